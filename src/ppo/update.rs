//! One update: epochs of minibatches over the groups of a rollout.

use std::ops::Range;

use rand::seq::SliceRandom;

use super::advantage::{Shift, whiten};
use super::objective::{Minibatch, Objective, PolicyStatistics, Tokens, value_loss};
use super::ptx::PretrainingMix;
use super::roles::{Learner, Roles};
use super::rollout::{Episode, Group, episodes};
use super::settings::{PpoSettings, Whitening};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::ops::Outputs;
use crate::random;
use crate::train::learned::Learned;

/// What an update is made with, apart from the settings.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Its number, from 0 on.
    pub number: usize,
    /// The policy's learning rate.
    pub learning_rate: f64,
    /// The value model's learning rate.
    pub value_learning_rate: f64,
    /// The weight of the KL penalty now.
    pub kl_coefficient: f64,
}

/// What happened in an update: means over its minibatches, but for counts.
#[derive(Debug, Clone, Default)]
pub struct UpdateReport {
    /// The policy.
    pub policy: PolicyStatistics,
    /// The first minibatch of the first epoch, at which the ratio is 1.
    pub first: PolicyStatistics,
    /// Value loss.
    pub value_loss: f64,
    /// Share of tokens at which the clipped value loss was the larger.
    pub value_clipped: f64,
    /// Loss of a token of the pretraining mix.
    pub ptx_loss: f64,
    /// Norm of the policy's gradient.
    pub policy_gradient_norm: f64,
    /// Norm of the value model's gradient.
    pub value_gradient_norm: f64,
    /// Minibatches seen.
    pub minibatches: usize,
    /// Optimizer steps that changed weights.
    pub changed: usize,
    /// Optimizer steps that were left out because a gradient was not finite.
    pub skipped: usize,
    /// What was not finite in the first of them.
    pub not_finite: Option<String>,
    /// Minibatches that changed nothing because their ratio was too large.
    pub over_ratio: usize,
    /// Whether the passes ended early because the policy had gone far enough.
    pub stopped_early: bool,
}

/// Improves policy and value model on the groups.
pub fn update(
    roles: &mut Roles,
    mix: Option<&mut PretrainingMix>,
    groups: &[Group],
    settings: &PpoSettings,
    step: Step,
) -> Result<UpdateReport> {
    let objective = Objective::new(&settings.policy, &settings.kl, settings.loss_kl(step.kl_coefficient));
    let mut report = UpdateReport::default();
    let mut learning = Learning { roles, mix, objective, settings, step };
    for epoch in 0..settings.policy.ppo_epochs {
        let mut order: Vec<usize> = (0..groups.len()).collect();
        let shuffled_as = if settings.policy.reshuffle { epoch } else { 0 };
        let purpose = format!("minibatches of epoch {shuffled_as}");
        order.shuffle(&mut random::stream(settings.common.seed, &purpose, step.number as u64));
        for places in evenly(groups.len(), settings.policy.minibatches) {
            let minibatch: Vec<&Group> = order[places].iter().map(|&index| &groups[index]).collect();
            learning.minibatch(&minibatch, &mut report)?;
            if report.stopped_early {
                return Ok(report.means());
            }
        }
    }
    Ok(report.means())
}

/// Divides `count` items into `parts` runs whose lengths differ by one at most, the longer ones first.
fn evenly(count: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (length, longer) = (count / parts, count % parts);
    (0..parts).map(move |part| {
        let start = part * length + part.min(longer);
        start..start + length + usize::from(part < longer)
    })
}

impl UpdateReport {
    /// Counts an optimizer step that was skipped, if something in the gradients, which are `whose`, was not finite.
    fn skipped(&mut self, not_finite: Option<String>, whose: &str) {
        if let Some(what) = not_finite {
            self.skipped += 1;
            self.not_finite.get_or_insert_with(|| format!("{whose} {what}"));
        }
    }

    /// What its optimizer steps did to the policy, which is what a run is for.
    pub fn learned(&self) -> Learned {
        Learned {
            changed: self.changed,
            skipped: self.skipped,
            held_back: self.over_ratio + usize::from(self.stopped_early),
            not_finite: self.not_finite.clone(),
            ..Learned::default()
        }
    }

    /// Sums over minibatches as means.
    fn means(mut self) -> Self {
        let count = self.minibatches.max(1) as f64;
        self.policy = self.policy.divided_by(count);
        let means = [&mut self.value_loss, &mut self.value_clipped, &mut self.ptx_loss];
        means.into_iter().for_each(|sum| *sum /= count);
        [&mut self.policy_gradient_norm, &mut self.value_gradient_norm].into_iter().for_each(|sum| *sum /= count);
        self
    }
}

/// An update under way.
struct Learning<'a, 'm> {
    roles: &'a mut Roles,
    mix: Option<&'a mut PretrainingMix<'m>>,
    objective: Objective,
    settings: &'a PpoSettings,
    step: Step,
}

impl Learning<'_, '_> {
    /// Accumulates one minibatch's gradients and steps both optimizers, unless the policy has gone too far.
    fn minibatch(&mut self, groups: &[&Group], report: &mut UpdateReport) -> Result<()> {
        let trains_policy = self.step.number >= self.settings.value.critic_warmup;
        let statistics = self.accumulate(groups, trains_policy, report)?;
        if report.minibatches == 0 {
            report.first = statistics;
        }
        report.policy.add(&statistics);
        report.minibatches += 1;
        let limits = &self.settings.policy;
        let too_large = limits.ratio_threshold > 0.0 && statistics.ratio > limits.ratio_threshold;
        report.stopped_early = limits.early_stop_kl > 0.0 && statistics.approximate_kl > limits.early_stop_kl;
        if too_large || report.stopped_early {
            report.over_ratio += usize::from(too_large);
            self.roles.policy.optimizer.discard();
            self.roles.value.iter_mut().for_each(|value| value.optimizer.discard());
            return Ok(());
        }
        if trains_policy {
            if let Some(mix) = self.mix.as_deref_mut() {
                report.ptx_loss += mix.accumulate(&mut self.roles.policy)?;
            }
            let done = self.roles.policy.optimizer.step(self.step.learning_rate)?;
            report.changed += usize::from(done.changed);
            report.skipped(done.not_finite, "of the policy's gradients");
            report.policy_gradient_norm += done.gradient_norm;
        }
        if let Some(value) = &mut self.roles.value {
            let done = value.optimizer.step(self.step.value_learning_rate)?;
            report.skipped(done.not_finite, "of the value model's gradients");
            report.value_gradient_norm += done.gradient_norm;
        }
        Ok(())
    }

    /// Adds one minibatch's gradients to both optimizers; gives the policy's statistics.
    fn accumulate(
        &mut self,
        groups: &[&Group],
        trains_policy: bool,
        report: &mut UpdateReport,
    ) -> Result<PolicyStatistics> {
        let mut advantages: Vec<Vec<f32>> =
            episodes(groups.iter().copied()).map(|episode| episode.advantages.clone()).collect();
        if self.settings.advantage.whiten_advantages == Whitening::Minibatch {
            let mut slices: Vec<&mut [f32]> = advantages.iter_mut().map(Vec::as_mut_slice).collect();
            whiten(&mut slices, self.settings.advantage.whitening_variance, Shift::ToZero);
        }
        let minibatch = Minibatch { tokens: advantages.iter().map(Vec::len).sum(), answers: advantages.len() };
        let trees = groups.iter().map(|group| &group.tree);
        let mut advantages = advantages.into_iter();
        let mut sums = PolicyStatistics::default();
        for range in self.roles.policy.model.passes(trees, self.settings.common.tokens_per_batch) {
            let groups = &groups[range];
            let batch = self.roles.policy.model.pack(groups.iter().map(|group| &group.tree));
            let answers = batch.answer_targets.len();
            let tokens = Tokens {
                answers: batch.answer_targets.clone(),
                old_log_probs: gather(groups, |episode| &episode.log_probs),
                reference_log_probs: gather(groups, |episode| &episode.reference_log_probs),
                sampler_log_probs: gather(groups, |episode| &episode.sampler_log_probs),
                advantages: advantages.by_ref().take(answers).flatten().collect(),
            };
            // In turn, so that what one model keeps for its backward pass is free again before the other's pass.
            sums.add(&self.learn_policy(&batch, &tokens, minibatch, trains_policy)?);
            let shares = self.objective.shares(&tokens.answers, minibatch);
            if let Some(value) = &mut self.roles.value {
                let (loss, clipped) = learn_values(value, &batch, groups, self.settings, &shares)?;
                report.value_loss += loss;
                report.value_clipped += clipped / minibatch.tokens as f64;
            }
        }
        Ok(sums.means())
    }

    /// Adds one micro-batch's gradient of the policy; gives the sums of its statistics.
    fn learn_policy(
        &mut self,
        batch: &Batch,
        tokens: &Tokens,
        minibatch: Minibatch,
        trains: bool,
    ) -> Result<PolicyStatistics> {
        let policy = &mut self.roles.policy;
        let frozen = if trains { None } else { Some(policy.model.frozen()?) };
        let model = frozen.as_ref().unwrap_or(&policy.model);
        let hidden = model.hidden(batch, &Pass::default())?; // [tokens, d_model]
        let found = model.log_probs(&hidden, batch, self.settings.sampling.temperature)?; // [targets]
        drop(hidden);
        let mut outputs = Outputs::default();
        let (log_probs, entropy) = (outputs.tensor(&found.log_probs)?, outputs.tensor(&found.entropy)?);
        drop(found);
        let loss = self.objective.policy_loss(&log_probs, &entropy, tokens, minibatch)?;
        if trains {
            policy.optimizer.backward(&loss.total, outputs)?;
        }
        Ok(loss.statistics)
    }
}

/// Adds one micro-batch's gradient of the value model; gives its share of the loss and the number of tokens at which the clipped loss was the larger.
fn learn_values(
    value: &mut Learner,
    batch: &Batch,
    groups: &[&Group],
    settings: &PpoSettings,
    shares: &[f32],
) -> Result<(f64, f64)> {
    let hidden = value.model.hidden(batch, &Pass::default())?; // [tokens, d_model]
    let rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
    let mut outputs = Outputs::default();
    let values = outputs.tensor(&value.model.values(&hidden, &rows)?)?; // [targets]
    drop(hidden);
    let old_values = gather(groups, |episode| &episode.values);
    let returns = gather(groups, |episode| &episode.returns);
    let (loss, clipped) = value_loss(&values, &old_values, &returns, settings.value.value_clip_range, shares)?;
    value.optimizer.backward(&loss.affine(settings.value.value_coefficient, 0.0)?, outputs)?;
    Ok((f64::from(loss.to_scalar::<f32>()?), clipped))
}

/// One number a token of the answers, end to end.
fn gather(groups: &[&Group], of: fn(&Episode) -> &Vec<f32>) -> Vec<f32> {
    episodes(groups.iter().copied()).flat_map(|episode| of(episode).iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_rollout_is_divided_into_as_many_minibatches_as_asked(count in 1usize..200, parts in 1usize..20) {
            prop_assume!(parts <= count);
            let runs: Vec<Range<usize>> = evenly(count, parts).collect();
            prop_assert_eq!(runs.len(), parts);
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            let lengths: Vec<usize> = runs.iter().map(ExactSizeIterator::len).collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        }
    }
}
