//! Columns in which every row must hold a text, or a list of texts.

use arrow::array::{Array, LargeStringArray};

use crate::data::column::{Lists, TextColumn, begins_like_messages};
use crate::data::conversation::{History, OneForm, one_form};
use crate::data::notes;
use crate::data::record::{Message, Origin, Text};
use crate::data::table::Rows;
use crate::error::{Error, Result};

impl Rows {
    /// Where a row was read.
    pub fn origin(&self, row: usize) -> Origin {
        Origin { file: self.file.clone(), row: self.first_row + row }
    }

    pub(in crate::data) fn map<T>(&self, record: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
        (0..self.batch.num_rows()).map(record).collect()
    }

    pub(in crate::data) fn first_of<'a>(&self, names: &[&'a str]) -> Option<&'a str> {
        names.iter().find(|name| self.has(name)).copied()
    }

    pub(in crate::data) fn fault(&self, row: usize, column: &str, fault: impl std::fmt::Display) -> Error {
        Error::input(format!("{}, column `{column}`: {fault}", self.origin(row)))
    }

    pub(in crate::data) fn no_layout(&self, what: &str, accepted: &str) -> Error {
        let columns = self.column_names();
        Error::input(format!(
            "{}: no {what} can be made of the columns {columns}; name the columns {accepted}",
            self.file.display()
        ))
    }
}

/// Counts a row whose text is JSON, or looks as if it should be.
fn count_json(rows: &Rows, row: usize, column: &TextColumn, text: &Text) {
    let TextColumn::Plain { is_json: false, .. } = column else { return };
    match text {
        Text::Messages(_) => notes::count("hold messages as JSON text, which are read as messages", &rows.origin(row)),
        Text::Plain(text) if begins_like_messages(text) => {
            let what = "hold a text that begins like a list of messages but cannot be read as JSON, and are read as plain text";
            notes::count(what, &rows.origin(row));
        }
        Text::Plain(_) => {}
    }
}

/// Counts a row whose answers are strings that begin with the prompt: they may hold what the model is given
/// already.
fn count_repeated_prompt(rows: &Rows, row: usize, prompt: &Text, answers: &[Text]) {
    let prompt = match prompt {
        Text::Plain(prompt) => prompt.as_str(),
        Text::Messages(messages) => messages.last().map_or("", Message::content),
    };
    if answers.iter().any(|answer| matches!(answer, Text::Plain(answer) if repeats(answer, prompt))) {
        let what = "have answers that begin with the text of the prompt, which the model is given twice then";
        notes::count(what, &rows.origin(row));
    }
}

/// Whether an answer begins with the prompt, white space around both left out, and not with a longer word
/// than its last one.
fn repeats(answer: &str, prompt: &str) -> bool {
    let prompt = prompt.trim();
    let Some(rest) = answer.trim_start().strip_prefix(prompt) else { return false };
    let cuts_a_word = prompt.ends_with(char::is_alphanumeric) && rest.starts_with(char::is_alphanumeric);
    !prompt.is_empty() && !cuts_a_word
}

/// A column in which every row must hold a text.
pub(super) struct Column<'a> {
    rows: &'a Rows,
    name: &'a str,
    texts: TextColumn,
}

impl<'a> Column<'a> {
    pub(super) fn texts(rows: &'a Rows, name: &'a str) -> Result<Self> {
        Ok(Self { rows, name, texts: rows.texts(name)? })
    }

    pub(super) fn fault(&self, row: usize, fault: impl std::fmt::Display) -> Error {
        self.rows.fault(row, self.name, fault)
    }

    pub(super) fn get(&self, row: usize) -> Result<Text> {
        match self.texts.get(row).map_err(|fault| self.fault(row, fault))? {
            None => Err(self.fault(row, "is null, expected a text")),
            Some(Text::Messages(messages)) if messages.is_empty() => {
                Err(self.fault(row, "is an empty list, expected messages"))
            }
            Some(text) => {
                count_json(self.rows, row, &self.texts, &text);
                Ok(text)
            }
        }
    }

    pub(super) fn messages(&self, row: usize) -> Result<Vec<Message>> {
        match self.get(row)? {
            Text::Messages(conversation) => Ok(conversation.messages),
            Text::Plain(_) => {
                Err(self.fault(row, "is a string, expected a list of {role, content} or the same as JSON"))
            }
        }
    }
}

/// A column in which every row must hold a list of texts with at least one item.
pub(super) struct ListColumn<'a> {
    rows: &'a Rows,
    name: &'a str,
    lists: Lists<TextColumn>,
}

impl<'a> ListColumn<'a> {
    pub(super) fn new(rows: &'a Rows, name: &'a str) -> Result<Self> {
        Ok(Self { rows, name, lists: rows.text_lists(name)? })
    }

    pub(super) fn get(&self, row: usize) -> Result<Vec<Text>> {
        let fault = |fault: String| self.rows.fault(row, self.name, fault);
        let range = self.lists.range(row).ok_or_else(|| fault("is null, expected a list of texts".to_owned()))?;
        if range.is_empty() {
            return Err(fault("is an empty list, expected at least one answer".to_owned()));
        }
        let item = |index, number| match self.lists.values.get(index).map_err(fault)? {
            Some(Text::Messages(messages)) if messages.is_empty() => {
                Err(fault(format!("item {number} (counted from 0) is an empty list, expected messages")))
            }
            Some(text) => {
                count_json(self.rows, row, &self.lists.values, &text);
                Ok(text)
            }
            None => Err(fault(format!("item {number} (counted from 0) is null"))),
        };
        range.enumerate().map(|(number, index)| item(index, number)).collect()
    }
}

/// The columns `history`, `instruction` and `input` of Alpaca (`context` of Dolly): turns, the last one of
/// the user.
pub(super) struct Instructions<'a> {
    instructions: Column<'a>,
    inputs: Option<(&'a str, LargeStringArray)>,
    history: History<'a>,
}

impl<'a> Instructions<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self> {
        let name = rows.first_of(&["input", "context"]);
        let inputs = name.map(|name| rows.strings(name).map(|inputs| (name, inputs))).transpose()?;
        Ok(Self { instructions: Column::texts(rows, "instruction")?, inputs, history: History::new(rows)? })
    }

    /// What was said before, then `instruction`, and below it `input` where there is one.
    pub(super) fn get(&self, row: usize) -> Result<Text> {
        let inputs = self.inputs.as_ref().filter(|(_, inputs)| inputs.is_valid(row));
        let input = inputs.map(|(name, inputs)| (*name, inputs.value(row))).filter(|(_, input)| !input.is_empty());
        let mut turns = self.history.get(row)?;
        match (self.instructions.get(row)?, input) {
            (Text::Plain(instruction), Some((_, input))) => {
                turns.push(Message::user(format!("{instruction}\n\n{input}")))
            }
            (Text::Plain(instruction), None) => turns.push(Message::user(instruction)),
            (Text::Messages(conversation), None) => turns.extend(conversation.messages),
            (Text::Messages(_), Some((name, _))) => {
                let fault = format!("holds messages, to which `{name}` cannot be added; add it to the last of them");
                return Err(self.instructions.fault(row, fault));
            }
        }
        Ok(Text::messages(turns))
    }
}

/// The prompt and the answers of a row in one form (see [`one_form`]); the answers are of `columns`, or all
/// of the one column.
pub(super) fn joined(rows: &Rows, row: usize, columns: &[&str], prompt: Text, answers: Vec<Text>) -> Result<OneForm> {
    let is_list = columns.len() == 1 && answers.len() > 1;
    count_repeated_prompt(rows, row, &prompt, &answers);
    one_form(prompt, answers).map_err(|(number, fault)| {
        let column = columns.get(number).or(columns.last()).copied().unwrap_or_default();
        let fault = if is_list { format!("item {number} (counted from 0) {fault}") } else { fault };
        rows.fault(row, column, fault)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_repeats_the_prompt_where_no_word_is_cut() {
        for (answer, prompt) in [("2+2= 4", "2+2="), (" Hi\nthere", "Hi \n"), ("Hi", "Hi"), ("Q: 1\nA: 2", "Q: 1\nA:")]
        {
            assert!(repeats(answer, prompt), "{answer:?} {prompt:?}");
        }
        for (answer, prompt) in [("Highway", "Hi"), ("12", "1"), ("a", ""), ("a", " \n"), ("Hello", "Hi")] {
            assert!(!repeats(answer, prompt), "{answer:?} {prompt:?}");
        }
    }
}
