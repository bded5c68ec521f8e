//! Settings of `ppo`.

mod groups;
pub mod presets;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::data::schema::{Layouts, PROMPTS, PROMPTS_WITH_COLUMNS, Prompt};
use crate::error::Result;
use crate::generate::SamplingSettings;
use crate::rewards::RewardSourceSettings;
use crate::settings::{
    CommonSettings, Flags, Method, ModelSettings, Program, SHUFFLE_WINDOW, Section, ShortFlag, TrainingSettings,
    at_least_one, learning_rate_help,
};
use crate::train::examples::Source;
use crate::train::inputs::Inputs;
use crate::train::schedule::Schedule;
pub use groups::{
    AdvantageSettings, Aggregation, EpisodeSettings, KlController, KlEstimator, KlPlace, KlSettings,
    ObservationSettings, PolicySettings, PtxSettings, ValueHead, ValueSettings, ValueSource, Variance, WatchSettings,
    Whitening,
};
pub use presets::Preset;

/// The default peak learning rate of full weights.
pub const LEARNING_RATE: f64 = 3e-6;

/// Optimises a policy against a reward by PPO, RLOO or GRPO
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(
    name = "ppo",
    version,
    mut_arg("learning_rate", learning_rate_help(LEARNING_RATE)),
    mut_args(presets::conditional_defaults)
)]
pub struct PpoSettings {
    /// The policy's model; the reference is the same model, as it is at the start.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of prompts (columns prompt or messages)
    #[arg(long, value_name = "FILES")]
    pub data: String,
    /// What judges answers.
    #[command(flatten)]
    #[serde(flatten)]
    pub rewards: RewardSourceSettings,
    /// Where advantages come from; rloo and grpo have no value model, sample several answers to each prompt, and change some defaults
    #[arg(long, value_enum, default_value_t = Algorithm::Ppo)]
    pub algorithm: Algorithm,
    /// Sets every detail as in a publication or program, and prints what it set; flags and settings file win over it
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Print this many prompts as the model will see them, and stop
    #[arg(long, value_name = "N")]
    pub inspect: Option<usize>,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
    /// What the training programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: TrainingSettings,
    /// How answers are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingSettings,
    /// Passes over the prompts
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub epochs: usize,
    /// Prompts, and texts of --ptx-data, among which the order is random; as many or fewer are kept in memory, of more one window at a time
    #[arg(long, value_name = "ROWS", default_value_t = SHUFFLE_WINDOW, value_parser = at_least_one)]
    pub shuffle_window: usize,
    /// What becomes of an answer's score.
    #[command(flatten)]
    #[serde(flatten)]
    pub episode: EpisodeSettings,
    /// The penalty for leaving the reference.
    #[command(flatten)]
    #[serde(flatten)]
    pub kl: KlSettings,
    /// From rewards to advantages.
    #[command(flatten)]
    #[serde(flatten)]
    pub advantage: AdvantageSettings,
    /// The policy's updates.
    #[command(flatten)]
    #[serde(flatten)]
    pub policy: PolicySettings,
    /// The value model.
    #[command(flatten)]
    #[serde(flatten)]
    pub value: ValueSettings,
    /// Pretraining mixed in.
    #[command(flatten)]
    #[serde(flatten)]
    pub ptx: PtxSettings,
    /// What is looked at and kept during the run.
    #[command(flatten)]
    #[serde(flatten)]
    pub observation: ObservationSettings,
    /// When the run warns.
    #[command(flatten)]
    #[serde(flatten)]
    pub watch: WatchSettings,
}

/// Where advantages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// A value model and generalised advantage estimation (Schulman et al. 2017)
    Ppo,
    /// The mean reward of the other answers to the prompt as baseline (Ahmadian et al. 2024)
    Rloo,
    /// The rewards of a prompt's answers, standardised (Shao et al. 2024)
    Grpo,
}

impl Algorithm {
    /// Whether it needs a value model.
    pub fn has_values(self) -> bool {
        self == Algorithm::Ppo
    }
}

impl Program for PpoSettings {
    fn flags() -> Flags<Self> {
        let has_values = |ppo: &Self| ppo.algorithm.has_values();
        let has_new_head = move |ppo: &Self| has_values(ppo) && ppo.value_source() == ValueSource::Policy;
        let whitens = |ppo: &Self| ppo.advantage.whiten_advantages != Whitening::None || ppo.episode.whiten_rewards;
        let commands =
            |ppo: &Self| ppo.rewards.reward_command.is_some() || ppo.observation.judge.judge_command.is_some();
        Flags::new()
            .of(|ppo: &Self| &ppo.model, ModelSettings::flags())
            .of(|ppo: &Self| &ppo.rewards, RewardSourceSettings::flags())
            .only("with --reward-command or --judge-command", &["reward_timeout"], commands)
            .always(&["data", "algorithm", "preset", "inspect", "epochs", "shuffle_window"])
            .of(|ppo: &Self| &ppo.common, CommonSettings::flags())
            .of(|ppo: &Self| &ppo.training, TrainingSettings::flags())
            .only("with --value-from policy and --algorithm ppo", &["pooling"], has_new_head)
            .only(
                "with --value-from policy and --algorithm ppo, or with --method probing",
                &["probe_hidden_size"],
                move |ppo| has_new_head(ppo) || ppo.training.method.has(Method::Probing),
            )
            .of(|ppo: &Self| &ppo.sampling, SamplingSettings::flags().without(&["top_k", "top_p"]))
            // A policy that is certain learns nothing, and is refused for that.
            .always(&["top_k", "top_p"])
            .of(|ppo: &Self| &ppo.episode, EpisodeSettings::flags())
            .of(|ppo: &Self| &ppo.kl, KlSettings::flags())
            .always(&["whiten_advantages"])
            // The others compare the sums of answers' rewards, which whitening each token would change by their length.
            .only("with --algorithm ppo", &["gamma", "lambda", "whiten_rewards"], has_values)
            .only("with --whiten-advantages or --whiten-rewards", &["whitening_variance"], whitens)
            .of(|ppo: &Self| &ppo.policy, PolicySettings::flags())
            .only(
                "with --algorithm ppo",
                &["value_from", "value_learning_rate", "value_clip_range", "value_coefficient", "critic_warmup"],
                has_values,
            )
            .only("with --value-from policy and --algorithm ppo", &["value_head"], has_new_head)
            .of(|ppo: &Self| &ppo.ptx, PtxSettings::flags())
            .of(|ppo: &Self| &ppo.observation, ObservationSettings::flags())
            .of(|ppo: &Self| &ppo.watch, WatchSettings::flags())
            .only("with --algorithm ppo", &["watch_explained_variance"], has_values)
            .only("with --evaluation-data", &["watch_hacking"], |ppo: &Self| ppo.observation.evaluation_data.is_some())
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "Input and output",
                flags: &[
                    ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                    ShortFlag("data", "FILES", "Prompts"),
                    ShortFlag("reward_model", "FOLDER", "Reward model, such as the output of reward"),
                    ShortFlag("reward_classifier", "F@LABEL", "or a classifier,"),
                    ShortFlag("reward_command", "COMMAND", "or a program of yours,"),
                    ShortFlag("reward_rule", "RULE", "or a rule on --reward-column"),
                    ShortFlag("evaluation_data", "FILES", "Held-out prompts, scored by --judge-model"),
                    ShortFlag("output", "FOLDER", "Run folder: model, metrics, checkpoints"),
                ],
            },
            Section {
                heading: "Algorithm",
                flags: &[
                    ShortFlag("algorithm", "NAME", "ppo, rloo or grpo"),
                    ShortFlag("preset", "NAME", "All details of instructgpt, n-plus or trl"),
                    ShortFlag("answers", "N", "Answers a prompt"),
                    ShortFlag("response_length", "N", "Most tokens of an answer"),
                    ShortFlag("ppo_epochs", "N", "Passes over the answers of an update"),
                    ShortFlag("minibatches", "N", "Optimizer steps of a pass"),
                    ShortFlag("kl_coefficient", "X", "Weight of the KL penalty"),
                    ShortFlag("ptx_data", "FILES", "Pretraining mix (PPO-ptx)"),
                ],
            },
            Section {
                heading: "Training",
                flags: &[
                    ShortFlag("method", "NAME", "full, lora, ia3, prefix-tuning ..."),
                    ShortFlag("learning_rate", "X", "Peak learning rate [by method]"),
                    ShortFlag("batch_size", "N", "Answers of an update"),
                    ShortFlag("epochs", "N", "Passes over the prompts"),
                    ShortFlag("max_steps", "N", "Stop after this many updates"),
                ],
            },
            Section {
                heading: "Memory and resuming",
                flags: &[
                    ShortFlag("max_length", "N", "Longest sequence in tokens"),
                    ShortFlag("tokens_per_batch", "N", "Tokens of a pass: memory, not results"),
                    ShortFlag("resume", "", "Continue from the newest checkpoint in --output"),
                ],
            },
        ]
    }
}

impl PpoSettings {
    /// With everything that is left to a default, as it is recorded.
    pub fn resolved(&self) -> Self {
        PpoSettings { training: self.training.resolved(LEARNING_RATE), ..self.clone() }
    }

    /// The policy's learning rate in each of so many updates.
    pub fn schedule(&self, total_updates: usize) -> Schedule {
        Schedule::new(&self.training.optimizer, self.training.learning_rate(LEARNING_RATE), total_updates)
    }

    /// The weight of the KL penalty in the reward at this value of the controller.
    pub fn reward_kl(&self, coefficient: f64) -> f64 {
        if self.kl.kl_in == KlPlace::Reward { coefficient } else { 0.0 }
    }

    /// The weight of the KL penalty in the loss at this value of the controller.
    pub fn loss_kl(&self, coefficient: f64) -> f64 {
        if self.kl.kl_in == KlPlace::Loss { coefficient } else { 0.0 }
    }

    /// What the value model starts from.
    pub fn value_source(&self) -> ValueSource {
        let by_itself = if self.rewards.reward_model.is_empty() { ValueSource::Policy } else { ValueSource::Reward };
        self.value.value_from.unwrap_or(by_itself)
    }

    /// The layouts of the prompts: with the rows' other columns where a source of rewards or the judge reads them.
    pub fn prompt_layouts(&self) -> Layouts<Prompt> {
        let reads = self.rewards.reads_columns() || self.observation.judge.reads_columns();
        if reads { PROMPTS_WITH_COLUMNS } else { PROMPTS }
    }

    /// Prompts of an update.
    pub fn prompts_an_update(&self) -> usize {
        (self.training.batch_size / self.episode.answers).max(1)
    }

    /// Which prompts it learns from, and in which order.
    pub fn source(&self) -> Source<'_> {
        Source {
            data: &self.data,
            evaluation_data: None,
            evaluation_share: 0.0,
            window: self.shuffle_window,
            batch_size: self.prompts_an_update(),
            // A rest of a few prompts would be an update at the full learning rate on almost nothing.
            drops_rest: true,
            seed: self.common.seed,
        }
    }

    /// What the run reads.
    pub fn inputs(&self) -> Result<Inputs> {
        let mut inputs = Inputs::default().model("--model", &self.model.model, &self.model.adapter)?;
        for (flag, folders) in
            [("--reward-model", &self.rewards.reward_model), ("--judge-model", &self.observation.judge.judge_model)]
        {
            for (number, folder) in folders.iter().enumerate() {
                inputs = inputs.model(&format!("{flag} {number}"), folder, &[])?;
            }
        }
        let judging = &self.observation.judge.judge_classifier;
        for (flag, given) in [("--reward-classifier", &self.rewards.reward_classifier), ("--judge-classifier", judging)]
        {
            for (number, given) in given.iter().enumerate() {
                inputs = inputs.model(&format!("{flag} {number}"), given.folder(), &[])?;
            }
        }
        let inputs = inputs.data("--data", &self.data)?.optional("--ptx-data", self.ptx.ptx_data.as_ref())?;
        inputs.evaluation("--evaluation-data", self.observation.evaluation_data.as_ref())
    }

    /// Refuses settings that do not fit each other.
    pub fn check(&self) -> Result<()> {
        self.sampling.check()?;
        if self.sampling.is_greedy() {
            bail!(
                "--temperature is {}, so every answer is certain and there is nothing to learn from; expected a number above 0, 1 for the policy as it is",
                self.sampling.temperature
            );
        }
        if self.common.max_length <= self.sampling.response_length {
            bail!(
                "--max-length {} leaves no room for a prompt beside --response-length {}; raise the first or lower the second",
                self.common.max_length,
                self.sampling.response_length
            );
        }
        let (batch, answers) = (self.training.batch_size, self.episode.answers);
        if !batch.is_multiple_of(answers) {
            bail!(
                "--batch-size {batch} counts answers, of which each prompt has --answers {answers}; give a multiple of {answers}"
            );
        }
        if !self.algorithm.has_values() && answers < 2 {
            bail!("--answers is 1, and rloo and grpo compare the answers to a prompt with each other; give 2 or more");
        }
        if self.kl.kl_controller == KlController::Adaptive && self.kl.kl_coefficient == 0.0 {
            bail!(
                "--kl-coefficient is 0, which the adaptive controller multiplies; give a number above 0, or --kl-controller fixed"
            );
        }
        if self.kl.kl_controller == KlController::Adaptive && 0.2 * batch as f64 >= self.kl.kl_horizon {
            bail!(
                "--kl-horizon {} is so short that one update of --batch-size {batch} could make the weight of the penalty 0 or negative; give more than {}",
                self.kl.kl_horizon,
                batch as f64 / 5.0
            );
        }
        self.rewards.check()?;
        self.observation.judge.check()
    }
}

#[cfg(test)]
mod tests;
