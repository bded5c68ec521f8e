//! Episodes: sampled answers and everything that is known about them before the update.

use candle_core::Tensor;

use super::advantage;
use crate::data::batch::{Batch, Continuation, TokenTree, split_by_budget};
use crate::error::Result;
use crate::generate::Answer;
use crate::model::Model;
use crate::model::adapter::Pass;

/// One sampled answer. Every vector has one number a token of the answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Episode {
    /// Prompt and answer.
    pub tree: TokenTree,
    /// Whether the answer ended with a stop token.
    pub ended: bool,
    /// `log π_old`, under the policy that sampled it.
    pub log_probs: Vec<f32>,
    /// `log π_ref`, under the reference.
    pub reference_log_probs: Vec<f32>,
    /// `V_old`, the value model's expectation before each token.
    pub values: Vec<f32>,
    /// The reward model's score, any penalty subtracted.
    pub score: f32,
    /// Rewards, KL penalty included.
    pub rewards: Vec<f32>,
    /// Advantages, before whitening.
    pub advantages: Vec<f32>,
    /// What the value model is trained towards.
    pub returns: Vec<f32>,
}

impl Episode {
    /// An episode of which nothing is known but its tokens.
    pub fn new(prompt: &[u32], answer: Answer) -> Self {
        let learned = vec![true; answer.tokens.len()];
        let tree =
            TokenTree { prompt: prompt.to_vec(), answers: vec![Continuation { tokens: answer.tokens, learned }] };
        Episode { tree, ended: answer.ended, ..Default::default() }
    }

    /// Number of tokens of the answer.
    pub fn len(&self) -> usize {
        self.tree.answers[0].tokens.len()
    }

    /// Whether the answer has no token, which no sampled answer is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `Σ (log π_old - log π_ref)`, the k1 estimate of the answer's divergence from the reference.
    pub fn kl(&self) -> f64 {
        let terms = self.log_probs.iter().zip(&self.reference_log_probs);
        terms.map(|(log_prob, reference)| f64::from(log_prob - reference)).sum()
    }

    /// Fills in rewards, advantages and returns.
    pub fn estimate_advantages(&mut self, kl_coefficient: f64, gamma: f64, lambda: f64) {
        self.rewards =
            advantage::token_rewards(&self.log_probs, &self.reference_log_probs, self.score, kl_coefficient as f32);
        self.advantages = advantage::generalized_advantages(&self.rewards, &self.values, gamma as f32, lambda as f32);
        self.returns = advantage::returns(&self.advantages, &self.values);
    }
}

/// Log-probabilities of every episode's tokens under a frozen model, by the same operations as the update's, so that the first
/// ratio of an update is 1.
pub fn log_probs(
    model: &Model,
    episodes: &[Episode],
    temperature: f64,
    tokens_per_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    over_batches(model, episodes, tokens_per_batch, |hidden, batch| {
        let log_probs: Vec<f32> = model.log_probs(hidden, batch, temperature)?.log_probs.to_vec1()?;
        Ok(batch.answer_targets.iter().map(|range| log_probs[range.clone()].to_vec()).collect())
    })
}

/// Values before every token of every episode under a frozen model.
pub fn values(model: &Model, episodes: &[Episode], tokens_per_batch: usize) -> Result<Vec<Vec<f32>>> {
    over_batches(model, episodes, tokens_per_batch, |hidden, batch| {
        let rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
        let values: Vec<f32> = model.values(hidden, &rows)?.to_vec1()?;
        Ok(batch.answer_targets.iter().map(|range| values[range.clone()].to_vec()).collect())
    })
}

/// The score of every episode at its last token under a frozen reward model.
pub fn scores(model: &Model, episodes: &[Episode], tokens_per_batch: usize) -> Result<Vec<f32>> {
    over_batches(model, episodes, tokens_per_batch, |hidden, batch| Ok(model.rewards(hidden, batch)?.to_vec1()?))
}

fn over_batches<T>(
    model: &Model,
    episodes: &[Episode],
    tokens_per_batch: usize,
    read: impl Fn(&Tensor, &Batch) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let sizes: Vec<usize> = episodes.iter().map(|episode| episode.tree.tokens()).collect();
    let mut results = Vec::with_capacity(episodes.len());
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let batch = model.pack(episodes[range].iter().map(|episode| &episode.tree));
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        results.extend(read(&hidden, &batch)?);
    }
    Ok(results)
}
