//! The layouts of prompts with answers to be scored.

use super::demonstrations::demonstrations_as_marked;
use super::rankings::Pairs;
use super::texts::{Column, ListColumn, joined};
use crate::data::conversation::ConversationColumns;
use crate::data::record::{Answered, Conversation, Message, Text};
use crate::data::schema::AnswerLayout;
use crate::data::table::Rows;
use crate::error::Result;

/// Reads prompts with the answers to be scored.
pub(in crate::data) fn answered(rows: &Rows) -> Result<(AnswerLayout, Vec<Answered>)> {
    let columns = ConversationColumns::new(rows)?;
    let answered = |row, (mut prompt, answers): (Text, Vec<Text>)| {
        let answers: Vec<Text> = answers.into_iter().map(Text::without_marks).collect();
        columns.complete(row, &mut prompt, &answers)?;
        Ok(Answered { prompt, answers, origin: rows.origin(row) })
    };
    if let (true, Some(name)) = (rows.has("prompt"), rows.first_of(&["responses", "completions"])) {
        let (prompts, answers) = (Column::texts(rows, "prompt")?, ListColumn::new(rows, name)?);
        let records =
            rows.map(|row| answered(row, joined(rows, row, &[name], prompts.get(row)?, answers.get(row)?)?.apart()))?;
        return Ok((AnswerLayout::List, records));
    }
    let one_answer = rows.has("prompt") && rows.first_of(&["completion", "response"]).is_some();
    if !one_answer && rows.has("chosen") && rows.has("rejected") {
        let pairs = Pairs::new(rows)?;
        let records = rows.map(|row| answered(row, pairs.get(row)?))?;
        return Ok((AnswerLayout::Pair, records));
    }
    if rows.first_of(&["completion", "response", "messages", "conversations", "output", "text"]).is_none() {
        return Err(rows.no_layout(
            "answers to score",
            "`prompt` with `completion`, `response`, `completions` or `responses`, or a layout of demonstrations, or \
             `chosen` and `rejected`",
        ));
    }
    let records = demonstrations_as_marked(rows)?.into_iter().map(|record| {
        let (prompt, answer) = match (record.prompt, record.completion) {
            (Some(prompt), completion) => (prompt, completion),
            (None, Text::Messages(Conversation { mut messages, inputs })) => {
                // Only the last answer is scored: what follows it is of no use to it.
                let last = messages.iter().rposition(Message::is_assistant).unwrap_or(0);
                messages.truncate(last + 1);
                // Of two turns in a row the second is no continuation of the first.
                let before = messages[..last].iter().rposition(|message| !message.is_assistant());
                let answer = messages.split_off(before.map_or(0, |before| before + 1));
                (Text::Messages(Conversation { messages, inputs }), Text::messages(answer))
            }
            (None, text) => (Text::Plain(String::new()), text),
        };
        Answered { prompt, answers: vec![answer.without_marks()], origin: record.origin }
    });
    Ok((AnswerLayout::One, records.collect()))
}
