//! What is evaluated, and how.

use std::path::PathBuf;

use clap::Parser;
use serde::{Deserialize, Serialize};

use super::duels::VoteSettings;
use super::labelled::LabelledSettings;
use super::multiple_choice::MultipleChoiceSettings;
use super::perplexity::PerplexitySettings;
use super::recognition::RecognitionSettings;
use super::scorers::ScorerSettings;
use super::tasks::TaskSettings;
use super::toxicity::ToxicitySettings;
use crate::generate::SamplingSettings;
use crate::sample::cached_tokens;
use crate::settings::{CommonSettings, NamedFolder, UserSettings, at_least_one};

/// Says what alignment did: toxicity, hallucination and preference, of models or of answers made elsewhere, in one report
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "evaluate", version, mut_arg("tokens_per_batch", cached_tokens))]
pub struct EvaluateSettings {
    /// Models and what to call them; answers are compared with those of the one called base, else of the first
    #[arg(long, value_name = "NAME=FOLDER", num_args = 1.., required_unless_present_any = ["answers", "labelled", "votes"], conflicts_with = "answers")]
    #[serde(default)]
    pub models: Vec<NamedFolder>,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of answers that were made elsewhere, instead of models: columns model, prompt and response (or the lists models and responses; without models
    /// they are called by the name of their file), and, where there are, score (or scores) and prompt_type, by which rates are split
    #[arg(long, value_name = "FILES")]
    pub answers: Option<String>,
    /// Folder of a ppo run, whose kept policies (--policy-every) are measured too, named step-000010 and so on
    #[arg(long, value_name = "FOLDER")]
    pub policies: Option<PathBuf>,
    /// Folder of a reward model that judges the answers too
    #[arg(long, value_name = "FOLDER")]
    pub reward_model: Option<PathBuf>,
    /// The adapters that single prompts are answered with.
    #[command(flatten)]
    #[serde(flatten)]
    pub users: UserSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of prompts for the models; those of the embedded world (columns kind, facts and expected) are judged by its rule [default: data/evaluation.parquet, unless something else is to be measured]
    #[arg(long, value_name = "FILES")]
    pub data: Option<String>,
    /// Answers of each model to each prompt
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub samples: usize,
    /// Draws of the bootstrap that the intervals are made from
    #[arg(long, default_value_t = 1000, value_parser = at_least_one)]
    pub resamples: usize,
    /// How answers are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingSettings,
    /// What judges beside rule and reward model.
    #[command(flatten)]
    #[serde(flatten)]
    pub scorers: ScorerSettings,
    /// Toxicity of continuations.
    #[command(flatten)]
    #[serde(flatten)]
    pub toxicity: ToxicitySettings,
    /// True and false answers.
    #[command(flatten)]
    #[serde(flatten)]
    pub multiple_choice: MultipleChoiceSettings,
    /// Answers to recognise.
    #[command(flatten)]
    #[serde(flatten)]
    pub recognition: RecognitionSettings,
    /// Tasks by templates.
    #[command(flatten)]
    #[serde(flatten)]
    pub tasks: TaskSettings,
    /// Held-out text.
    #[command(flatten)]
    #[serde(flatten)]
    pub perplexity: PerplexitySettings,
    /// People's votes.
    #[command(flatten)]
    #[serde(flatten)]
    pub votes: VoteSettings,
    /// Agreement of the scorers with people.
    #[command(flatten)]
    #[serde(flatten)]
    pub labelled: LabelledSettings,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
}

/// The evaluation prompts of the embedded world.
const WORLD: &str = "data/evaluation.parquet";

impl EvaluateSettings {
    /// The prompts that the models answer, if they are to answer any.
    pub(super) fn prompts(&self) -> Option<&str> {
        let others = [
            &self.toxicity.toxicity_prompts,
            &self.labelled.labelled,
            &self.multiple_choice.multiple_choice,
            &self.recognition.recognition,
            &self.tasks.tasks,
            &self.perplexity.perplexity,
            &self.votes.votes,
        ];
        let asks_else = others.iter().any(|other| other.is_some());
        match &self.data {
            Some(data) => Some(data),
            None if asks_else || self.models.is_empty() => None,
            None => Some(WORLD),
        }
    }
}
