//! A reward model that judges the answers of any policy.

use std::path::{Path, PathBuf};

use super::{Asked, Reply, ending};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::answer_reader::AnswerReader;
use crate::data::batch::TokenTree;
use crate::data::schema::{Message, Text};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::files::warn_once;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::architecture::BeyondContext;

/// A frozen model with a head of one label, and how it reads answers.
pub struct RewardModel {
    folder: PathBuf,
    model: Model,
    tokenizer: Tokenizer,
    max_length: usize,
    /// What of the texts that it read was too long.
    truncation: Truncation,
    /// Its vocabulary is the policy's, whose tokens it reads as they are; otherwise it reads their text.
    reads_tokens: bool,
    /// Whether it was said that some texts are longer than the model was made for.
    has_warned: bool,
    /// Whether answers that ended by themselves are read without the end-of-text token.
    as_is: bool,
}

impl RewardModel {
    /// Reads a reward model, which shares its base with others of `bases`.
    ///
    /// # Errors
    /// Where the folder holds no head of one label: there is nothing that could be trusted in its place.
    pub fn load(folder: &Path, bases: &mut Bases, max_length: usize, seed: u64) -> Result<Self> {
        let tokenizer = adapt::tokenizer(folder, &[])?;
        let role = Role { folder, adapters: &[], training: Training::Frozen, head: Head::Scalar, seed };
        let model = bases.load(&role)?;
        let max_length = max_length.min(model.architecture().longest().unwrap_or(usize::MAX));
        let truncation = Truncation::default();
        let (folder, reads_tokens, has_warned, as_is) = (folder.to_path_buf(), false, false, false);
        Ok(RewardModel { folder, model, tokenizer, max_length, truncation, reads_tokens, has_warned, as_is })
    }

    /// The same model, reading answers as they are where `as_is`; else those that ended by themselves end with the end-of-text token.
    pub fn reading_as_is(self, as_is: bool) -> Self {
        RewardModel { as_is, ..self }
    }

    /// How answers end as it reads them, in words.
    pub fn endings(&self) -> String {
        ending::of_reward_model(self.model.head().map(|head| &head.form), self.model.architecture().causal, self.as_is)
    }

    /// The same model, reading the policy's tokens without making text of them where their vocabularies are one.
    pub fn reading_tokens_of(self, policy: &Tokenizer) -> Self {
        let architecture = self.model.architecture();
        // A policy may draw the ids of all rows of its embedding, those without a token too.
        let has_rows = policy.rows().is_none_or(|rows| rows <= architecture.vocabulary);
        let reads_tokens = architecture.causal && has_rows && self.tokenizer.vocabulary() == policy.vocabulary();
        RewardModel { reads_tokens, ..self }
    }

    /// Whether it reads the policy's tokens as they are.
    pub fn reads_tokens(&self) -> bool {
        self.reads_tokens
    }

    /// The folder that it was read from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How many texts lost a part before it read them.
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// Counts on from there.
    pub fn count_from(&mut self, truncation: Truncation) {
        self.truncation = truncation;
    }

    /// The model itself.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The reward of every answer of every prompt.
    pub fn score(&mut self, asked: &[Asked], tokens_per_batch: usize) -> Result<Vec<Vec<f32>>> {
        let mut rewards: Vec<Vec<f32>> = asked.iter().map(|asked| vec![0.0; asked.replies.len()]).collect();
        let (mut trees, mut places) = (Vec::new(), Vec::new());
        for (prompt, asked) in asked.iter().enumerate() {
            trees.push(match (self.reads_tokens, asked.tree) {
                (true, Some(tree)) => self.read_tokens(tree, asked.replies)?,
                _ => self.read(asked)?,
            });
            places.extend((0..asked.replies.len()).map(|answer| (prompt, answer)));
        }
        self.warn_of_lengths(&trees);
        for ((prompt, answer), reward) in places.into_iter().zip(self.score_trees(&trees, tokens_per_batch)?) {
            if !reward.is_finite() {
                bail!(
                    "{}: gives {reward} for the answer {:?} to {}; a reward is a finite number",
                    self.folder.display(),
                    asked[prompt].replies[answer].text,
                    asked[prompt].prompt.origin
                );
            }
            rewards[prompt][answer] = reward;
        }
        Ok(rewards)
    }

    /// Warns once where texts are longer than the model was made for.
    fn warn_of_lengths(&mut self, trees: &[TokenTree]) {
        if self.has_warned {
            return;
        }
        let lengths =
            trees.iter().flat_map(|tree| tree.answers.iter().map(|answer| tree.prompt.len() + answer.tokens.len()));
        if let Some(warning) = BeyondContext::of(self.model.architecture()).with(lengths).warning() {
            self.has_warned = true;
            warn_once(&format!("warning: {}: {warning}", self.folder.display()));
        }
    }

    /// The policy's tokens. An answer that ended by itself ends with a stop token of the tokenizer's, also where another one (`--stop-token`) ended
    /// it and there is room; or without one, as it is.
    fn read_tokens(&self, tree: &TokenTree, replies: &[Reply]) -> Result<TokenTree> {
        let mut tree = tree.clone();
        for (answer, _) in tree.answers.iter_mut().zip(replies).filter(|(_, reply)| reply.ended) {
            let is_closed = answer.tokens.last().is_some_and(|token| self.tokenizer.stop_tokens().contains(token));
            if self.as_is && is_closed {
                answer.tokens.pop();
                answer.learned.pop();
            } else if !self.as_is && !is_closed && tree.prompt.len() + answer.tokens.len() < self.max_length {
                answer.tokens.push(self.tokenizer.eos()?);
                answer.learned.push(true);
            }
        }
        Ok(tree)
    }

    /// A prompt with its answers, as the model's own tokens; an answer that was cut off has no end.
    fn read(&mut self, asked: &Asked) -> Result<TokenTree> {
        let answer = |reply: &Reply| match &asked.prompt.prompt {
            Text::Plain(_) => Text::Plain(reply.text.clone()),
            Text::Messages(_) => Text::messages(vec![Message::assistant(reply.text.clone())]),
        };
        let answers: Vec<Text> = asked.replies.iter().map(answer).collect();
        let (prompt, origin) = (&asked.prompt.prompt, &asked.prompt.origin);
        let ending = |answer: usize| match (asked.replies[answer].ended, self.as_is) {
            (true, false) => Ending::Eos,
            (true, true) => Ending::AsIs,
            (false, _) => Ending::Cut,
        };
        let is_encoder = !self.model.architecture().causal;
        let reader = AnswerReader { tokenizer: &self.tokenizer, is_encoder, max_length: self.max_length };
        reader.tree(Some(prompt), &answers, origin, ending, &mut self.truncation)
    }

    /// One reward an answer, tree after tree.
    fn score_trees(&self, trees: &[TokenTree], tokens_per_batch: usize) -> Result<Vec<f32>> {
        let mut rewards = Vec::new();
        for range in self.model.passes(trees, tokens_per_batch) {
            let batch = self.model.pack(&trees[range]);
            let hidden = self.model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
            rewards.extend(self.model.rewards(&hidden, &batch)?.to_vec1()?);
        }
        Ok(rewards)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::batch::Continuation;
    use crate::data::schema::{Origin, Prompt};
    use crate::score::tests::random_model;
    use candle_core::Device;

    #[test]
    fn an_answer_that_ended_is_read_with_its_end_as_text_and_as_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = random_model(folder.path(), true);
        let tokenizer = Tokenizer::load(&path).unwrap();
        let load = || RewardModel::load(&path, &mut Bases::new(Device::Cpu), 64, 0).unwrap();
        let origin = Origin { file: Arc::from(Path::new("prompts.parquet")), row: 0 };
        let prompt = Prompt::new(Text::Plain("What does Vubek keep?\n".into()), origin);
        let (text, eos) = ("A hen.", tokenizer.eos().unwrap());
        let said = tokenizer.encode_words(text).unwrap();
        let closed = [&said[..], &[eos]].concat();
        let before = tokenizer.prompt(&prompt, 64, &mut Truncation::default()).unwrap();
        let score = |mut model: RewardModel, tokens: &[u32], ended: bool| {
            let answers = vec![Continuation { tokens: tokens.to_vec(), learned: vec![true; tokens.len()] }];
            let tree = TokenTree { prompt: before.clone(), answers };
            let replies = [Reply { text: text.to_string(), ended }];
            let asked = Asked { prompt: &prompt, tree: Some(&tree), replies: &replies };
            model.score(&[asked], 512).unwrap()[0][0]
        };
        let tokens = || load().reading_tokens_of(&tokenizer);
        let (with_end, without) = (score(tokens(), &closed, true), score(tokens(), &said, false));
        assert!(tokens().reads_tokens() && (with_end - without).abs() > 1e-3);
        let is = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
        // Another token than the tokenizer's own ended it.
        is(score(tokens(), &said, true), with_end);
        is(score(load(), &closed, true), with_end);
        is(score(load(), &said, false), without);
        is(score(tokens().reading_as_is(true), &closed, true), without);
        is(score(load().reading_as_is(true), &closed, true), without);
    }
}
