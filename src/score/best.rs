//! Best of n: of a prompt's answers the one with the highest reward (Stiennon et al. 2020, section 4.2), which PPO has to be better than.

use std::sync::Arc;

use arrow::array::{Array, BooleanArray, Float64Array, Int64Array, RecordBatch};

use super::Score;
use super::ending::one_of_each;
use crate::bail;
use crate::data::schema::{self, AnswerLayout, Answered, AnsweredRows, Text};
use crate::data::text_column::{TextForm, batch_of, named};
use crate::error::{Error, Result};

/// A row a prompt, with its best answer: the columns `prompt`, `completion`, `ended` where the rows have it, and,
/// after `prefix`, `log_prob`, `tokens` and `reward` of that answer. Of equally good ones it is the first.
///
/// # Errors
/// Where the rows hold one answer each, where a row holds none or does not say of each whether it ended, or where no
/// model of rewards scored them.
pub(super) fn best_rows(
    answered: &AnsweredRows,
    form: &TextForm,
    scores: &[Vec<Score>],
    prefix: &str,
) -> Result<RecordBatch> {
    let file = answered.rows.file.display();
    if answered.layout == AnswerLayout::One {
        bail!(
            "{file}: each row holds one answer, and --best chooses among several; give lists of answers, as `sample --answers 4` writes them"
        );
    }
    let chosen: Vec<usize> =
        answered.records.iter().zip(scores).map(|(record, scores)| best(record, scores)).collect::<Result<_>>()?;
    let records = answered.records.iter().zip(scores).zip(&chosen);
    let best: Vec<(&Answered, &Text, &Score)> =
        records.map(|((record, scores), &best)| (record, &record.answers[best], &scores[best])).collect();
    let column = |name: &str, texts: &[&Text]| {
        let mixed = || Error::input(format!("{file}: `{name}` is a string in some rows and messages in others"));
        form.column(name, texts).ok_or_else(mixed)
    };
    let prompts: Vec<&Text> = best.iter().map(|(record, _, _)| &record.prompt).collect();
    let answers: Vec<&Text> = best.iter().map(|(_, answer, _)| *answer).collect();
    let mut columns = vec![column("prompt", &prompts)?];
    columns.extend(form.input_columns(&prompts));
    columns.push(column("completion", &answers)?);
    if answered.rows.has("ended") {
        let ended = answered.rows.boolean_lists("ended")?;
        let of_row = |(row, &best): (usize, &usize)| {
            let at = one_of_each(&answered.records[row], ended.range(row))?.start + best;
            Ok(ended.values.is_valid(at).then(|| ended.values.value(at)))
        };
        let ended = chosen.iter().enumerate().map(of_row).collect::<Result<Vec<Option<bool>>>>()?;
        columns.push(named("ended", Arc::new(BooleanArray::from(ended))));
    }
    let log_probs = best.iter().map(|(_, _, score)| score.log_prob).collect::<Float64Array>();
    let tokens = best.iter().map(|(_, _, score)| Some(score.tokens as i64)).collect::<Int64Array>();
    let rewards = best.iter().map(|(_, _, score)| score.reward).collect::<Float64Array>();
    columns.push(named(&format!("{prefix}log_prob"), Arc::new(log_probs)));
    columns.push(named(&format!("{prefix}tokens"), Arc::new(tokens)));
    columns.push(named(&format!("{prefix}reward"), Arc::new(rewards)));
    batch_of(columns)
}

/// What the prompts and answers of some files hold.
pub(super) fn form(data: &str) -> Result<TextForm> {
    let mut form = TextForm::of([]);
    for answered in schema::answered(data)? {
        for record in answered?.records {
            std::iter::once(&record.prompt).chain(&record.answers).for_each(|text| form.add(text));
        }
    }
    Ok(form)
}

/// The index of a record's best answer.
fn best(record: &Answered, scores: &[Score]) -> Result<usize> {
    // Rewards are finite.
    match (0..scores.len()).reduce(|best, next| if scores[next].reward > scores[best].reward { next } else { best }) {
        Some(best) => Ok(best),
        None => bail!("{}: the list of answers is empty, and --best needs one to choose", record.origin),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::data::schema::Origin;

    #[test]
    fn the_first_of_the_highest_is_chosen_and_nothing_of_an_empty_list() {
        let texts = ["a", "b", "c"].map(|text| Text::Plain(text.to_string()));
        let origin = Origin { file: Arc::from(Path::new("answers.parquet")), row: 4 };
        let chosen = |rewards: &[f64]| {
            let answers = texts[..rewards.len()].to_vec();
            let record = Answered { prompt: Text::Plain(String::new()), answers, origin: origin.clone() };
            let score = |&reward: &f64| Score { log_prob: None, tokens: 1, reward: Some(reward) };
            let scores: Vec<Score> = rewards.iter().map(score).collect();
            best(&record, &scores).map_err(|error| error.to_string())
        };
        assert_eq!(chosen(&[-2.0, 1.0, 1.0]), Ok(1));
        assert_eq!(chosen(&[-2.0, -3.0]), Ok(0));
        let error = chosen(&[]).unwrap_err();
        assert!(error.contains("row 4") && error.contains("the list of answers is empty"), "{error}");
    }
}
