//! The layouts of demonstrations.

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;

use super::texts::{Column, Instructions, joined};
use crate::bail;
use crate::data::column::written;
use crate::data::conversation::{ConversationColumns, OneForm};
use crate::data::labels::class_names;
use crate::data::record::{Demonstration, Message, Text};
use crate::data::table::Rows;
use crate::data::typed_text;
use crate::error::Result;

/// Columns by which an answer is marked as good or bad: unpaired preferences (KTO).
const MARKS: [&str; 3] = ["label", "labels", "kto_tag"];

/// Reads demonstrations to learn from; the first layout of the list in [`crate::data::schema`] that the columns allow.
///
/// # Errors
/// Where no layout fits, a row is not what its column promises, or answers are marked as good or bad: the bad ones are no demonstrations.
pub(in crate::data) fn demonstrations(rows: &Rows) -> Result<Vec<Demonstration>> {
    let is_answered = ["prompt", "instruction", "messages", "conversations"].iter().any(|name| rows.has(name));
    let is_class = |name: &str| name == "label" && class_names(rows).is_some();
    for name in MARKS.iter().filter(|name| is_answered && !is_class(name)) {
        if rows.column(name)?.is_some_and(is_mark) {
            bail!(
                "{}: column `{name}` marks each answer as good or bad (unpaired preferences, as for KTO), and every answer \
                 would be learned; leave out the rows of bad answers, and the column",
                rows.file.display()
            );
        }
    }
    let excluded = |record: &&Demonstration| !record.completion.is_learned();
    let records = demonstrations_as_marked(rows)?;
    match records.iter().find(excluded) {
        Some(record) => bail!(
            "{}: the data exclude all messages of the assistant (by `weight` 0, or `train` or `loss` false), so there is \
             nothing to learn; leave the row out",
            record.origin
        ),
        None => Ok(records),
    }
}

/// Whether a column may hold truth values, which are also written as whole numbers, or as texts, as in CSV.
fn is_mark(column: &ArrayRef) -> bool {
    let data_type = column.data_type();
    *data_type == DataType::Boolean
        || data_type.is_integer()
        || written(column).is_some_and(|texts| typed_text::has_mark(&texts))
}

/// Reads demonstrations whatever they are marked as.
pub(super) fn demonstrations_as_marked(rows: &Rows) -> Result<Vec<Demonstration>> {
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
            if !messages.iter().any(Message::is_assistant) {
                return Err(conversations.fault(row, "holds no message of the assistant, so nothing to learn"));
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
