//! Best of n: of a prompt's answers the one with the highest reward (Stiennon et al. 2020, section 4.2), which PPO has to be better than.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};

use super::Score;
use crate::bail;
use crate::data::schema::{AnswerLayout, Answered, AnsweredRows, Text};
use crate::data::text_column::text_column;
use crate::error::{Error, Result};

/// A row a prompt, with its best answer: the columns `prompt`, `completion`, and, after `prefix`, `log_prob`, `tokens` and `reward` of that answer. Of
/// equally good ones it is the first.
///
/// # Errors
/// Where the rows hold one answer each, where a row holds none, or where no model of rewards scored them.
pub(super) fn best_rows(answered: &AnsweredRows, scores: &[Vec<Score>], prefix: &str) -> Result<RecordBatch> {
    let file = answered.rows.file.display();
    if answered.layout == AnswerLayout::One {
        bail!(
            "{file}: each row holds one answer, and --best chooses among several; give lists of answers, as `sample --answers 4` writes them"
        );
    }
    let best: Vec<(&Answered, &Text, &Score)> =
        answered.records.iter().zip(scores).map(|(record, scores)| best(record, scores)).collect::<Result<_>>()?;
    let column = |name: &str, texts: Vec<&Text>| {
        text_column(&texts)
            .ok_or_else(|| Error::input(format!("{file}: `{name}` is a string in some rows and messages in others")))
    };
    let names = ["log_prob", "tokens", "reward"].map(|name| format!("{prefix}{name}"));
    let numbers: [ArrayRef; 3] = [
        Arc::new(best.iter().map(|(_, _, score)| score.log_prob).collect::<Float64Array>()),
        Arc::new(best.iter().map(|(_, _, score)| Some(score.tokens as i64)).collect::<Int64Array>()),
        Arc::new(best.iter().map(|(_, _, score)| score.reward).collect::<Float64Array>()),
    ];
    let mut columns = vec![
        ("prompt", column("prompt", best.iter().map(|(record, _, _)| &record.prompt).collect())?, true),
        ("completion", column("completion", best.iter().map(|(_, answer, _)| *answer).collect())?, true),
    ];
    columns.extend(names.iter().zip(numbers).map(|(name, numbers)| (name.as_str(), numbers, true)));
    RecordBatch::try_from_iter_with_nullable(columns).map_err(|error| Error::input(format!("{file}: {error}")))
}

fn best<'a>(record: &'a Answered, scores: &'a [Score]) -> Result<(&'a Answered, &'a Text, &'a Score)> {
    let reward = |score: &Score| score.reward.unwrap_or(f64::NEG_INFINITY);
    let pairs = record.answers.iter().zip(scores);
    let best = pairs.reduce(|best, other| if reward(other.1) > reward(best.1) { other } else { best });
    match best {
        Some((answer, score)) => Ok((record, answer, score)),
        None => bail!("{}: the list of answers is empty, and --best needs one to choose", record.origin),
    }
}
