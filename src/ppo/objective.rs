//! The clipped losses of PPO (Schulman et al. 2017), summed over the tokens of a micro-batch.

use candle_core::Tensor;

use crate::error::Result;

/// The policy's loss on one micro-batch.
pub struct PolicyLoss {
    /// `Σ max(-A r, -A clip(r, 1 - ε, 1 + ε))` with `r = exp(log π - log π_old)`; a scalar to call `backward` on after division by
    /// the number of tokens of the whole minibatch.
    pub sum: Tensor,
    /// Sums over tokens.
    pub statistics: PolicyStatistics,
}

/// Sums over tokens; divide by their number.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PolicyStatistics {
    /// Tokens summed over.
    pub tokens: f64,
    /// The loss.
    pub loss: f64,
    /// `r`.
    pub ratio: f64,
    /// `(log π - log π_old)² / 2`, an estimate of the divergence since the rollout.
    pub approximate_kl: f64,
    /// Tokens at which the clipped term was the larger.
    pub clipped: f64,
    /// Entropy of the policy.
    pub entropy: f64,
}

impl PolicyStatistics {
    /// Adds the sums of another micro-batch.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.ratio += other.ratio;
        self.approximate_kl += other.approximate_kl;
        self.clipped += other.clipped;
        self.entropy += other.entropy;
    }

    /// The sums divided by the number of tokens, which stays as it is.
    pub fn means(&self) -> Self {
        let mean = |sum: f64| sum / self.tokens.max(1.0);
        PolicyStatistics {
            tokens: self.tokens,
            loss: mean(self.loss),
            ratio: mean(self.ratio),
            approximate_kl: mean(self.approximate_kl),
            clipped: mean(self.clipped),
            entropy: mean(self.entropy),
        }
    }
}

/// The policy's loss: all arguments have one number a token.
pub fn policy_loss(
    log_probs: &Tensor,
    old_log_probs: &[f32],
    advantages: &[f32],
    clip_range: f64,
) -> Result<PolicyLoss> {
    let device = log_probs.device();
    let old = Tensor::from_slice(old_log_probs, old_log_probs.len(), device)?;
    let negative: Vec<f32> = advantages.iter().map(|advantage| -advantage).collect();
    let negative = Tensor::from_vec(negative, advantages.len(), device)?;
    let difference = (log_probs - old)?;
    let ratio = difference.exp()?;
    let plain = (&ratio * &negative)?;
    let clipped = (ratio.clamp(1.0 - clip_range, 1.0 + clip_range)? * &negative)?;
    let sum = maximum(&plain, &clipped)?.sum_all()?;
    let differences: Vec<f32> = difference.detach().to_vec1()?;
    let (plain, clipped): (Vec<f32>, Vec<f32>) = (plain.detach().to_vec1()?, clipped.detach().to_vec1()?);
    let statistics = PolicyStatistics {
        tokens: differences.len() as f64,
        loss: f64::from(sum.detach().to_scalar::<f32>()?),
        ratio: differences.iter().map(|&d| f64::from(d).exp()).sum(),
        approximate_kl: differences.iter().map(|&d| 0.5 * f64::from(d).powi(2)).sum(),
        clipped: plain.iter().zip(&clipped).filter(|(plain, clipped)| clipped > plain).count() as f64,
        entropy: 0.0,
    };
    Ok(PolicyLoss { sum, statistics })
}

/// The value model's loss on one micro-batch: `Σ ½ max((V - R)², (clip(V, V_old ± ε) - R)²)`, and the number of tokens at which the
/// clipped term was the larger. Its caller divides by the tokens of the minibatch and multiplies with the value coefficient.
pub fn value_loss(values: &Tensor, old_values: &[f32], returns: &[f32], clip_range: f64) -> Result<(Tensor, f64)> {
    let device = values.device();
    let old = Tensor::from_slice(old_values, old_values.len(), device)?;
    let returns = Tensor::from_slice(returns, returns.len(), device)?;
    let clipped = (&old + (values - &old)?.clamp(-clip_range, clip_range)?)?;
    let plain = (values - &returns)?.sqr()?;
    let clipped = (clipped - &returns)?.sqr()?;
    let sum = maximum(&plain, &clipped)?.sum_all()?.affine(0.5, 0.0)?;
    let (plain, clipped): (Vec<f32>, Vec<f32>) = (plain.detach().to_vec1()?, clipped.detach().to_vec1()?);
    let count = plain.iter().zip(&clipped).filter(|(plain, clipped)| clipped > plain).count();
    Ok((sum, count as f64))
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
    use candle_core::{Device, Var};

    fn gradient(log_prob: f32, advantage: f32) -> Result<f32> {
        let log_probs = Var::new(&[log_prob], &Device::Cpu)?;
        let loss = policy_loss(log_probs.as_tensor(), &[0.0], &[advantage], 0.2)?;
        Ok(loss.sum.backward()?.get(&log_probs).unwrap().to_vec1::<f32>()?[0])
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
