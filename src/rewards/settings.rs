//! Settings of what judges answers.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::classifier::ClassifierLabel;
use super::rule::{RewardRule, RuleKind};
use crate::bail;
use crate::error::Result;
use crate::settings::{Flags, not_negative};

const HEADING: &str = "Rewards";

/// What judges answers.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
pub struct RewardSourceSettings {
    /// Folders of reward models, of this or another tokenizer and family; ppo's value model starts from the first
    #[arg(long, help_heading = HEADING, value_name = "FOLDER", num_args = 1..)]
    #[serde(default)]
    pub reward_model: Vec<PathBuf>,
    /// Reward models read answers as they are, without the end-of-text token, which else ends those that ended by
    /// themselves, as `reward` trains them
    #[arg(long, help_heading = HEADING)]
    #[serde(default)]
    pub reward_as_is: bool,
    /// Classifiers (Hugging Face sequence classifiers), each with a label that answers are to have, FOLDER@LABEL,
    /// or not to have, FOLDER@-LABEL: the reward is the logarithm of the odds, of the answer's text alone
    #[arg(long, help_heading = HEADING, value_name = "FOLDER@LABEL", num_args = 1..)]
    #[serde(default)]
    pub reward_classifier: Vec<ClassifierLabel>,
    /// A program that judges: it reads one JSON object a line, {"prompt": ..., "response": ..., "ended": ..., "columns": {...}} (the row's other
    /// columns), and writes one number a line, at once
    #[arg(long, help_heading = HEADING, value_name = "COMMAND")]
    pub reward_command: Option<String>,
    /// Give --reward-command all answers to a prompt in one line, {"prompt": ..., "responses": [...], "ended": [...], "columns": {...}}, for which
    /// it writes one line with a list of numbers
    #[arg(long, help_heading = HEADING)]
    #[serde(default)]
    pub reward_group: bool,
    /// Seconds that the reward command may take for an answer
    #[arg(long, help_heading = HEADING, value_name = "SECONDS", default_value_t = 60.0, value_parser = not_negative)]
    pub reward_timeout: f64,
    /// Rules that compare an answer with a column of its row: the reward is 1 where the answer passes, else 0
    #[arg(long, help_heading = HEADING, value_name = "RULE", value_enum, num_args = 1..)]
    #[serde(default)]
    pub reward_rule: Vec<RuleKind>,
    /// The column of reference answers that --reward-rule reads (a text, a number, or a list of which one has to match): one for all rules, or
    /// one for each
    #[arg(long, help_heading = HEADING, value_name = "COLUMN", num_args = 1..)]
    #[serde(default)]
    pub reward_column: Vec<String>,
    /// Weights of the rewards, in this order: reward models, classifiers, reward command, rules [default: 1 each]
    #[arg(long, help_heading = HEADING, value_name = "NUMBER", num_args = 1.., value_delimiter = ',', allow_negative_numbers = true)]
    #[serde(default)]
    pub reward_weights: Vec<f64>,
    /// How several rewards of an answer are combined
    #[arg(long, help_heading = HEADING, value_enum, default_value_t = Combination::Mean)]
    pub reward_combination: Combination,
    /// How many standard deviations of the rewards mean-minus-deviation subtracts
    #[arg(long, help_heading = HEADING, default_value_t = 1.0, value_parser = not_negative)]
    pub reward_deviations: f64,
}

/// How several rewards `r` of an answer, with weights `w`, are combined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combination {
    /// Their weighted mean, Σ w r / Σ w
    #[default]
    Mean,
    /// Their weighted sum, Σ w r (TRL)
    Sum,
    /// The lowest: what every source finds good (Coste et al. 2023); without weights
    Minimum,
    /// Their mean less a multiple of their standard deviation: what they agree on (Coste et al. 2023); without weights
    MeanMinusDeviation,
}

/// A held-out judge of answers, which nothing is trained against.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct JudgeSettings {
    /// Folders of reward models that judge the answers to held-out prompts
    #[arg(long, help_heading = HEADING, value_name = "FOLDER", num_args = 1..)]
    #[serde(default)]
    pub judge_model: Vec<PathBuf>,
    /// Classifiers that judge them, as --reward-classifier does
    #[arg(long, help_heading = HEADING, value_name = "FOLDER@LABEL", num_args = 1..)]
    #[serde(default)]
    pub judge_classifier: Vec<ClassifierLabel>,
    /// A program that judges them, as --reward-command does
    #[arg(long, help_heading = HEADING, value_name = "COMMAND")]
    pub judge_command: Option<String>,
    /// Rules that judge them, as --reward-rule does; they read the columns of --judge-column
    #[arg(long, help_heading = HEADING, value_name = "RULE", value_enum, num_args = 1..)]
    #[serde(default)]
    pub judge_rule: Vec<RuleKind>,
    /// The column of reference answers that --judge-rule reads: one for all rules, or one for each
    #[arg(long, help_heading = HEADING, value_name = "COLUMN", num_args = 1..)]
    #[serde(default)]
    pub judge_column: Vec<String>,
}

impl RewardSourceSettings {
    /// When they are read. `reward_timeout`, which counts for a judge too, is not among them.
    pub fn flags() -> Flags<Self> {
        let has_several = |of: &Self| of.sources() > 1;
        let is_sum = |of: &Self| of.reward_combination == Combination::Sum;
        Flags::new()
            .always(&["reward_model", "reward_classifier", "reward_command", "reward_rule"])
            .only("with --reward-model", &["reward_as_is"], |of: &Self| !of.reward_model.is_empty())
            .only("with --reward-command", &["reward_group"], |of: &Self| of.reward_command.is_some())
            .only("with --reward-rule", &["reward_column"], |of: &Self| !of.reward_rule.is_empty())
            .only(
                "with --reward-combination mean of several sources of rewards, or with --reward-combination sum",
                &["reward_weights"],
                move |of| is_sum(of) || has_several(of) && of.reward_combination == Combination::Mean,
            )
            .only("with several sources of rewards, or with --reward-weights", &["reward_combination"], move |of| {
                has_several(of) || !of.reward_weights.is_empty()
            })
            .only("with --reward-combination mean-minus-deviation", &["reward_deviations"], move |of| {
                has_several(of) && of.reward_combination == Combination::MeanMinusDeviation
            })
    }

    /// Number of sources of rewards.
    pub fn sources(&self) -> usize {
        let models = self.reward_model.len() + self.reward_classifier.len();
        models + usize::from(self.reward_command.is_some()) + self.reward_rule.len()
    }

    /// Whether a source reads other columns of a row than the prompt's.
    pub fn reads_columns(&self) -> bool {
        self.reward_command.is_some() || !self.reward_rule.is_empty()
    }

    /// The rules; errors name the `flag` that asked for them.
    pub fn rules(&self, flag: &'static str) -> Vec<RewardRule> {
        RewardRule::all(flag, &self.reward_rule, &self.reward_column)
    }

    /// Refuses to go on without anything that judges, and settings that do not fit each other.
    pub fn check(&self) -> Result<()> {
        if self.sources() == 0 {
            bail!(
                "nothing judges the answers; give --reward-model, --reward-classifier, --reward-command or --reward-rule"
            );
        }
        check_columns("reward", &self.reward_rule, &self.reward_column)?;
        self.check_weights()
    }

    fn check_weights(&self) -> Result<()> {
        let (weights, sources) = (&self.reward_weights, self.sources());
        if weights.is_empty() {
            return Ok(());
        }
        if weights.len() != sources {
            bail!(
                "--reward-weights has {} numbers for {sources} sources of rewards (models, then classifiers, the command, rules); give one for each",
                weights.len()
            );
        }
        if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
            bail!("--reward-weights holds {weight}, expected finite numbers");
        }
        match self.reward_combination {
            Combination::Sum => Ok(()),
            Combination::Mean if weights.iter().sum::<f64>() > 0.0 && weights.iter().all(|&weight| weight >= 0.0) => {
                Ok(())
            }
            Combination::Mean => bail!(
                "--reward-weights holds a number below 0, or only zeros, of which no mean can be made; give other weights, or --reward-combination sum"
            ),
            // They have no weights, and `flags` refuses those that were given.
            Combination::Minimum | Combination::MeanMinusDeviation => Ok(()),
        }
    }
}

impl JudgeSettings {
    /// Whether anything judges.
    pub fn is_given(&self) -> bool {
        let has_models = !self.judge_model.is_empty() || !self.judge_classifier.is_empty();
        has_models || self.judge_command.is_some() || !self.judge_rule.is_empty()
    }

    /// Whether something that judges reads other columns of a row than the prompt's.
    pub fn reads_columns(&self) -> bool {
        self.judge_command.is_some() || !self.judge_rule.is_empty()
    }

    /// Refuses settings that do not fit each other.
    pub fn check(&self) -> Result<()> {
        check_columns("judge", &self.judge_rule, &self.judge_column)
    }

    /// The same as sources of rewards.
    pub(super) fn as_sources(&self, reward_timeout: f64) -> RewardSourceSettings {
        RewardSourceSettings {
            reward_model: self.judge_model.clone(),
            reward_classifier: self.judge_classifier.clone(),
            reward_command: self.judge_command.clone(),
            reward_rule: self.judge_rule.clone(),
            reward_column: self.judge_column.clone(),
            reward_timeout,
            ..Default::default()
        }
    }
}

fn check_columns(prefix: &str, rules: &[RuleKind], columns: &[String]) -> Result<()> {
    match (rules.len(), columns.len()) {
        (0, _) => Ok(()),
        (_, 0) => bail!("--{prefix}-rule compares an answer with a column of its row; name it with --{prefix}-column"),
        (rules, columns) if columns != 1 && columns != rules => {
            bail!("--{prefix}-column names {columns} columns for {rules} rules; name one for all, or one for each")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(change: impl FnOnce(&mut RewardSourceSettings)) -> Result<()> {
        let mut settings = RewardSourceSettings {
            reward_rule: vec![RuleKind::Exact, RuleKind::Numeric],
            reward_column: vec!["answer".into()],
            ..Default::default()
        };
        change(&mut settings);
        settings.check()
    }

    #[test]
    fn settings_that_do_not_fit_each_other_are_refused_by_name() {
        assert!(settings(|_| ()).is_ok());
        assert!(settings(|s| s.reward_weights = vec![1.0, 0.5]).is_ok());
        let refused = |change: fn(&mut RewardSourceSettings), expected: &str| {
            let error = settings(change).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refused(|s| s.reward_column.clear(), "--reward-column");
        refused(|s| s.reward_column = vec!["a".into(); 3], "names 3 columns for 2 rules");
        refused(|s| s.reward_weights = vec![1.0], "1 numbers for 2 sources");
        refused(|s| s.reward_weights = vec![1.0, -1.0], "--reward-combination sum");
        refused(|s| s.reward_weights = vec![0.0, 0.0], "only zeros");
        refused(|s| s.reward_weights = vec![f64::NAN, 1.0], "finite");
    }
}
