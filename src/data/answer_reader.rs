//! Answers as a model reads them: behind the prompt, or by an encoder as the second text of a pair.

use super::batch::{Continuation, TokenTree};
use super::schema::{Answered, Origin, Text};
use super::tokenize::{EncodedTexts, Tokenizer};
use super::tokenize_records::{Ending, Truncation, at};
use crate::error::Result;

/// How a model reads prompts with answers.
#[derive(Clone, Copy)]
pub struct AnswerReader<'t> {
    /// The model's tokenizer.
    pub tokenizer: &'t Tokenizer,
    /// Whether it is an encoder, to which an answer is the second text of a pair.
    pub is_encoder: bool,
    /// The most tokens of a prompt with an answer.
    pub max_length: usize,
}

impl AnswerReader<'_> {
    /// A prompt with its answers as a tree: the prompt once, cut for the longest of the answers. `ending`
    /// says how each answer ends; an encoder's tokenizer ends them by itself, and no token of them is
    /// learned.
    pub fn tree(
        &self,
        prompt: Option<&Text>,
        answers: &[Text],
        origin: &Origin,
        ending: impl Fn(usize) -> Ending,
        truncation: &mut Truncation,
    ) -> Result<TokenTree> {
        let tree = match self.is_encoder {
            true => self.pairs(prompt, answers, truncation),
            false => self.tokenizer.tree(prompt, answers, ending, self.max_length, truncation),
        };
        tree.map_err(|error| at(origin, error))
    }

    /// The same of a record.
    pub fn answered(
        &self,
        record: &Answered,
        ending: impl Fn(usize) -> Ending,
        truncation: &mut Truncation,
    ) -> Result<TokenTree> {
        self.tree(Some(&record.prompt), &record.answers, &record.origin, ending, truncation)
    }

    fn pairs(&self, prompt: Option<&Text>, answers: &[Text], truncation: &mut Truncation) -> Result<TokenTree> {
        let mut tree = TokenTree::default();
        let mut was_cut = false;
        for (index, answer) in answers.iter().enumerate() {
            let read = self.tokenizer.pieces(prompt, answer, index == 0, truncation)?;
            let text = |learned: bool| -> String {
                read.pieces.iter().filter(|piece| piece.learned == learned).map(|piece| piece.text.as_str()).collect()
            };
            let encoded = self.tokenizer.encode_texts(&text(false), Some(&text(true)), self.max_length)?;
            let EncodedTexts { tokens: mut first, second, was_cut: cut, .. } = encoded;
            let tokens = first.split_off(second);
            if tree.prompt.is_empty() || first.len() < tree.prompt.len() {
                tree.prompt = first;
            }
            was_cut |= cut;
            tree.answers.push(Continuation { learned: vec![false; tokens.len()], tokens });
        }
        truncation.answers += usize::from(was_cut);
        Ok(tree)
    }
}
