//! One update: epochs of minibatches over the episodes of a rollout.

use rand::seq::SliceRandom;

use super::advantage::whiten;
use super::objective::{PolicyStatistics, policy_loss, value_loss};
use super::rollout::Episode;
use super::settings::PpoSettings;
use crate::data::batch::{Batch, split_by_budget};
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::random;
use crate::train::optimizer::Optimizer;

/// A model that trains, with its optimizer.
pub struct Learner {
    /// The model.
    pub model: Model,
    /// Its optimizer.
    pub optimizer: Optimizer,
}

/// What happened in an update.
#[derive(Debug, Clone, Default)]
pub struct UpdateReport {
    /// Means over all minibatches of all epochs.
    pub policy: PolicyStatistics,
    /// The first minibatch of the first epoch, at which the ratio is 1.
    pub first: PolicyStatistics,
    /// Mean value loss.
    pub value_loss: f64,
    /// Share of tokens at which the clipped value loss was the larger.
    pub value_clip_fraction: f64,
    /// Norm of the policy's gradient, mean over minibatches.
    pub policy_gradient_norm: f64,
    /// Norm of the value model's gradient, mean over minibatches.
    pub value_gradient_norm: f64,
    /// Optimizer steps that were skipped because a gradient was not finite.
    pub skipped: usize,
}

/// Improves policy and value model on the episodes.
pub fn update(
    policy: &mut Learner,
    value: &mut Learner,
    episodes: &[Episode],
    settings: &PpoSettings,
    learning_rates: (f64, f64),
    step: u64,
) -> Result<UpdateReport> {
    let mut report = UpdateReport::default();
    let mut minibatches = 0.0;
    for epoch in 0..settings.ppo_epochs {
        let mut order: Vec<usize> = (0..episodes.len()).collect();
        let purpose = format!("minibatches of epoch {epoch}");
        order.shuffle(&mut random::stream(settings.common.seed, &purpose, step));
        for minibatch in order.chunks(episodes.len().div_ceil(settings.minibatches)) {
            let minibatch: Vec<&Episode> = minibatch.iter().map(|&index| &episodes[index]).collect();
            let statistics = accumulate_minibatch(policy, value, &minibatch, settings, &mut report)?;
            if minibatches == 0.0 {
                report.first = statistics;
            }
            minibatches += 1.0;
            let policy_step = policy.optimizer.step(learning_rates.0)?;
            let value_step = value.optimizer.step(learning_rates.1)?;
            report.skipped += usize::from(policy_step.skipped) + usize::from(value_step.skipped);
            report.policy_gradient_norm += policy_step.gradient_norm;
            report.value_gradient_norm += value_step.gradient_norm;
        }
    }
    report.policy_gradient_norm /= minibatches;
    report.value_gradient_norm /= minibatches;
    let tokens = report.policy.tokens;
    report.policy = report.policy.means();
    report.value_loss /= tokens;
    report.value_clip_fraction /= tokens;
    Ok(report)
}

/// Adds one minibatch's gradients to both optimizers and its sums to the report; gives the means of the policy's statistics.
fn accumulate_minibatch(
    policy: &mut Learner,
    value: &mut Learner,
    minibatch: &[&Episode],
    settings: &PpoSettings,
    report: &mut UpdateReport,
) -> Result<PolicyStatistics> {
    let mut advantages: Vec<Vec<f32>> = minibatch.iter().map(|episode| episode.advantages.clone()).collect();
    if settings.whiten_advantages {
        whiten(&mut advantages.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
    }
    let tokens: usize = minibatch.iter().map(|episode| episode.len()).sum();
    let sizes: Vec<usize> = minibatch.iter().map(|episode| episode.tree.tokens()).collect();
    let mut sums = PolicyStatistics::default();
    for range in split_by_budget(&sizes, settings.common.tokens_per_batch) {
        let episodes = &minibatch[range.clone()];
        let batch = Batch::pack(episodes.iter().map(|episode| &episode.tree));
        // In turn, so that what one model keeps for its backward pass is free again before the other's pass.
        sums.add(&learn_policy(policy, &batch, episodes, &advantages[range].concat(), settings, tokens)?);
        let (loss, clipped) = learn_values(value, &batch, episodes, settings, tokens)?;
        report.value_loss += loss;
        report.value_clip_fraction += clipped;
    }
    report.policy.add(&sums);
    Ok(sums.means())
}

/// Adds one micro-batch's gradient of the policy, as its share of a minibatch of `tokens` tokens; gives the sums of its statistics.
fn learn_policy(
    policy: &mut Learner,
    batch: &Batch,
    episodes: &[&Episode],
    advantages: &[f32],
    settings: &PpoSettings,
    tokens: usize,
) -> Result<PolicyStatistics> {
    let hidden = policy.model.hidden(batch, &Pass::default())?; // [tokens, d_model]
    let log_probs = policy.model.log_probs(&hidden, batch, settings.sampling.temperature)?; // [targets]
    let old_log_probs = gather(episodes, |episode| &episode.log_probs);
    let loss = policy_loss(&log_probs.log_probs, &old_log_probs, advantages, settings.clip_range)?;
    let entropy: Vec<f32> = log_probs.entropy.detach().to_vec1()?;
    policy.optimizer.accumulate(&(loss.sum / tokens as f64)?.backward()?)?;
    let mut statistics = loss.statistics;
    statistics.entropy += entropy.iter().map(|&entropy| f64::from(entropy)).sum::<f64>();
    Ok(statistics)
}

/// The same for the value model; gives the sum of its losses and the number of tokens at which the clipped one was the larger.
fn learn_values(
    value: &mut Learner,
    batch: &Batch,
    episodes: &[&Episode],
    settings: &PpoSettings,
    tokens: usize,
) -> Result<(f64, f64)> {
    let hidden = value.model.hidden(batch, &Pass::default())?; // [tokens, d_model]
    let rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
    let values = value.model.values(&hidden, &rows)?; // [targets]
    let (old_values, returns) =
        (gather(episodes, |episode| &episode.values), gather(episodes, |episode| &episode.returns));
    let (sum, clipped) = value_loss(&values, &old_values, &returns, settings.value_clip_range)?;
    let coefficient = settings.value_coefficient / tokens as f64;
    value.optimizer.accumulate(&sum.affine(coefficient, 0.0)?.backward()?)?;
    Ok((f64::from(sum.to_scalar::<f32>()?), clipped))
}

/// One number a token of the episodes, end to end.
fn gather(episodes: &[&Episode], of: fn(&Episode) -> &Vec<f32>) -> Vec<f32> {
    episodes.iter().flat_map(|episode| of(episode).iter().copied()).collect()
}
