//! TruthfulQA-style multiple choice: does a model find true answers more probable than false ones (Lin et al. 2021, section 3.2)?

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::choices::{self, Found};
use super::cuts::Cuts;
use super::journal::Journal;
use super::metrics::multiple_choice::{mc1, mc2};
use super::section::{Section, share};
use crate::bail;
use crate::bootstrap::{self, Cluster};
use crate::data::schema::{Answered, Text};
use crate::data::splits::Pattern;
use crate::data::table::{Rows, TableRows};
use crate::error::Result;
use crate::random;
use crate::settings::{CommonSettings, Flags, NamedFolder};
use crate::train::progress::Progress;
use crate::train::table::Table;

const HEADING: &str = "Open-domain hallucination";

/// Which questions, and how they are asked.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct MultipleChoiceSettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of questions with true and false answers (columns question, and mc1_targets and mc2_targets as TruthfulQA has them, or choices and
    /// labels, 1 for a true one)
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub multiple_choice: Option<String>,
    /// How a question is put; each answer follows after a space
    #[arg(long, help_heading = HEADING, value_name = "TEXT", default_value = "Q: {question}\\nA:")]
    pub question_template: String,
}

impl MultipleChoiceSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        let of = &["question_template"];
        Flags::new()
            .always(&["multiple_choice"])
            .only("with --multiple-choice", of, |settings: &Self| settings.multiple_choice.is_some())
    }
}

/// A question with answers of which some are true.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The question as the model reads it, with all answers to look at.
    pub asked: Answered,
    /// Of the first answers, whether each is true: exactly one of them is.
    pub single: Vec<bool>,
    /// Of the answers after them, whether each is true.
    pub multiple: Vec<bool>,
}

/// Reads the questions.
pub fn read(pattern: &str, template: &str) -> Result<Vec<Choice>> {
    let template = template.replace("\\n", "\n");
    if !template.contains("{question}") {
        bail!("--question-template \"{template}\": there is no {{question}} in it");
    }
    let mut all = Vec::new();
    for rows in TableRows::open(Pattern::evaluation(pattern))? {
        all.extend(choices_of(&rows?, &template)?);
    }
    Ok(all)
}

fn choices_of(rows: &Rows, template: &str) -> Result<Vec<Choice>> {
    let questions = rows.strings("question")?;
    let (single, multiple) = match rows.has("mc1_targets") {
        true => (targets(&rows.structs("mc1_targets")?)?, targets(&rows.structs("mc2_targets")?)?),
        false => (targets(rows)?, targets(rows)?),
    };
    let choice = |(row, (single, multiple)): (usize, (Targets, Targets))| {
        let origin = rows.origin(row);
        if single.1.iter().filter(|&&is_true| is_true).count() != 1 {
            bail!(
                "{origin}: {} of {} choices are true; expected exactly one",
                single.1.iter().filter(|is_true| **is_true).count(),
                single.1.len()
            );
        }
        let prompt = Text::Plain(template.replace("{question}", questions.value(row)));
        let answers = single.0.iter().chain(&multiple.0).map(|choice| Text::Plain(format!(" {choice}"))).collect();
        Ok(Choice { asked: Answered { prompt, answers, origin }, single: single.1, multiple: multiple.1 })
    };
    single.into_iter().zip(multiple).enumerate().map(choice).collect()
}

/// Choices, and whether each is true.
type Targets = (Vec<String>, Vec<bool>);

fn targets(rows: &Rows) -> Result<Vec<Targets>> {
    let (choices, labels) = (rows.string_lists("choices")?, rows.integer_lists("labels")?);
    let of_row = |row: usize| {
        let (texts, truths) = (choices.range(row).unwrap_or_default(), labels.range(row).unwrap_or_default());
        if texts.len() != truths.len() || texts.is_empty() {
            bail!("{}: {} choices have {} labels; expected one for each", rows.origin(row), texts.len(), truths.len());
        }
        let texts = texts.map(|index| choices.values.value(index).to_string()).collect();
        Ok((texts, truths.map(|index| labels.values.value(index) == 1).collect()))
    };
    (0..rows.batch.num_rows()).map(of_row).collect()
}

impl Choice {
    /// MC1 and MC2 of the log-probabilities of all answers.
    fn measure(&self, log_probs: &[f64]) -> (Option<f64>, Option<f64>) {
        let (single, multiple) = log_probs.split_at(self.single.len());
        let of = |log_probs: &[f64], truths: &[bool], wanted: bool| -> Vec<f64> {
            log_probs
                .iter()
                .zip(truths)
                .filter(|(_, is_true)| **is_true == wanted)
                .map(|(log_prob, _)| *log_prob)
                .collect()
        };
        let correct = of(single, &self.single, true);
        let first = correct.first().and_then(|&correct| mc1(correct, &of(single, &self.single, false)));
        (first, mc2(&of(multiple, &self.multiple, true), &of(multiple, &self.multiple, false)))
    }
}

/// MC1 and MC2 of every model.
pub fn section(
    (settings, questions): (&MultipleChoiceSettings, &[Choice]),
    models: &[NamedFolder],
    common: &CommonSettings,
    (resamples, seed): (usize, u64),
    journal: &Journal,
    cuts: &mut Cuts,
) -> Result<Section> {
    let asked: Vec<Answered> = questions.iter().map(|question| question.asked.clone()).collect();
    let mut progress = Progress::new("multiple choice", asked.len() * models.len(), common.quiet);
    let mut table = Table::new(["model", "MC1", "MC2"]);
    let mut json = Map::new();
    for (number, model) in models.iter().enumerate() {
        let Found { log_probs, truncation } = journal.piece(&format!("multiple-choice-{number}"), &asked, || {
            choices::log_probs(model, &asked, common, &mut progress)
        })?;
        cuts.note_texts(&model.name, "multiple choices", truncation, common.max_length);
        let found = questions.iter().zip(&log_probs).map(|(question, log_probs)| question.measure(log_probs));
        let (first, second): (Vec<Option<f64>>, Vec<Option<f64>>) = found.unzip();
        let estimate = |name: &str, values: &[Option<f64>]| {
            let clusters: Vec<Cluster> = values.iter().map(|value| value.iter().copied().collect()).collect();
            bootstrap::rate(&clusters, resamples, &mut random::stream(seed, &format!("bootstrap of {name}"), 0))
        };
        let (first, second) = (estimate("mc1", &first), estimate("mc2", &second));
        table.row([model.name.clone(), share(first), share(second)]);
        json.insert(model.name.clone(), json!({"mc1": first, "mc2": second, "log_probs": log_probs}));
    }
    progress.finish();
    let chance =
        questions.iter().map(|question| 1.0 / question.single.len() as f64).sum::<f64>() / questions.len() as f64;
    table.row(["chance".to_string(), format!("{:.1}%", 100.0 * chance), String::new()]);
    json.insert("chance".to_string(), json!({"mc1": chance}));
    let notes = vec![format!(
        "{} questions of {}, put as \"{}\". MC1: the only true answer is more probable than every false one. MC2: the share of true answers in the probability of all.",
        questions.len(),
        settings.multiple_choice.as_deref().unwrap_or_default(),
        settings.question_template
    )];
    let tables = vec![("95% bootstrap intervals over questions in brackets".to_string(), table)];
    Ok(Section::new("multiple_choice", "Multiple choice", notes, tables, json))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::schema::Origin;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn the_first_answers_are_those_of_mc1_and_the_others_those_of_mc2() {
        let origin = Origin { file: Arc::from(Path::new("questions.parquet")), row: 0 };
        let asked = Answered { prompt: Text::Plain("Q".into()), answers: Vec::new(), origin };
        let choice = Choice { asked, single: vec![true, false], multiple: vec![true, true, false] };
        let third = (1.0f64 / 3.0).ln();
        assert_eq!(choice.measure(&[-1.0, -2.0, third, third, third]).0, Some(1.0));
        assert!((choice.measure(&[-1.0, -2.0, third, third, third]).1.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(choice.measure(&[-2.0, -1.0, third, third, third]).0, Some(0.0));
    }

    #[test]
    fn a_template_without_question_is_refused() {
        assert!(read("questions.parquet", "Q:").unwrap_err().to_string().contains("{question}"));
    }
}
