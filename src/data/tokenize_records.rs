//! Records to trees of tokens: which tokens all answers share, and which are learned.
//!
//! Prompt and answer are tokenized together, as one text, because that is what a model reads. A token that covers the
//! end of the prompt and the start of the answer belongs to the answer. EOS ends every answer and is learned, whatever
//! its id is (it may be the padding token's): what is learned is known from where a token stands, never from its id.

use std::ops::AddAssign;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::{Continuation, TokenTree};
use super::chat_counts::ChatCounts;
use super::schema::{Demonstration, Labelled, Message, Origin, Prompt, Ranking, Text};
use super::template::{LearnFrom, Piece, is_open, not_written};
use super::tokenize::{Encoded, EncodedTexts, Tokenizer};
use crate::bail;
use crate::error::{Error, Result};

/// How many records were too long, and what is left out of rankings ([`super::pairs`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Truncation {
    /// Prompts that lost their start.
    pub prompts: usize,
    /// Answers that lost their end, and with it EOS.
    pub answers: usize,
    /// What is not learned or read of conversations and prompts as the data have them.
    pub chats: ChatCounts,
    /// Records in which there is nothing to learn, ties and those without pairs among them.
    pub left_out: usize,
    /// Rankings whose answers are one tie.
    pub ties: usize,
    /// Pairs of answers that are the same.
    pub same_pairs: usize,
    /// Of these, pairs that are the same only because they were cut.
    pub same_when_cut: usize,
    /// Rankings all of whose pairs are the same.
    pub without_pairs: usize,
}

impl Truncation {
    /// What was cut to `max_length` tokens, in words; `None` where nothing was.
    pub fn cuts(&self, max_length: usize) -> Option<String> {
        let lost = match (self.prompts, self.answers) {
            (0, 0) => return None,
            (prompts, 0) => format!("{prompts} prompts lost their start"),
            (0, answers) => format!("{answers} answers lost their end"),
            (prompts, answers) => format!("{prompts} prompts lost their start and {answers} answers lost their end"),
        };
        Some(format!("{lost} to --max-length {max_length}"))
    }
}

impl AddAssign for Truncation {
    fn add_assign(&mut self, other: Self) {
        self.prompts += other.prompts;
        self.answers += other.answers;
        self.chats += other.chats;
        self.left_out += other.left_out;
        self.ties += other.ties;
        self.same_pairs += other.same_pairs;
        self.same_when_cut += other.same_when_cut;
        self.without_pairs += other.without_pairs;
    }
}

/// What an answer ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// EOS, unless the answer ends with it already.
    Eos,
    /// What it ends with itself, or its template ends it with.
    AsIs,
    /// Nothing: it was cut off, so that not even its template ends it.
    Cut,
}

impl EncodedTexts {
    /// As a tree in which no token is learned: the first of a pair is the prompt, the second the answer; a single text is an answer without prompt.
    pub fn tree(&self) -> TokenTree {
        let split = if self.second < self.tokens.len() { self.second } else { 0 };
        let (prompt, answer) = self.tokens.split_at(split);
        let answer = Continuation { tokens: answer.to_vec(), learned: vec![false; answer.len()] };
        TokenTree { prompt: prompt.to_vec(), answers: vec![answer] }
    }
}

/// A text whose probability is measured, as a tree of one answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldOut {
    /// What the model reads; the learned tokens are predicted, but for the first of a text that nothing stands before.
    pub tree: TokenTree,
    /// Bytes of the text (in UTF-8) that the predicted tokens stand for.
    pub bytes: usize,
    /// Tokens at its end that were to be predicted and are not read.
    pub left_out: usize,
    /// Tokens at the start of its prompt that are not read.
    pub prompt_left_out: usize,
}

/// The text of a prompt with one answer.
pub(super) struct Read {
    pub(super) pieces: Vec<Piece>,
    /// Whether a chat template wrote it.
    is_chat: bool,
}

/// The tokens of one prompt with one answer.
struct Sequence {
    tokens: Vec<u32>,
    learned: Vec<bool>,
    /// Of each token, the bytes of the text that it stands for.
    bytes: Vec<(usize, usize)>,
}

impl Sequence {
    /// Where the answer begins: at the first learned token.
    fn answer_start(&self) -> usize {
        self.learned.iter().position(|&learned| learned).unwrap_or(self.tokens.len())
    }
}

impl Tokenizer {
    /// A demonstration as a tree of one answer. The tokens before the first learned one are the prompt.
    ///
    /// Prompt and answer together keep to `max_length` tokens: a prompt loses its start (not BOS); an answer that is
    /// too long by itself loses its end.
    pub fn demonstration(
        &self,
        record: &Demonstration,
        max_length: usize,
        truncation: &mut Truncation,
    ) -> Result<TokenTree> {
        let answers = std::slice::from_ref(&record.completion);
        let tree = self.tree(record.prompt.as_ref(), answers, |_| Ending::Eos, max_length, truncation);
        tree.map_err(|error| at(&record.origin, error))
    }

    /// A text to be measured: as [`demonstration`](Self::demonstration), but nothing is put behind it, so that every predicted token stands for bytes of the text. One that is
    /// longer than `max_length` tokens keeps its beginning.
    pub fn held_out(&self, record: &Demonstration, max_length: usize, truncation: &mut Truncation) -> Result<HeldOut> {
        if max_length < 2 {
            bail!("--max-length {max_length} leaves no token to be predicted; set 2 or more");
        }
        let sequence = self.sequence(record.prompt.as_ref(), &record.completion, Ending::AsIs, true, truncation);
        let Sequence { mut tokens, mut learned, bytes } = sequence.map_err(|error| at(&record.origin, error))?;
        let start = learned.iter().position(|&learned| learned).unwrap_or(tokens.len());
        let answer = Continuation { tokens: tokens.split_off(start), learned: learned.split_off(start) };
        let count = |answer: &Continuation| answer.learned.iter().filter(|&&learned| learned).count();
        let (whole, prompt) = (count(&answer), tokens.len());
        let tree = TokenTree { prompt: tokens, answers: vec![answer] };
        let tree = self.shortened(tree, max_length, &mut Truncation::default());
        let unpredicted = usize::from(tree.prompt.is_empty());
        let predicted = bytes[start..].iter().zip(&tree.answers[0].learned).skip(unpredicted);
        let bytes = covered(predicted.filter(|(_, learned)| **learned).map(|(bytes, _)| *bytes));
        let left_out = whole - count(&tree.answers[0]);
        Ok(HeldOut { bytes, left_out, prompt_left_out: prompt - tree.prompt.len(), tree })
    }

    /// A ranking as a tree: the prompt once, and each answer. The prompt is cut for the longest of the answers.
    pub fn ranking(&self, record: &Ranking, max_length: usize, truncation: &mut Truncation) -> Result<TokenTree> {
        let tree = self.tree(Some(&record.prompt), &record.responses, |_| Ending::Eos, max_length, truncation);
        tree.map_err(|error| at(&record.origin, error))
    }

    /// A text, or a pair of texts, to be classified. One that is too long counts as a cut answer.
    pub fn labelled(&self, record: &Labelled, max_length: usize, truncation: &mut Truncation) -> Result<EncodedTexts> {
        let encoded = self.encode_texts(&record.text, record.pair.as_deref(), max_length);
        let encoded = encoded.map_err(|error| at(&record.origin, error))?;
        truncation.answers += usize::from(encoded.was_cut);
        if encoded.tokens.is_empty() {
            return Err(at(&record.origin, Error::input("the text has no token")));
        }
        Ok(encoded)
    }

    /// The tokens of a prompt, up to where the answer begins; of a longer one the last `max_length` (and BOS).
    pub fn prompt(&self, record: &Prompt, max_length: usize, truncation: &mut Truncation) -> Result<Vec<u32>> {
        let tokens = self.prompt_tokens(&record.prompt, truncation).map_err(|error| at(&record.origin, error))?;
        if tokens.is_empty() {
            return Err(at(&record.origin, Error::input("the prompt is empty, and no token begins a text")));
        }
        Ok(self.without_start(tokens, max_length, truncation))
    }

    fn prompt_tokens(&self, prompt: &Text, truncation: &mut Truncation) -> Result<Vec<u32>> {
        truncation.chats.prompts += 1;
        match prompt {
            Text::Plain(text) => {
                truncation.chats.spaced_prompts += usize::from(ends_in_space(text));
                self.encode(text)
            }
            Text::Messages(messages) => {
                let text = self.chat_template().prompt(messages, &messages.inputs)?;
                let ends_in_answer = messages.last().is_some_and(is_open);
                truncation.chats.spaced_prompts += usize::from(ends_in_answer && ends_in_space(&text));
                truncation.chats.add_messages(messages, &not_written(messages, &text), 0);
                Ok(self.encode_with_bytes(&text, true)?.ids)
            }
        }
    }

    /// `prompt` followed by each of `answers`: one tree, whose prompt is what all of them have in common. `ending` says how each answer ends.
    ///
    /// # Errors
    /// Where the chat template fails, or there is no token at all to predict from or to predict.
    pub fn tree(
        &self,
        prompt: Option<&Text>,
        answers: &[Text],
        ending: impl Fn(usize) -> Ending,
        max_length: usize,
        truncation: &mut Truncation,
    ) -> Result<TokenTree> {
        if max_length < 2 {
            bail!("--max-length {max_length} leaves no room for a prompt and an answer; set 2 or more");
        }
        let mut sequences = Vec::with_capacity(answers.len());
        for (index, answer) in answers.iter().enumerate() {
            sequences.push(self.sequence(prompt, answer, ending(index), index == 0, truncation)?);
        }
        let Some(first) = sequences.first() else { bail!("there is no answer") };
        let mut shared = first.answer_start();
        for other in &sequences[1..] {
            let limit = shared.min(other.answer_start());
            let pairs = first.tokens.iter().zip(&other.tokens);
            shared = pairs.take(limit).take_while(|(left, right)| left == right).count();
        }
        let prompt = first.tokens[..shared].to_vec();
        let answers = sequences.into_iter().map(|mut sequence| Continuation {
            tokens: sequence.tokens.split_off(shared),
            learned: sequence.learned.split_off(shared),
        });
        let tree = self.shortened(TokenTree { prompt, answers: answers.collect() }, max_length, truncation);
        if tree.prompt.is_empty() && tree.answers.iter().any(|answer| answer.tokens.is_empty()) {
            bail!("prompt and answer are empty, and no token begins or ends a text");
        }
        Ok(tree)
    }

    /// The tokens of a prompt with one answer; `is_first` says that what is said of the prompt is not counted yet.
    fn sequence(
        &self,
        prompt: Option<&Text>,
        answer: &Text,
        ending: Ending,
        is_first: bool,
        truncation: &mut Truncation,
    ) -> Result<Sequence> {
        let Read { mut pieces, is_chat } = self.pieces(prompt, answer, is_first, truncation)?;
        let closed = match is_chat {
            true => self.cut_at_stops(&mut pieces),
            false => pieces.last().is_some_and(|last| self.stop_texts().iter().any(|stop| last.text.ends_with(stop))),
        };
        match ending {
            Ending::Cut if closed && is_chat => self.drop_stop(&mut pieces),
            Ending::Eos if closed && is_chat => self.drop_doubled_stop(&mut pieces),
            _ => {}
        }
        let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        let encoded = self.encode_with_bytes(&text, is_chat)?;
        let given: usize = pieces.iter().take_while(|piece| !piece.learned).map(|piece| piece.text.len()).sum();
        if is_first && given > 0 && given < text.len() {
            truncation.chats.prompts += 1;
            let is_split = self.is_split(&text, given, &encoded)?;
            truncation.chats.split_prompts += usize::from(is_split);
            truncation.chats.spaced_prompts += usize::from(!is_split && !is_chat && ends_in_space(&text[..given]));
        }
        let learned = learned_tokens(&pieces, &encoded.bytes);
        let mut sequence = Sequence { learned, tokens: encoded.ids, bytes: encoded.bytes };
        if ending == Ending::Eos && !closed {
            sequence.tokens.push(self.eos()?);
            sequence.learned.push(true);
            sequence.bytes.push((text.len(), text.len()));
        }
        Ok(sequence)
    }

    /// Takes away the stop token that an answer of the data ends with, where the template writes one behind it.
    fn drop_doubled_stop(&self, pieces: &mut [Piece]) {
        let Some(last) = pieces.iter_mut().rev().find(|piece| piece.learned) else { return };
        let without =
            |text: &str| self.stop_texts().iter().find_map(|stop| text.strip_suffix(stop.as_str())).map(str::len);
        while let Some(once) = without(&last.text)
            && without(last.text[..once].trim_end()).is_some()
        {
            let end = last.text.split_off(once);
            let twice = without(last.text.trim_end()).unwrap_or(once);
            last.text.truncate(twice);
            last.text += &end;
        }
    }

    /// Whether the first `given` bytes of a text are other tokens by themselves than in the whole.
    fn is_split(&self, text: &str, given: usize, encoded: &Encoded) -> Result<bool> {
        let behind = encoded.bytes.iter().position(|&(_, end)| end > given).unwrap_or(encoded.ids.len());
        if encoded.bytes.get(behind).is_some_and(|&(start, _)| start < given) {
            return Ok(true);
        }
        // Where no token reaches over the end, only white space before it depends on what follows.
        if !text[..given].ends_with(char::is_whitespace) {
            return Ok(false);
        }
        // Texts are split at added tokens before anything else, so the last of these is a place to begin at.
        let begin = (0..behind).rev().find(|&token| self.is_added(encoded.ids[token]) && encoded.bytes[token].1 > 0);
        let begin = begin.or_else(|| encoded.bytes.iter().position(|&(_, end)| end > 0)).unwrap_or(0);
        let Some(&(start, _)) = encoded.bytes.get(begin) else { return Ok(false) };
        let alone = self.encode_words(&text[start.min(given)..given])?;
        Ok(alone != encoded.ids[begin..behind.max(begin)])
    }

    /// The text of prompt and answer, in pieces that are learned or not.
    pub(super) fn pieces(
        &self,
        prompt: Option<&Text>,
        answer: &Text,
        is_first: bool,
        truncation: &mut Truncation,
    ) -> Result<Read> {
        let as_messages = |text: &Text, message: fn(String) -> Message| match text {
            Text::Plain(text) if text.is_empty() => Vec::new(),
            Text::Plain(text) => vec![message(text.clone())],
            Text::Messages(conversation) => conversation.messages.clone(),
        };
        let piece = |text: &String, learned: bool| Piece { text: text.clone(), learned };
        match (prompt, answer) {
            (None, Text::Plain(answer)) => {
                truncation.chats.add_string(answer);
                Ok(Read { pieces: vec![piece(answer, true)], is_chat: false })
            }
            (Some(Text::Plain(prompt)), Text::Plain(answer)) => {
                truncation.chats.add_string(answer);
                Ok(Read { pieces: vec![piece(prompt, false), piece(answer, true)], is_chat: false })
            }
            (prompt, answer) => {
                let messages = prompt.map_or_else(Vec::new, |prompt| as_messages(prompt, Message::user));
                let (messages, from) = joined(messages, as_messages(answer, Message::assistant));
                let inputs = match (prompt, answer) {
                    (Some(Text::Messages(prompt)), _) => prompt.inputs.clone(),
                    (_, Text::Messages(answer)) => answer.inputs.clone(),
                    _ => Arc::default(),
                };
                let rendered = self.chat_template().render(&messages, &inputs, from, self.stop_texts())?;
                truncation.chats.add_rendered(&messages, &rendered, if is_first { 0 } else { from.message });
                Ok(Read { pieces: rendered.pieces, is_chat: true })
            }
        }
    }

    /// Ends each learned turn where a stop token ends it: the line break that many templates write after it is not
    /// learned, and dropped after the last turn. Returns whether a stop token ends the last turn.
    fn cut_at_stops(&self, pieces: &mut Vec<Piece>) -> bool {
        let mut cut = Vec::with_capacity(pieces.len() + 1);
        let mut closed = false;
        for mut piece in pieces.drain(..) {
            let end = piece.text.trim_end().len();
            closed = piece.learned && self.stop_texts().iter().any(|stop| piece.text[..end].ends_with(stop));
            let rest = if closed { piece.text.split_off(end) } else { String::new() };
            cut.push(piece);
            cut.push(Piece { text: rest, learned: false });
        }
        cut.pop();
        *pieces = cut;
        closed
    }

    /// Takes away the stop token that ends the last turn.
    fn drop_stop(&self, pieces: &mut [Piece]) {
        let Some(last) = pieces.iter_mut().rev().find(|piece| piece.learned) else { return };
        let text = last.text.trim_end();
        if let Some(kept) = self.stop_texts().iter().find_map(|stop| text.strip_suffix(stop.as_str())) {
            last.text = kept.to_string();
        }
    }

    fn shortened(&self, mut tree: TokenTree, max_length: usize, truncation: &mut Truncation) -> TokenTree {
        // Whatever the answer's length, its first token is predicted from at least one token of the prompt.
        let limit = max_length - usize::from(!tree.prompt.is_empty());
        for answer in &mut tree.answers {
            if answer.tokens.len() > limit {
                answer.tokens.truncate(limit);
                answer.learned.truncate(limit);
                truncation.answers += 1;
            }
        }
        let longest = tree.answers.iter().map(|answer| answer.tokens.len()).max().unwrap_or(0);
        tree.prompt = self.without_start(tree.prompt, max_length - longest, truncation);
        tree
    }

    /// The last `length` tokens of a prompt; if it began with BOS, BOS and the last `length - 1`.
    fn without_start(&self, mut prompt: Vec<u32>, length: usize, truncation: &mut Truncation) -> Vec<u32> {
        if prompt.len() > length {
            let kept = usize::from(length > 1 && self.bos().is_some_and(|bos| prompt[0] == bos));
            prompt.drain(kept..kept + prompt.len() - length);
            truncation.prompts += 1;
        }
        prompt
    }
}

/// Whether a text ends in white space that tokenizers join to the word after it, as they do not join line breaks.
fn ends_in_space(text: &str) -> bool {
    text.ends_with(|last: char| last.is_whitespace() && !matches!(last, '\n' | '\r'))
}

/// The messages of a prompt with those of an answer, which goes on with the prompt's last one where the assistant began it.
fn joined(mut prompt: Vec<Message>, mut answer: Vec<Message>) -> (Vec<Message>, LearnFrom) {
    let mut from = LearnFrom { message: prompt.len(), byte: 0 };
    if let (Some(given), Some(first)) = (prompt.last().filter(|last| is_open(last)), answer.first_mut())
        && first.is_assistant()
    {
        from = LearnFrom { message: prompt.len() - 1, byte: given.content().len() };
        first.set_content(format!("{}{}", given.content(), first.content()));
        prompt.pop();
    }
    prompt.append(&mut answer);
    (prompt, from)
}

/// How many bytes ranges in order cover together: the tokens of one character may all stand for the whole of it.
fn covered(ranges: impl Iterator<Item = (usize, usize)>) -> usize {
    let (total, _) = ranges.fold((0, 0), |(total, reached), (start, end)| {
        (total + end.saturating_sub(start.max(reached)), reached.max(end))
    });
    total
}

/// For each token whether it covers a learned byte.
fn learned_tokens(pieces: &[Piece], bytes: &[(usize, usize)]) -> Vec<bool> {
    let mut end = 0;
    let mut ends: Vec<(usize, bool)> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        end += piece.text.len();
        ends.push((end, piece.learned));
    }
    let mut current = 0;
    let covers_learned = |&(start, end): &(usize, usize)| {
        while current < ends.len() && ends[current].0 <= start {
            current += 1;
        }
        let mut piece_start = start;
        for &(piece_end, learned) in &ends[current..] {
            if piece_start >= end {
                break;
            }
            if learned {
                return true;
            }
            piece_start = piece_end;
        }
        false
    };
    bytes.iter().map(covers_learned).collect()
}

pub(super) fn at(origin: &Origin, error: Error) -> Error {
    match error {
        Error::Input(sentence) => Error::Input(format!("{origin}: {sentence}")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_is_said_of_prompts_and_answers_alike() {
        let cuts = |prompts, answers| Truncation { prompts, answers, ..Default::default() }.cuts(8);
        assert_eq!(cuts(0, 0), None);
        assert_eq!(cuts(2, 0).unwrap(), "2 prompts lost their start to --max-length 8");
        assert_eq!(cuts(0, 3).unwrap(), "3 answers lost their end to --max-length 8");
        let both = cuts(2, 3).unwrap();
        assert_eq!(both, "2 prompts lost their start and 3 answers lost their end to --max-length 8");
    }
}
