//! The layouts of prompts.

use arrow::json::LineDelimitedWriter;
use serde_json::{Map, Value};

use super::texts::{Column, Instructions};
use crate::data::conversation::ConversationColumns;
use crate::data::json_column::repeated_name;
use crate::data::record::{Message, Prompt, Text};
use crate::data::table::Rows;
use crate::error::{Error, Result};

/// Reads prompts.
pub(in crate::data) fn prompts(rows: &Rows) -> Result<Vec<Prompt>> {
    let columns = ConversationColumns::new(rows)?;
    let prompt = |row, mut prompt: Text| {
        columns.complete(row, &mut prompt, &[])?;
        Ok(Prompt::new(prompt, rows.origin(row)))
    };
    if rows.has("prompt") {
        let prompts = Column::texts(rows, "prompt")?;
        return rows.map(|row| prompt(row, prompts.get(row)?));
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
            prompt(row, Text::messages(messages))
        });
    }
    if rows.has("instruction") {
        let instructions = Instructions::new(rows)?;
        return rows.map(|row| prompt(row, instructions.get(row)?));
    }
    Err(rows.no_layout("prompts", "`prompt`, or `messages`, or `conversations`, or `instruction`"))
}

/// Reads prompts with the other columns of their rows: all but the one that holds the prompt.
pub(in crate::data) fn prompts_with_columns(rows: &Rows) -> Result<Vec<Prompt>> {
    let mut records = prompts(rows)?;
    let holds_prompt = rows.first_of(&["prompt", "messages", "conversations"]);
    for (record, mut columns) in records.iter_mut().zip(json_rows(rows)?) {
        holds_prompt.map(|name| columns.remove(name));
        record.columns = columns;
    }
    Ok(records)
}

/// Each row as a JSON object, nulls left out.
fn json_rows(rows: &Rows) -> Result<Vec<Map<String, Value>>> {
    let fault = |error: &dyn std::fmt::Display| {
        let (file, row) = (rows.file.display(), rows.first_row);
        Error::input(format!("{file}: the rows from {row} on cannot be written as JSON for the rewards: {error}"))
    };
    // Of two values of one name an object would keep the last.
    if let Some(name) = repeated_name(rows.batch.schema_ref().fields()) {
        rows.column(name)?;
    }
    let mut writer = LineDelimitedWriter::new(Vec::new());
    writer.write(&rows.batch).and_then(|()| writer.finish()).map_err(|error| fault(&error))?;
    let lines = serde_json::Deserializer::from_slice(&writer.into_inner()).into_iter().collect::<Result<_, _>>();
    lines.map_err(|error| fault(&error))
}
