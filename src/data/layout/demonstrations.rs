//! The layouts of demonstrations.

use super::texts::{Column, Instructions, joined};
use crate::data::conversation::{ConversationColumns, OneForm};
use crate::data::parquet::Rows;
use crate::data::record::{Demonstration, Message, Text};
use crate::error::Result;

/// Reads demonstrations; the first layout of the list in [`crate::data::schema`] that the columns allow.
pub(in crate::data) fn demonstrations(rows: &Rows) -> Result<Vec<Demonstration>> {
    let columns = ConversationColumns::new(rows)?;
    let demonstration = |row, mut prompt: Option<Text>, mut completion: Text| {
        match &mut prompt {
            Some(prompt) => columns.complete(row, prompt, std::slice::from_ref(&completion))?,
            None => columns.complete(row, &mut completion, &[])?,
        }
        Ok(Demonstration { prompt, completion, origin: rows.origin(row) })
    };
    let prompted = |row, answer, prompt, completion| match joined(rows, row, &[answer], prompt, vec![completion])? {
        OneForm::Apart(prompt, answers) => {
            demonstration(row, Some(prompt), answers.into_iter().next().unwrap_or(Text::messages(Vec::new())))
        }
        OneForm::Whole(conversations) => {
            demonstration(row, None, Text::messages(conversations.into_iter().flatten().collect()))
        }
    };
    if let (true, Some(answer)) = (rows.has("prompt"), rows.first_of(&["completion", "response"])) {
        let (prompts, completions) = (Column::texts(rows, "prompt")?, Column::texts(rows, answer)?);
        return rows.map(|row| prompted(row, answer, prompts.get(row)?, completions.get(row)?));
    }
    if let Some(name) = rows.first_of(&["messages", "conversations"]) {
        let conversations = Column::texts(rows, name)?;
        return rows.map(|row| {
            let messages = conversations.messages(row)?;
            if !messages.iter().any(Message::is_learned) {
                return Err(conversations.fault(row, "holds no message of the assistant to learn"));
            }
            demonstration(row, None, Text::messages(messages))
        });
    }
    if let (true, Some(answer)) = (rows.has("instruction"), rows.first_of(&["output", "response"])) {
        let (instructions, outputs) = (Instructions::new(rows)?, Column::texts(rows, answer)?);
        return rows.map(|row| prompted(row, answer, instructions.get(row)?, outputs.get(row)?));
    }
    if rows.has("text") {
        let texts = Column::texts(rows, "text")?;
        return rows.map(|row| demonstration(row, None, texts.get(row)?));
    }
    Err(rows.no_layout(
        "demonstrations",
        "`prompt` and `completion`, or `messages`, or `conversations`, or `instruction` and `output`, or `text`",
    ))
}
