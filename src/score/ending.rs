//! How the answers that are scored end.

use std::ops::Range;

use arrow::array::Array;

use super::ScoreSettings;
use crate::bail;
use crate::data::schema::{AnswerLayout, Answered, AnsweredRows};
use crate::data::tokenize_records::Ending;
use crate::error::Result;
use crate::model::Model;
use crate::rewards::ending::{AS_PAIR, how_read, how_read_and_trained};

/// The flag that says how answers end, where one was given.
pub(super) fn given_flag(settings: &ScoreSettings) -> Option<&'static str> {
    let given = [("--add-eos", settings.add_eos), ("--as-is", settings.as_is)];
    given.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
}

/// Whether answers that run with this stack are ended with the end-of-text token.
fn ends_answers(settings: &ScoreSettings, model: &Model, stack: usize) -> bool {
    let was_trained_so = || model.head_of(stack).is_some_and(|head| head.form.answers_end_with_eos == Some(true));
    settings.add_eos || !settings.as_is && was_trained_so()
}

/// How the answers of each row end.
pub(super) fn of_rows(
    settings: &ScoreSettings,
    model: &Model,
    answered: &AnsweredRows,
    stacks: &[usize],
) -> Result<Vec<Vec<Ending>>> {
    if !stacks.iter().any(|&stack| ends_answers(settings, model, stack)) {
        return Ok(answered.records.iter().map(|record| vec![Ending::AsIs; record.answers.len()]).collect());
    }
    let has_ended = answered.rows.has("ended");
    // A list as `sample` writes it, or a truth value an answer.
    let lists = (has_ended && answered.layout == AnswerLayout::List).then(|| answered.rows.boolean_lists("ended"));
    let single = (has_ended && answered.layout == AnswerLayout::One).then(|| answered.rows.booleans("ended"));
    let (lists, single) = (lists.transpose()?, single.transpose()?);
    let one = |(row, record): (usize, &Answered)| {
        let count = record.answers.len();
        match (&lists, &single) {
            _ if !ends_answers(settings, model, stacks[row]) => Ok(vec![Ending::AsIs; count]),
            (Some(ended), _) => of_row(record, ended.range(row), |answer| ended.values.value(answer)),
            (_, Some(ended)) if ended.is_valid(row) && !ended.value(row) => Ok(vec![Ending::Cut; count]),
            _ => Ok(vec![Ending::Eos; count]),
        }
    };
    answered.records.iter().enumerate().map(one).collect()
}

/// Of answers of which the data say whether each ended by itself.
fn of_row(record: &Answered, range: Option<Range<usize>>, has_ended: impl Fn(usize) -> bool) -> Result<Vec<Ending>> {
    let ending = |answer| if has_ended(answer) { Ending::Eos } else { Ending::Cut };
    Ok(one_of_each(record, range)?.map(ending).collect())
}

/// The places of the values of `ended` of a record's answers, of which there has to be one for each.
pub(super) fn one_of_each(record: &Answered, range: Option<Range<usize>>) -> Result<Range<usize>> {
    let count = record.answers.len();
    match range {
        Some(range) if range.len() == count => Ok(range),
        range => bail!(
            "{}: column `ended` has {} values for {count} answers; expected one for each",
            record.origin,
            range.map_or(0, |range| range.len())
        ),
    }
}

/// The same in words, for the plan.
pub(super) fn described(settings: &ScoreSettings, model: &Model) -> String {
    if !model.architecture().causal {
        return AS_PAIR.to_owned();
    }
    let with_eos = ends_answers(settings, model, 0);
    let Some(head) = model.head() else { return how_read(with_eos).to_owned() };
    let trained_so = head.form.answers_end_with_eos;
    let advice = match trained_so {
        _ if given_flag(settings).is_some() => "",
        Some(true) => " (--as-is leaves them as they are)",
        Some(false) => "",
        None => " (--add-eos adds the end-of-text token)",
    };
    how_read_and_trained(with_eos, trained_so) + advice
}
