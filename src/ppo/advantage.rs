//! From scores to advantages, on plain slices: one episode a slice, one number a token of its answer.

/// The reward of every token: `-kl_coefficient (log π - log π_ref)` (the k1 estimator of Schulman 2020), and the score on top at
/// the last (Ziegler et al. 2019, equation 2).
pub fn token_rewards(log_probs: &[f32], reference_log_probs: &[f32], score: f32, kl_coefficient: f32) -> Vec<f32> {
    let mut rewards: Vec<f32> = (log_probs.iter().zip(reference_log_probs))
        .map(|(log_prob, reference)| -kl_coefficient * (log_prob - reference))
        .collect();
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

/// `(x - mean) / sqrt(variance + 1e-8)` over all numbers of all slices, the variance unbiased, as TRL's `masked_whiten`.
/// A single number has no variance and is left as it is.
pub fn whiten(slices: &mut [&mut [f32]]) {
    let numbers = || slices.iter().flat_map(|slice| slice.iter()).map(|&x| f64::from(x));
    let count = numbers().count() as f64;
    if count < 2.0 {
        return;
    }
    let mean = numbers().sum::<f64>() / count;
    let variance = numbers().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let inverse = 1.0 / (variance + 1e-8).sqrt();
    for x in slices.iter_mut().flat_map(|slice| slice.iter_mut()) {
        *x = ((f64::from(*x) - mean) * inverse) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_score_is_at_the_last_token_and_the_penalty_at_every() {
        let rewards = token_rewards(&[-1.0, -2.0], &[-1.5, -1.0], 3.0, 0.1);
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
        fn whitened_numbers_have_mean_zero_and_variance_one(mut x in prop::collection::vec(-5f32..5.0, 3..40)) {
            x.push(9.0);
            let (a, b) = x.split_at_mut(2);
            whiten(&mut [a, b]);
            let mean = x.iter().sum::<f32>() / x.len() as f32;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / (x.len() - 1) as f32;
            prop_assert!(mean.abs() < 1e-4 && (variance - 1.0).abs() < 1e-3);
        }
    }
}
