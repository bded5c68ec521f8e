//! A reward model that judges the answers of any policy.

use std::path::{Path, PathBuf};

use super::{Asked, Reply};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{TokenTree, split_by_budget};
use crate::data::schema::{Answered, Message, Text};
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
        let (folder, reads_tokens, has_warned) = (folder.to_path_buf(), false, false);
        Ok(RewardModel { folder, model, tokenizer, max_length, truncation, reads_tokens, has_warned })
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
                (true, Some(tree)) => tree.clone(),
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
        let lengths =
            trees.iter().flat_map(|tree| tree.answers.iter().map(|answer| tree.prompt.len() + answer.tokens.len()));
        let beyond = BeyondContext::of(self.model.architecture()).with(lengths).warning();
        if let Some(warning) = beyond.filter(|_| !self.has_warned) {
            self.has_warned = true;
            warn_once(&format!("warning: {}: {warning}", self.folder.display()));
        }
    }

    /// A prompt with its answers, as the model's own tokens; an answer that was cut off has no end.
    fn read(&mut self, asked: &Asked) -> Result<TokenTree> {
        let answer = |reply: &Reply| match &asked.prompt.prompt {
            Text::Plain(_) => Text::Plain(reply.text.clone()),
            Text::Messages(_) => Text::messages(vec![Message::assistant(reply.text.clone())]),
        };
        let answers: Vec<Text> = asked.replies.iter().map(answer).collect();
        let (prompt, origin) = (&asked.prompt.prompt, &asked.prompt.origin);
        let truncation = &mut self.truncation;
        if !self.model.architecture().causal {
            return self.tokenizer.answer_pairs(Some(prompt), &answers, origin, self.max_length, truncation);
        }
        let ending = |answer: usize| if asked.replies[answer].ended { Ending::Eos } else { Ending::Cut };
        let record = Answered { prompt: prompt.clone(), answers, origin: origin.clone() };
        self.tokenizer.answered(&record, ending, self.max_length, truncation)
    }

    /// One reward an answer, tree after tree.
    fn score_trees(&self, trees: &[TokenTree], tokens_per_batch: usize) -> Result<Vec<f32>> {
        let sizes: Vec<usize> = trees.iter().map(TokenTree::tokens).collect();
        let mut rewards = Vec::new();
        for range in split_by_budget(&sizes, tokens_per_batch) {
            let batch = self.model.pack(&trees[range]);
            let hidden = self.model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
            rewards.extend(self.model.rewards(&hidden, &batch)?.to_vec1::<f32>()?);
        }
        Ok(rewards)
    }
}
