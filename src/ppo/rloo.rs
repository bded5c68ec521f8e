//! RLOO: the other answers to a prompt are the baseline (Ahmadian et al. 2024, equation 8; Kool et al. 2019).

use super::rollout::Episode;

/// `A_i = R_i - Σ_{j ≠ i} R_j / (k - 1)` at every token of answer `i` of `k`, with `R` the sum of an answer's rewards, KL penalty and all.
/// `answers` are those to one prompt.
pub fn estimate_advantages(answers: &mut [Episode]) {
    let rewards: Vec<f64> = answers.iter().map(Episode::total_reward).collect();
    let total: f64 = rewards.iter().sum();
    for (episode, reward) in answers.iter_mut().zip(&rewards) {
        let baseline = (total - reward) / (rewards.len() as f64 - 1.0);
        episode.advantages = vec![(reward - baseline) as f32; episode.len()];
    }
}
