//! Direct preference optimisation: from preferred answers to a policy, without a reward model and without sampling (Rafailov et al. 2023).
//!
//! A ranking of k answers gives all its pairs of answers that differ, which share the prompt's segment and count together as one element, as the pairwise loss of
//! reward models has them. The reference is the model as it is at the start; its log-probabilities are computed once.

use std::cmp::Ordering;
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{Accumulated, Objective, SftReport, SftSettings, Task, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree};
use crate::data::inspect;
use crate::data::pairs::{Pair, RankedTokens, by_learned_tokens, ranked_tokens};
use crate::data::schema::{RANKINGS, Ranking};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::passes::StepPasses;
use crate::model::weight_files::no_weights;
use crate::ops::{self, Outputs};
use crate::say;
use crate::settings::{CommonSettings, Flags, below_one, not_negative};
use crate::train::examples::{Examples, values};
use crate::train::memory::{self, Footprint};
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Sizes, Workload, check_lengths};
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
    /// (h - 1 / (2 β))², with h a sum over each answer's tokens, as in the paper, so that β is per answer; TRL takes the mean over the tokens instead (Azar et al. 2023, equation 17)
    Ipo,
}

/// A prompt with its answers, every pair of which one is better, and the log-probabilities of the answers under the reference once they are known.
struct Preference {
    tree: TokenTree,
    /// The pairs of answers that are no tie and differ.
    pairs: Vec<Pair>,
    weight: f32,
    reference: OnceLock<Vec<f32>>,
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

/// In the words of a plan.
impl fmt::Display for DpoSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loss = if self.preference_loss == PreferenceLoss::Ipo { "ipo" } else { "sigmoid" };
        write!(f, "dpo ({loss}), beta {}", self.beta)?;
        if self.label_smoothing > 0.0 { write!(f, ", label smoothing {}", self.label_smoothing) } else { Ok(()) }
    }
}

impl DpoSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<SftSettings> {
        let is_dpo = |sft: &SftSettings| sft.objective == Objective::Dpo;
        // IPO has no probability that could be smoothed.
        let is_smooth = move |sft: &SftSettings| is_dpo(sft) && sft.dpo.preference_loss == PreferenceLoss::Sigmoid;
        Flags::new().only("with --objective dpo", &["beta", "preference_loss"], is_dpo).only(
            "with --objective dpo and --preference-loss sigmoid",
            &["label_smoothing"],
            is_smooth,
        )
    }

    /// Refuses what the loss of a pair has no use for.
    fn check(&self) -> Result<()> {
        if self.beta == 0.0 {
            bail!(
                "--beta is 0, so nothing holds the policy to the reference and no pair has a finite loss; give a number above 0"
            );
        }
        Ok(())
    }
}

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    settings.dpo.check()?;
    let common = &settings.common;
    let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
    let source = settings.source();
    let mut examples = Examples::open(&source, RANKINGS, |ranking, truncation| {
        preference(&ranking, &tokenizer, common.max_length, truncation)
    })?;
    if let Some(pattern) = examples.nothing_in(&source) {
        bail!(
            "{pattern}: no preference is left after reading; at least one prompt with a better and a worse answer that differ is needed"
        );
    }
    if let Some(count) = settings.examples.inspect {
        for example in examples.first(count)? {
            say!("{}", inspect::inspect(&example.value.tree, &tokenizer)?);
        }
        examples.say_remarks();
        return Ok(SftReport::NOTHING);
    }
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::Language,
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, common, &settings.training)?;
    let mut bases = Bases::of(common, Device::Cpu);
    let model = bases.load(&role)?;
    if model.folder().new_from_seed.is_some() {
        // The reference would be random.
        return Err(no_weights(&model.folder().path));
    }
    let length = |preference: &Preference| preference.tree.longest();
    let too_long = check_lengths(model.architecture(), &examples, length, common.max_length)?;
    // A frozen model has the weights of the one that trains, and here has to keep those of the start.
    let copy = if examples.is_streamed() { Some(bases.load(&role)?.frozen()?) } else { None };
    drop(bases);
    let beside = copy.iter().map(|copy| Footprint::of("reference", copy)).collect::<Result<Vec<_>>>()?;
    let schedule = settings.schedule_of(&examples);
    let rows = |preference: &Preference| model.rows_of(&preference.tree);
    let sizes = Sizes {
        tokens: &|preference: &Preference| preference.tree.tokens(),
        learned: &rows,
        evaluated: &rows,
        budget: common.tokens_per_batch,
    };
    let workload = Workload::new("preferences", &examples, schedule.total_steps, &sizes);
    let workload = workload.looked_up(&examples, &sizes);
    let plan = settings
        .plan(&model, &schedule, &workload, &beside)?
        .warning(too_long)
        .chat_format(&tokenizer)
        .line("objective", settings.dpo)
        .line("reference", settings.model.as_it_is());
    let (checkpoints, total_steps) = (&settings.training.checkpoints, schedule.total_steps);
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    if let Some(training) = examples.training() {
        let reference = model.frozen()?;
        run.heeding(|| {
            look_up_reference(&reference, &values(&training), common.tokens_per_batch)?;
            look_up_reference(&reference, &values(examples.evaluation()?), common.tokens_per_batch)
        })?;
    }
    let save = |folder: &Path| model.save(folder);
    let task = Preferences { model: &model, reference: copy, settings: &settings.dpo, common };
    let report = train(settings, &model, &task, &mut examples, &mut run, save)?;
    run.finish()?;
    Ok(report)
}

/// A ranking as pairs of its answers; nothing where these are one tie, or all the same.
fn preference(
    ranking: &Ranking,
    tokenizer: &Tokenizer,
    max_length: usize,
    truncation: &mut Truncation,
) -> Result<Option<Preference>> {
    let tokenize =
        |ranking: &Ranking, max_length, truncation: &mut Truncation| tokenizer.ranking(ranking, max_length, truncation);
    let tokens = ranked_tokens(ranking, max_length, truncation, tokenize, by_learned_tokens)?;
    let weight = ranking.weight;
    Ok(tokens.map(|RankedTokens { tree, pairs, .. }| Preference { tree, pairs, weight, reference: OnceLock::new() }))
}

/// Computes the log-probabilities of the answers under the reference where they are not known.
fn look_up_reference(reference: &Model, preferences: &[&Preference], tokens_per_batch: usize) -> Result<()> {
    let unknown: Vec<_> = preferences.iter().filter(|preference| preference.reference.get().is_none()).collect();
    let trees = unknown.iter().map(|preference| &preference.tree);
    for range in reference.passes(trees, tokens_per_batch) {
        let preferences = &unknown[range];
        let batch = reference.pack(preferences.iter().map(|preference| &preference.tree));
        let found: Vec<f32> = answer_log_probs(reference, &batch, &Pass::default())?.0.to_vec1()?;
        for (preference, answers) in preferences.iter().zip(&batch.trees) {
            preference.reference.get_or_init(|| found[answers.clone()].to_vec());
        }
    }
    Ok(())
}

/// `Σ log π(token | what stands before it)` over the tokens of each answer that not all answers share,
/// `[answers]`, and what it was computed from.
fn answer_log_probs(model: &Model, batch: &Batch, pass: &Pass) -> Result<(Tensor, Outputs)> {
    let hidden = model.hidden(batch, pass)?; // [tokens, d_model]
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, batch, 1.0)?.log_probs)?; // [targets]
    Ok((ops::sum_ranges(&log_probs, &batch.answer_targets)?, outputs))
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
    /// The model as it was at the start, where the reference's log-probabilities are not known before the training.
    reference: Option<Model>,
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
        mut pass: impl FnMut(&Batch) -> Pass,
        mut learn: impl FnMut(&Tensor, Outputs) -> Result<()>,
    ) -> Result<Sums> {
        if let Some(reference) = &self.reference {
            look_up_reference(reference, preferences, self.common.tokens_per_batch)?;
        }
        let trees = preferences.iter().map(|preference| &preference.tree);
        let total: f32 = preferences.iter().map(|preference| preference.weight).sum();
        let mut sums = Sums::default();
        for range in model.passes(trees, self.common.tokens_per_batch) {
            let preferences = &preferences[range];
            let batch = model.pack(preferences.iter().map(|preference| &preference.tree));
            let mut pairs = PreferencePairs::default();
            for (preference, answers) in preferences.iter().zip(&batch.trees) {
                let weight = preference.weight / (total.max(f32::MIN_POSITIVE) * preference.pairs.len() as f32);
                for pair in &preference.pairs {
                    pairs.better.push((answers.start + pair.better) as u32);
                    pairs.worse.push((answers.start + pair.worse) as u32);
                    pairs.weights.push(weight);
                }
            }
            let known = preferences.iter().flat_map(|preference| preference.reference.get().into_iter().flatten());
            let reference: Vec<f32> = known.copied().collect();
            let (log_probs, outputs) = answer_log_probs(model, &batch, &pass(&batch))?;
            let (loss, rewards) = loss(self.settings, &log_probs, &reference, &pairs)?;
            learn(&loss, outputs)?;
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            for (&better, &worse) in pairs.better.iter().zip(&pairs.worse) {
                let [better, worse] = [better, worse].map(|answer| f64::from(rewards[answer as usize]));
                sums.pairs += 1.0;
                sums.chosen += better;
                sums.rejected += worse;
                sums.right += match better.partial_cmp(&worse) {
                    // Of a NaN neither is the better.
                    None => f64::NAN,
                    Some(Ordering::Equal) => 0.5,
                    Some(order) => f64::from(u8::from(order == Ordering::Greater)),
                };
            }
        }
        Ok(sums)
    }
}

impl Task for Preferences<'_> {
    type Value = Preference;

    fn accumulate(&self, optimizer: &mut Optimizer, preferences: &[&Preference], step: u64) -> Result<Accumulated> {
        let mut passes = StepPasses::new(self.common.seed, step);
        let pass = |batch: &Batch| passes.next(self.model, batch);
        let learn = |loss: &Tensor, outputs| optimizer.backward(loss, outputs);
        let sums = self.losses(self.model, preferences, pass, learn)?;
        let names = ["rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins"];
        let tokens = preferences.iter().map(|preference| preference.tree.tokens()).sum();
        Ok(Accumulated { loss: sums.loss, tokens, metrics: sums.metrics(names) })
    }

    fn evaluate(&self, preferences: &[&Preference]) -> Result<Vec<(&'static str, f64)>> {
        let sums = self.losses(&self.model.frozen()?, preferences, |_| Pass::default(), |_, _| Ok(()))?;
        let names =
            ["evaluation_accuracy", "evaluation_reward_chosen", "evaluation_reward_rejected", "evaluation_margin"];
        Ok(std::iter::once(("evaluation_loss", sums.loss)).chain(sums.metrics(names)).collect())
    }
}
