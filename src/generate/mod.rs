//! Sampling answers with a key-value cache and continuous batching.
//!
//! A prompt is computed once, whatever the number of its answers, and so is what several prompts begin with;
//! answers that are finished leave the batch, and waiting prompts take their place. Every answer draws from a
//! stream of its own, so that what it becomes does not depend on its company.
//!
//! Where rotations depend on the length of a sequence, a token is computed with those of the length that its sequence has by then. Of LongRoPE, whose
//! rotations all change at one length, the keys and values of an answer that outgrows it are computed anew, as `transformers` does for Phi-3; dynamic
//! scaling keeps the keys that are there, as it does too.
//!
//! Keys and values are kept in f32, or rounded to bf16 ([`CachePrecision`]). Then those of every token, and of a
//! prefix, are read back rounded, by the token's own pass too. Passes of other sizes round sums in another order;
//! where such a last digit decides between two neighbours in bf16, the difference is one of bf16.

mod batch;
mod beginnings;
pub mod kv_cache;
mod pass;
pub mod sampler;
mod truncation;

use serde::{Deserialize, Serialize};

use crate::data::schema::Origin;
use crate::error::Result;
use crate::model::Model;
use batch::ContinuousBatch;
pub use kv_cache::{CachePrecision, CacheSize};
pub use sampler::{Distribution, NotFinite, SamplingSettings};

/// A sampled answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Its tokens, the stop token last where there is one.
    pub tokens: Vec<u32>,
    /// Whether it ended with a stop token before `response_length` was reached.
    pub ended: bool,
    /// The log-probability of each token as it was drawn, at the temperature.
    pub log_probs: Vec<f32>,
}

/// What ends an answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stop<'a> {
    /// Tokens that end it.
    pub tokens: &'a [u32],
    /// They do so only after this many tokens.
    pub after: usize,
}

impl<'a> Stop<'a> {
    /// These tokens end an answer wherever they stand.
    pub fn at(tokens: &'a [u32]) -> Self {
        Stop { tokens, after: 0 }
    }

    fn ends(self, answer: &[u32]) -> bool {
        answer.len() > self.after && answer.last().is_some_and(|token| self.tokens.contains(token))
    }
}

/// A prompt, and which of the model's adapter stacks answers it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The index of the stack; 0 is the model's own.
    pub stack: usize,
    /// Where it was read, as errors name it; none for one that was read nowhere.
    pub origin: Option<Origin>,
}

impl From<Vec<u32>> for PromptTokens {
    fn from(tokens: Vec<u32>) -> Self {
        PromptTokens { tokens, stack: 0, origin: None }
    }
}

/// How answers are generated.
#[derive(Debug, Clone, Copy)]
pub struct Generation<'a> {
    /// Answers to each prompt.
    pub answers: usize,
    /// How their tokens are drawn, and how many tokens' keys and values are kept meanwhile.
    pub sampling: SamplingSettings,
    /// What ends them.
    pub stop: Stop<'a>,
    /// The seed of their streams: that of answer `j` to prompt `i` is (`seed`, "sampling", `first + i *
    /// answers + j`).
    pub seed: u64,
    /// The number of the first answer.
    pub first: u64,
    /// Tokens of prompts that go through the model at a time; a longer prompt does so alone.
    pub tokens_per_pass: usize,
}

/// What was generated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generated {
    /// The answers to each prompt.
    pub answers: Vec<Vec<Answer>>,
    /// Tokens of the prompts that were not computed again, as another prompt begins with them too.
    pub shared_tokens: usize,
}

/// Samples answers to prompts.
///
/// # Errors
/// Where a prompt is empty, or where the model gives logits from which nothing can be drawn; the error names
/// model, prompt and position.
pub fn generate(model: &Model, prompts: &[PromptTokens], generation: &Generation) -> Result<Generated> {
    generation.sampling.check()?;
    // No weight changes while answers are sampled.
    let model = model.snapshot()?.resolved();
    let mut batch = ContinuousBatch::new(&model, prompts, generation)?;
    while !batch.is_done() {
        batch.admit()?;
        batch.step()?;
    }
    Ok(batch.generated())
}
