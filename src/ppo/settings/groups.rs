//! The groups of `ppo`'s settings, by the part of an update that they belong to.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::rewards::JudgeSettings;
use crate::settings::{Flags, at_least_one, not_negative, ratio};

const EPISODES: &str = "Episodes";
const KL: &str = "KL penalty";
const ADVANTAGES: &str = "Advantages";
const POLICY: &str = "Policy";
const VALUES: &str = "Value model";
const PTX: &str = "Pretraining mix (PPO-ptx)";
const OBSERVATION: &str = "Observation";
const WARNINGS: &str = "Warnings";

/// Which answers are sampled and what becomes of their score.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct EpisodeSettings {
    /// Answers to each prompt, which share its segment; --batch-size counts answers
    #[arg(long, help_heading = EPISODES, default_value_t = 1, value_parser = at_least_one)]
    pub answers: usize,
    /// Tokens that end an answer, as they are in the vocabulary [default: the tokenizer's end-of-text tokens]
    #[arg(long, help_heading = EPISODES, value_name = "TOKEN", num_args = 1..)]
    #[serde(default)]
    pub stop_token: Vec<String>,
    /// A stop token ends an answer only after this many tokens
    #[arg(long, help_heading = EPISODES, value_name = "TOKENS", default_value_t = 0)]
    pub stop_after: usize,
    /// Subtracted from the score of an answer that does not end by itself
    #[arg(long, help_heading = EPISODES, default_value_t = 1.0, value_parser = not_negative)]
    pub missing_eos_penalty: f64,
    /// The score of an answer that does not end by itself, in place of the reward's and of the penalty
    #[arg(long, help_heading = EPISODES, allow_negative_numbers = true)]
    pub missing_eos_score: Option<f64>,
    /// Scores count from minus this to this; 0 leaves them as they are
    #[arg(long, help_heading = EPISODES, default_value_t = 0.0, value_parser = not_negative)]
    pub reward_clip: f64,
    /// Whether the rewards of a rollout are divided by their standard deviation; their mean stays
    #[arg(long, help_heading = EPISODES, default_value_t = false, action = clap::ArgAction::Set)]
    pub whiten_rewards: bool,
}

/// The penalty for leaving the reference.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct KlSettings {
    /// Weight of the penalty, at the start where it adapts
    #[arg(long, help_heading = KL, default_value_t = 0.05, value_parser = not_negative)]
    pub kl_coefficient: f64,
    /// Where the penalty stands
    #[arg(long, help_heading = KL, value_enum, default_value_t = KlPlace::Reward)]
    pub kl_in: KlPlace,
    /// How the divergence at a token is estimated, with d = log π - log π_ref [with --kl-in loss: k3]
    #[arg(long, help_heading = KL, value_enum, default_value_t = KlEstimator::K1)]
    pub kl_estimator: KlEstimator,
    /// A token's estimate counts from minus this to this; 0 leaves it as it is
    #[arg(long, help_heading = KL, default_value_t = 0.0, value_parser = not_negative)]
    pub kl_clip: f64,
    /// Whether the weight stays or is steered towards --kl-target
    #[arg(long, help_heading = KL, value_enum, default_value_t = KlController::Fixed)]
    pub kl_controller: KlController,
    /// The divergence of an answer, in nats, that the adaptive controller steers towards
    #[arg(long, help_heading = KL, default_value_t = 6.0, value_parser = above_zero)]
    pub kl_target: f64,
    /// Episodes in which the adaptive controller changes the weight by at most a fifth
    #[arg(long, help_heading = KL, default_value_t = 10_000.0, value_parser = above_zero)]
    pub kl_horizon: f64,
}

/// Where the KL penalty stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlPlace {
    /// Subtracted from the reward of every token (Ziegler et al. 2019)
    Reward,
    /// Added to the policy's loss (Shao et al. 2024)
    Loss,
}

/// Estimators of KL(π, π_ref) from samples of π (Schulman 2020), with `d = log π - log π_ref`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimator {
    /// d: unbiased, of high variance, of either sign
    K1,
    /// d² / 2: of low variance, biased
    K2,
    /// exp(-d) - 1 + d: unbiased, never negative
    K3,
}

/// How the weight of the KL penalty goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlController {
    /// It stays
    Fixed,
    /// It grows where the divergence is above the target and shrinks below (Ziegler et al. 2019, section 2.2)
    Adaptive,
}

/// From rewards to advantages.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct AdvantageSettings {
    /// Discount of later rewards
    #[arg(long, help_heading = ADVANTAGES, default_value_t = 1.0, value_parser = ratio)]
    pub gamma: f64,
    /// Trade-off of bias and variance in the advantages
    #[arg(long, help_heading = ADVANTAGES, default_value_t = 0.95, value_parser = ratio)]
    pub lambda: f64,
    /// Over what advantages get mean 0 and variance 1
    #[arg(long, help_heading = ADVANTAGES, value_enum, default_value_t = Whitening::Minibatch)]
    pub whiten_advantages: Whitening,
    /// What whitening divides the sum of squares by
    #[arg(long, help_heading = ADVANTAGES, value_enum, default_value_t = Variance::Unbiased)]
    pub whitening_variance: Variance,
}

/// Over what advantages are whitened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whitening {
    /// Not at all
    None,
    /// Over each minibatch (Ziegler et al. 2019)
    Minibatch,
    /// Over the whole rollout, once (TRL)
    Rollout,
}

/// The variance that whitening divides by the root of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variance {
    /// Σ (x - mean)² / (n - 1), as PyTorch's
    Unbiased,
    /// Σ (x - mean)² / n, as TensorFlow's moments
    Biased,
}

/// The policy's updates.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct PolicySettings {
    /// Passes over the episodes of a rollout
    #[arg(long, help_heading = POLICY, default_value_t = 4, value_parser = at_least_one)]
    pub ppo_epochs: usize,
    /// Minibatches, each an optimizer step, into which a rollout is divided
    #[arg(long, help_heading = POLICY, default_value_t = 1, value_parser = at_least_one)]
    pub minibatches: usize,
    /// Whether each pass divides the rollout into other minibatches
    #[arg(long, help_heading = POLICY, default_value_t = true, action = clap::ArgAction::Set)]
    pub reshuffle: bool,
    /// How far the policy's ratio counts from 1
    #[arg(long, help_heading = POLICY, default_value_t = 0.2, value_parser = not_negative)]
    pub clip_range: f64,
    /// How far the ratio counts above 1, where that differs
    #[arg(long, help_heading = POLICY, value_parser = not_negative)]
    pub clip_range_high: Option<f64>,
    /// With negative advantages the ratio counts up to this (Ye et al. 2020); 0 for no bound
    #[arg(long, help_heading = POLICY, default_value_t = 0.0, value_parser = not_negative)]
    pub dual_clip: f64,
    /// The mean that a loss is: over all tokens, or over answers of the mean over each one's tokens
    #[arg(long, help_heading = POLICY, value_enum, default_value_t = Aggregation::Token)]
    pub loss_aggregation: Aggregation,
    /// Weight of the entropy, which the loss rewards
    #[arg(long, help_heading = POLICY, default_value_t = 0.0, value_parser = not_negative)]
    pub entropy_coefficient: f64,
    /// A minibatch whose mean ratio is above this changes nothing; 0 for no bound
    #[arg(long, help_heading = POLICY, default_value_t = 10.0, value_parser = not_negative)]
    pub ratio_threshold: f64,
    /// A token's log-ratio counts from minus this to this; 0 leaves it as it is
    #[arg(long, help_heading = POLICY, default_value_t = 0.0, value_parser = not_negative)]
    pub log_ratio_clip: f64,
    /// Ends an update's passes when the policy is this far (d² / 2, mean over tokens) from the rollout's; 0 for no bound
    #[arg(long, help_heading = POLICY, default_value_t = 0.0, value_parser = not_negative)]
    pub early_stop_kl: f64,
    /// Tokens whose probability differs between sampler and update are weighted by the quotient, at most by this; 0 for no weights
    #[arg(long, help_heading = POLICY, default_value_t = 2.0, value_parser = not_negative)]
    pub sampler_correction: f64,
    /// The saved policy is the moving average of its weights with this decay an update; 0 for the weights themselves
    #[arg(long, help_heading = POLICY, default_value_t = 0.0, value_parser = ratio)]
    pub ema_decay: f64,
}

/// The mean that a loss is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Over all tokens of the minibatch
    Token,
    /// Over answers, of the mean over each answer's tokens
    Answer,
    /// Over answers, whose ratio is that of the whole answer
    Sequence,
}

/// The value model.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct ValueSettings {
    /// What the value model starts from [default: reward where there is a reward model, else policy]
    #[arg(long, help_heading = VALUES, value_enum)]
    pub value_from: Option<ValueSource>,
    /// How the value model's head starts, where it is not the reward model's
    #[arg(long, help_heading = VALUES, value_enum, default_value_t = ValueHead::Zero)]
    pub value_head: ValueHead,
    /// Peak learning rate of the value model [default: the policy's]
    #[arg(long, help_heading = VALUES, value_parser = not_negative)]
    pub value_learning_rate: Option<f64>,
    /// How far a value counts from the rollout's; 0 for no bound
    #[arg(long, help_heading = VALUES, default_value_t = 0.2, value_parser = not_negative)]
    pub value_clip_range: f64,
    /// Weight of the value loss
    #[arg(long, help_heading = VALUES, default_value_t = 0.1, value_parser = not_negative)]
    pub value_coefficient: f64,
    /// Updates in which the value model learns alone, before the policy
    #[arg(long, help_heading = VALUES, value_name = "UPDATES", default_value_t = 0)]
    pub critic_warmup: usize,
}

/// What the value model starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ValueSource {
    /// The (first) reward model, head and all
    Reward,
    /// The policy, with a new head
    Policy,
}

/// How a new value head starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ValueHead {
    /// All 0: every value is 0 (Ziegler et al. 2019)
    Zero,
    /// Normal with standard deviation 1/(d+1)
    Normal,
}

/// Pretraining mixed into the policy's updates (Ouyang et al. 2022, equation 2).
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct PtxSettings {
    /// Data set of texts or demonstrations, whose log-likelihood the policy's updates raise too
    #[arg(long, help_heading = PTX, value_name = "FILES")]
    pub ptx_data: Option<String>,
    /// Weight of the mean loss of a token of them
    #[arg(long, help_heading = PTX, default_value_t = 27.8, value_parser = not_negative)]
    pub ptx_coefficient: f64,
    /// Texts for each episode of a minibatch
    #[arg(long, help_heading = PTX, default_value_t = 8.0, value_parser = above_zero)]
    pub ptx_ratio: f64,
}

/// What is looked at and kept during the run.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct ObservationSettings {
    /// Updates between sample answers, written with score, value and KL as text and Parquet; 0 for none
    #[arg(long, help_heading = OBSERVATION, value_name = "UPDATES", default_value_t = 10)]
    pub sample_every: usize,
    /// Sample answers written at a time
    #[arg(long, help_heading = OBSERVATION, default_value_t = 8, value_parser = at_least_one)]
    pub samples: usize,
    /// Updates between policies that are kept as models, policies/step-000010 and so on, for `evaluate --policies`; 0 for none
    #[arg(long, help_heading = OBSERVATION, value_name = "UPDATES", default_value_t = 0)]
    pub policy_every: usize,
    /// Prompts kept apart, whose answers a held-out judge scores; the best policy by that judge is kept beside the last
    #[arg(long, help_heading = OBSERVATION, value_name = "FILES")]
    pub evaluation_data: Option<String>,
    /// Updates between evaluations [default: a tenth of the run]
    #[arg(long, help_heading = OBSERVATION, value_name = "UPDATES", value_parser = at_least_one)]
    pub evaluate_every: Option<usize>,
    /// The held-out judge.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeSettings,
}

impl EpisodeSettings {
    /// When they are read. `whiten_rewards`, which depends on the algorithm, is not among them.
    pub(super) fn flags() -> Flags<Self> {
        Flags::new().always(&["answers", "stop_token", "stop_after", "missing_eos_score", "reward_clip"]).only(
            "without --missing-eos-score",
            &["missing_eos_penalty"],
            |of: &Self| of.missing_eos_score.is_none(),
        )
    }
}

impl KlSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        let adapts = |kl: &Self| kl.kl_controller == KlController::Adaptive;
        Flags::new()
            .always(&["kl_coefficient", "kl_controller"])
            .only("with a --kl-coefficient above 0", &["kl_in", "kl_estimator", "kl_clip"], |kl: &Self| {
                kl.kl_coefficient > 0.0
            })
            .only("with --kl-controller adaptive", &["kl_target", "kl_horizon"], adapts)
    }
}

impl PolicySettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        Flags::new()
            .always(&["ppo_epochs", "minibatches", "clip_range", "clip_range_high", "dual_clip", "loss_aggregation"])
            .always(&["entropy_coefficient", "ratio_threshold", "log_ratio_clip", "early_stop_kl"])
            .always(&["sampler_correction", "ema_decay"])
            .only("with more than one of --ppo-epochs", &["reshuffle"], |policy: &Self| policy.ppo_epochs > 1)
    }
}

impl PtxSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        Flags::new()
            .always(&["ptx_data"])
            .only("with --ptx-data", &["ptx_coefficient", "ptx_ratio"], |ptx: &Self| ptx.ptx_data.is_some())
    }
}

impl ObservationSettings {
    /// When they are read. A judge judges the answers to held-out prompts.
    pub(super) fn flags() -> Flags<Self> {
        Flags::new()
            .always(&["sample_every", "policy_every", "evaluation_data"])
            .only("with a --sample-every above 0", &["samples"], |of: &Self| of.sample_every > 0)
            .only(
                "with --evaluation-data",
                &["evaluate_every", "judge_model", "judge_classifier", "judge_command", "judge_rule"],
                |of: &Self| of.evaluation_data.is_some(),
            )
            .only("with --evaluation-data and --judge-rule", &["judge_column"], |of: &Self| {
                of.evaluation_data.is_some() && !of.judge.judge_rule.is_empty()
            })
    }
}

impl WatchSettings {
    /// When they are read. `watch_explained_variance` and `watch_hacking`, of which other settings decide, are not among them.
    pub(super) fn flags() -> Flags<Self> {
        Flags::new().always(&[
            "watch_kl",
            "watch_negative_kl",
            "watch_entropy",
            "watch_no_eos",
            "watch_length",
            "watch_repeated",
        ])
    }
}

/// When the run warns. Each warning is given once in ten updates: printed, written to `warnings.txt` and counted in `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct WatchSettings {
    /// Divergence of an answer from the reference, in nats, from which on the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 50.0, value_parser = above_zero)]
    pub watch_kl: f64,
    /// Updates in a row with a negative divergence after which the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 5, value_parser = at_least_one)]
    pub watch_negative_kl: usize,
    /// Share of the first update's entropy below which the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 0.1, value_parser = ratio)]
    pub watch_entropy: f64,
    /// Explained variance of the values below which the run warns, after ten updates
    #[arg(long, help_heading = WARNINGS, default_value_t = 0.0, allow_negative_numbers = true)]
    pub watch_explained_variance: f64,
    /// Share of answers that do not end by themselves above which the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 0.5, value_parser = ratio)]
    pub watch_no_eos: f64,
    /// Factor by which answers may become longer or shorter than in the first update
    #[arg(long, help_heading = WARNINGS, default_value_t = 2.0, value_parser = above_zero)]
    pub watch_length: f64,
    /// Share of answers that are given to several prompts of a rollout, above the first update's, from which on the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 0.3, value_parser = ratio)]
    pub watch_repeated: f64,
    /// Evaluations in a row in which the score rises and the held-out judge falls after which the run warns
    #[arg(long, help_heading = WARNINGS, default_value_t = 2, value_parser = at_least_one)]
    pub watch_hacking: usize,
}

/// A finite number above 0.
fn above_zero(text: &str) -> Result<f64, String> {
    match not_negative(text) {
        Ok(number) if number > 0.0 => Ok(number),
        _ => Err("expected a finite number above 0".to_string()),
    }
}
