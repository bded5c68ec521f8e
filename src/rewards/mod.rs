//! What says how good an answer is: reward models, of any tokenizer and family, several of them together,
//! classifiers, a command of the user's, or rules over a column.
//!
//! A reward that fails is an error, never a number.

mod classifier;
mod command;
pub mod ending;
mod model;
mod rule;
mod settings;

use std::time::Duration;

use crate::adapt::Bases;
use crate::bail;
use crate::data::batch::TokenTree;
use crate::data::schema::Prompt;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::numbers::smallest;
pub use classifier::{ClassifierLabel, RewardClassifier};
pub use command::RewardCommand;
pub use model::RewardModel;
pub use rule::{RewardRule, RuleKind};
pub use settings::{Combination, JudgeSettings, RewardSourceSettings};

/// The flag that asks for rules, as errors name it.
pub const REWARD_RULE: &str = "--reward-rule";

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

/// What the sources of rewards give an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AnswerReward {
    /// What they give together.
    pub combined: f32,
    /// What each gives, in the order of [`Rewards::names`].
    pub by_source: Vec<f32>,
}

/// All that judges, and how its several rewards are combined.
pub struct Rewards {
    models: Vec<RewardModel>,
    classifiers: Vec<RewardClassifier>,
    command: Option<RewardCommand>,
    rules: Vec<RewardRule>,
    weights: Vec<f64>,
    combination: Combination,
    deviations: f64,
}

/// The flags that errors name.
struct Flags {
    command: &'static str,
    rule: &'static str,
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
        let flags = Flags { command: "--reward-command", rule: REWARD_RULE };
        Self::named(flags, settings, bases, policy, max_length, seed)
    }

    fn named(
        flags: Flags,
        settings: &RewardSourceSettings,
        bases: &mut Bases,
        policy: &Tokenizer,
        max_length: usize,
        seed: u64,
    ) -> Result<Self> {
        let is_encoder = |model: &RewardModel| !model.model().architecture().causal;
        let models = settings.reward_model.iter().map(|folder| {
            let model = RewardModel::load(folder, bases, max_length, seed)?;
            Ok(model.reading_tokens_of(policy).reading_as_is(settings.reward_as_is))
        });
        let models = models.collect::<Result<Vec<RewardModel>>>()?;
        if settings.reward_as_is && models.iter().all(is_encoder) {
            bail!(
                "--reward-as-is has no effect here: encoders read an answer as the second text of a pair; leave it out"
            );
        }
        let classifiers = settings.reward_classifier.iter().map(RewardClassifier::load).collect::<Result<_>>()?;
        let Ok(limit) = Duration::try_from_secs_f64(settings.reward_timeout) else {
            bail!("--reward-timeout {} is more seconds than can be counted; give fewer", settings.reward_timeout)
        };
        let start = |command| RewardCommand::start(flags.command, command, settings.reward_group, limit);
        let command = settings.reward_command.as_deref().map(start).transpose()?;
        let weights = match settings.reward_weights.is_empty() {
            true => vec![1.0; settings.sources()],
            false => settings.reward_weights.clone(),
        };
        Ok(Rewards {
            models,
            classifiers,
            command,
            rules: settings.rules(flags.rule),
            weights,
            combination: settings.reward_combination,
            deviations: settings.reward_deviations,
        })
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
        if !settings.is_given() {
            return Ok(None);
        }
        let flags = Flags { command: "--judge-command", rule: "--judge-rule" };
        Self::named(flags, &settings.as_sources(limit), bases, policy, max_length, seed).map(Some)
    }

    /// How metrics call the sources, each once: the last part of a model's folder, of a classifier's with its label,
    /// `command`, and the rules with their columns.
    pub fn names(&self) -> Vec<String> {
        let of_model = |model: &RewardModel| {
            model.folder().file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
        };
        let models = self.models.iter().map(of_model);
        let classifiers = self.classifiers.iter().map(RewardClassifier::name);
        let command = self.command.iter().map(|_| "command".to_string());
        let rules = self.rules.iter().map(RewardRule::name);
        let mut names: Vec<String> = models.chain(classifiers).chain(command).chain(rules).collect();
        for index in 0..names.len() {
            let (earlier, later) = names.split_at_mut(index);
            let own = later[0].clone();
            let numbered = (2..).map(|number| format!("{own}-{number}"));
            if let Some(name) = std::iter::once(own.clone()).chain(numbered).find(|name| !earlier.contains(name)) {
                later[0] = name;
            }
        }
        names
    }

    /// The models, in the order in which they were given.
    pub fn models(&self) -> &[RewardModel] {
        &self.models
    }

    /// The rules, in the order in which they were given.
    pub fn rules(&self) -> &[RewardRule] {
        &self.rules
    }

    /// Refuses a prompt whose row the rules cannot compare with.
    ///
    /// # Errors
    /// As [`RewardRule::check`].
    pub fn check_row(&self, prompt: &Prompt) -> Result<()> {
        self.rules.iter().try_for_each(|rule| rule.check(prompt))
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

    /// The rewards of every answer of every prompt.
    ///
    /// # Errors
    /// Where a source fails or gives no finite number, or they combine to none; the error names it.
    pub fn score(&mut self, asked: &[Asked], tokens_per_batch: usize) -> Result<Vec<Vec<AnswerReward>>> {
        let mut sources = Vec::new();
        for model in &mut self.models {
            sources.push(model.score(asked, tokens_per_batch)?);
        }
        for classifier in &self.classifiers {
            sources.push(classifier.score(asked, tokens_per_batch)?);
        }
        if let Some(command) = &mut self.command {
            sources.push(command.score(asked)?);
        }
        for rule in &self.rules {
            sources.push(rule.score(asked)?);
        }
        let of_answer = |prompt: usize, answer: usize| {
            let by_source: Vec<f32> = sources.iter().map(|source| source[prompt][answer]).collect();
            let combined = combine(&by_source, &self.weights, self.combination, self.deviations);
            if !combined.is_finite() {
                bail!(
                    "{}: the rewards {by_source:?} of an answer combine to {combined}, expected a finite number; lower --reward-weights",
                    asked[prompt].prompt.origin
                );
            }
            Ok(AnswerReward { combined, by_source })
        };
        let of_prompt = |(prompt, asked): (usize, &Asked)| {
            (0..asked.replies.len()).map(|answer| of_answer(prompt, answer)).collect()
        };
        asked.iter().enumerate().map(of_prompt).collect()
    }
}

/// Several rewards of one answer, as one number; the standard deviation is that of the population. Weights count in mean and sum alone.
pub fn combine(rewards: &[f32], weights: &[f64], combination: Combination, deviations: f64) -> f32 {
    let count = rewards.len().max(1) as f64;
    let mean = rewards.iter().map(|&reward| f64::from(reward)).sum::<f64>() / count;
    let weighted = || rewards.iter().zip(weights).map(|(&reward, weight)| f64::from(reward) * weight).sum::<f64>();
    match combination {
        Combination::Mean => (weighted() / weights.iter().sum::<f64>()) as f32,
        Combination::Sum => weighted() as f32,
        Combination::Minimum => smallest(rewards.iter().copied()).unwrap_or(f32::INFINITY),
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
        let (rewards, equal) = ([1.0, 2.0, 6.0], [1.0; 3]);
        assert_eq!(combine(&rewards, &equal, Combination::Mean, 1.0), 3.0);
        assert_eq!(combine(&rewards, &[2.0, 0.0, 1.0], Combination::Mean, 1.0), 8.0 / 3.0);
        assert_eq!(combine(&rewards, &[2.0, 0.0, -1.0], Combination::Sum, 1.0), -4.0);
        assert_eq!(combine(&rewards, &equal, Combination::Minimum, 1.0), 1.0);
        let deviation = (14f64 / 3.0).sqrt();
        let found = combine(&rewards, &equal, Combination::MeanMinusDeviation, 0.5);
        assert!((f64::from(found) - (3.0 - 0.5 * deviation)).abs() < 1e-6);
        assert_eq!(combine(&[4.0], &[1.0], Combination::MeanMinusDeviation, 2.0), 4.0);
    }
}
