//! Direct preference optimisation: from preferred answers to a policy, without a reward model and without sampling (Rafailov et al. 2023).
//!
//! A ranking of k answers gives all its pairs, which share the prompt's segment and count together as one element, as the pairwise loss of
//! reward models has them. The reference is the model as it is at the start; its log-probabilities are computed once.

use std::path::Path;

use candle_core::{Device, Tensor};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{Accumulated, SftReport, SftSettings, Task, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree, split_by_budget};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::data::{inspect, schema};
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::model::{Model, dropout_seed};
use crate::ops;
use crate::say;
use crate::settings::{CommonSettings, below_one, not_negative};
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::order::{self, Order};
use crate::train::plan::{Examples, training_plan};
use crate::train::run::Run;

const HEADING: &str = "Direct preference optimisation";

/// DPO's own settings.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize, Deserialize)]
pub struct DpoSettings {
    /// How strongly the policy is held to the reference: the weight of log π - log π_ref, which is the implied reward
    #[arg(long, help_heading = HEADING, default_value_t = 0.1, value_parser = not_negative)]
    pub beta: f64,
    /// The loss of a pair
    #[arg(long, help_heading = HEADING, value_enum, default_value_t = PreferenceLoss::Sigmoid)]
    pub preference_loss: PreferenceLoss,
    /// The share of labels taken to be the wrong way round
    #[arg(long, help_heading = HEADING, default_value_t = 0.0, value_parser = below_one)]
    pub label_smoothing: f64,
}

/// The loss of a pair, with `h` the difference of the two answers' log π - log π_ref.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PreferenceLoss {
    /// -log σ(β h) (Rafailov et al. 2023, equation 7)
    Sigmoid,
    /// (h - 1 / (2 β))² (Azar et al. 2023, equation 17)
    Ipo,
}

/// A prompt with its answers, every pair of which one is better, and the log-probabilities of the answers under the reference.
struct Preference {
    tree: TokenTree,
    /// Indices of the better and the worse answer.
    pairs: Vec<(usize, usize)>,
    weight: f32,
    reference: Vec<f32>,
}

/// The pairs of a micro-batch: one number each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PreferencePairs {
    /// The better answer's index among all answers.
    pub better: Vec<u32>,
    /// The worse answer's.
    pub worse: Vec<u32>,
    /// The pair's share of the loss.
    pub weights: Vec<f32>,
}

impl DpoSettings {
    /// Refuses what the loss of a pair has no use for.
    fn check(&self) -> Result<()> {
        if self.beta == 0.0 {
            bail!(
                "--beta is 0, so nothing holds the policy to the reference and no pair has a finite loss; give a number above 0"
            );
        }
        if self.preference_loss == PreferenceLoss::Ipo && self.label_smoothing > 0.0 {
            bail!("--label-smoothing is for --preference-loss sigmoid; ipo has no probability that it could smooth");
        }
        Ok(())
    }
}

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    settings.dpo.check()?;
    let common = &settings.common;
    let tokenizer = Tokenizer::load(adapt::tokenizer_folder(&settings.model.model)?)?;
    let mut truncation = Truncation::default();
    let preferences = read(&settings.data, &tokenizer, common.max_length, &mut truncation)?;
    if let Some(count) = settings.examples.inspect {
        for preference in preferences.iter().take(count) {
            say!("{}", inspect::inspect(&preference.tree, &tokenizer)?);
        }
        return Ok(SftReport::NOTHING);
    }
    let (mut training, mut evaluation) = match &settings.examples.evaluation_data {
        Some(pattern) => (preferences, read(pattern, &tokenizer, common.max_length, &mut Truncation::default())?),
        None => order::split(preferences, settings.examples.evaluation_share, common.seed),
    };
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::Language,
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, &settings.training)?;
    let model = Bases::new(Device::Cpu).load(&role)?;
    tokenizer.fits(model.architecture().vocabulary)?;
    let longest = training.iter().chain(&evaluation).map(|preference| preference.tree.longest()).max();
    model.architecture().check_length(longest.unwrap_or(0))?;
    let order = Order::new((0..training.len()).collect(), settings.training.batch_size, common.seed);
    let tokens = training.iter().map(|preference| preference.tree.tokens()).sum();
    let (what, count) = ("preferences", training.len());
    let examples = Examples { what, training: count, evaluation: evaluation.len(), tokens, truncation };
    let plan = training_plan("sft", &model, &[], common, &settings.training, &examples, 0)?
        .line("objective", format!("dpo, beta {}", settings.dpo.beta));
    let total_steps = order.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    let checkpoints = &settings.training.checkpoints;
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let reference = model.frozen()?;
    for preferences in [&mut training, &mut evaluation] {
        look_up_reference(&reference, preferences, common.tokens_per_batch)?;
    }
    let save = |folder: &Path| model.save(folder);
    let task =
        Preferences { model: &model, training: &training, evaluation: &evaluation, settings: &settings.dpo, common };
    let report = train(settings, &model, &task, order, &mut run, save)?;
    run.finish()?;
    Ok(report)
}

/// Reads rankings; those whose answers are one tie are left out.
fn read(
    pattern: &str,
    tokenizer: &Tokenizer,
    max_length: usize,
    truncation: &mut Truncation,
) -> Result<Vec<Preference>> {
    let mut preferences = Vec::new();
    for ranking in schema::rankings(pattern)? {
        let ranking = ranking?;
        let ranks = ranking.ranks.iter().enumerate();
        let worse = |(better, low): (usize, &i64)| {
            let low = *low;
            ranking
                .ranks
                .iter()
                .enumerate()
                .filter(move |(_, high)| low < **high)
                .map(move |(worse, _)| (better, worse))
        };
        let pairs: Vec<(usize, usize)> = ranks.flat_map(worse).collect();
        if !pairs.is_empty() {
            let tree = tokenizer.ranking(&ranking, max_length, truncation)?;
            preferences.push(Preference { tree, pairs, weight: ranking.weight, reference: Vec::new() });
        }
    }
    if preferences.is_empty() {
        bail!(
            "{pattern}: no preference is left after reading; at least one prompt with a better and a worse answer is needed"
        );
    }
    Ok(preferences)
}

fn look_up_reference(reference: &Model, preferences: &mut [Preference], tokens_per_batch: usize) -> Result<()> {
    let sizes: Vec<usize> = preferences.iter().map(|preference| preference.tree.tokens()).collect();
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let preferences = &mut preferences[range];
        let batch = Batch::pack(preferences.iter().map(|preference| &preference.tree));
        let found: Vec<f32> = answer_log_probs(reference, &batch, &Pass::default())?.to_vec1()?;
        for (preference, answers) in preferences.iter_mut().zip(&batch.trees) {
            preference.reference = found[answers.clone()].to_vec();
        }
    }
    Ok(())
}

/// `Σ log π(token | what stands before it)` over the tokens of each answer that not all answers share, `[answers]`.
fn answer_log_probs(model: &Model, batch: &Batch, pass: &Pass) -> Result<Tensor> {
    let hidden = model.hidden(batch, pass)?; // [tokens, d_model]
    let log_probs = model.log_probs(&hidden, batch, 1.0)?.log_probs; // [targets]
    ops::sum_ranges(&log_probs, &batch.answer_targets)
}

/// `Σ weight · loss` over pairs; `log_probs` and `reference` are `[answers]`. Gives the implied rewards `β (log π - log π_ref)` too.
pub fn loss(
    settings: &DpoSettings,
    log_probs: &Tensor,
    reference: &[f32],
    pairs: &PreferencePairs,
) -> Result<(Tensor, Vec<f32>)> {
    let device = log_probs.device();
    let ratios = (log_probs - Tensor::from_slice(reference, reference.len(), device)?)?; // [answers]
    let count = pairs.better.len();
    let of = |indices: &[u32]| ratios.index_select(&Tensor::from_slice(indices, count, device)?, 0);
    let difference = (of(&pairs.better)? - of(&pairs.worse)?)?; // [pairs]
    let losses = match settings.preference_loss {
        PreferenceLoss::Ipo => difference.affine(1.0, -1.0 / (2.0 * settings.beta))?.sqr()?,
        PreferenceLoss::Sigmoid => {
            let scaled = difference.affine(settings.beta, 0.0)?;
            let right = ops::softplus(&scaled.neg()?)?.affine(1.0 - settings.label_smoothing, 0.0)?;
            (right + ops::softplus(&scaled)?.affine(settings.label_smoothing, 0.0)?)?
        }
    };
    let loss = (losses * Tensor::from_slice(&pairs.weights, count, device)?)?.sum_all()?;
    Ok((loss, ratios.detach().affine(settings.beta, 0.0)?.to_vec1()?))
}

struct Preferences<'a> {
    model: &'a Model,
    training: &'a [Preference],
    evaluation: &'a [Preference],
    settings: &'a DpoSettings,
    common: &'a CommonSettings,
}

/// Sums over pairs.
#[derive(Default)]
struct Sums {
    loss: f64,
    pairs: f64,
    chosen: f64,
    rejected: f64,
    right: f64,
}

impl Sums {
    fn metrics(&self, names: [&'static str; 4]) -> Vec<(&'static str, f64)> {
        let values = [self.right, self.chosen, self.rejected, self.chosen - self.rejected];
        names.into_iter().zip(values.map(|sum| sum / self.pairs.max(1.0))).collect()
    }
}

impl Preferences<'_> {
    /// The losses of micro-batches, as shares of the mean over all `preferences`, given to `learn`.
    fn losses(
        &self,
        model: &Model,
        preferences: &[&Preference],
        pass: impl Fn(u64) -> Pass,
        mut learn: impl FnMut(&Tensor) -> Result<()>,
    ) -> Result<Sums> {
        let sizes: Vec<usize> = preferences.iter().map(|preference| preference.tree.tokens()).collect();
        let total: f32 = preferences.iter().map(|preference| preference.weight).sum();
        let mut sums = Sums::default();
        for (index, range) in split_by_budget(&sizes, self.common.tokens_per_batch).into_iter().enumerate() {
            let preferences = &preferences[range];
            let batch = Batch::pack(preferences.iter().map(|preference| &preference.tree));
            let mut pairs = PreferencePairs::default();
            for (preference, answers) in preferences.iter().zip(&batch.trees) {
                let weight = preference.weight / (total.max(f32::MIN_POSITIVE) * preference.pairs.len() as f32);
                for &(better, worse) in &preference.pairs {
                    pairs.better.push((answers.start + better) as u32);
                    pairs.worse.push((answers.start + worse) as u32);
                    pairs.weights.push(weight);
                }
            }
            let reference: Vec<f32> = preferences.iter().flat_map(|preference| preference.reference.clone()).collect();
            let log_probs = answer_log_probs(model, &batch, &pass(index as u64))?;
            let (loss, rewards) = loss(self.settings, &log_probs, &reference, &pairs)?;
            learn(&loss)?;
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            for (&better, &worse) in pairs.better.iter().zip(&pairs.worse) {
                let [better, worse] = [better, worse].map(|answer| f64::from(rewards[answer as usize]));
                sums.pairs += 1.0;
                sums.chosen += better;
                sums.rejected += worse;
                sums.right += if better == worse { 0.5 } else { f64::from(u8::from(better > worse)) };
            }
        }
        Ok(sums)
    }
}

impl Task for Preferences<'_> {
    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[usize], step: u64) -> Result<Accumulated> {
        let preferences: Vec<&Preference> = chosen.iter().map(|&index| &self.training[index]).collect();
        let pass = |index| Pass { dropout_seed: Some(dropout_seed(self.common.seed, step, index)) };
        let sums = self.losses(self.model, &preferences, pass, |loss| optimizer.accumulate(&loss.backward()?))?;
        let names = ["rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins"];
        let tokens = preferences.iter().map(|preference| preference.tree.tokens()).sum();
        Ok(Accumulated { loss: sums.loss, tokens, metrics: sums.metrics(names) })
    }

    fn evaluate(&self) -> Result<Vec<(&'static str, f64)>> {
        if self.evaluation.is_empty() {
            return Ok(Vec::new());
        }
        let preferences: Vec<&Preference> = self.evaluation.iter().collect();
        let sums = self.losses(&self.model.frozen()?, &preferences, |_| Pass::default(), |_| Ok(()))?;
        let names =
            ["evaluation_accuracy", "evaluation_reward_chosen", "evaluation_reward_rejected", "evaluation_margin"];
        Ok(std::iter::once(("evaluation_loss", sums.loss)).chain(sums.metrics(names)).collect())
    }
}
