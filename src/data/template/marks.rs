//! Marks: characters that cannot occur in a conversation, put into the contents of messages to see where these are in the rendered text.
//!
//! A mark is a number between two of Unicode's noncharacters (U+FDD0 to U+FDEF), which are reserved for use within a program.

use super::{Chat, ChatTemplate};
use crate::data::record::Message;
use crate::error::Result;

/// A place in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The message.
    pub(super) message: usize,
    /// The byte of its content.
    pub(super) byte: usize,
}

/// A rendered conversation in whose contents marks were put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Marked {
    /// The text without the marks.
    pub(super) text: String,
    /// The byte of each mark; none for one that the template left out or wrote more than once.
    pub(super) bytes: Vec<Option<usize>>,
}

/// So many characters that occur in no content, or `None` where the contents use them up.
pub(super) fn unused_characters<const COUNT: usize>(messages: &[Message]) -> Option<[char; COUNT]> {
    let unused = |character: &char| !messages.iter().any(|message| message.content().contains(*character));
    let found: Vec<char> = ('\u{fdd0}'..='\u{fdef}').filter(unused).take(COUNT).collect();
    found.try_into().ok()
}

impl ChatTemplate {
    /// The conversation as text, with the places of marks; `None` where there is no character for marks. `places` are in ascending order.
    pub(super) fn apply_marked(
        &self,
        chat: Chat,
        places: &[Place],
        add_generation_prompt: bool,
    ) -> Result<Option<Marked>> {
        let Some(characters) = unused_characters(chat.messages) else { return Ok(None) };
        let messages = with_marks(chat.messages, places, characters);
        let text = self.run(Chat { messages: &messages, ..chat }, add_generation_prompt, None)?;
        Ok(Some(without_marks(&text, characters, places.len())))
    }
}

/// The messages with marks in their contents.
fn with_marks(messages: &[Message], places: &[Place], [open, close]: [char; 2]) -> Vec<Message> {
    let mut marked = messages.to_vec();
    // From the end on, so that the places before stay what they are.
    for (number, place) in places.iter().enumerate().rev() {
        let message = &mut marked[place.message];
        let (before, after) = message.content().split_at(place.byte);
        message.set_content(format!("{before}{open}{number}{close}{after}"));
    }
    marked
}

fn without_marks(text: &str, [open, close]: [char; 2], count: usize) -> Marked {
    let mut marked = Marked { text: String::with_capacity(text.len()), bytes: vec![None; count] };
    let mut seen = vec![false; count];
    let mut parts = text.split(open);
    marked.text.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let number = part.split_once(close).and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest)));
        match number.filter(|(number, _)| *number < count) {
            Some((number, rest)) => {
                marked.bytes[number] = (!seen[number]).then_some(marked.text.len());
                seen[number] = true;
                marked.text.push_str(rest);
            }
            None => {
                marked.text.push(open);
                marked.text.push_str(part);
            }
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_where_they_are_written_once() {
        let characters = ['\u{fdd0}', '\u{fdd1}'];
        let messages = [Message::user("ab"), Message::assistant("é")];
        let places = [(0, 0), (0, 2), (1, 2)].map(|(message, byte)| Place { message, byte });
        let marked = with_marks(&messages, &places, characters);
        let text = format!("<{}|{}>", marked[0].content(), marked[1].content());
        let found = without_marks(&text, characters, 3);
        assert_eq!(found, Marked { text: "<ab|é>".to_owned(), bytes: vec![Some(1), Some(3), Some(6)] });
        let twice = without_marks(&format!("{text}{}", marked[1].content()), characters, 3);
        assert_eq!((twice.text.as_str(), twice.bytes), ("<ab|é>é", vec![Some(1), Some(3), None]));
    }

    #[test]
    fn characters_of_a_content_are_no_marks() {
        let messages = [Message::user("\u{fdd0}0\u{fdd1}")];
        assert_eq!(unused_characters(&messages), Some(['\u{fdd2}', '\u{fdd3}']));
        let all: String = ('\u{fdd0}'..='\u{fdef}').collect();
        assert_eq!(unused_characters::<1>(&[Message::user(all)]), None);
    }
}
