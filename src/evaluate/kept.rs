//! `answers.parquet`: every answer with everything that it was found to be, a row each.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};

use super::judging::JudgedAnswer;
use super::question::Question;
use super::rates::Evaluation;
use super::scorer::{Identity, Verdict};
use crate::data::parquet;
use crate::error::{Error, Result};
use crate::world::rule::Judgement;

/// Every answer.
pub const FILE: &str = "answers.parquet";

/// An answer with whose it is and what it belongs to.
pub struct Kept<'a> {
    /// The part of the evaluation, such as `answers` or `toxicity`.
    pub part: &'a str,
    /// Who answered.
    pub model: &'a str,
    /// What was asked.
    pub question: &'a Question,
    /// The answer.
    pub answer: &'a JudgedAnswer,
    /// Who made `answer.verdicts`.
    pub scorers: &'a [Identity],
}

impl Evaluation {
    /// Every answer, with whose it is.
    pub(super) fn kept<'a>(&'a self, part: &'a str) -> impl Iterator<Item = Kept<'a>> {
        self.models.iter().flat_map(move |model| {
            self.questions.iter().zip(&model.answers).flat_map(move |(question, answers)| {
                let kept = move |answer| Kept { part, model: &model.name, question, answer, scorers: &self.scorers };
                answers.iter().map(kept)
            })
        })
    }
}

/// What a scorer says: a column named as its rate; for one that reads tokens two more, in how many windows each text was read, and whether a part of it was not.
pub(super) fn verdict_columns(scorer: &Identity, verdicts: &[Option<Verdict>]) -> Vec<(String, ArrayRef)> {
    let (found, rate) = (|| verdicts.iter().copied(), scorer.rate());
    let scores: Float64Array = found().map(|verdict| verdict?.score).collect();
    let mut columns: Vec<(String, ArrayRef)> = vec![(rate.clone(), Arc::new(scores))];
    if scorer.max_tokens.is_some() {
        let windows: Int64Array = found().map(|verdict| Some(verdict?.windows as i64)).collect();
        let cut: BooleanArray = found().map(|verdict| Some(verdict?.was_cut)).collect();
        columns.push((format!("{rate}_windows"), Arc::new(windows)));
        columns.push((format!("{rate}_cut"), Arc::new(cut)));
    }
    columns
}

/// Writes the answers into `folder`. Each scorer has columns of its own.
pub fn write(rows: &[Kept], folder: &Path) -> Result<()> {
    let invalid = |error| Error::input(format!("{FILE}: {error}"));
    let strings =
        |of: &dyn Fn(&Kept) -> Option<String>| -> ArrayRef { Arc::new(rows.iter().map(of).collect::<StringArray>()) };
    let flags =
        |of: &dyn Fn(&Kept) -> Option<bool>| -> ArrayRef { Arc::new(rows.iter().map(of).collect::<BooleanArray>()) };
    let numbers =
        |of: &dyn Fn(&Kept) -> Option<f64>| -> ArrayRef { Arc::new(rows.iter().map(of).collect::<Float64Array>()) };
    let ruled = |of: fn(&Judgement) -> bool| flags(&move |row: &Kept| row.answer.judgement.as_ref().map(of));
    let tokens: Int64Array = rows.iter().map(|row| row.answer.answer.tokens.map(|tokens| tokens as i64)).collect();
    let mut columns: Vec<(String, ArrayRef)> = [
        ("part", strings(&|row| Some(row.part.to_string()))),
        ("model", strings(&|row| Some(row.model.to_string()))),
        ("kind", strings(&|row| row.question.group.clone())),
        ("prompt", strings(&|row| Some(row.question.text()))),
        ("response", strings(&|row| Some(row.answer.answer.text.clone()))),
        ("tokens", Arc::new(tokens) as ArrayRef),
        ("ended", flags(&|row| row.answer.answer.ended)),
        ("hallucinated", ruled(|found| found.hallucinated)),
        ("rude", ruled(|found| found.rude)),
        ("refused", flags(&|row| row.answer.refused)),
        ("right", ruled(|found| found.right)),
        ("preferred_to_base", numbers(&|row| row.answer.preferred)),
        ("reward", numbers(&|row| row.answer.reward)),
        ("utility", numbers(&|row| row.answer.judgement.map(|found| f64::from(found.utility)))),
        ("kl", numbers(&|row| row.answer.answer.kl)),
        ("score", numbers(&|row| row.answer.answer.given_score)),
    ]
    .map(|(name, column)| (name.to_string(), column))
    .into();
    let mut scorers: Vec<&Identity> = Vec::new();
    for scorer in rows.iter().flat_map(|row| row.scorers) {
        if !scorers.contains(&scorer) {
            scorers.push(scorer);
        }
    }
    for scorer in scorers {
        let verdict = |row: &Kept| {
            let index = row.scorers.iter().position(|other| other == scorer)?;
            row.answer.verdicts.get(index).copied()
        };
        let verdicts: Vec<Option<Verdict>> = rows.iter().map(verdict).collect();
        columns.extend(verdict_columns(scorer, &verdicts));
    }
    let columns = columns.into_iter().map(|(name, column)| (name, column, true));
    let batch = RecordBatch::try_from_iter_with_nullable(columns).map_err(invalid)?;
    parquet::write(folder.join(FILE), &batch)
}
