//! The layouts of rankings.

use arrow::array::Array;

use super::texts::{Column, ListColumn, joined};
use crate::bail;
use crate::data::column::Lists;
use crate::data::conversation::{ConversationColumns, OneForm};
use crate::data::record::{Ranking, Text};
use crate::data::remarks::Remarks;
use crate::data::table::Rows;
use crate::error::Result;

/// Reads rankings; a pair is a ranking of two.
pub(in crate::data) fn rankings(rows: &Rows) -> Result<Vec<Ranking>> {
    if rows.has("responses") && rows.has("prompt") {
        return listed_rankings(rows);
    }
    if !rows.has("chosen") || !rows.has("rejected") {
        return Err(rows.no_layout(
            "rankings",
            "`prompt`, `responses` and `ranks` or `scores`; or `prompt`, `chosen` and `rejected`; or `chosen` and \
             `rejected`",
        ));
    }
    let (pairs, columns, remarks) = (Pairs::new(rows)?, ConversationColumns::new(rows)?, Remarks::new(rows)?);
    rows.map(|row| {
        let (mut prompt, responses) = pairs.get(row)?;
        let responses: Vec<Text> = responses.into_iter().map(Text::without_marks).collect();
        columns.complete(row, &mut prompt, &responses)?;
        remarks.ranking(row, prompt, responses, vec![0, 1])
    })
}

fn listed_rankings(rows: &Rows) -> Result<Vec<Ranking>> {
    let (prompts, responses) = (Column::texts(rows, "prompt")?, ListColumn::new(rows, "responses")?);
    let (ranks, columns, remarks) = (Ranks::new(rows)?, ConversationColumns::new(rows)?, Remarks::new(rows)?);
    rows.map(|row| {
        let (mut prompt, responses) =
            joined(rows, row, &["responses"], prompts.get(row)?, responses.get(row)?)?.apart();
        let responses: Vec<Text> = responses.into_iter().map(Text::without_marks).collect();
        columns.complete(row, &mut prompt, &responses)?;
        let ranks = ranks.get(row)?;
        if ranks.len() != responses.len() {
            let name = if rows.has("ranks") { "ranks" } else { "scores" };
            let fault = format!("has {} items, but `responses` has {}", ranks.len(), responses.len());
            return Err(rows.fault(row, name, fault));
        }
        remarks.ranking(row, prompt, responses, ranks)
    })
}

/// The columns `chosen` and `rejected`, with or without `prompt`.
pub(super) struct Pairs<'a> {
    rows: &'a Rows,
    prompts: Option<Column<'a>>,
    chosen: Column<'a>,
    rejected: Column<'a>,
}

impl<'a> Pairs<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self> {
        let prompts = rows.has("prompt").then(|| Column::texts(rows, "prompt")).transpose()?;
        Ok(Self { rows, prompts, chosen: Column::texts(rows, "chosen")?, rejected: Column::texts(rows, "rejected")? })
    }

    pub(super) fn get(&self, row: usize) -> Result<(Text, Vec<Text>)> {
        let (chosen, rejected) = (self.chosen.get(row)?, self.rejected.get(row)?);
        match (&self.prompts, chosen, rejected) {
            (Some(prompts), chosen, rejected) => {
                let joined = joined(self.rows, row, &["chosen", "rejected"], prompts.get(row)?, vec![chosen, rejected]);
                Ok(joined?.apart())
            }
            (None, Text::Plain(chosen), Text::Plain(rejected)) => {
                let prompt = shared_prompt(&chosen, &rejected);
                let answers = [&chosen, &rejected].map(|text| Text::Plain(text[prompt.len()..].to_owned()));
                Ok((Text::Plain(prompt.to_owned()), answers.to_vec()))
            }
            (None, Text::Messages(chosen), Text::Messages(rejected)) => {
                Ok(OneForm::Whole(vec![chosen.messages, rejected.messages]).apart())
            }
            _ => Err(self.chosen.fault(row, "and `rejected` differ in type: one is a string, one a list of messages")),
        }
    }
}

/// The columns `ranks` or `scores`.
enum Ranks<'a> {
    Ranks(&'a Rows, Lists<arrow::array::Int64Array>),
    Scores(&'a Rows, Lists<arrow::array::Float64Array>),
}

impl<'a> Ranks<'a> {
    fn new(rows: &'a Rows) -> Result<Self> {
        if rows.has("ranks") {
            return Ok(Ranks::Ranks(rows, rows.integer_lists("ranks")?));
        }
        if rows.has("scores") {
            return Ok(Ranks::Scores(rows, rows.float_lists("scores")?));
        }
        bail!(
            "{}: `responses` has neither `ranks` (lower is better) nor `scores` (higher is better) beside it; the \
             columns are {}",
            rows.file.display(),
            rows.column_names()
        )
    }

    fn get(&self, row: usize) -> Result<Vec<i64>> {
        match self {
            Ranks::Ranks(rows, lists) => {
                let range = lists.range(row).ok_or_else(|| rows.fault(row, "ranks", "is null, expected a list"))?;
                let rank = |index| lists.values.is_valid(index).then(|| lists.values.value(index));
                let ranks: Option<Vec<i64>> = range.map(rank).collect();
                ranks.ok_or_else(|| rows.fault(row, "ranks", "holds a null, expected whole numbers"))
            }
            Ranks::Scores(rows, lists) => {
                let range = lists.range(row).ok_or_else(|| rows.fault(row, "scores", "is null, expected a list"))?;
                let number = |index| Some(lists.values.value(index)).filter(|score| score.is_finite());
                let score = |index| lists.values.is_valid(index).then(|| number(index)).flatten();
                let scores: Option<Vec<f64>> = range.map(score).collect();
                let fault =
                    || rows.fault(row, "scores", "holds an item that is no finite number (null, NaN or infinite)");
                Ok(ranks_of_scores(&scores.ok_or_else(fault)?))
            }
        }
    }
}

/// The dense rank of each score: 0 for the highest, and one more for each lower value. Equal scores share a rank.
fn ranks_of_scores(scores: &[f64]) -> Vec<i64> {
    let mut values = scores.to_vec();
    values.sort_by(|left, right| right.total_cmp(left));
    values.dedup();
    scores.iter().map(|score| values.partition_point(|value| value > score) as i64).collect()
}

/// What two texts that hold both prompt and answer have in common, as their prompt.
///
/// In HH-RLHF's transcripts it ends with the last `\n\nAssistant:` of the common start. Elsewhere the common start is cut
/// back to the last white space in it, so that no word is torn and the white space begins both answers.
fn shared_prompt<'a>(chosen: &'a str, rejected: &str) -> &'a str {
    const ANSWER: &str = "\n\nAssistant:";
    let pairs = chosen.chars().zip(rejected.chars());
    let length = pairs.take_while(|(left, right)| left == right).map(|(character, _)| character.len_utf8()).sum();
    let shared: &str = &chosen[..length];
    if let Some(start) = shared.rfind(ANSWER) {
        return &shared[..start + ANSWER.len()];
    }
    match shared.rfind(char::is_whitespace) {
        Some(last) => {
            let end = last + shared[last..].chars().next().map_or(0, char::len_utf8);
            shared[..end].trim_end()
        }
        None => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_start_ends_at_the_last_turn_or_at_a_word() {
        let dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:";
        let (chosen, rejected) = (format!("{dialogue} I do not know"), format!("{dialogue} I do"));
        assert_eq!(shared_prompt(&chosen, &rejected), dialogue);
        assert_eq!(shared_prompt("The sky is blue", "The sky is black"), "The sky is");
        assert_eq!(shared_prompt("Q: x\nA: yes", "Q: x\nA: no"), "Q: x\nA:");
        assert_eq!(shared_prompt("Say hi", "Say hi!"), "Say");
        assert_eq!(shared_prompt("été", "étang"), "");
    }

    #[test]
    fn ranks_of_scores_are_dense_and_equal_scores_tie() {
        assert_eq!(ranks_of_scores(&[0.5, -1.0, 2.0, 0.5, -0.0, 0.0]), [1, 3, 0, 1, 2, 2]);
    }
}
