//! The layouts of prompts.

use super::texts::{Column, Instructions};
use crate::data::conversation::ConversationColumns;
use crate::data::record::{Message, Prompt, Text};
use crate::data::table::Rows;
use crate::error::Result;

/// Reads prompts.
pub(in crate::data) fn prompts(rows: &Rows) -> Result<Vec<Prompt>> {
    let columns = ConversationColumns::new(rows)?;
    let prompt = |row, mut prompt: Text| {
        columns.complete(row, &mut prompt, &[])?;
        Ok(Prompt { prompt, origin: rows.origin(row) })
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
