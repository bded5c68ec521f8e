//! The losses of an update, over the tokens of a micro-batch: clipped policy loss (Schulman et al. 2017), KL penalty, entropy, clipped value loss.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::kl;
use super::settings::{Aggregation, KlEstimator, KlSettings, PolicySettings};
use crate::error::Result;
use crate::ops;

/// Everything about the answers of a micro-batch that an update learns from; every vector has one number a token.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// The range of each answer.
    pub answers: Vec<Range<usize>>,
    /// `log π_old`.
    pub old_log_probs: Vec<f32>,
    /// `log π_ref`.
    pub reference_log_probs: Vec<f32>,
    /// `log π` of the sampler.
    pub sampler_log_probs: Vec<f32>,
    /// Advantages, whitened where they are to be.
    pub advantages: Vec<f32>,
}

/// What a loss is divided by, so that the losses of a minibatch's micro-batches add up to a mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Minibatch {
    /// Its tokens.
    pub tokens: usize,
    /// Its answers.
    pub answers: usize,
}

/// How the policy's loss is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    clip_low: f64,
    clip_high: f64,
    dual_clip: f64,
    log_ratio_clip: f64,
    sampler_correction: f64,
    aggregation: Aggregation,
    entropy_coefficient: f64,
    kl_coefficient: f64,
    kl_estimator: KlEstimator,
    kl_clip: f64,
}

/// The policy's loss on one micro-batch.
pub struct PolicyLoss {
    /// The micro-batch's share of the minibatch's loss, to call `backward` on.
    pub total: Tensor,
    /// Sums.
    pub statistics: PolicyStatistics,
}

/// What an update did to the policy.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PolicyStatistics {
    /// Tokens summed over.
    pub tokens: f64,
    /// The clipped loss, already a share of the minibatch's mean.
    pub loss: f64,
    /// The KL penalty of the loss before its weight, already a share of the mean.
    pub kl: f64,
    /// Sum of the ratios `r = exp(log π - log π_old)`.
    pub ratio: f64,
    /// Sum of `(log π - log π_old)² / 2`, an estimate of the divergence since the rollout.
    pub approximate_kl: f64,
    /// Number of tokens at which the clipped term was the larger.
    pub clipped: f64,
    /// Sum of the policy's entropies.
    pub entropy: f64,
}

impl PolicyStatistics {
    /// Adds another micro-batch of the same minibatch, or the means of another minibatch.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.kl += other.kl;
        self.ratio += other.ratio;
        self.approximate_kl += other.approximate_kl;
        self.clipped += other.clipped;
        self.entropy += other.entropy;
    }

    /// With sums over tokens divided by their number, which stays as it is.
    pub fn means(&self) -> Self {
        let mean = |sum: f64| sum / self.tokens.max(1.0);
        PolicyStatistics {
            ratio: mean(self.ratio),
            approximate_kl: mean(self.approximate_kl),
            clipped: mean(self.clipped),
            entropy: mean(self.entropy),
            ..*self
        }
    }

    /// All numbers but the tokens divided by this.
    pub fn divided_by(&self, count: f64) -> Self {
        PolicyStatistics {
            tokens: self.tokens,
            loss: self.loss / count,
            kl: self.kl / count,
            ratio: self.ratio / count,
            approximate_kl: self.approximate_kl / count,
            clipped: self.clipped / count,
            entropy: self.entropy / count,
        }
    }
}

impl Objective {
    /// The objective that the settings describe; `kl_coefficient` is the weight of the KL penalty in the loss now.
    pub fn new(policy: &PolicySettings, kl: &KlSettings, kl_coefficient: f64) -> Self {
        Objective {
            clip_low: policy.clip_range,
            clip_high: policy.clip_range_high.unwrap_or(policy.clip_range),
            dual_clip: policy.dual_clip,
            log_ratio_clip: policy.log_ratio_clip,
            sampler_correction: policy.sampler_correction,
            aggregation: policy.loss_aggregation,
            entropy_coefficient: policy.entropy_coefficient,
            kl_coefficient,
            kl_estimator: kl.kl_estimator,
            kl_clip: kl.kl_clip,
        }
    }

    /// `Σ w (c L + β KL - c_e H)` over tokens, `log_probs` and `entropy` being `[tokens]`, with
    /// `L = max(-A r, -A clip(r, 1 - ε, 1 + ε_high))` (for `A < 0` at most `-A c_dual`), `c = min(exp(log π_old - log π_sampler), C)` and `w` the
    /// token's share of the minibatch's mean. With [`Aggregation::Sequence`] `r`, `c` and `L` are those of whole answers.
    pub fn policy_loss(
        &self,
        log_probs: &Tensor,
        entropy: &Tensor,
        tokens: &Tokens,
        minibatch: Minibatch,
    ) -> Result<PolicyLoss> {
        let device = log_probs.device();
        let difference = (log_probs - vector(&tokens.old_log_probs, device)?)?; // [tokens]
        let shares = vector(&self.shares(&tokens.answers, minibatch), device)?; // [tokens]
        let (losses, clipped) = if self.aggregation == Aggregation::Sequence {
            let difference = ops::sum_ranges(&difference, &tokens.answers)?; // [answers]
            let corrections: Vec<f32> = (tokens.answers.iter())
                .map(|answer| {
                    self.correction(&tokens.sampler_log_probs[answer.clone()], &tokens.old_log_probs[answer.clone()])
                })
                .collect();
            let advantages: Vec<f32> = tokens.answers.iter().map(|answer| tokens.advantages[answer.start]).collect();
            let (losses, clipped) = self.clipped_losses(&difference, &advantages, &corrections)?; // [answers]
            let lengths = tokens
                .answers
                .iter()
                .zip(clipped)
                .map(|(answer, is_clipped)| if is_clipped { answer.len() } else { 0 });
            (losses.affine(1.0 / minibatch.answers as f64, 0.0)?.sum_all()?, lengths.sum())
        } else {
            let pairs = tokens.sampler_log_probs.chunks(1).zip(tokens.old_log_probs.chunks(1));
            let corrections: Vec<f32> = pairs.map(|(sampler, old)| self.correction(sampler, old)).collect();
            let (losses, clipped) = self.clipped_losses(&difference, &tokens.advantages, &corrections)?; // [tokens]
            ((losses * &shares)?.sum_all()?, clipped.into_iter().filter(|&is_clipped| is_clipped).count())
        };
        let mut total = losses.clone();
        let mut penalty = 0.0;
        if self.kl_coefficient > 0.0 {
            let reference = vector(&tokens.reference_log_probs, device)?;
            let estimates = kl::estimates(log_probs, &reference, self.kl_estimator, self.kl_clip)?;
            let mean = (estimates * &shares)?.sum_all()?;
            penalty = f64::from(mean.detach().to_scalar::<f32>()?);
            total = (total + mean.affine(self.kl_coefficient, 0.0)?)?;
        }
        if self.entropy_coefficient > 0.0 {
            total = (total - (entropy * &shares)?.sum_all()?.affine(self.entropy_coefficient, 0.0)?)?;
        }
        let differences: Vec<f32> = difference.detach().to_vec1()?;
        let entropies: Vec<f32> = entropy.detach().to_vec1()?;
        let statistics = PolicyStatistics {
            tokens: differences.len() as f64,
            loss: f64::from(losses.detach().to_scalar::<f32>()?),
            kl: penalty,
            ratio: differences.iter().map(|&d| f64::from(d).exp()).sum(),
            approximate_kl: differences.iter().map(|&d| 0.5 * f64::from(d).powi(2)).sum(),
            clipped: clipped as f64,
            entropy: entropies.iter().map(|&entropy| f64::from(entropy)).sum(),
        };
        Ok(PolicyLoss { total, statistics })
    }

    /// The clipped loss of each item, and whether its clipped term was the larger.
    fn clipped_losses(
        &self,
        difference: &Tensor,
        advantages: &[f32],
        corrections: &[f32],
    ) -> Result<(Tensor, Vec<bool>)> {
        let device = difference.device();
        let bound = self.log_ratio_clip;
        let ratio = if bound > 0.0 { difference.clamp(-bound, bound)?.exp()? } else { difference.exp()? };
        let negative: Vec<f32> = advantages.iter().map(|advantage| -advantage).collect();
        let negative = vector(&negative, device)?;
        let plain = (&ratio * &negative)?;
        let clipped = (ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)? * &negative)?;
        let mut losses = maximum(&plain, &clipped)?;
        if self.dual_clip > 0.0 {
            // Only where the advantage is negative; elsewhere the bound is out of reach.
            let bounds: Vec<f32> = (advantages.iter())
                .map(|&advantage| if advantage < 0.0 { -advantage * self.dual_clip as f32 } else { f32::MAX })
                .collect();
            losses = maximum(&losses.neg()?, &vector(&bounds, device)?.neg()?)?.neg()?;
        }
        let (plain, clipped): (Vec<f32>, Vec<f32>) = (plain.detach().to_vec1()?, clipped.detach().to_vec1()?);
        let is_clipped = plain.iter().zip(&clipped).map(|(plain, clipped)| clipped > plain).collect();
        Ok(((losses * vector(corrections, device)?)?, is_clipped))
    }

    /// `min(exp(Σ (log π_old - log π_sampler)), C)`: truncated importance sampling (Yao et al. 2025), 1 where nothing is to be corrected.
    fn correction(&self, sampler: &[f32], old: &[f32]) -> f32 {
        if self.sampler_correction == 0.0 {
            return 1.0;
        }
        let difference: f64 = old.iter().zip(sampler).map(|(old, sampler)| f64::from(old - sampler)).sum();
        let quotient = difference.exp();
        // `min` would make the bound of NaN.
        (if quotient > self.sampler_correction { self.sampler_correction } else { quotient }) as f32
    }

    /// Each token's share of the mean over the minibatch.
    pub fn shares(&self, answers: &[Range<usize>], minibatch: Minibatch) -> Vec<f32> {
        let of_answer = |answer: &Range<usize>| {
            let share = match self.aggregation {
                Aggregation::Token => 1.0 / minibatch.tokens as f32,
                Aggregation::Answer | Aggregation::Sequence => 1.0 / (minibatch.answers * answer.len()) as f32,
            };
            std::iter::repeat_n(share, answer.len())
        };
        answers.iter().flat_map(of_answer).collect()
    }
}

/// The value model's loss on one micro-batch: `Σ w ½ max((V - R)², (clip(V, V_old ± ε) - R)²)` with `w` each token's share of the mean, and
/// the number of tokens at which the clipped term was the larger. Without a clip range the loss is `Σ w ½ (V - R)²`.
pub fn value_loss(
    values: &Tensor,
    old_values: &[f32],
    returns: &[f32],
    clip_range: f64,
    shares: &[f32],
) -> Result<(Tensor, f64)> {
    let device = values.device();
    let (old, returns) = (vector(old_values, device)?, vector(returns, device)?);
    let plain = (values - &returns)?.sqr()?; // [tokens]
    let shares = vector(shares, device)?;
    if clip_range == 0.0 {
        return Ok(((plain * shares)?.sum_all()?.affine(0.5, 0.0)?, 0.0));
    }
    let clipped = (&old + (values - &old)?.clamp(-clip_range, clip_range)?)?;
    let clipped = (clipped - &returns)?.sqr()?;
    let loss = (maximum(&plain, &clipped)? * shares)?.sum_all()?.affine(0.5, 0.0)?;
    let (plain, clipped): (Vec<f32>, Vec<f32>) = (plain.detach().to_vec1()?, clipped.detach().to_vec1()?);
    let count = plain.iter().zip(&clipped).filter(|(plain, clipped)| clipped > plain).count();
    Ok((loss, count as f64))
}

fn vector(numbers: &[f32], device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_slice(numbers, numbers.len(), device)?)
}

/// The larger of two tensors, element by element. Where they are equal the gradient is halved between them, as PyTorch's
/// `max` does, so that an unclipped token gets its whole gradient.
fn maximum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let a_wins = a.gt(b)?.to_dtype(a.dtype())?;
    let b_wins = b.gt(a)?.to_dtype(a.dtype())?;
    let tie = a.eq(b)?.to_dtype(a.dtype())?.affine(0.5, 0.0)?;
    let weight_a = (a_wins + &tie)?.detach();
    let weight_b = (b_wins + tie)?.detach();
    Ok(((a * weight_a)? + (b * weight_b)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn gradient(log_prob: f32, advantage: f32) -> Result<f32> {
        let log_probs = Var::new(&[log_prob], &Device::Cpu)?;
        let objective = Objective {
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: 0.0,
            log_ratio_clip: 0.0,
            sampler_correction: 0.0,
            aggregation: Aggregation::Token,
            entropy_coefficient: 0.0,
            kl_coefficient: 0.0,
            kl_estimator: KlEstimator::K1,
            kl_clip: 0.0,
        };
        let one = std::iter::once(0..1).collect();
        let tokens = Tokens {
            answers: one,
            old_log_probs: vec![0.0],
            sampler_log_probs: vec![0.0],
            advantages: vec![advantage],
            ..Default::default()
        };
        let entropy = Tensor::new(&[0f32], &Device::Cpu)?;
        let minibatch = Minibatch { tokens: 1, answers: 1 };
        let loss = objective.policy_loss(log_probs.as_tensor(), &entropy, &tokens, minibatch)?;
        Ok(loss.total.backward()?.get(&log_probs).unwrap().to_vec1::<f32>()?[0])
    }

    #[test]
    fn an_unclipped_token_gets_the_policy_gradient_and_a_clipped_one_none() -> Result<()> {
        assert_eq!(gradient(0.0, 1.5)?, -1.5);
        assert_eq!(gradient(0.5, 1.5)?, 0.0);
        assert!((gradient(0.5, -1.5)? - 1.5 * 0.5f32.exp()).abs() < 1e-5);
        assert_eq!(gradient(-0.5, -1.5)?, 0.0);
        Ok(())
    }
}
