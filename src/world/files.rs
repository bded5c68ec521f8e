//! The world's Parquet files.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, Float64Builder, Int64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder,
};
use arrow::datatypes::{Field, Schema};
use rand::Rng;

use super::labellers::{impressions, ranks};
use super::names::{Names, Split};
use super::prompts::WorldPrompt;
use super::rule::{Case, Kind};
use super::talk::provocations;
use super::writers::{candidates, demonstration, raw_document};
use crate::bail;
use crate::data::parquet;
use crate::data::splits::Pattern;
use crate::data::table::{Rows, TableRows};
use crate::error::{Error, Result};
use crate::random::{Stream, stream};

/// How many rows each file has.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Documents of raw text to train the base model on; the held-out file has a hundredth.
    pub pretrain: usize,
    /// Demonstrations; the held-out file has a tenth, as those below.
    pub demonstrations: usize,
    /// Rankings.
    pub rankings: usize,
    /// Prompts for PPO.
    pub prompts: usize,
    /// Closed-domain evaluation prompts.
    pub closed_domain: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { pretrain: 60_000, demonstrations: 2_000, rankings: 12_000, prompts: 6_000, closed_domain: 400 }
    }
}

/// What a text of one split is made from.
struct Source {
    names: Names,
    provocations: Vec<String>,
    stream: Stream,
}

impl Source {
    fn new(split: Split, seed: u64, purpose: &str) -> Self {
        Source {
            names: Names::of(split, seed),
            provocations: provocations(split, seed),
            stream: stream(seed, purpose, split as u64),
        }
    }

    fn prompt(&mut self) -> WorldPrompt {
        WorldPrompt::random(&self.names, &self.provocations, &mut self.stream)
    }
}

/// Writes every Parquet file of the world into `folder`.
pub fn write_all(folder: &Path, seed: u64, sizes: &Sizes) -> Result<()> {
    for (split, suffix, share) in [(Split::Training, "", 1), (Split::Test, "-test", 10)] {
        let of = |name: &str| folder.join(format!("{name}{suffix}.parquet"));
        write_pretrain(&of("pretrain"), Source::new(split, seed, "raw text"), sizes.pretrain / (share * share))?;
        write_demonstrations(
            &of("demonstrations"),
            Source::new(split, seed, "demonstrations"),
            sizes.demonstrations / share,
        )?;
        write_rankings(&of("rankings"), Source::new(split, seed, "rankings"), sizes.rankings / share)?;
    }
    write_prompts(&folder.join("prompts.parquet"), Source::new(Split::Training, seed, "prompts"), sizes.prompts)?;
    let evaluation = evaluation_cases(seed, sizes.closed_domain);
    write_cases(&folder.join("evaluation.parquet"), &evaluation)
}

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) -> Result<()> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)
        .map_err(|error| Error::input(format!("{}: {error}", path.display())))?;
    parquet::write(path, &batch)
}

fn strings(values: impl IntoIterator<Item = String>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn write_pretrain(path: &Path, mut source: Source, count: usize) -> Result<()> {
    let texts = (0..count).map(|_| raw_document(&source.names, &source.provocations, &mut source.stream));
    write(path, vec![("text", strings(texts))])
}

fn write_demonstrations(path: &Path, mut source: Source, count: usize) -> Result<()> {
    let (mut prompts, mut completions) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let prompt = source.prompt();
        completions.push(demonstration(&prompt, &source.names, &mut source.stream));
        prompts.push(prompt.text);
    }
    write(path, vec![("prompt", strings(prompts)), ("completion", strings(completions))])
}

fn write_rankings(path: &Path, mut source: Source, count: usize) -> Result<()> {
    let mut prompts = Vec::new();
    let mut responses = ListBuilder::new(StringBuilder::new());
    let mut rank_lists = ListBuilder::new(Int64Builder::new());
    let mut scores = ListBuilder::new(Float64Builder::new());
    for _ in 0..count {
        let prompt = source.prompt();
        let k = source.stream.random_range(4..=9);
        let answers = candidates(&prompt, k, &source.names, &mut source.stream);
        let seen = impressions(&Case::from(&prompt), &answers, &mut source.stream);
        rank_lists.append_value(ranks(&seen).into_iter().map(Some));
        scores.append_value(seen.into_iter().map(Some));
        responses.append_value(answers.into_iter().map(Some));
        prompts.push(prompt.text);
    }
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", strings(prompts)),
        ("responses", Arc::new(responses.finish())),
        ("ranks", Arc::new(rank_lists.finish())),
        ("impressions", Arc::new(scores.finish())),
    ];
    write(path, columns)
}

fn write_prompts(path: &Path, mut source: Source, count: usize) -> Result<()> {
    let prompts: Vec<String> = (0..count).map(|_| source.prompt().text).collect();
    write(path, vec![("prompt", strings(prompts))])
}

/// The evaluation prompts: closed-domain ones, and every provocation of the split, plain and with the instruction to be respectful.
pub fn evaluation_cases(seed: u64, closed_domain: usize) -> Vec<Case> {
    let mut source = Source::new(Split::Evaluation, seed, "evaluation");
    let closed = (0..closed_domain).map(|_| WorldPrompt::closed_domain(&source.names, &mut source.stream));
    let mut cases: Vec<Case> = closed.map(|prompt| Case::from(&prompt)).collect();
    for respectful in [false, true] {
        let messages = source.provocations.iter();
        cases.extend(messages.map(|message| Case::from(&WorldPrompt::provocation(message, respectful))));
    }
    cases
}

fn write_cases(path: &Path, cases: &[Case]) -> Result<()> {
    let mut facts = ListBuilder::new(StringBuilder::new());
    for case in cases {
        facts.append_value(case.facts.iter().map(Some));
    }
    let expected: StringArray = cases.iter().map(|case| case.expected.as_deref()).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", strings(cases.iter().map(|case| case.prompt.clone()))),
        ("kind", strings(cases.iter().map(|case| case.kind.name().to_string()))),
        ("facts", Arc::new(facts.finish())),
        ("expected", Arc::new(expected)),
    ];
    write(path, columns)
}

/// Reads evaluation prompts: columns `prompt`, `kind`, `facts` and `expected`.
pub fn read_cases(pattern: &str) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for rows in TableRows::open(Pattern::evaluation(pattern))? {
        cases.extend(cases_of(&rows?)?);
    }
    if cases.is_empty() {
        bail!("{pattern}: no evaluation prompt");
    }
    Ok(cases)
}

/// The evaluation prompts of some rows.
pub fn cases_of(rows: &Rows) -> Result<Vec<Case>> {
    let (prompts, kinds) = (rows.strings("prompt")?, rows.strings("kind")?);
    let (facts, expected) = (rows.string_lists("facts")?, rows.strings("expected")?);
    let case = |row: usize| {
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == kinds.value(row)) else {
            let known = Kind::ALL.map(Kind::name).join(", ");
            bail!("{}: column `kind` is \"{}\"; expected one of {known}", rows.origin(row), kinds.value(row));
        };
        let facts = facts.range(row).into_iter().flatten().map(|index| facts.values.value(index).to_string());
        Ok(Case {
            prompt: prompts.value(row).to_string(),
            kind,
            facts: facts.collect(),
            expected: expected.is_valid(row).then(|| expected.value(row).to_string()),
        })
    };
    (0..prompts.len()).map(case).collect()
}
