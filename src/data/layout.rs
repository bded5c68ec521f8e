//! Which columns make which record: the layouts that [`super::schema`] names.

use arrow::array::Array;

use super::column::{Lists, TextColumn};
use super::parquet::Rows;
use super::remarks::Remarks;
use super::schema::{AnswerLayout, Answered, Demonstration, Message, Origin, Prompt, Ranking, Text};
use crate::bail;
use crate::error::{Error, Result};

/// The columns that a layout of demonstrations may use.
pub(super) const DEMONSTRATION_COLUMNS: &[&str] = &[
    "prompt",
    "completion",
    "response",
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "output",
    "text",
];
/// The columns that a layout of rankings may use.
pub(super) const RANKING_COLUMNS: &[&str] =
    &["prompt", "responses", "ranks", "scores", "chosen", "rejected", "margin", "weight", "agreement"];
/// The columns that a layout of prompts may use.
pub(super) const PROMPT_COLUMNS: &[&str] = &["prompt", "messages", "conversations", "instruction", "input", "context"];

/// Reads demonstrations; the first layout of the list in [`super::schema`] that the columns allow.
pub(super) fn demonstrations(rows: &Rows) -> Result<Vec<Demonstration>> {
    let demonstration = |row, prompt, completion| Demonstration { prompt, completion, origin: rows.origin(row) };
    if let (true, Some(answer)) = (rows.has("prompt"), rows.first_of(&["completion", "response"])) {
        let (prompts, completions) = (Column::texts(rows, "prompt")?, Column::texts(rows, answer)?);
        return rows.map(|row| {
            let (prompt, mut answers) = one_form(prompts.get(row)?, vec![completions.get(row)?]);
            Ok(demonstration(row, Some(prompt), answers.remove(0)))
        });
    }
    if let Some(name) = rows.first_of(&["messages", "conversations"]) {
        let conversations = Column::texts(rows, name)?;
        return rows.map(|row| {
            let messages = conversations.messages(row)?;
            if !messages.iter().any(Message::is_assistant) {
                return Err(conversations.fault(row, "holds no message of the assistant, so nothing to learn"));
            }
            Ok(demonstration(row, None, Text::Messages(messages)))
        });
    }
    if let (true, Some(answer)) = (rows.has("instruction"), rows.first_of(&["output", "response"])) {
        let (instructions, outputs) = (Instructions::new(rows)?, Column::texts(rows, answer)?);
        return rows.map(|row| {
            let (prompt, mut answers) = one_form(instructions.get(row)?, vec![outputs.get(row)?]);
            Ok(demonstration(row, Some(prompt), answers.remove(0)))
        });
    }
    if rows.has("text") {
        let texts = Column::texts(rows, "text")?;
        return rows.map(|row| Ok(demonstration(row, None, texts.get(row)?)));
    }
    Err(rows.no_layout(
        "demonstrations",
        "`prompt` and `completion`, or `messages`, or `conversations`, or `instruction` and `output`, or `text`",
    ))
}

/// Reads rankings; a pair is a ranking of two.
pub(super) fn rankings(rows: &Rows) -> Result<Vec<Ranking>> {
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
    let pairs = Pairs::new(rows)?;
    let remarks = Remarks::new(rows)?;
    rows.map(|row| {
        let (prompt, responses) = pairs.get(row)?;
        remarks.ranking(row, prompt, responses, vec![0, 1])
    })
}

fn listed_rankings(rows: &Rows) -> Result<Vec<Ranking>> {
    let (prompts, responses) = (Column::texts(rows, "prompt")?, ListColumn::new(rows, "responses")?);
    let (ranks, remarks) = (Ranks::new(rows)?, Remarks::new(rows)?);
    rows.map(|row| {
        let (prompt, responses) = one_form(prompts.get(row)?, responses.get(row)?);
        let ranks = ranks.get(row)?;
        if ranks.len() != responses.len() {
            let name = if rows.has("ranks") { "ranks" } else { "scores" };
            let fault = format!("has {} items, but `responses` has {}", ranks.len(), responses.len());
            return Err(rows.fault(row, name, fault));
        }
        remarks.ranking(row, prompt, responses, ranks)
    })
}

/// Reads prompts.
pub(super) fn prompts(rows: &Rows) -> Result<Vec<Prompt>> {
    if rows.has("prompt") {
        let prompts = Column::texts(rows, "prompt")?;
        return rows.map(|row| Ok(Prompt { prompt: prompts.get(row)?, origin: rows.origin(row) }));
    }
    if let Some(name) = rows.first_of(&["messages", "conversations"]) {
        let conversations = Column::texts(rows, name)?;
        return rows.map(|row| {
            let mut messages = conversations.messages(row)?;
            while messages.last().is_some_and(Message::is_assistant) {
                messages.pop();
            }
            if messages.is_empty() {
                return Err(conversations.fault(row, "holds nothing but answers, so no prompt"));
            }
            Ok(Prompt { prompt: Text::Messages(messages), origin: rows.origin(row) })
        });
    }
    if rows.has("instruction") {
        let instructions = Instructions::new(rows)?;
        return rows.map(|row| Ok(Prompt { prompt: instructions.get(row)?, origin: rows.origin(row) }));
    }
    Err(rows.no_layout("prompts", "`prompt`, or `messages`, or `conversations`, or `instruction`"))
}

/// Reads prompts with the answers to be scored.
pub(super) fn answered(rows: &Rows) -> Result<(AnswerLayout, Vec<Answered>)> {
    let answered = |row, (prompt, answers)| Answered { prompt, answers, origin: rows.origin(row) };
    if let (true, Some(name)) = (rows.has("prompt"), rows.first_of(&["responses", "completions"])) {
        let (prompts, answers) = (Column::texts(rows, "prompt")?, ListColumn::new(rows, name)?);
        let records = rows.map(|row| Ok(answered(row, one_form(prompts.get(row)?, answers.get(row)?))))?;
        return Ok((AnswerLayout::List, records));
    }
    let one_answer = rows.has("prompt") && rows.first_of(&["completion", "response"]).is_some();
    if !one_answer && rows.has("chosen") && rows.has("rejected") {
        let pairs = Pairs::new(rows)?;
        let records = rows.map(|row| Ok(answered(row, pairs.get(row)?)))?;
        return Ok((AnswerLayout::Pair, records));
    }
    if rows.first_of(&["completion", "response", "messages", "conversations", "output", "text"]).is_none() {
        return Err(rows.no_layout(
            "answers to score",
            "`prompt` with `completion`, `response`, `completions` or `responses`, or a layout of demonstrations, or \
             `chosen` and `rejected`",
        ));
    }
    let records = demonstrations(rows)?.into_iter().enumerate().map(|(row, record)| {
        let (prompt, answer) = match (record.prompt, record.completion) {
            (Some(prompt), completion) => (prompt, completion),
            (None, Text::Messages(mut messages)) => {
                // Only the last answer is scored: what follows it is of no use to it.
                let last = messages.iter().rposition(Message::is_assistant).unwrap_or(0);
                messages.truncate(last + 1);
                let answer = messages.split_off(last);
                (Text::Messages(messages), Text::Messages(answer))
            }
            (None, text) => (Text::Plain(String::new()), text),
        };
        answered(row, (prompt, vec![answer]))
    });
    Ok((AnswerLayout::One, records.collect()))
}

impl Rows {
    /// Where a row was read.
    pub fn origin(&self, row: usize) -> Origin {
        Origin { file: self.file.clone(), row: self.first_row + row }
    }

    pub(super) fn map<T>(&self, record: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
        (0..self.batch.num_rows()).map(record).collect()
    }

    pub(super) fn first_of<'a>(&self, names: &[&'a str]) -> Option<&'a str> {
        names.iter().find(|name| self.has(name)).copied()
    }

    pub(super) fn fault(&self, row: usize, column: &str, fault: impl std::fmt::Display) -> Error {
        Error::input(format!("{}, column `{column}`: {fault}", self.origin(row)))
    }

    pub(super) fn no_layout(&self, what: &str, accepted: &str) -> Error {
        let columns = self.column_names();
        Error::input(format!(
            "{}: no {what} can be made of the columns {columns}; name the columns {accepted}",
            self.file.display()
        ))
    }
}

/// A column in which every row must hold a text.
struct Column<'a> {
    rows: &'a Rows,
    name: &'a str,
    texts: TextColumn,
}

impl<'a> Column<'a> {
    fn texts(rows: &'a Rows, name: &'a str) -> Result<Self> {
        Ok(Self { rows, name, texts: rows.texts(name)? })
    }

    fn fault(&self, row: usize, fault: impl std::fmt::Display) -> Error {
        self.rows.fault(row, self.name, fault)
    }

    fn get(&self, row: usize) -> Result<Text> {
        match self.texts.get(row).map_err(|fault| self.fault(row, fault))? {
            None => Err(self.fault(row, "is null, expected a text")),
            Some(Text::Messages(messages)) if messages.is_empty() => {
                Err(self.fault(row, "is an empty list, expected messages"))
            }
            Some(text) => Ok(text),
        }
    }

    fn messages(&self, row: usize) -> Result<Vec<Message>> {
        match self.get(row)? {
            Text::Messages(messages) => Ok(messages),
            Text::Plain(_) => Err(self.fault(row, "is a string, expected a list of {role, content}")),
        }
    }
}

/// A column in which every row must hold a list of texts with at least one item.
struct ListColumn<'a> {
    rows: &'a Rows,
    name: &'a str,
    lists: Lists<TextColumn>,
}

impl<'a> ListColumn<'a> {
    fn new(rows: &'a Rows, name: &'a str) -> Result<Self> {
        Ok(Self { rows, name, lists: rows.text_lists(name)? })
    }

    fn get(&self, row: usize) -> Result<Vec<Text>> {
        let fault = |fault: String| self.rows.fault(row, self.name, fault);
        let range = self.lists.range(row).ok_or_else(|| fault("is null, expected a list of texts".to_owned()))?;
        if range.is_empty() {
            return Err(fault("is an empty list, expected at least one answer".to_owned()));
        }
        let item = |index, number| match self.lists.values.get(index).map_err(fault)? {
            Some(Text::Messages(messages)) if messages.is_empty() => {
                Err(fault(format!("item {number} (counted from 0) is an empty list, expected messages")))
            }
            Some(text) => Ok(text),
            None => Err(fault(format!("item {number} (counted from 0) is null"))),
        };
        range.enumerate().map(|(number, index)| item(index, number)).collect()
    }
}

/// The columns `instruction` and `input` of Alpaca (`context` of Dolly): a turn of the user.
struct Instructions<'a> {
    instructions: Column<'a>,
    inputs: Option<TextColumn>,
}

impl<'a> Instructions<'a> {
    fn new(rows: &'a Rows) -> Result<Self> {
        let inputs = rows.first_of(&["input", "context"]).map(|name| rows.strings(name)).transpose()?;
        Ok(Self { instructions: Column::texts(rows, "instruction")?, inputs: inputs.map(TextColumn::Plain) })
    }

    /// `instruction`, and below it `input` where there is one.
    fn get(&self, row: usize) -> Result<Text> {
        let input = self.inputs.as_ref().and_then(|inputs| inputs.get(row).ok().flatten());
        match (self.instructions.get(row)?, input) {
            (Text::Plain(instruction), Some(Text::Plain(input))) if !input.is_empty() => {
                Ok(Text::Messages(vec![Message::user(format!("{instruction}\n\n{input}"))]))
            }
            (Text::Plain(instruction), _) => Ok(Text::Messages(vec![Message::user(instruction)])),
            (messages, _) => Ok(messages),
        }
    }
}

/// The columns `chosen` and `rejected`, with or without `prompt`.
struct Pairs<'a> {
    prompts: Option<Column<'a>>,
    chosen: Column<'a>,
    rejected: Column<'a>,
}

impl<'a> Pairs<'a> {
    fn new(rows: &'a Rows) -> Result<Self> {
        let prompts = rows.has("prompt").then(|| Column::texts(rows, "prompt")).transpose()?;
        Ok(Self { prompts, chosen: Column::texts(rows, "chosen")?, rejected: Column::texts(rows, "rejected")? })
    }

    fn get(&self, row: usize) -> Result<(Text, Vec<Text>)> {
        let (chosen, rejected) = (self.chosen.get(row)?, self.rejected.get(row)?);
        match (&self.prompts, chosen, rejected) {
            (Some(prompts), chosen, rejected) => Ok(one_form(prompts.get(row)?, vec![chosen, rejected])),
            (None, Text::Plain(chosen), Text::Plain(rejected)) => {
                let prompt = shared_prompt(&chosen, &rejected);
                let answers = [&chosen, &rejected].map(|text| Text::Plain(text[prompt.len()..].to_owned()));
                Ok((Text::Plain(prompt.to_owned()), answers.to_vec()))
            }
            (None, Text::Messages(chosen), Text::Messages(rejected)) => {
                let shared = chosen.iter().zip(&rejected).take_while(|(left, right)| left == right).count();
                // Each answer keeps at least its last message.
                let shared = shared.min(chosen.len() - 1).min(rejected.len() - 1);
                let answers = [&chosen, &rejected].map(|turns| Text::Messages(turns[shared..].to_vec()));
                Ok((Text::Messages(chosen[..shared].to_vec()), answers.to_vec()))
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

/// Makes a prompt and its answers all strings or all messages: where one is a list of messages, a string becomes a turn
/// of the user (prompt) or of the assistant (answer). Answers that repeat the prompt's messages lose them.
fn one_form(prompt: Text, answers: Vec<Text>) -> (Text, Vec<Text>) {
    if matches!(prompt, Text::Plain(_)) && answers.iter().all(|answer| matches!(answer, Text::Plain(_))) {
        return (prompt, answers);
    }
    let prompt = match prompt {
        Text::Plain(prompt) if prompt.is_empty() => Vec::new(),
        Text::Plain(prompt) => vec![Message::user(prompt)],
        Text::Messages(messages) => messages,
    };
    let mut answers: Vec<Vec<Message>> = answers
        .into_iter()
        .map(|answer| match answer {
            Text::Plain(answer) => vec![Message::assistant(answer)],
            Text::Messages(messages) => messages,
        })
        .collect();
    if answers.iter().all(|answer| answer.len() > prompt.len() && answer.starts_with(&prompt)) {
        for answer in &mut answers {
            answer.drain(..prompt.len());
        }
    }
    (Text::Messages(prompt), answers.into_iter().map(Text::Messages).collect())
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

    #[test]
    fn strings_beside_messages_become_messages_and_a_repeated_prompt_goes() {
        let full = |answer: &str| Text::Messages(vec![Message::user("Hi"), Message::assistant(answer)]);
        let (prompt, answers) = one_form(Text::Plain("Hi".into()), vec![full("a"), full("b")]);
        assert_eq!(prompt, Text::Messages(vec![Message::user("Hi")]));
        assert_eq!(answers[1], Text::Messages(vec![Message::assistant("b")]));
        let (_, answers) = one_form(prompt, vec![Text::Plain("c".into())]);
        assert_eq!(answers, [Text::Messages(vec![Message::assistant("c")])]);
    }
}
