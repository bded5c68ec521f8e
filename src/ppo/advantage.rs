//! From scores to advantages, on plain slices: one answer a slice, one number a token.

use super::kl;
use super::rollout::{Episode, Group};
use super::settings::{Algorithm, PpoSettings, Variance, Whitening};
use super::{grpo, rloo};

/// Fills in rewards, advantages and, where there is a value model, returns of a whole rollout; `kl_coefficient` is the weight of the penalty now.
pub fn estimate_advantages(groups: &mut [Group], settings: &PpoSettings, kl_coefficient: f64) {
    let coefficient = settings.reward_kl(kl_coefficient) as f32;
    for episode in episodes(groups) {
        let kl: Vec<f32> = (episode.log_probs.iter().zip(&episode.reference_log_probs))
            .map(|(&log_prob, &reference)| {
                kl::estimate(log_prob, reference, settings.kl.kl_estimator, settings.kl.kl_clip)
            })
            .collect();
        episode.rewards = token_rewards(&kl, episode.score, coefficient);
        episode.objective = episode.total_reward();
    }
    let variance = settings.advantage.whitening_variance;
    if settings.episode.whiten_rewards {
        whiten(&mut slices(groups, |episode| &mut episode.rewards), variance, Shift::Keep);
    }
    match settings.algorithm {
        Algorithm::Ppo => {
            let (gamma, lambda) = (settings.advantage.gamma as f32, settings.advantage.lambda as f32);
            for episode in episodes(groups) {
                episode.advantages = generalized_advantages(&episode.rewards, &episode.values, gamma, lambda);
                episode.returns = returns(&episode.advantages, &episode.values);
            }
        }
        Algorithm::Rloo => groups.iter_mut().for_each(|group| rloo::estimate_advantages(&mut group.episodes)),
        Algorithm::Grpo => groups.iter_mut().for_each(|group| grpo::estimate_advantages(&mut group.episodes)),
    }
    if settings.advantage.whiten_advantages == Whitening::Rollout {
        whiten(&mut slices(groups, |episode| &mut episode.advantages), variance, Shift::ToZero);
    }
}

fn episodes(groups: &mut [Group]) -> impl Iterator<Item = &mut Episode> {
    groups.iter_mut().flat_map(|group| group.episodes.iter_mut())
}

fn slices(groups: &mut [Group], of: fn(&mut Episode) -> &mut Vec<f32>) -> Vec<&mut [f32]> {
    episodes(groups).map(|episode| of(episode).as_mut_slice()).collect()
}

/// The reward of every token: `-kl_coefficient kl`, and the score on top at the last (Ziegler et al. 2019, equation 2).
pub fn token_rewards(kl: &[f32], score: f32, kl_coefficient: f32) -> Vec<f32> {
    let mut rewards: Vec<f32> = kl.iter().map(|kl| -kl_coefficient * kl).collect();
    if let Some(last) = rewards.last_mut() {
        *last += score;
    }
    rewards
}

/// Generalised advantage estimation (Schulman et al. 2015, equation 16): `A_t = δ_t + γ λ A_{t+1}` with
/// `δ_t = r_t + γ V_{t+1} - V_t`, and 0 after the last token.
pub fn generalized_advantages(rewards: &[f32], values: &[f32], gamma: f32, lambda: f32) -> Vec<f32> {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_advantage, mut next_value) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = values[t];
        advantages[t] = next_advantage;
    }
    advantages
}

/// What the value model is trained towards: `A_t + V_t`.
pub fn returns(advantages: &[f32], values: &[f32]) -> Vec<f32> {
    advantages.iter().zip(values).map(|(advantage, value)| advantage + value).collect()
}

/// What whitening does with the mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// It becomes 0.
    ToZero,
    /// It stays.
    Keep,
}

/// `(x - mean) / sqrt(variance + 1e-8)` over all numbers of all slices, the mean added again where it is kept, as TRL's `masked_whiten`.
/// A single number has no variance and is left as it is.
pub fn whiten(slices: &mut [&mut [f32]], variance: Variance, shift: Shift) {
    let numbers = || slices.iter().flat_map(|slice| slice.iter()).map(|&x| f64::from(x));
    let count = numbers().count() as f64;
    if count < 2.0 {
        return;
    }
    let mean = numbers().sum::<f64>() / count;
    let divisor = if variance == Variance::Unbiased { count - 1.0 } else { count };
    let variance = numbers().map(|x| (x - mean).powi(2)).sum::<f64>() / divisor;
    let inverse = 1.0 / (variance + 1e-8).sqrt();
    let kept = if shift == Shift::Keep { mean } else { 0.0 };
    for x in slices.iter_mut().flat_map(|slice| slice.iter_mut()) {
        *x = ((f64::from(*x) - mean) * inverse + kept) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_score_is_at_the_last_token_and_the_penalty_at_every() {
        let rewards = token_rewards(&[0.5, -1.0], 3.0, 0.1);
        assert!((rewards[0] - -0.05).abs() < 1e-6 && (rewards[1] - 3.1).abs() < 1e-6);
    }

    proptest! {
        /// The sum over n of (γλ)^n δ_{t+n}, written out.
        #[test]
        fn recursion_equals_the_closed_form(
            pairs in prop::collection::vec((-2f32..2.0, -2f32..2.0), 1..20), gamma in 0.5f32..1.0, lambda in 0f32..1.0
        ) {
            let (rewards, values): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let found = generalized_advantages(&rewards, &values, gamma, lambda);
            for (t, &found) in found.iter().enumerate() {
                let closed: f64 = (t..rewards.len()).map(|n| {
                    let next = values.get(n + 1).copied().unwrap_or(0.0);
                    let delta = f64::from(rewards[n]) + f64::from(gamma) * f64::from(next) - f64::from(values[n]);
                    (f64::from(gamma) * f64::from(lambda)).powi((n - t) as i32) * delta
                }).sum();
                prop_assert!((f64::from(found) - closed).abs() < 1e-4);
            }
        }

        #[test]
        fn whitened_numbers_have_variance_one_and_mean_zero_or_their_own(mut x in prop::collection::vec(-5f32..5.0, 3..40)) {
            x.push(9.0);
            let mean = |x: &[f32]| x.iter().sum::<f32>() / x.len() as f32;
            let before = mean(&x);
            for (shift, kind, less) in [(Shift::ToZero, Variance::Unbiased, 1), (Shift::Keep, Variance::Biased, 0)] {
                let mut x = x.clone();
                let (a, b) = x.split_at_mut(2);
                whiten(&mut [a, b], kind, shift);
                let now = mean(&x);
                let variance = x.iter().map(|x| (x - now).powi(2)).sum::<f32>() / (x.len() - less) as f32;
                let expected = if shift == Shift::Keep { before } else { 0.0 };
                prop_assert!((now - expected).abs() < 1e-4);
                prop_assert!((variance - 1.0).abs() < 1e-3);
            }
        }
    }
}
