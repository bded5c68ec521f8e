//! Settings of `ppo`.

use std::path::PathBuf;

use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::Result;
use crate::generate::SamplingSettings;
use crate::settings::{CommonSettings, ModelSettings, TrainingSettings, at_least_one, learning_rate_help};

/// The default peak learning rate of full weights.
pub const LEARNING_RATE: f64 = 3e-6;

/// Optimises a policy against a reward model with PPO (Schulman et al. 2017; Ouyang et al. 2022)
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "ppo", version, mut_arg("learning_rate", learning_rate_help(LEARNING_RATE)))]
pub struct PpoSettings {
    /// The policy's model; the reference is the same model, as it is at the start.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Folder of the reward model; the value model starts from it
    #[arg(long, value_name = "FOLDER")]
    pub reward_model: PathBuf,
    /// Parquet file, folder or glob of prompts (columns prompt or messages)
    #[arg(long, value_name = "FILES")]
    pub data: String,
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
    /// Passes over the episodes of a rollout
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    pub ppo_epochs: usize,
    /// Minibatches into which a rollout is divided
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub minibatches: usize,
    /// Weight of the per-token KL penalty in the reward
    #[arg(long, default_value_t = 0.05)]
    pub kl_coefficient: f64,
    /// Discount of later rewards
    #[arg(long, default_value_t = 1.0)]
    pub gamma: f64,
    /// Trade-off of bias and variance in the advantages
    #[arg(long, default_value_t = 0.95)]
    pub lambda: f64,
    /// How far the policy's ratio counts from 1
    #[arg(long, default_value_t = 0.2)]
    pub clip_range: f64,
    /// How far a value counts from the rollout's
    #[arg(long, default_value_t = 0.2)]
    pub value_clip_range: f64,
    /// Weight of the value loss
    #[arg(long, default_value_t = 0.1)]
    pub value_coefficient: f64,
    /// The value model's learning rate [default: the policy's]
    #[arg(long)]
    pub value_learning_rate: Option<f64>,
    /// Whether advantages are whitened over each minibatch
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub whiten_advantages: bool,
    /// Subtracted from the score of an answer that does not end by itself
    #[arg(long, default_value_t = 1.0)]
    pub missing_eos_penalty: f64,
}

impl PpoSettings {
    /// With everything that is left to a default, as it is recorded.
    pub fn resolved(&self) -> Self {
        PpoSettings { training: self.training.resolved(LEARNING_RATE), ..self.clone() }
    }

    /// Refuses settings that do not fit each other.
    pub fn check(&self) -> Result<()> {
        self.sampling.check()?;
        if self.sampling.temperature == 0.0 {
            bail!(
                "--temperature is 0, so every answer is certain and there is nothing to learn from; expected a number above 0"
            );
        }
        if self.common.max_length <= self.sampling.response_length {
            bail!(
                "--max-length {} leaves no room for a prompt beside --response-length {}; raise the first or lower the second",
                self.common.max_length,
                self.sampling.response_length
            );
        }
        Ok(())
    }
}
