//! Perplexity of held-out text: how much of what a model knew it has forgotten, part of the alignment tax (Ouyang et al. 2022, section 4.2; Askell et al. 2021).
//!
//! Over all texts together, with the natural logarithm: mean negative log-likelihood `-Σ log p(token | what stands before it) / tokens` in nats a token, perplexity
//! `exp` of it (Jelinek et al. 1977), and bits per byte `-Σ log p / (ln 2 · bytes)` over the bytes that these tokens stand for (Gao et al. 2020, "The Pile", section 3.1), the only one
//! of the three that can be compared between models of different tokenizers.

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use super::answering::{note_chats, warn_of_lengths};
use super::journal::Journal;
use super::section::{Section, number};
use crate::bail;
use crate::bootstrap::{self, Cluster, Estimate};
use crate::data::batch::TokenTree;
use crate::data::schema::{self, Demonstration};
use crate::data::splits::Pattern;
use crate::data::tokenize_records::{HeldOut, Truncation};
use crate::error::Result;
use crate::random;
use crate::sample;
use crate::score::{self, AnswerTrees};
use crate::settings::{CommonSettings, ModelSettings, NamedFolder};
use crate::train::progress::Progress;
use crate::train::table::Table;

const HEADING: &str = "Capability kept";

/// Which texts.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct PerplexitySettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of held-out text whose perplexity under each model is measured: column text, or prompt and completion, of which the completion counts, or
    /// any other layout of demonstrations
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub perplexity: Option<String>,
}

/// Reads the texts.
pub fn read(pattern: &str) -> Result<Vec<Demonstration>> {
    let texts: Vec<Demonstration> = schema::demonstrations(Pattern::evaluation(pattern))?.collect::<Result<_>>()?;
    if texts.is_empty() {
        bail!("--perplexity {pattern}: there is no row; expected text to be measured");
    }
    Ok(texts)
}

/// What a model makes of one text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Measured {
    /// `-Σ log p` of the predicted tokens.
    nats: f64,
    /// How many these are; none where there is nothing to predict or nothing to predict it from.
    tokens: usize,
    /// The bytes that they stand for.
    bytes: usize,
    /// Tokens that were too many.
    left_out: usize,
    /// Tokens of the prompt that were too many.
    prompt_left_out: usize,
}

impl Measured {
    /// Whether the same bytes are predicted from the same ones before them.
    fn predicts_as(&self, other: &Measured) -> bool {
        let whole = |text: &Measured| text.left_out == 0 && text.prompt_left_out == 0;
        self.bytes == other.bytes && (self.tokens == other.tokens || whole(self) && whole(other))
    }
}

/// What a model makes of all texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct OfModel {
    texts: Vec<Measured>,
    /// The hash of the tokens: numbers a token can be compared between models that read the same ones.
    tokens: u64,
}

fn measure(
    model: &NamedFolder,
    texts: &[Demonstration],
    common: &CommonSettings,
    progress: &mut Progress,
) -> Result<OfModel> {
    let folder = ModelSettings { model: model.folder.clone(), adapter: Vec::new() };
    let (name, (model, tokenizer)) = (&model.name, sample::load(&folder, &[], common)?);
    let longest = model.architecture().longest().unwrap_or(usize::MAX).min(common.max_length);
    let mut truncation = Truncation::default();
    let read = texts.iter().map(|text| tokenizer.held_out(text, longest, &mut truncation));
    let read = read.collect::<Result<Vec<HeldOut>>>()?;
    note_chats(&truncation, &tokenizer, progress);
    warn_of_lengths(name, &model, read.iter().map(|text| text.tree.longest()));
    let mut hash = Xxh3::new();
    for token in read.iter().flat_map(|text| text.tree.prompt.iter().chain(&text.tree.answers[0].tokens)) {
        hash.update(&token.to_le_bytes());
    }
    let is_measured = |text: &HeldOut| text.tree.learned_tokens() > 0;
    let trees: Vec<TokenTree> = read.iter().filter(|text| is_measured(text)).map(|text| text.tree.clone()).collect();
    let origins = texts.iter().zip(&read).filter(|(_, text)| is_measured(text)).map(|(text, _)| &text.origin).collect();
    let answers = AnswerTrees { trees: &trees, stacks: &vec![0; trees.len()], origins };
    let scores = score::scores(&model.frozen()?, &answers, common.tokens_per_batch, |tree| {
        progress.advance(None, tree.tokens())
    })?;
    let mut scores = scores.into_iter();
    let measured = |text: &HeldOut| {
        let mut found =
            Measured { left_out: text.left_out, prompt_left_out: text.prompt_left_out, ..Default::default() };
        let score = if is_measured(text) { scores.next().and_then(|of_text| of_text.into_iter().next()) } else { None };
        if let Some((score, log_prob)) = score.and_then(|score| Some((score, score.log_prob?))) {
            (found.nats, found.tokens, found.bytes) = (-log_prob, score.tokens, text.bytes);
        }
        found
    };
    Ok(OfModel { texts: read.iter().map(measured).collect(), tokens: hash.digest() })
}

/// A mean over texts, as the ratio of two sums.
type Ratio = fn(&Measured) -> Cluster;

const PER_TOKEN: Ratio = |text| Cluster { sum: text.nats, count: text.tokens as f64 };
const PER_BYTE: Ratio = |text| Cluster { sum: text.nats / std::f64::consts::LN_2, count: text.bytes as f64 };

impl OfModel {
    fn clusters(&self, ratio: Ratio) -> Vec<Cluster> {
        self.texts.iter().map(ratio).collect()
    }

    /// The texts of which both models predict the same, for two tokenizers cut a long text at different places.
    fn paired(&self, base: &OfModel, ratio: Ratio) -> (Vec<Cluster>, Vec<Cluster>) {
        self.texts
            .iter()
            .zip(&base.texts)
            .filter(|(text, of_base)| text.predicts_as(of_base))
            .map(|(text, of_base)| (ratio(text), ratio(of_base)))
            .unzip()
    }

    fn sum(&self, of: fn(&Measured) -> usize) -> usize {
        self.texts.iter().map(of).sum()
    }

    fn json(&self, [nats, perplexity, bits]: [Option<Estimate>; 3]) -> Map<String, Value> {
        let all = json!({
            "nats_per_token": nats, "perplexity": perplexity, "bits_per_byte": bits,
            "texts": self.texts.iter().filter(|text| text.tokens > 0).count(),
            "tokens": self.sum(|text| text.tokens), "bytes": self.sum(|text| text.bytes),
            "texts_cut": self.texts.iter().filter(|text| text.left_out > 0).count(),
            "tokens_left_out": self.sum(|text| text.left_out),
            "prompt_tokens_left_out": self.sum(|text| text.prompt_left_out),
            "nats": self.texts.iter().map(|text| text.nats).collect::<Vec<_>>(),
        });
        all.as_object().cloned().unwrap_or_default()
    }
}

/// The exponential of a mean and of the ends of its interval: a quantile of what is drawn stays one.
fn exp(estimate: Option<Estimate>) -> Option<Estimate> {
    estimate.map(|Estimate { value, low, high }| Estimate { value: value.exp(), low: low.exp(), high: high.exp() })
}

/// Perplexity under every model, and the change against the base model.
pub fn section(
    (settings, texts): (&PerplexitySettings, &[Demonstration]),
    (models, base): (&[NamedFolder], usize),
    common: &CommonSettings,
    (resamples, seed): (usize, u64),
    journal: &Journal,
) -> Result<Section> {
    let mut progress = Progress::new("perplexity", texts.len() * models.len(), common.quiet);
    let mut measured = Vec::new();
    for (number, model) in models.iter().enumerate() {
        let found: OfModel =
            journal.piece(&format!("perplexity-{number}"), &texts, || measure(model, texts, common, &mut progress))?;
        if found.sum(|text| text.tokens) == 0 {
            bail!(
                "--perplexity {}: no text has a token that {} could predict; expected text in the column text or completion",
                settings.perplexity.as_deref().unwrap_or_default(),
                model.name
            );
        }
        measured.push(found);
    }
    progress.finish();
    // The same texts are drawn for every model.
    let stream = || random::stream(seed, "bootstrap of perplexity", 0);
    let mut table = Table::new(["model", "texts", "tokens", "nats per token", "perplexity", "bits per byte"]);
    let mut changes = Table::new(["model", "nats per token", "perplexity, times", "bits per byte"]);
    let mut json = Map::new();
    let of_base = &measured[base];
    for (number_of_model, (model, found)) in models.iter().zip(&measured).enumerate() {
        let estimate = |ratio: Ratio| bootstrap::rate(&found.clusters(ratio), resamples, &mut stream());
        let (nats, bits) = (estimate(PER_TOKEN), estimate(PER_BYTE));
        let mut of_model = found.json([nats, exp(nats), bits]);
        let counts = [of_model["texts"].to_string(), of_model["tokens"].to_string()];
        table.row(std::iter::once(model.name.clone()).chain(counts).chain([nats, exp(nats), bits].map(number)));
        if number_of_model != base {
            let change = |ratio: Ratio| {
                let (of_model, of_base) = found.paired(of_base, ratio);
                bootstrap::change(&of_model, &of_base, resamples, &mut stream())
            };
            let bits = change(PER_BYTE);
            let nats = if found.tokens == of_base.tokens { change(PER_TOKEN) } else { None };
            changes.row(std::iter::once(model.name.clone()).chain([signed(nats), number(exp(nats)), signed(bits)]));
            let change = json!({"nats_per_token": nats, "perplexity_ratio": exp(nats), "bits_per_byte": bits});
            of_model.insert("change_from_base".to_string(), change);
        }
        json.insert(model.name.clone(), of_model.into());
    }
    let mut tables = vec![("95% bootstrap intervals over texts in brackets".to_string(), table)];
    if models.len() > 1 {
        tables.push((format!("Change against {}, over the same texts", models[base].name), changes));
    }
    Ok(Section::new(
        "perplexity",
        "Perplexity of held-out text",
        notes(settings, models, &measured, common),
        tables,
        json,
    ))
}

/// A change with its interval, in a table.
fn signed(estimate: Option<Estimate>) -> String {
    estimate.map_or(String::new(), |Estimate { value, low, high }| format!("{value:+.3} [{low:+.3}, {high:+.3}]"))
}

fn notes(
    settings: &PerplexitySettings,
    models: &[NamedFolder],
    measured: &[OfModel],
    common: &CommonSettings,
) -> Vec<String> {
    let mut notes = vec![format!(
        "{} texts of {}. Perplexity is exp of the mean negative log-likelihood of a token; bits per byte, the same for a byte, can be compared between models of different tokenizers.",
        measured[0].texts.len(),
        settings.perplexity.as_deref().unwrap_or_default()
    )];
    if measured.iter().any(|of_model| of_model.tokens != measured[0].tokens) {
        notes.push(
            "The models do not all read the same tokens: between those that do not, compare bits per byte alone. Its change is over the texts of which both predict the same bytes."
                .to_string(),
        );
    }
    for (model, found) in models.iter().zip(measured) {
        let (cut, left_out) =
            (found.texts.iter().filter(|text| text.left_out > 0).count(), found.sum(|text| text.left_out));
        let prompts = found.sum(|text| text.prompt_left_out);
        if cut + prompts > 0 {
            notes.push(format!(
                "{} reads at most --max-length {} tokens of a text, or as many as it has positions: {cut} texts count with their beginning alone, {left_out} tokens of their ends and {prompts} of the starts of prompts are left out.",
                model.name, common.max_length
            ));
        }
        let unread = found.texts.iter().filter(|text| text.tokens == 0).count();
        if unread > 0 {
            notes.push(format!("{} can predict nothing of {unread} texts, which are left out.", model.name));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, RecordBatch, StringArray};

    use super::*;
    use crate::data::parquet;
    use crate::score::tests::{random_model, random_model_in};
    use crate::settings::from_arguments;

    const TEXTS: [(&str, &str); 4] =
        [("", "Vubek keeps a hen."), ("Who?", " Vubek does."), ("", ""), ("", "Grüße: 你好 🙂, and so on and on.")];

    /// Perplexity of these texts under two models, of which the second finds every token as probable as every other.
    fn measured(folder: &Path, more: &[&str]) -> Section {
        random_model(folder, false);
        random_model_in(folder.join("uniform"), false, 0.0, 5);
        let column = |of: fn(&(&str, &'static str)) -> &'static str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(TEXTS.iter().map(of)))
        };
        let prompts: ArrayRef = Arc::new(StringArray::from_iter_values(TEXTS.iter().map(|(prompt, _)| prompt)));
        let columns = [("prompt", prompts), ("completion", column(|(_, completion)| completion))];
        let file = folder.join("held_out.parquet");
        parquet::write(&file, &RecordBatch::try_from_iter(columns).unwrap()).unwrap();
        let own = |text: &str| text.replace("FOLDER", folder.to_str().unwrap());
        let arguments =
            ["--models", "first=FOLDER/model", "uniform=FOLDER/uniform", "--perplexity", "FOLDER/held_out.parquet"];
        let arguments = arguments.iter().chain(&["--output", "FOLDER/report", "--quiet"]).chain(more);
        let settings: crate::evaluate::EvaluateSettings = from_arguments(arguments.map(|text| own(text))).unwrap();
        let sections = crate::evaluate::evaluate(&settings).unwrap().sections;
        sections.into_iter().find(|section| section.key == "perplexity").unwrap()
    }

    #[test]
    fn models_are_compared_over_texts_of_which_they_predict_the_same() {
        let of = |texts: &[(usize, usize, usize)]| {
            let text = |&(tokens, bytes, left_out)| Measured { nats: 1.0, tokens, bytes, left_out, prompt_left_out: 0 };
            OfModel { texts: texts.iter().map(text).collect(), tokens: 0 }
        };
        let model = of(&[(5, 10, 0), (4, 8, 3), (4, 8, 3), (3, 9, 0)]);
        // Whole in other tokens; cut at the same place; cut in other tokens; another number of bytes.
        let base = of(&[(7, 10, 0), (4, 8, 3), (6, 8, 1), (3, 8, 0)]);
        let (of_model, of_base) = model.paired(&base, PER_TOKEN);
        let tokens = |clusters: &[Cluster]| clusters.iter().map(|cluster| cluster.count).collect::<Vec<_>>();
        assert_eq!((tokens(&of_model), tokens(&of_base)), (vec![5.0, 4.0], vec![7.0, 4.0]));
    }

    #[test]
    fn a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() {
        let folder = tempfile::tempdir().unwrap();
        let section = measured(folder.path(), &[]);
        let found = &section.json["uniform"];
        let number = |key: &str| found[key]["value"].as_f64().unwrap();
        let tokens = found["tokens"].as_f64().unwrap();
        assert!((number("perplexity") - 280.0).abs() < 1e-2, "{found}");
        // A token begins each text, so that all of them is predicted.
        let bytes: usize = TEXTS.iter().map(|(_, completion)| completion.len()).sum();
        assert_eq!(found["bytes"], bytes);
        let bits = tokens * 280f64.log2() / bytes as f64;
        assert!((number("bits_per_byte") - bits).abs() < 1e-4 * bits, "{found}");
        // The empty text counts for nothing, and the note says so.
        assert_eq!(found["texts"], 3);
        assert!(section.notes.iter().any(|note| note.contains("nothing of 1 texts")), "{:?}", section.notes);
    }

    #[test]
    fn a_change_is_the_difference_of_the_models_on_the_same_texts() {
        let folder = tempfile::tempdir().unwrap();
        let section = measured(folder.path(), &[]);
        let (first, uniform) = (&section.json["first"], &section.json["uniform"]);
        let change = &uniform["change_from_base"];
        for key in ["nats_per_token", "bits_per_byte"] {
            let difference = uniform[key]["value"].as_f64().unwrap() - first[key]["value"].as_f64().unwrap();
            assert!((change[key]["value"].as_f64().unwrap() - difference).abs() < 1e-9 && difference < -0.1, "{key}");
        }
        assert!(first.get("change_from_base").is_none());
        assert_eq!(section.tables.len(), 2);
    }

    #[test]
    fn a_text_that_is_too_long_counts_with_its_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let whole = measured(folder.path(), &[]);
        let cut = measured(folder.path(), &["--max-length", "8"]);
        let (whole, found) = (&whole.json["uniform"], &cut.json["uniform"]);
        let number = |of: &Value, key: &str| of[key].as_u64().unwrap();
        assert_eq!(number(found, "tokens") + number(found, "tokens_left_out"), number(whole, "tokens"));
        assert!(number(found, "bytes") < number(whole, "bytes") && number(found, "texts_cut") > 0);
        assert!(cut.notes.iter().any(|note| note.contains("--max-length 8")), "{:?}", cut.notes);
    }
}
