//! GRPO: the rewards of a prompt's answers, standardised (Shao et al. 2024, section 4.1.2).

use super::rollout::Episode;

/// Keeps the advantages finite where all answers have one reward.
const EPSILON: f64 = 1e-4;

/// `A_i = (R_i - mean(R)) / (std(R) + 1e-4)` at every token of answer `i`, with `R` the sum of an answer's rewards; the standard deviation is
/// unbiased, as in TRL.
pub fn estimate_advantages(answers: &mut [Episode]) {
    let rewards: Vec<f64> = answers.iter().map(Episode::total_reward).collect();
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    for (episode, reward) in answers.iter_mut().zip(&rewards) {
        let advantage = (reward - mean) / (variance.sqrt() + EPSILON);
        episode.advantages = vec![advantage as f32; episode.len()];
    }
}
