//! Where the assistant's turns are in a rendered conversation, and so what is learned of it.
//!
//! The conversation is rendered once more with marks at the ends of the contents. Where the text is otherwise
//! the same, they say where each content begins and ends in the whole, however the template writes earlier
//! turns. A turn begins where the model would begin to write it, behind the generation prompt, and ends with
//! the first stop token behind its content, or, where there is none, with the text that ends the last turn
//! too. Where marks change what the template writes, the conversation up to the turn is rendered instead, and
//! compared with the start of the whole.

use std::collections::HashMap;
use std::ops::Range;

use super::marks::{Place, unused_characters};
use super::said::{is_open, not_written, says_nothing};
use super::{Chat, ChatTemplate, Piece};
use crate::bail;
use crate::data::record::{Message, TemplateInputs};
use crate::error::Result;

/// From where on the assistant's turns are learned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LearnFrom {
    /// The first message of which anything is learned.
    pub message: usize,
    /// The bytes of its content that are given: an answer that the prompt begins.
    pub byte: usize,
}

/// A conversation in pieces, and what of it could not be learned or was not written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// Together the text up to the end of the last learned turn.
    pub pieces: Vec<Piece>,
    /// The turns that are to be learned.
    pub answers: usize,
    /// Those of them that are not, as they cannot be told apart in the text.
    pub not_learned: usize,
    /// Other turns of the assistant, which the data exclude.
    pub excluded: usize,
    /// Turns that are to be learned and say nothing.
    pub empty: usize,
    /// The messages of which the content (without white space around it) or a called function is not in the
    /// text.
    pub not_written: Vec<usize>,
}

/// Renderings in which one turn alone is marked, at most: only templates that react to marks need them.
const MOST_SINGLE_RENDERINGS: usize = 64;

impl ChatTemplate {
    /// The conversation in pieces. Learned are the assistant's turns from `from` on; `stops` are the texts of
    /// the tokens that end an answer.
    ///
    /// Where the template has blocks `{% generation %}`, these say what is learned of a turn.
    ///
    /// # Errors
    /// Where the template rejects the conversation, or none of the turns can be told apart.
    pub fn render(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        from: LearnFrom,
        stops: &[String],
    ) -> Result<Rendered> {
        let last_of =
            |is_one: fn(&Message) -> bool| messages.iter().rposition(is_one).filter(|&last| last >= from.message);
        // A last answer that is not learned is rendered too, as templates write earlier ones by what follows
        // them.
        let Some(last) = last_of(Message::is_assistant) else {
            bail!("the conversation has no message of the assistant where the answer should be");
        };
        let chat = Chat { messages: &messages[..=last], inputs };
        let learned: Vec<usize> = (from.message..=last).filter(|&turn| messages[turn].is_learned()).collect();
        let (whole, spans) = self.apply_tracked(chat)?;
        let mut turns = Turns::new(self, chat, stops, whole);
        let single = if spans.is_empty() { turns.single(&learned, from) } else { None };
        let ranges = match single {
            Some(range) => vec![Some(vec![range])],
            None => {
                turns.locate(&learned);
                let ranges = turns.marked_by_template(&learned, &spans).unwrap_or_else(|| turns.written(&learned));
                turns.behind_given(ranges, from)?
            }
        };
        let found = ranges.iter().flatten().count();
        if found == 0 && !learned.is_empty() {
            bail!(
                "{}: the chat template does not write the conversation before the last answer as it does when the answer \
                 is to follow, so the answer cannot be told apart; give prompt and completion as strings instead",
                self.program(chat).origin
            );
        }
        let not_written = not_written(chat.messages, &turns.whole);
        let pieces = match learned.is_empty() {
            true => vec![Piece { text: turns.whole, learned: false }],
            false => pieces(&turns.whole, ranges.into_iter().flatten().flatten()),
        };
        let answers = learned.len();
        let all = chat.messages[from.message..].iter().filter(|message| message.is_assistant()).count();
        let given = |turn: usize| if turn == from.message { from.byte } else { 0 };
        let empty = learned.iter().filter(|&&turn| says_nothing(&messages[turn], given(turn))).count();
        Ok(Rendered { pieces, answers, not_learned: answers - found, excluded: all - answers, empty, not_written })
    }

    /// The conversation as text, and the bytes of it that the template's blocks `{% generation %}` wrote.
    fn apply_tracked(&self, chat: Chat) -> Result<(String, Vec<Range<usize>>)> {
        let marks = if self.program(chat).has_generation { unused_characters(chat.messages) } else { None };
        let text = self.run(chat, false, marks)?;
        let Some([start, end]) = marks else { return Ok((text, Vec::new())) };
        let (mut whole, mut spans, mut open) = (String::with_capacity(text.len()), Vec::new(), None);
        for part in text.split_inclusive([start, end]) {
            whole.push_str(part.trim_end_matches([start, end]));
            if part.ends_with(start) {
                open = Some(whole.len());
            } else if part.ends_with(end) {
                spans.extend(open.take().map(|open| open..whole.len()));
            }
        }
        Ok((whole, spans))
    }

    /// The text of a prompt, up to where the answer begins; a last message of the assistant is continued, and
    /// not ended.
    pub fn prompt(&self, messages: &[Message], inputs: &TemplateInputs) -> Result<String> {
        match messages.last() {
            Some(last) if is_open(last) => self.opened(Chat { messages, inputs }),
            _ => self.apply(messages, inputs, true),
        }
    }

    /// The conversation up to the end of its last content. As in `transformers`, white space at the end of
    /// the content is kept if the template keeps white space there.
    fn opened(&self, chat: Chat) -> Result<String> {
        let last = chat.messages.len() - 1;
        let mut messages = chat.messages.to_vec();
        let content = messages[last].content().to_owned();
        messages[last].set_content(format!("{content} "));
        let places = [Place { message: last, byte: content.len() }];
        let marked = self.apply_marked(Chat { messages: &messages, ..chat }, &places, false)?;
        let marked = marked.filter(|marked| marked.text.contains(content.trim()));
        let end = marked.as_ref().and_then(|marked| marked.bytes[0]);
        let (Some(marked), Some(end)) = (marked, end) else {
            bail!(
                "{}: the chat template does not write the content of the assistant's last message as it is, which the \
                 answer is to continue; give the prompt as a string, or end it with another message",
                self.program(chat).origin
            );
        };
        let (text, rest) = marked.text.split_at(end);
        Ok(if rest.starts_with(' ') { text } else { text.trim_end() }.to_owned())
    }
}

/// A text in pieces that are learned or not, up to the end of the last learned one. `ranges` are what is
/// learned, in ascending order.
fn pieces(whole: &str, ranges: impl Iterator<Item = Range<usize>>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut end_of_previous = 0;
    for Range { start, end } in ranges {
        let start = start.max(end_of_previous);
        if start > end {
            continue;
        }
        pieces.push(Piece { text: whole[end_of_previous..start].to_owned(), learned: false });
        pieces.push(Piece { text: whole[start..end].to_owned(), learned: true });
        end_of_previous = end;
    }
    pieces.retain(|piece| !piece.text.is_empty());
    pieces
}

/// What is learned of a turn, in one or several ranges of bytes; `None` for a turn that cannot be told apart.
type Learned = Option<Vec<Range<usize>>>;

/// A rendered conversation and what is known of where its contents are.
struct Turns<'t> {
    template: &'t ChatTemplate,
    chat: Chat<'t>,
    stops: &'t [String],
    whole: String,
    /// Where each content begins in the whole, without white space around it.
    starts: Vec<Option<usize>>,
    /// Where it ends.
    ends: Vec<Option<usize>>,
    /// Whether it is known that the end of a content is not written.
    is_lost: Vec<bool>,
}

impl<'t> Turns<'t> {
    fn new(template: &'t ChatTemplate, chat: Chat<'t>, stops: &'t [String], whole: String) -> Self {
        let count = chat.messages.len();
        Turns {
            template,
            chat,
            stops,
            whole,
            starts: vec![None; count],
            ends: vec![None; count],
            is_lost: vec![false; count],
        }
    }

    /// The first messages.
    fn first(&self, count: usize) -> Chat<'t> {
        Chat { messages: &self.chat.messages[..count], ..self.chat }
    }

    /// The first messages as they are rendered alone, if the template does not reject them.
    fn apply(&self, count: usize, add_generation_prompt: bool) -> Option<String> {
        self.template.run(self.first(count), add_generation_prompt, None).ok()
    }

    /// The one learned turn of a conversation that begins with the prompt as it is rendered alone, if its
    /// content is in one place of the rest: no marks are needed then.
    fn single(&self, learned: &[usize], from: LearnFrom) -> Option<Range<usize>> {
        let &[turn] = learned else { return None };
        if turn == 0 || from.byte > 0 {
            return None;
        }
        let prompt = self.apply(turn, true)?;
        let rest = self.whole.strip_prefix(&prompt)?;
        let content = self.chat.messages[turn].content().trim();
        let mut places = rest.match_indices(content).map(|(at, _)| at);
        let behind = match (content.is_empty(), places.next(), places.next()) {
            (true, ..) => 0,
            (false, Some(at), None) => at + content.len(),
            _ => return None,
        };
        let end = self.end_behind(prompt.len() + behind, self.whole.len()).unwrap_or(self.whole.len());
        Some(prompt.len()..end)
    }

    /// The place before the content of a message or behind it, white space around it left out; none for a
    /// message without content.
    fn place(&self, message: usize, is_end: bool) -> Option<Place> {
        let content = self.chat.messages[message].content();
        let byte = if is_end { content.trim_end().len() } else { content.len() - content.trim_start().len() };
        (!content.trim().is_empty()).then_some(Place { message, byte })
    }

    /// Finds where the contents are, at least those of the learned turns and of the messages before them.
    fn locate(&mut self, learned: &[usize]) {
        let all: Vec<usize> = (0..self.chat.messages.len()).collect();
        let before = learned.iter().filter_map(|turn| turn.checked_sub(1));
        let mut needed: Vec<usize> = before.chain(learned.iter().copied()).collect();
        needed.sort_unstable();
        needed.dedup();
        // Some templates look at how a content begins or ends, mostly at that of other turns than the
        // assistant's.
        for (messages, with_starts) in
            [(&all, true), (&all, false), (&learned.to_vec(), true), (&learned.to_vec(), false)]
        {
            if self.is_located(&needed) {
                break;
            }
            self.mark(messages, with_starts);
        }
        let left: Vec<usize> = needed.into_iter().filter(|&message| !self.is_located(&[message])).collect();
        for message in left.into_iter().take(MOST_SINGLE_RENDERINGS) {
            self.mark(&[message], false);
        }
        for message in 0..self.chat.messages.len() {
            let content = self.chat.messages[message].content().trim();
            let literal = self.ends[message].filter(|&end| self.whole[..end].ends_with(content));
            self.starts[message] = literal.map(|end| end - content.len()).or(self.starts[message]);
        }
    }

    fn is_located(&self, messages: &[usize]) -> bool {
        let is_known = |&message: &usize| {
            self.ends[message].is_some() || self.is_lost[message] || self.place(message, true).is_none()
        };
        messages.iter().all(is_known)
    }

    /// Renders with marks at the contents of these messages. Nothing is learned from it where that changes
    /// the text.
    fn mark(&mut self, messages: &[usize], with_starts: bool) {
        let ends = |&message: &usize| {
            self.place(message, false).filter(|_| with_starts).into_iter().chain(self.place(message, true))
        };
        let places: Vec<Place> = messages.iter().flat_map(ends).collect();
        let marked = self.template.apply_marked(self.chat, &places, false);
        let Ok(Some(marked)) = marked else { return };
        if marked.text != self.whole {
            return;
        }
        for (place, byte) in places.iter().zip(marked.bytes) {
            let message = place.message;
            if Some(*place) == self.place(message, true) {
                self.ends[message] = self.ends[message].or(byte);
                self.is_lost[message] |= byte.is_none();
            } else {
                self.starts[message] = self.starts[message].or(byte);
            }
        }
    }

    /// What the template's blocks `{% generation %}` wrote of each learned turn; `None` where there is no
    /// block in any of them.
    fn marked_by_template(&self, learned: &[usize], spans: &[Range<usize>]) -> Option<Vec<Learned>> {
        let mut ranges: Vec<Learned> = vec![None; learned.len()];
        for span in spans {
            let Some(index) = self.turn_of(span).and_then(|turn| learned.binary_search(&turn).ok()) else { continue };
            let ranges = ranges[index].get_or_insert_default();
            match ranges.last_mut() {
                // A template may mark one stretch of text in several parts.
                Some(previous) if previous.end == span.start => previous.end = span.end,
                _ => ranges.push(span.clone()),
            }
        }
        ranges.iter().any(Option::is_some).then_some(ranges)
    }

    /// The assistant's turn that a block is a part of: the first one whose content does not end before it, or
    /// the last before such a message.
    fn turn_of(&self, span: &Range<usize>) -> Option<usize> {
        let reached = self.ends.iter().position(|end| end.is_some_and(|end| end >= span.start));
        let reached = reached.unwrap_or(self.chat.messages.len() - 1);
        self.chat.messages[..=reached].iter().rposition(Message::is_assistant)
    }

    /// What is written of each learned turn, from behind its header to the token that ends it.
    fn written(&self, learned: &[usize]) -> Vec<Learned> {
        let mut leads = HashMap::new();
        let mut written = |&turn: &usize| {
            let start = self.start(turn, &mut leads)?;
            let end = self.end(turn, start)?;
            let is_written = start < end || start == end && self.place(turn, true).is_none();
            is_written.then(|| std::iter::once(start..end).collect())
        };
        learned.iter().map(&mut written).collect()
    }

    /// The same without what is given of the first answer.
    fn behind_given(&self, mut ranges: Vec<Learned>, from: LearnFrom) -> Result<Vec<Learned>> {
        if from.byte == 0 {
            return Ok(ranges);
        }
        let places = [Place { message: from.message, byte: from.byte }];
        let marked = self.template.apply_marked(self.chat, &places, false).ok().flatten();
        let given = marked.filter(|marked| marked.text == self.whole).and_then(|marked| marked.bytes[0]);
        let (Some(given), Some(Some(first))) = (given, ranges.first_mut()) else {
            bail!(
                "{}: the chat template does not write the answer that the prompt begins as it is, so what follows cannot be \
                 told apart; give prompt and completion as strings instead",
                self.template.program(self.chat).origin
            );
        };
        first.retain(|range| range.end > given);
        first.iter_mut().for_each(|range| range.start = range.start.max(given));
        Ok(ranges)
    }

    /// Where the model begins to write a turn: behind what the template writes between the message before and
    /// the answer that is to follow, as far as the whole has it. The turn that opens a conversation begins
    /// with its content.
    fn start(&self, turn: usize, leads: &mut HashMap<String, Option<Lead>>) -> Option<usize> {
        if turn == 0 {
            return self.starts[0].or_else(|| {
                let prompt = self.apply(0, true)?;
                Some(shared_bytes(&prompt, &self.whole))
            });
        }
        if let Some(end) = self.ends[turn - 1] {
            let role = self.chat.messages[turn - 1].role();
            if !leads.contains_key(role) {
                leads.insert(role.to_owned(), self.lead(turn));
            }
            if let Some(lead) = leads[role].as_ref().filter(|lead| !lead.text.is_empty()) {
                return Some(self.behind_lead(turn, end, lead));
            }
        }
        let prompt = self.apply(turn, true);
        if let Some(prompt) = prompt.as_ref().filter(|prompt| self.whole.starts_with(*prompt)) {
            return Some(prompt.len());
        }
        self.starts[turn].or_else(|| {
            // The generation prompt may hold more than a finished turn shows (an opened <think>): its common
            // part counts.
            let context = self.apply(turn, false)?;
            self.whole.starts_with(&context).then_some(shared_bytes(&prompt?, &self.whole).max(context.len()))
        })
    }

    /// Where a turn begins: behind what leads to it from the content that ends at `end`.
    fn behind_lead(&self, turn: usize, end: usize, lead: &Lead) -> usize {
        // White space at the end of the content may be written or not.
        let ends = [Some(end), self.written_end(turn - 1)].into_iter().flatten();
        let shared = ends.map(|end| (shared_bytes(&lead.text, &self.whole[end..]), end));
        let (shared, end) = shared.max_by_key(|&(shared, _)| shared).unwrap_or((0, end));
        if shared == lead.text.len() || lead.header.is_empty() {
            return end + shared;
        }
        // Some templates write an EOS before the generation prompt, but not before a turn that is there.
        let gap = self.starts[turn].and_then(|start| self.whole.get(end..start));
        match gap.and_then(|gap| gap.rfind(&lead.header)) {
            Some(at) => end + at + lead.header.len(),
            None => end + shared,
        }
    }

    /// What leads from the content of the message before a turn to the turn, where this is to follow.
    fn lead(&self, turn: usize) -> Option<Lead> {
        let text = self.behind_content(turn - 1, true)?;
        let closing = self.behind_content(turn - 1, false).unwrap_or_default();
        let header = text.strip_prefix(&closing).unwrap_or_default().to_owned();
        Some(Lead { text, header })
    }

    /// What the template writes behind the content of a message that is the last one.
    fn behind_content(&self, message: usize, add_generation_prompt: bool) -> Option<String> {
        let Place { message, .. } = self.place(message, true)?;
        let places = [Place { message, byte: self.chat.messages[message].content().len() }];
        let marked = self.template.apply_marked(self.first(message + 1), &places, add_generation_prompt).ok()??;
        Some(marked.text[marked.bytes[0]?..].to_owned())
    }

    /// Where a content ends with the white space at its end, if that is written.
    fn written_end(&self, message: usize) -> Option<usize> {
        let content = self.chat.messages[message].content();
        let space = &content[content.trim_end().len()..];
        self.ends[message].map(|end| if self.whole[end..].starts_with(space) { end + space.len() } else { end })
    }

    /// Where a turn that begins at `start` ends.
    fn end(&self, turn: usize, start: usize) -> Option<usize> {
        let is_last = turn + 1 == self.chat.messages.len();
        let has_content = self.place(turn, true).is_some();
        let limit = self.starts[turn + 1..].iter().flatten().next().map_or(self.whole.len(), |&limit| limit);
        let behind = match self.written_end(turn) {
            Some(end) => end.max(start),
            // Calls of tools, say.
            None if !has_content => start,
            None if is_last => start,
            None if self.is_lost[turn] => return None,
            None => return self.end_by_prefix(turn),
        };
        match self.end_behind(behind, limit) {
            Some(end) => Some(end),
            None if is_last => Some(self.whole.len()),
            None if has_content => Some(behind + self.closing(turn, &self.whole[behind..limit])),
            None => self.end_by_prefix(turn),
        }
    }

    /// The end of the first stop token in a part of the whole.
    fn end_behind(&self, start: usize, limit: usize) -> Option<usize> {
        let part = self.whole.get(start..limit)?;
        let ends = self.stops.iter().filter_map(|stop| Some((part.find(stop.as_str())?, stop.len())));
        // Of two that begin together the longer one.
        let (at, length) = ends.min_by_key(|&(at, length)| (at, std::cmp::Reverse(length)))?;
        Some(start + at + length)
    }

    /// How much of what follows a content ends its turn, where no stop token does.
    fn closing(&self, turn: usize, gap: &str) -> usize {
        let of_last = self.written_end(self.ends.len() - 1).map(|end| self.whole[end..].to_owned());
        let of_turn = || self.behind_content(turn, false);
        let fitting = |closing: &String| {
            self.without_eos(closing).into_iter().find(|closing| gap.starts_with(closing)).map(str::len)
        };
        of_last.as_ref().and_then(fitting).or_else(|| of_turn().as_ref().and_then(fitting)).unwrap_or(0)
    }

    /// The end of a turn where the whole begins with the conversation up to it as it is rendered alone.
    fn end_by_prefix(&self, turn: usize) -> Option<usize> {
        let text = self.apply(turn + 1, false)?;
        let candidates = self.without_eos(&text);
        candidates.into_iter().find(|text| self.whole.starts_with(text)).map(str::len)
    }

    /// A text, and the same without an EOS at its end: some templates end every conversation with one, which
    /// then does not follow earlier turns.
    fn without_eos<'s>(&self, text: &'s str) -> Vec<&'s str> {
        let eos = self.template.special_tokens.get("eos_token");
        std::iter::once(text).chain(eos.and_then(|eos| text.strip_suffix(eos.as_str()))).collect()
    }
}

/// What a template writes between a message and the turn of the assistant that is to follow.
struct Lead {
    /// All of it.
    text: String,
    /// The generation prompt alone.
    header: String,
}

/// The length of the longest common start of two texts, at a boundary of characters.
fn shared_bytes(left: &str, right: &str) -> usize {
    let pairs = left.chars().zip(right.chars());
    pairs.take_while(|(left, right)| left == right).map(|(character, _)| character.len_utf8()).sum()
}
