//! Scoring: answers in, the same rows out with what a model thinks of them.
//!
//! A model with a reward head reads answers as that head was trained: `reward` ends every answer with the end-of-text token and says so in
//! `head.json`, so that answers are ended here too, unless `--as-is` is given or the data say that an answer was cut off.
//!
//! `log_prob` is `Σ log p(token | what stands before it)` over the tokens of an answer, `tokens` the number of terms of that sum,
//! and `reward` the scalar head's score at the answer's last token, where the model has such a head. Rows with a list of answers
//! get lists, rows with `chosen` and `rejected` get `chosen_log_prob`, `rejected_log_prob` and so on.

mod best;
mod carried;
mod ending;

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Float64Builder, Int64Array, Int64Builder, ListBuilder, RecordBatch};
use arrow::datatypes::{Schema, SchemaRef};
use candle_core::Device;
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training, users};
use crate::bail;
use crate::data::answer_reader::AnswerReader;
use crate::data::batch::{Batch, TokenTree};
use crate::data::parquet::ParquetWriter;
use crate::data::schema::{self, AnswerLayout, AnsweredRows, Origin};
use crate::data::table::TableRows;
use crate::data::text_column::named;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::architecture::BeyondContext;
use crate::ops::{Arithmetic, Value};
use crate::sample::{parquet_output, say_chat_format};
use crate::settings::{
    CommonSettings, Flags, ModelSettings, NamedFolder, Program, Section, ShortFlag, UserSettings, short_help,
};
use crate::train::plan::{Plan, base_forms};
use crate::train::progress::Progress;

/// Scores answers: log-probability, number of tokens and, of a reward model, reward
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "score", version, mut_arg("output", parquet_output))]
pub struct ScoreSettings {
    /// The model that scores.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// The adapters that single rows are scored with.
    #[command(flatten)]
    #[serde(flatten)]
    pub users: UserSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of prompts with answers (columns prompt and completion, response, completions or responses;
    /// or chosen and rejected; or any layout of demonstrations)
    #[arg(long, value_name = "FILES")]
    pub data: String,
    /// Score the end-of-text token after each answer too, unless the answer ends with it already, or a column `ended`, as `sample` writes it, says that it was cut off
    /// [default: with a reward head that was trained so, as those of `reward` are]
    #[arg(long)]
    #[serde(default)]
    pub add_eos: bool,
    /// Score answers as they are, whatever the reward head was trained with
    #[arg(long, conflicts_with = "add_eos")]
    #[serde(default)]
    pub as_is: bool,
    /// Keep of each prompt's answers the one with the highest reward: a row a prompt, with the columns prompt and completion and the scores (best of n)
    #[arg(long)]
    #[serde(default)]
    pub best: bool,
    /// Put before the names of the new columns
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub prefix: String,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
}

impl Program for ScoreSettings {
    fn flags() -> Flags<Self> {
        Flags::new()
            .of(|score: &Self| &score.model, ModelSettings::flags())
            .of(|score: &Self| &score.users, UserSettings::flags())
            .always(&["data", "add_eos", "as_is", "best", "prefix"])
            .of(|score: &Self| &score.common, CommonSettings::flags())
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "Input and output",
                flags: &[
                    ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                    ShortFlag("data", "FILES", "Prompts with answers, such as sample writes"),
                    ShortFlag("output", "FILE", "Parquet file to write: all columns and scores"),
                    ShortFlag("best", "", "Keep of each prompt's answers the best"),
                    ShortFlag("as_is", "", "Score answers without adding an end"),
                    ShortFlag("add_eos", "", "Score the end-of-text token too"),
                ],
            },
            short_help::GENERAL,
        ]
    }
}

/// What a model thinks of an answer. Its numbers are finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Sum of the log-probabilities of its tokens, in nats; none for a model without an output matrix.
    pub log_prob: Option<f64>,
    /// Number of tokens in that sum. A text without prompt and BOS has one less than it has tokens: nothing predicts its first.
    pub tokens: usize,
    /// The scalar head's score at its last token; none for a model without such a head.
    pub reward: Option<f64>,
}

/// What came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScoreReport {
    /// Rows read and written.
    pub rows: usize,
    /// Answers scored.
    pub answers: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// What was too long.
    pub truncation: Truncation,
}

/// Runs the program: reads, scores, writes; a few rows at a time.
///
/// # Errors
/// Where settings, model or data cannot be used; then there is no output file.
pub fn run(settings: &ScoreSettings) -> Result<ScoreReport> {
    let common = &settings.common;
    let rows = TableRows::open(&settings.data)?;
    let row_count = rows.rows();
    let stored = check_columns(settings, &rows)?;
    let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
    let model = load(&settings.model, &settings.users.adapters, common)?;
    let stacks = users::stacks_of_rows(&settings.users, &settings.data)?;
    if settings.best && model.head().is_none() {
        bail!(
            "{}: this model gives no reward, by which --best chooses; give the output folder of `reward`",
            settings.model.model.display()
        );
    }
    if let Some(flag) = ending::given_flag(settings).filter(|_| !model.architecture().causal) {
        bail!("{flag} has no effect here: an encoder reads an answer as the second text of a pair; leave it out");
    }
    print_plan(settings, &model, row_count);
    let mut progress = Progress::new("score", row_count, common.quiet);
    let mut report = ScoreReport::default();
    let mut writer = None;
    let mut lengths = BeyondContext::of(model.architecture());
    let reader = answer_reader(&model, &tokenizer, common.max_length);
    let form = settings.best.then(|| best::form(&settings.data)).transpose()?;
    for answered in schema::answered(&settings.data)? {
        let answered = answered?;
        let stacks = &stacks[report.rows..][..answered.records.len()];
        let endings = ending::of_rows(settings, &model, &answered, stacks)?;
        let trees: Vec<TokenTree> = (answered.records.iter().zip(endings))
            .map(|(record, endings)| {
                let mut tree = reader.answered(record, |answer| endings[answer], &mut report.truncation)?;
                if reader.is_encoder {
                    tree.answers.iter_mut().for_each(|answer| answer.learned.fill(true));
                }
                Ok(tree)
            })
            .collect::<Result<_>>()?;
        for tree in &trees {
            tree.answers.iter().for_each(|answer| lengths.add(tree.prompt.len() + answer.tokens.len()));
        }
        let done = |tree: &TokenTree| progress.advance(None, tree.tokens());
        let origins = answered.records.iter().map(|record| &record.origin).collect();
        let rows = AnswerTrees { trees: &trees, stacks, origins };
        let scores = scores(&model, &rows, common.tokens_per_batch, done)?;
        report.rows += scores.len();
        report.answers += scores.iter().map(Vec::len).sum::<usize>();
        report.tokens += scores.iter().flatten().map(|score| score.tokens).sum::<usize>();
        let batch = match &form {
            Some(form) => best::best_rows(&answered, form, &scores, &settings.prefix)?,
            None => with_scores(&answered, &stored, &scores, &settings.prefix)?,
        };
        let writer = match &mut writer {
            Some(writer) => writer,
            empty => empty.insert(ParquetWriter::create(&common.output, batch.schema())?),
        };
        writer.write(&batch)?;
    }
    if let Some(writer) = writer {
        writer.finish()?;
    }
    progress.finish();
    if !common.quiet {
        say(&report, settings);
        say_chat_format(&tokenizer);
    }
    if let Some(warning) = lengths.warning() {
        eprintln!("warning: {warning}");
    }
    Ok(report)
}

/// An encoder reads prompt and answer as `reward` trains it, and no more than it has positions.
fn answer_reader<'t>(model: &Model, tokenizer: &'t Tokenizer, max_length: usize) -> AnswerReader<'t> {
    let architecture = model.architecture();
    let is_encoder = !architecture.causal;
    let longest = architecture.longest().filter(|_| is_encoder).unwrap_or(usize::MAX);
    AnswerReader { tokenizer, is_encoder, max_length: max_length.min(longest) }
}

fn print_plan(settings: &ScoreSettings, model: &Model, rows: usize) {
    let gives = match (model.has_output_matrix(), model.head().is_some()) {
        (true, true) => "log_prob, tokens, reward",
        (true, false) => "log_prob, tokens",
        (false, _) => "tokens, reward (log_prob stays empty: a classifier without an output matrix)",
    };
    Plan::new("score")
        .line("model", settings.model.model.display())
        .line("rows", rows)
        .line("scores", gives)
        .optional_line("base kept in", base_forms(model))
        .line("products", Arithmetic::current())
        .line("answers end", ending::described(settings, model))
        .line("at most", format!("{} tokens a text (--max-length)", settings.common.max_length))
        .print(settings.common.quiet);
}

fn say(report: &ScoreReport, settings: &ScoreSettings) {
    eprintln!(
        "{} answers of {} tokens in {} rows scored: {}",
        report.answers,
        report.tokens,
        report.rows,
        settings.common.output.display()
    );
    if let Some(cuts) = report.truncation.cuts(settings.common.max_length) {
        eprintln!("{cuts}");
    }
    report.truncation.chats.remarks("").iter().for_each(|(_, text)| eprintln!("{text}"));
}

/// A frozen model, with its scalar head where it has one, and the adapters of users on top of it.
fn load(settings: &ModelSettings, users: &[NamedFolder], common: &CommonSettings) -> Result<Model> {
    let role = Role {
        folder: &settings.model,
        adapters: &settings.adapter,
        training: Training::Frozen,
        head: Head::AsFound,
        seed: common.seed,
    };
    Bases::of(common, Device::Cpu).load_with_users(&role, users)
}

/// The schema of all files, as the output has one: refuses files that differ, and columns that are there already.
fn check_columns(settings: &ScoreSettings, rows: &TableRows) -> Result<SchemaRef> {
    let Some((first_file, first)) = rows.schemas().first() else { return Ok(Arc::new(Schema::empty())) };
    for (file, schema) in rows.schemas() {
        if schema.fields() != first.fields() {
            bail!(
                "{}: its columns are not those of {}; score each file by itself",
                file.display(),
                first_file.display()
            );
        }
        let layouts = [AnswerLayout::One, AnswerLayout::Pair];
        for name in layouts.into_iter().flat_map(|layout| new_columns(layout, &settings.prefix)) {
            if schema.field_with_name(&name).is_ok() {
                bail!(
                    "{}: there is a column `{name}` already; name the new columns otherwise with --prefix, as in --prefix other_",
                    file.display()
                );
            }
        }
    }
    Ok(first.clone())
}

/// Names of the columns that hold answer 0's log-probability, tokens and reward, then answer 1's.
fn new_columns(layout: AnswerLayout, prefix: &str) -> Vec<String> {
    let answers: &[&str] = if layout == AnswerLayout::Pair { &["chosen_", "rejected_"] } else { &[""] };
    let scores = ["log_prob", "tokens", "reward"];
    answers.iter().flat_map(|answer| scores.map(|score| format!("{prefix}{answer}{score}"))).collect()
}

/// Prompts with answers to look at.
#[derive(Debug, Clone)]
pub struct AnswerTrees<'a> {
    /// Prompts and answers as tokens.
    pub trees: &'a [TokenTree],
    /// Of each tree the stack of adapters that it runs with; 0 is the model's own.
    pub stacks: &'a [usize],
    /// Of each tree the row that it was made of, by which errors name it.
    pub origins: Vec<&'a Origin>,
}

impl AnswerTrees<'_> {
    /// Refuses a number that is none, by its row.
    fn check(&self, model: &Model, what: &str, values: &[Vec<f64>]) -> Result<()> {
        for (origin, values) in self.origins.iter().zip(values) {
            if let Some(answer) = values.iter().position(|value| !value.is_finite()) {
                bail!(
                    "{origin}: the {what} of answer {answer} (counted from 0) by {} is {}, not a finite number; the model's weights are damaged or overflow, look for NaN in them",
                    model.folder().name(),
                    values[answer]
                );
            }
        }
        Ok(())
    }
}

/// The scores of every answer of every tree; `done` is told of each tree as it is finished.
///
/// # Errors
/// Where the model gives a log-probability or a reward that is not finite; the error names the row.
pub fn scores(
    model: &Model,
    answers: &AnswerTrees,
    tokens_per_batch: usize,
    done: impl FnMut(&TokenTree),
) -> Result<Vec<Vec<Score>>> {
    let found = over_batches(model, answers, tokens_per_batch, done, |batch| {
        let hidden = model.hidden(batch, &Pass::default())?; // [tokens, d_model]
        let log_probs = log_probs(model, &hidden, batch, 1.0)?;
        let rewards = rewards(model, &hidden, batch)?;
        let score = |(answer, targets): (usize, &Range<usize>)| Score {
            log_prob: log_probs.as_ref().map(|all| sum(&all[targets.clone()])),
            tokens: targets.len(),
            reward: rewards.as_ref().map(|all| f64::from(all[answer])),
        };
        Ok(batch.answer_targets.iter().enumerate().map(score).collect())
    })?;
    let of = |value: fn(&Score) -> Option<f64>| -> Vec<Vec<f64>> {
        found.iter().map(|scores| scores.iter().map(|score| value(score).unwrap_or(0.0)).collect()).collect()
    };
    answers.check(model, "log-probability", &of(|score| score.log_prob))?;
    answers.check(model, "reward", &of(|score| score.reward))?;
    Ok(found)
}

/// The log-probability of every answer of every tree at a temperature, under a model with an output matrix.
///
/// # Errors
/// As [`scores`].
pub(crate) fn answer_log_probs(
    model: &Model,
    answers: &AnswerTrees,
    temperature: f64,
    tokens_per_batch: usize,
    done: impl FnMut(&TokenTree),
) -> Result<Vec<Vec<f64>>> {
    let found = over_batches(model, answers, tokens_per_batch, done, |batch| {
        let hidden = model.hidden(batch, &Pass::default())?; // [tokens, d_model]
        let all = log_probs(model, &hidden, batch, temperature)?.unwrap_or_default();
        Ok(batch.answer_targets.iter().map(|targets| sum(&all[targets.clone()])).collect())
    })?;
    answers.check(model, "log-probability", &found)?;
    Ok(found)
}

fn sum(log_probs: &[f32]) -> f64 {
    log_probs.iter().map(|&x| f64::from(x)).sum()
}

/// Packs the trees into batches, reads one value an answer from each, and gives each tree its own.
fn over_batches<T>(
    model: &Model,
    answers: &AnswerTrees,
    tokens_per_batch: usize,
    mut done: impl FnMut(&TokenTree),
    read: impl Fn(&Batch) -> Result<Vec<T>>,
) -> Result<Vec<Vec<T>>> {
    let (trees, stacks) = (answers.trees, answers.stacks);
    let mut all = Vec::with_capacity(trees.len());
    for range in model.passes_of_stacks(trees.iter().zip(stacks.iter().copied()), tokens_per_batch) {
        let both = trees[range.clone()].iter().zip(stacks[range.clone()].iter().copied());
        let batch = model.pack_stacks(both);
        let mut values = read(&batch)?.into_iter();
        all.extend(batch.trees.iter().map(|answers| values.by_ref().take(answers.len()).collect::<Vec<T>>()));
        trees[range].iter().for_each(&mut done);
    }
    Ok(all)
}

/// One log-probability a target, `[targets]`.
fn log_probs(model: &Model, hidden: &Value, batch: &Batch, temperature: f64) -> Result<Option<Vec<f32>>> {
    if !model.has_output_matrix() {
        return Ok(None);
    }
    if batch.targets.is_empty() {
        return Ok(Some(Vec::new()));
    }
    Ok(Some(model.log_probs(hidden, batch, temperature)?.log_probs.to_vec1()?))
}

/// One reward an answer, `[answers]`.
fn rewards(model: &Model, hidden: &Value, batch: &Batch) -> Result<Option<Vec<f32>>> {
    match model.head() {
        Some(_) => Ok(Some(model.rewards(hidden, batch)?.to_vec1()?)),
        None => Ok(None),
    }
}

/// The rows with the columns of their file, whose schema is `stored`, and the new columns after them.
fn with_scores(
    answered: &AnsweredRows,
    stored: &SchemaRef,
    scores: &[Vec<Score>],
    prefix: &str,
) -> Result<RecordBatch> {
    let new: Vec<ArrayRef> = match answered.layout {
        AnswerLayout::List => list_columns(scores),
        AnswerLayout::One => flat_columns(scores, 0),
        AnswerLayout::Pair => flat_columns(scores, 0).into_iter().chain(flat_columns(scores, 1)).collect(),
    };
    let has_reward = scores.iter().flatten().any(|score| score.reward.is_some());
    let new = new_columns(answered.layout, prefix).into_iter().zip(new);
    let new = new.filter(|(name, _)| has_reward || !name.ends_with("reward"));
    carried::with_columns(&answered.rows, stored, new.map(|(name, column)| named(&name, column)).collect())
}

/// Columns of numbers: the scores of the answer of this index in every row.
fn flat_columns(scores: &[Vec<Score>], answer: usize) -> Vec<ArrayRef> {
    let scores = || scores.iter().map(|row| &row[answer]);
    vec![
        Arc::new(scores().map(|score| score.log_prob).collect::<Float64Array>()),
        Arc::new(scores().map(|score| Some(score.tokens as i64)).collect::<Int64Array>()),
        Arc::new(scores().map(|score| score.reward).collect::<Float64Array>()),
    ]
}

/// Columns of lists of numbers: the scores of all answers in every row.
fn list_columns(scores: &[Vec<Score>]) -> Vec<ArrayRef> {
    let mut log_probs = ListBuilder::new(Float64Builder::new());
    let mut tokens = ListBuilder::new(Int64Builder::new());
    let mut rewards = ListBuilder::new(Float64Builder::new());
    for row in scores {
        log_probs.append_value(row.iter().map(|score| score.log_prob));
        tokens.append_value(row.iter().map(|score| Some(score.tokens as i64)));
        rewards.append_value(row.iter().map(|score| score.reward));
    }
    vec![Arc::new(log_probs.finish()), Arc::new(tokens.finish()), Arc::new(rewards.finish())]
}

#[cfg(test)]
pub(crate) mod tests;
