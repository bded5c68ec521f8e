//! What alignment did: toxicity, hallucination and preference, measured on prompts that no training saw.
//!
//! Every model answers every evaluation prompt; the world's own rule judges the answers, and a reward model, if one is given.
//! The random numbers that choose the answers are the same for every model, so that equal models give equal answers.

pub mod bootstrap;
mod divergence;
pub mod diversity;
pub mod hallucination;
pub mod preference;
pub mod report;
pub mod toxicity;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::adapt::users;
use crate::bail;
use crate::data::schema::{Origin, Prompt, Text};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::generate::{PromptTokens, SamplingSettings};
use crate::model::Model;
use crate::sample::{self, Sampled, Sampler, cached_tokens};
use crate::settings::{CommonSettings, ModelSettings, NamedFolder, UserSettings, at_least_one};
use crate::train::plan::Plan;
use crate::train::progress::Progress;
use crate::world::files::read_cases;
use crate::world::rule::{Case, Judgement, judge};
pub use report::{Evaluation, ModelEvaluation};

/// Measures toxicity, hallucination and preference of models on the evaluation prompts
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "evaluate", version, mut_arg("tokens_per_batch", cached_tokens))]
pub struct EvaluateSettings {
    /// Models and what to call them; answers are compared with those of the one called base, else of the first
    #[arg(long, value_name = "NAME=FOLDER", num_args = 1.., required = true)]
    pub models: Vec<NamedFolder>,
    /// Folder of a ppo run, whose checkpoints are measured too, named step-000010 and so on
    #[arg(long, value_name = "FOLDER")]
    pub checkpoints: Option<PathBuf>,
    /// Folder of a reward model that judges the answers too
    #[arg(long, value_name = "FOLDER")]
    pub reward_model: Option<PathBuf>,
    /// The adapters that single prompts are answered with.
    #[command(flatten)]
    #[serde(flatten)]
    pub users: UserSettings,
    /// Parquet file, folder or glob of evaluation prompts (columns prompt, kind, facts and expected)
    #[arg(long, value_name = "FILES", default_value = "data/evaluation.parquet")]
    pub data: String,
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
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
}

/// An answer and what it was found to be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JudgedAnswer {
    /// The answer.
    pub sampled: Sampled,
    /// What the world's rule says of it.
    pub judgement: Judgement,
    /// How much the rule prefers it to the base model's: 1, 1/2 or 0.
    pub preferred: f64,
    /// What the reward model says of it.
    pub reward: Option<f64>,
    /// How much the reward model prefers it to the base model's: 1, 1/2 or 0.
    pub preferred_by_reward: Option<f64>,
    /// `log π(answer) - log π_base(answer)`, in nats; none where the base model has another vocabulary.
    pub kl: Option<f64>,
}

/// Runs the program: evaluates, and prints the table and where the files are.
pub fn run(settings: &EvaluateSettings) -> Result<Evaluation> {
    let evaluation = evaluate(settings)?;
    println!("{}", evaluation.table());
    let folder = &settings.common.output;
    println!("95% bootstrap intervals over {} prompts in brackets", evaluation.cases.len());
    println!("rates: {}", folder.join(report::FILE).display());
    println!("answers: {}", folder.join(report::ANSWERS).display());
    if evaluation.over_optimisation().is_some() {
        println!("reward and truth against distance: {}", folder.join(report::OVER_OPTIMISATION).display());
    }
    Ok(evaluation)
}

/// Samples the answers of every model, judges them, and writes `evaluation.json` and `answers.parquet` into `--output`.
///
/// # Errors
/// Where settings, models or data cannot be used; then nothing is written.
pub fn evaluate(settings: &EvaluateSettings) -> Result<Evaluation> {
    let models = all_models(settings)?;
    let base = base_index(&models)?;
    let prompt_length = sample::prompt_length(&settings.common, &settings.sampling)?;
    let cases = read_cases(&settings.data)?;
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    Plan::new("evaluate")
        .line("models", names.join(", "))
        .line("prompts", cases.len())
        .line("answers", format!("{} of each model to each prompt", settings.samples))
        .print(settings.common.quiet);
    let mut progress = Progress::new("evaluate", cases.len() * names.len(), settings.common.quiet);
    let mut answers = Vec::new();
    for model in &models {
        // Read anew for each model, so that no two of them are held at a time.
        let model = Answering::open(settings, model, &cases, prompt_length, &mut progress)?;
        answers.push(model.answer(settings, &mut progress)?);
    }
    progress.finish();
    let mut quiet = Progress::new("evaluate", 0, true);
    let reference = Answering::open(settings, &models[base], &cases, prompt_length, &mut quiet)?;
    let divergences =
        answers.iter().map(|answers| reference.divergences(settings, answers)).collect::<Result<Vec<_>>>()?;
    let answers: Vec<Vec<Vec<Sampled>>> = answers.into_iter().map(|answers| answers.sampled).collect();
    let rewards = match &settings.reward_model {
        Some(folder) => Some(preference::rewards(settings, folder, &cases, &answers)?),
        None => None,
    };
    let judged = judge_all(&cases, &answers, rewards.as_deref(), &divergences, base);
    let measure = |(name, answers): (&&str, Vec<Vec<JudgedAnswer>>)| {
        ModelEvaluation::new(name, &cases, answers, settings.resamples, settings.common.seed)
    };
    let measured = names.iter().zip(judged).map(measure).collect();
    let evaluation = Evaluation { models: measured, base: names[base].to_string(), cases };
    evaluation.write(settings, &settings.common.output)?;
    Ok(evaluation)
}

/// The models that were named, and the checkpoints of a run.
fn all_models(settings: &EvaluateSettings) -> Result<Vec<NamedFolder>> {
    let mut models = settings.models.clone();
    let Some(run) = &settings.checkpoints else { return Ok(models) };
    let folder = run.join("checkpoints");
    let mut found: Vec<NamedFolder> = (std::fs::read_dir(&folder).into_iter().flatten())
        .filter_map(|entry| entry.ok())
        .filter_map(|entry| Some(NamedFolder { name: entry.file_name().to_str()?.to_string(), folder: entry.path() }))
        .filter(|checkpoint| checkpoint.name.starts_with("step-"))
        .collect();
    if found.is_empty() {
        bail!(
            "{}: there is no checkpoint in it; give the output folder of a run of ppo with --checkpoint-every",
            folder.display()
        );
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    models.extend(found);
    Ok(models)
}

/// Which model the others are compared with.
fn base_index(models: &[NamedFolder]) -> Result<usize> {
    if models.is_empty() {
        bail!("--models is empty; expected at least one name=folder");
    }
    let mut seen = HashSet::new();
    if let Some(twice) = models.iter().find(|model| !seen.insert(&model.name)) {
        bail!("--models {twice}: the name \"{}\" is given twice; give each model a name of its own", twice.name);
    }
    Ok(models.iter().position(|model| model.name == "base").unwrap_or(0))
}

/// A model with the evaluation prompts as it reads them.
struct Answering {
    model: Model,
    tokenizer: Tokenizer,
    prompts: Vec<PromptTokens>,
}

/// A model's answers to every prompt.
struct Answers {
    /// `[prompt][sample]`.
    sampled: Vec<Vec<Sampled>>,
    /// The log-probability that the model itself gives each of them.
    log_probs: Vec<Vec<f64>>,
    /// The vocabulary that their tokens are of.
    vocabulary: HashMap<String, u32>,
}

impl Answering {
    fn open(
        settings: &EvaluateSettings,
        model: &NamedFolder,
        cases: &[Case],
        prompt_length: usize,
        progress: &mut Progress,
    ) -> Result<Self> {
        let folder = ModelSettings { model: model.folder.clone(), adapter: Vec::new() };
        let (model, tokenizer) = sample::load(&folder, &settings.users.adapters, settings.common.seed)?;
        let stacks = users::stacks_of_rows(&settings.users, &settings.data)?;
        let mut truncation = Truncation::default();
        let tokens = cases.iter().enumerate().map(|(index, case)| {
            let prompt = Prompt { prompt: Text::Plain(case.prompt.clone()), origin: origin(settings, index) };
            tokenizer.prompt(&prompt, prompt_length, &mut truncation)
        });
        let prompts = (tokens.zip(stacks)).map(|(tokens, stack)| Ok(PromptTokens { tokens: tokens?, stack }));
        let prompts: Vec<PromptTokens> = prompts.collect::<Result<_>>()?;
        if truncation.prompts > 0 {
            progress.note(&format!(
                "{} prompts lost their start to --max-length {}",
                truncation.prompts, settings.common.max_length
            ));
        }
        Ok(Answering { model, tokenizer, prompts })
    }

    fn answer(&self, settings: &EvaluateSettings, progress: &mut Progress) -> Result<Answers> {
        let Answering { model, tokenizer, prompts } = self;
        let sampler = Sampler::new(model, tokenizer, settings.sampling, settings.samples, &settings.common);
        let sampled = sampler.sample(prompts, 0, progress)?;
        let log_probs = self.log_probs(settings, &sampled)?;
        Ok(Answers { sampled, log_probs, vocabulary: tokenizer.vocabulary() })
    }

    fn log_probs(&self, settings: &EvaluateSettings, sampled: &[Vec<Sampled>]) -> Result<Vec<Vec<f64>>> {
        // A model that takes the most probable token is still a distribution.
        let temperature = if settings.sampling.temperature == 0.0 { 1.0 } else { settings.sampling.temperature };
        divergence::log_probs(&self.model, &self.prompts, sampled, temperature, PASS_TOKENS)
    }

    /// How much more probable each answer is under the model that gave it than under this one; none where their vocabularies differ.
    fn divergences(&self, settings: &EvaluateSettings, answers: &Answers) -> Result<Option<Vec<Vec<f64>>>> {
        if self.tokenizer.vocabulary() != answers.vocabulary {
            return Ok(None);
        }
        let here = self.log_probs(settings, &answers.sampled)?;
        let less = |(own, here): (&Vec<f64>, &Vec<f64>)| own.iter().zip(here).map(|(own, here)| own - here).collect();
        Ok(Some(answers.log_probs.iter().zip(&here).map(less).collect()))
    }
}

/// Tokens that go through a model at a time where their log-probabilities are looked up.
const PASS_TOKENS: usize = 4096;

/// Where an evaluation prompt was read, for messages.
fn origin(settings: &EvaluateSettings, row: usize) -> Origin {
    Origin { file: Arc::from(Path::new(&settings.data)), row }
}

/// Judges every answer, `[model][prompt][sample]`, alone and against the base model's answer of the same number.
fn judge_all(
    cases: &[Case],
    answers: &[Vec<Vec<Sampled>>],
    rewards: Option<&[Vec<Vec<f64>>]>,
    divergences: &[Option<Vec<Vec<f64>>>],
    base: usize,
) -> Vec<Vec<Vec<JudgedAnswer>>> {
    let judged = |model: usize, case: usize, sample: usize| {
        let (sampled, of_base) = (&answers[model][case][sample], &answers[base][case][sample]);
        let reward = |model: usize| rewards.map(|rewards| rewards[model][case][sample]);
        JudgedAnswer {
            sampled: sampled.clone(),
            judgement: judge(&cases[case], &sampled.text),
            preferred: preference::by_rule(&cases[case], &sampled.text, &of_base.text),
            reward: reward(model),
            preferred_by_reward: reward(model)
                .zip(reward(base))
                .map(|(reward, of_base)| preference::by_reward(reward, of_base)),
            kl: divergences[model].as_ref().map(|divergences| divergences[case][sample]),
        }
    };
    let of_case = |model: usize, case: usize| {
        (0..answers[model][case].len()).map(|sample| judged(model, case, sample)).collect::<Vec<_>>()
    };
    (0..answers.len()).map(|model| (0..cases.len()).map(|case| of_case(model, case)).collect()).collect()
}

#[cfg(test)]
mod tests;
