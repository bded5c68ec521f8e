//! HaluEval-style recognition: does a model itself see that an answer is made up (Li et al. 2023)?
//!
//! The model reads the question, what is known, and one of the answers, and its log-probabilities of "Yes" and "No" decide. Of a right and a hallucinated answer to a
//! question, one is shown, by seed.

use arrow::array::Array;
use clap::Args;
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::choices::{self, Found};
use super::cuts::Cuts;
use super::journal::Journal;
use super::metrics::agreement::{Scored, accuracy, balanced_accuracy, roc_auc};
use super::section::{Section, number, share};
use crate::bail;
use crate::bootstrap;
use crate::data::schema::{Answered, Text};
use crate::data::splits::Pattern;
use crate::data::table::{Rows, TableRows};
use crate::error::Result;
use crate::random::{self, Stream};
use crate::settings::{CommonSettings, Flags, NamedFolder};
use crate::train::progress::Progress;
use crate::train::table::Table;

const HEADING: &str = "Open-domain hallucination";

/// Which answers, and how the model is asked about them.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct RecognitionSettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of answers that a model is to recognise as hallucinated or not: columns question, right_answer and hallucinated_answer, of which
    /// one is shown by seed, or question (or user_query), response (or chatgpt_response) and hallucination (yes or no); optional knowledge
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub recognition: Option<String>,
    /// How a model is asked; " Yes" and " No" follow
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "TEXT",
        default_value = "{knowledge}\\nQuestion: {question}\\nAnswer: {answer}\\nIs anything in this answer made up, Yes or No?"
    )]
    pub recognition_template: String,
}

impl RecognitionSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        let of = &["recognition_template"];
        Flags::new()
            .always(&["recognition"])
            .only("with --recognition", of, |settings: &Self| settings.recognition.is_some())
    }
}

/// An answer that is hallucinated or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// What the model reads, with its two replies.
    pub asked: Answered,
    /// Whether people say that the answer is hallucinated.
    pub is_hallucinated: bool,
}

/// Reads the answers, and chooses by seed which of two is shown.
pub fn read(pattern: &str, template: &str, seed: u64) -> Result<Vec<Shown>> {
    let template = template.replace("\\n", "\n");
    if !template.contains("{answer}") {
        bail!("--recognition-template \"{template}\": there is no {{answer}} in it");
    }
    let mut stream = random::stream(seed, "answers to recognise", 0);
    let mut all = Vec::new();
    for rows in TableRows::open(Pattern::evaluation(pattern))? {
        all.extend(shown(&rows?, &template, &mut stream)?);
    }
    Ok(all)
}

fn shown(rows: &Rows, template: &str, stream: &mut Stream) -> Result<Vec<Shown>> {
    let questions = rows.strings(first_of(rows, ["question", "user_query"]))?;
    let knowledge = rows.has("knowledge").then(|| rows.strings("knowledge")).transpose()?;
    let answers = if rows.has("right_answer") { one_of_each_pair(rows, stream)? } else { labelled_answers(rows)? };
    let shown = |(row, (answer, is_hallucinated)): (usize, (String, bool))| {
        let known = knowledge.as_ref().filter(|of| of.is_valid(row)).map_or("", |of| of.value(row));
        let text = filled(template, &[("knowledge", known), ("question", questions.value(row)), ("answer", &answer)]);
        let prompt = Text::Plain(text.trim_start().to_string());
        let answers = vec![Text::Plain(" Yes".to_string()), Text::Plain(" No".to_string())];
        Shown { asked: Answered { prompt, answers, origin: rows.origin(row) }, is_hallucinated }
    };
    Ok(answers.into_iter().enumerate().map(shown).collect())
}

/// A template with its `{name}`s filled in, in one pass: what a value holds is no place for another. What has no value stays as it is.
fn filled(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        text += &rest[..start];
        rest = &rest[start..];
        let place = |(name, value): &(&str, &str)| {
            let end = rest[1..].strip_prefix(name)?.starts_with('}').then_some(name.len() + 2)?;
            Some((value.to_string(), end))
        };
        let (value, end) = values.iter().find_map(place).unwrap_or_else(|| ("{".to_string(), 1));
        text += &value;
        rest = &rest[end..];
    }
    text + rest
}

fn first_of(rows: &Rows, names: [&'static str; 2]) -> &'static str {
    names.into_iter().find(|name| rows.has(name)).unwrap_or(names[0])
}

/// The right or the hallucinated answer of every row, and whether it is the latter.
fn one_of_each_pair(rows: &Rows, stream: &mut Stream) -> Result<Vec<(String, bool)>> {
    let (right, hallucinated) = (rows.strings("right_answer")?, rows.strings("hallucinated_answer")?);
    let mut choose = |row: usize| {
        let is_hallucinated = stream.random::<bool>();
        (if is_hallucinated { &hallucinated } else { &right }.value(row).to_string(), is_hallucinated)
    };
    Ok((0..right.len()).map(&mut choose).collect())
}

/// The answer of every row, and whether people say that it is hallucinated.
fn labelled_answers(rows: &Rows) -> Result<Vec<(String, bool)>> {
    let (answers, labels) =
        (rows.strings(first_of(rows, ["response", "chatgpt_response"]))?, rows.strings("hallucination")?);
    let answer = |row: usize| match labels.value(row).to_lowercase().as_str() {
        "yes" => Ok((answers.value(row).to_string(), true)),
        "no" => Ok((answers.value(row).to_string(), false)),
        other => bail!("{}, column `hallucination`: is \"{other}\"; expected yes or no", rows.origin(row)),
    };
    (0..answers.len()).map(answer).collect()
}

/// What every model recognises.
pub fn section(
    (settings, shown): (&RecognitionSettings, &[Shown]),
    models: &[NamedFolder],
    common: &CommonSettings,
    (resamples, seed): (usize, u64),
    journal: &Journal,
    cuts: &mut Cuts,
) -> Result<Section> {
    let asked: Vec<Answered> = shown.iter().map(|shown| shown.asked.clone()).collect();
    let mut progress = Progress::new("recognition", asked.len() * models.len(), common.quiet);
    let mut table = Table::new(["model", "accuracy", "balanced accuracy", "AUC", "says yes"]);
    let mut json = Map::new();
    for (number_of_model, model) in models.iter().enumerate() {
        // `log p(Yes) - log p(No)`: above 0 the model says yes.
        let Found { log_probs, truncation } =
            journal.piece(&format!("recognition-{number_of_model}"), &asked, || {
                choices::log_probs(model, &asked, common, &mut progress)
            })?;
        cuts.note_texts(&model.name, "answers to recognise", truncation, common.max_length);
        let scores: Vec<f64> = log_probs.iter().map(|of| of[0] - of[1]).collect();
        let cases: Vec<Scored> =
            scores.iter().zip(shown).map(|(&score, shown)| Scored { score, positive: shown.is_hallucinated }).collect();
        let estimate = |name: &str, measure: &dyn Fn(&[Scored]) -> Option<f64>| {
            let mut stream = random::stream(seed, &format!("bootstrap of {name}"), 0);
            bootstrap::statistic(cases.len(), resamples, &mut stream, |drawn| {
                measure(&drawn.iter().map(|&index| cases[index]).collect::<Vec<_>>())
            })
        };
        let says_yes =
            |cases: &[Scored]| Some(cases.iter().filter(|case| case.score > 0.0).count() as f64 / cases.len() as f64);
        let found = [
            ("accuracy", estimate("accuracy", &|cases| accuracy(cases, f64::MIN_POSITIVE))),
            ("balanced_accuracy", estimate("balanced accuracy", &|cases| balanced_accuracy(cases, f64::MIN_POSITIVE))),
            ("auc", estimate("auc", &roc_auc)),
            ("says_yes", estimate("yes", &says_yes)),
        ];
        let [accuracy, balanced, auc, yes] = found.map(|(_, estimate)| estimate);
        table.row([model.name.clone(), share(accuracy), share(balanced), number(auc), share(yes)]);
        let mut of_model: Map<String, Value> =
            found.into_iter().map(|(name, estimate)| (name.to_string(), json!(estimate))).collect();
        of_model.insert("log_odds".to_string(), json!(scores));
        json.insert(model.name.clone(), of_model.into());
    }
    progress.finish();
    let positives = shown.iter().filter(|shown| shown.is_hallucinated).count();
    let notes = vec![format!(
        "{} answers of {}, {positives} of them hallucinated. The model says yes where \" Yes\" is more probable than \" No\" after \"{}\". Chance: a balanced accuracy of 50%, an AUC of 0.5.",
        shown.len(),
        settings.recognition.as_deref().unwrap_or_default(),
        settings.recognition_template
    )];
    let tables = vec![("95% bootstrap intervals over answers in brackets".to_string(), table)];
    Ok(Section::new("recognition", "Recognition of hallucination", notes, tables, json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_question_holds_is_no_place_for_the_answer() {
        let values =
            [("knowledge", ""), ("question", "What does {answer} mean, {knowledge}?"), ("answer", "{question}")];
        let found = filled("{knowledge}Q: {question}\nA: {answer} {other} {answer", &values);
        assert_eq!(found, "Q: What does {answer} mean, {knowledge}?\nA: {question} {other} {answer");
        assert_eq!(filled("{{answer}} ü{", &[("answer", "ß")]), "{ß} ü{");
    }
}
