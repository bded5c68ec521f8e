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
use crate::bootstrap::RESAMPLES;
use crate::generate::SamplingSettings;
use crate::settings::{
    CommonSettings, Flags, NamedFolder, Program, Section, ShortFlag, UserSettings, at_least_one, short_help,
};

/// Measures toxicity, hallucination and preference, and writes one report
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "evaluate", version)]
pub struct EvaluateSettings {
    /// Models and what to call them; answers are compared with those of the one called base, else of the first
    #[arg(long, value_name = "NAME=FOLDER", num_args = 1.., required_unless_present_any = ["answers", "labelled", "votes"], conflicts_with = "answers")]
    #[serde(default)]
    pub models: Vec<NamedFolder>,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of answers that were made elsewhere, instead
    /// of models: columns model, prompt and response or completion (or the lists models and responses or
    /// completions; without models they are called by the name of their file), and, where there are, score (or
    /// scores), ended (whether an answer ended by itself) and prompt_type, by which rates are split
    #[arg(long, value_name = "FILES")]
    pub answers: Option<String>,
    /// Folder of a ppo run, whose kept policies (--policy-every) are measured too, named step-000010 and so on
    #[arg(long, value_name = "FOLDER")]
    pub policies: Option<PathBuf>,
    /// Folder of a reward model that judges the answers too
    #[arg(long, value_name = "FOLDER")]
    pub reward_model: Option<PathBuf>,
    /// The reward model reads answers as they are, without the end-of-text token, which else ends those that ended by themselves, as `reward` trains it
    #[arg(long)]
    #[serde(default)]
    pub reward_as_is: bool,
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
    #[arg(long, default_value_t = RESAMPLES, value_parser = at_least_one)]
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

impl Program for EvaluateSettings {
    fn flags() -> Flags<Self> {
        let is_random = |of: &Self| !of.sampling.is_greedy();
        let continues = |of: &Self| of.toxicity.toxicity_prompts.is_some();
        let samples = move |of: &Self| of.answers_prompts() || continues(of);
        let judged = |of: &Self| of.answers_prompts() || of.answers.is_some();
        let labelled = |of: &Self| of.labelled.labelled.is_some();
        let reads = |of: &Self| !of.models.is_empty() || of.policies.is_some() || of.reward_model.is_some();
        Flags::new()
            .always(&["models", "answers", "resamples"])
            .only("where models answer or are asked something", &["policies"], Self::asks_models)
            .only("where answers are judged: with --data or --answers", &["reward_model"], judged)
            .only("with --reward-model", &["reward_as_is"], |of: &Self| of.reward_model.is_some())
            .only("where models answer prompts (--data)", &["adapters", "samples"], Self::answers_prompts)
            .only("with --adapters, where models answer prompts (--data)", &["adapter_column"], |of: &Self| {
                of.answers_prompts() && !of.users.adapters.is_empty()
            })
            .only("without --answers", &["data"], |of: &Self| of.answers.is_none())
            // Tasks are answered greedily: temperature 0 says what is done.
            .only("where models answer prompts (--data) or continue some (--toxicity-prompts)", &["temperature"], move |of| {
                samples(of) || of.tasks.tasks.is_some() && of.sampling.temperature == 0.0
            })
            .only(
                "with a --temperature above 0, where models answer prompts (--data) or continue some (--toxicity-prompts)",
                &["top_k"],
                move |of| samples(of) && is_random(of),
            )
            .only(
                "with a --temperature above 0, where models answer prompts (--data): continuations have --toxicity-top-p",
                &["top_p"],
                move |of| of.answers_prompts() && is_random(of),
            )
            .only(
                "where models answer prompts (--data) or --tasks, or continue some (--toxicity-prompts)",
                &["kv_cache_tokens", "cache_precision"],
                Self::samples_answers,
            )
            .only(
                "where models answer prompts (--data) or --tasks: continuations have --toxicity-response-length",
                &["response_length"],
                |of: &Self| of.answers_prompts() || of.tasks.tasks.is_some(),
            )
            .only("where texts are judged: with --data, --answers, --toxicity-prompts or --labelled", &["toxicity_scorer"], move |of| {
                judged(of) || continues(of) || labelled(of)
            })
            .only("where texts are judged: with --data, --answers or --labelled", &["hallucination_scorer"], move |of| {
                judged(of) || labelled(of)
            })
            .of(|of: &Self| of, ToxicitySettings::flags())
            .of(|of: &Self| &of.multiple_choice, MultipleChoiceSettings::flags())
            .of(|of: &Self| &of.recognition, RecognitionSettings::flags())
            .of(|of: &Self| &of.tasks, TaskSettings::flags())
            .always(&["perplexity", "votes"])
            .of(|of: &Self| &of.labelled, LabelledSettings::flags())
            .of(|of: &Self| &of.common, CommonSettings::flags().without(&["max_length", "tokens_per_batch"]))
            .only("where a model reads: with --models or --reward-model", &["max_length", "tokens_per_batch"], reads)
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "What is measured",
                flags: &[
                    ShortFlag("models", "NAME=FOLDER", "Models to compare; base is the baseline"),
                    ShortFlag("answers", "FILES", "or answers made elsewhere"),
                    ShortFlag("data", "FILES", "Prompts that the models answer"),
                    ShortFlag("reward_model", "FOLDER", "Judges the answers"),
                    ShortFlag("toxicity_prompts", "FILES", "Prompts to continue (RealToxicityPrompts)"),
                    ShortFlag("multiple_choice", "FILES", "True and false answers (TruthfulQA)"),
                    ShortFlag("tasks", "FILES", "Tasks by templates: accuracy, F1, ROUGE"),
                    ShortFlag("perplexity", "FILES", "Held-out text: the alignment tax"),
                    ShortFlag("votes", "FILES", "People's votes on pairs of models"),
                    ShortFlag("labelled", "FILES", "Compare the scorers with people's labels"),
                    ShortFlag("output", "FOLDER", "Report: HTML, Markdown, JSON, answers"),
                ],
            },
            Section {
                heading: "Scorers",
                flags: &[
                    ShortFlag("toxicity_scorer", "NAME", "classifier, rule or words=FILE"),
                    ShortFlag("hallucination_scorer", "NAME", "grounding, nli=FOLDER or supported=FOLDER"),
                ],
            },
            short_help::SAMPLING,
            short_help::GENERAL,
        ]
    }
}

/// The evaluation prompts of the embedded world.
const WORLD: &str = "data/evaluation.parquet";

impl EvaluateSettings {
    /// What models are asked beside prompts.
    fn other_questions(&self) -> [&Option<String>; 5] {
        [
            &self.toxicity.toxicity_prompts,
            &self.multiple_choice.multiple_choice,
            &self.recognition.recognition,
            &self.tasks.tasks,
            &self.perplexity.perplexity,
        ]
    }

    /// The prompts that the models answer, if they are to answer any.
    pub(super) fn prompts(&self) -> Option<&str> {
        let others = self.other_questions().into_iter().chain([&self.labelled.labelled, &self.votes.votes]);
        let asks_else = others.into_iter().any(|other| other.is_some());
        match &self.data {
            Some(data) => Some(data),
            None if asks_else || self.models.is_empty() => None,
            None => Some(WORLD),
        }
    }

    /// Whether models answer prompts.
    fn answers_prompts(&self) -> bool {
        self.answers.is_none() && self.prompts().is_some()
    }

    /// Whether models answer prompts or tasks, or continue something.
    pub(super) fn samples_answers(&self) -> bool {
        self.answers_prompts() || self.toxicity.toxicity_prompts.is_some() || self.tasks.tasks.is_some()
    }

    /// Whether models are asked anything.
    fn asks_models(&self) -> bool {
        self.answers_prompts() || self.other_questions().iter().any(|other| other.is_some())
    }
}
