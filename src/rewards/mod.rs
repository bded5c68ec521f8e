//! What says how good an answer is: reward models, of any tokenizer and family, several of them together, or a command of the user's.
//!
//! A reward that fails is an error, never a number.

mod command;
mod model;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::adapt::Bases;
use crate::bail;
use crate::data::batch::TokenTree;
use crate::data::schema::Prompt;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::settings::not_negative;
pub use command::RewardCommand;
pub use model::RewardModel;

const HEADING: &str = "Rewards";

/// What judges answers.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct RewardSourceSettings {
    /// Folders of reward models, of this or another tokenizer and family; ppo's value model starts from the first
    #[arg(long, help_heading = HEADING, value_name = "FOLDER", num_args = 1..)]
    #[serde(default)]
    pub reward_model: Vec<PathBuf>,
    /// A program that judges: it reads one JSON object a line, {"prompt": ..., "response": ...}, and writes one number a line, at once
    #[arg(long, help_heading = HEADING, value_name = "COMMAND")]
    pub reward_command: Option<String>,
    /// Seconds that the reward command may take for an answer
    #[arg(long, help_heading = HEADING, value_name = "SECONDS", default_value_t = 60.0, value_parser = not_negative)]
    pub reward_timeout: f64,
    /// What several rewards of an answer become
    #[arg(long, help_heading = HEADING, value_enum, default_value_t = Combination::Mean)]
    pub reward_combination: Combination,
    /// How many standard deviations of the rewards mean-minus-deviation subtracts
    #[arg(long, help_heading = HEADING, default_value_t = 1.0, value_parser = not_negative)]
    pub reward_deviations: f64,
}

/// What several rewards of an answer become (Coste et al. 2023).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combination {
    /// Their mean
    Mean,
    /// The lowest: what every model finds good
    Minimum,
    /// Their mean less a multiple of their standard deviation: what they agree on
    MeanMinusDeviation,
}

/// A held-out judge of answers, which nothing is trained against.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct JudgeSettings {
    /// Folders of reward models that judge the answers to held-out prompts
    #[arg(long, help_heading = HEADING, value_name = "FOLDER", num_args = 1..)]
    #[serde(default)]
    pub judge_model: Vec<PathBuf>,
    /// A program that judges them, as --reward-command does
    #[arg(long, help_heading = HEADING, value_name = "COMMAND")]
    pub judge_command: Option<String>,
}

impl RewardSourceSettings {
    /// Refuses to go on without anything that judges.
    pub fn check(&self) -> Result<()> {
        if self.reward_model.is_empty() && self.reward_command.is_none() {
            bail!("nothing judges the answers; give --reward-model, --reward-command or both");
        }
        Ok(())
    }
}

/// An answer as the sources of rewards see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// Its text, without an end-of-text token.
    pub text: String,
    /// Whether it ended by itself.
    pub ended: bool,
}

/// A prompt with the answers to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The prompt as it was read.
    pub prompt: &'a Prompt,
    /// The same and the answers as tokens of the policy, where there is one.
    pub tree: Option<&'a TokenTree>,
    /// The answers as text, in the order of the tree's.
    pub replies: &'a [Reply],
}

/// All that judges, and what becomes of its several rewards.
pub struct Rewards {
    models: Vec<RewardModel>,
    command: Option<RewardCommand>,
    combination: Combination,
    deviations: f64,
}

impl Rewards {
    /// Reads the models, which share their base with others of `bases`, and starts the command. `policy` is the tokenizer of the answers' trees.
    pub fn open(
        settings: &RewardSourceSettings,
        bases: &mut Bases,
        policy: &Tokenizer,
        max_length: usize,
        seed: u64,
    ) -> Result<Self> {
        Self::named("--reward-command", settings, bases, policy, max_length, seed)
    }

    fn named(
        flag: &str,
        settings: &RewardSourceSettings,
        bases: &mut Bases,
        policy: &Tokenizer,
        max_length: usize,
        seed: u64,
    ) -> Result<Self> {
        let models = settings.reward_model.iter().map(|folder| {
            let model = RewardModel::load(folder, bases, max_length, seed)?;
            Ok(model.reading_tokens_of(policy))
        });
        let models = models.collect::<Result<_>>()?;
        let Ok(limit) = Duration::try_from_secs_f64(settings.reward_timeout) else {
            bail!("--reward-timeout {} is more seconds than can be counted; give fewer", settings.reward_timeout)
        };
        let command = settings.reward_command.as_ref().map(|command| RewardCommand::start(flag, command, limit));
        let command = command.transpose()?;
        let (combination, deviations) = (settings.reward_combination, settings.reward_deviations);
        Ok(Rewards { models, command, combination, deviations })
    }

    /// A held-out judge, whose models share their base with others of `bases`; `None` where the settings name none.
    pub fn judge(
        settings: &JudgeSettings,
        limit: f64,
        bases: &mut Bases,
        policy: &Tokenizer,
        max_length: usize,
        seed: u64,
    ) -> Result<Option<Self>> {
        if settings.judge_model.is_empty() && settings.judge_command.is_none() {
            return Ok(None);
        }
        let settings = RewardSourceSettings {
            reward_model: settings.judge_model.clone(),
            reward_command: settings.judge_command.clone(),
            reward_timeout: limit,
            reward_combination: Combination::Mean,
            reward_deviations: 0.0,
        };
        Self::named("--judge-command", &settings, bases, policy, max_length, seed).map(Some)
    }

    /// The models, in the order in which they were given.
    pub fn models(&self) -> &[RewardModel] {
        &self.models
    }

    /// Texts that lost a part to the greatest length before a model read them, so far.
    pub fn truncated(&self) -> usize {
        self.models.iter().map(|model| model.truncation().prompts + model.truncation().answers).sum()
    }

    /// The texts that were cut, by model.
    pub fn truncations(&self) -> Vec<Truncation> {
        self.models.iter().map(RewardModel::truncation).collect()
    }

    /// Lets the models count on from there.
    pub fn count_from(&mut self, truncations: &[Truncation]) {
        self.models.iter_mut().zip(truncations).for_each(|(model, &truncation)| model.count_from(truncation));
    }

    /// The reward of every answer of every prompt.
    ///
    /// # Errors
    /// Where a source fails or gives no finite number; the error names it.
    pub fn score(&mut self, asked: &[Asked], tokens_per_batch: usize) -> Result<Vec<Vec<f32>>> {
        let mut sources = Vec::new();
        for model in &mut self.models {
            sources.push(model.score(asked, tokens_per_batch)?);
        }
        if let Some(command) = &mut self.command {
            sources.push(command.score(asked)?);
        }
        let combined = |prompt: usize, answer: usize| {
            let rewards: Vec<f32> = sources.iter().map(|source| source[prompt][answer]).collect();
            combine(&rewards, self.combination, self.deviations)
        };
        let of_prompt = |(prompt, asked): (usize, &Asked)| {
            (0..asked.replies.len()).map(|answer| combined(prompt, answer)).collect()
        };
        Ok(asked.iter().enumerate().map(of_prompt).collect())
    }
}

/// Several rewards of one answer, as one number; the standard deviation is that of the population.
pub fn combine(rewards: &[f32], combination: Combination, deviations: f64) -> f32 {
    let count = rewards.len().max(1) as f64;
    let mean = rewards.iter().map(|&reward| f64::from(reward)).sum::<f64>() / count;
    match combination {
        Combination::Mean => mean as f32,
        Combination::Minimum => rewards.iter().copied().fold(f32::INFINITY, f32::min),
        Combination::MeanMinusDeviation => {
            let variance = rewards.iter().map(|&reward| (f64::from(reward) - mean).powi(2)).sum::<f64>() / count;
            (mean - deviations * variance.sqrt()) as f32
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_rewards_become_one() {
        let rewards = [1.0, 2.0, 6.0];
        assert_eq!(combine(&rewards, Combination::Mean, 1.0), 3.0);
        assert_eq!(combine(&rewards, Combination::Minimum, 1.0), 1.0);
        let deviation = (14f64 / 3.0).sqrt();
        let found = combine(&rewards, Combination::MeanMinusDeviation, 0.5);
        assert!((f64::from(found) - (3.0 - 0.5 * deviation)).abs() < 1e-6);
        assert_eq!(combine(&[4.0], Combination::MeanMinusDeviation, 2.0), 4.0);
    }
}
