//! Supervised fine-tuning: demonstrations to cross-entropy over tokens, labelled texts to cross-entropy over classes, preferences to DPO's loss.

pub mod classification;
mod confusion;
mod control_task;
pub mod dpo;
pub mod language_modelling;

use std::path::Path;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::Model;
use crate::settings::{
    CommonSettings, ExampleSettings, Flags, Method, ModelSettings, Program, Section, ShortFlag, TrainingSettings,
    learning_rate_help, short_help,
};
use crate::train::examples::{Example, Examples, Source, values};
use crate::train::inputs::Inputs;
use crate::train::memory::Footprint;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Plan, TrainingPlan, Workload};
use crate::train::rounding::{as_saved, check_trained};
use crate::train::run::{Run, Turn};
use crate::train::schedule::Schedule;
use crate::train::state::StateWriter;
pub use dpo::DpoSettings;
pub use language_modelling::evaluation_loss;

/// The default peak learning rate of full weights.
const LEARNING_RATE: f64 = 1e-5;
/// The same for DPO.
const DPO_LEARNING_RATE: f64 = 1e-6;

/// Fine-tunes a model on demonstrations, labelled texts or preferences
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "sft", version, mut_arg("learning_rate", learning_rate_help(LEARNING_RATE)))]
pub struct SftSettings {
    /// The model to start from.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of demonstrations (columns prompt and completion, messages, instruction and output, or text), or a mixture of
    /// them (a TOML file of sources, templates and tasks held out), or, to classify, of labelled texts (columns text and label, with text_pair for pairs), or, for dpo, of rankings (columns prompt, chosen and rejected,
    /// or prompt, responses and ranks)
    #[arg(long, value_name = "FILES")]
    pub data: String,
    /// What is learned; dpo's default learning rates are a tenth of the others'
    #[arg(long, value_enum, default_value_t = Objective::LanguageModelling)]
    #[serde(default)]
    pub objective: Objective,
    /// The classes in their order, to classify [default: those of the data, sorted]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub labels: Vec<String>,
    /// Classify by the language model's own words: one word or phrase for each class, in the classes' order
    #[arg(long, value_name = "WORD", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub label_words: Vec<String>,
    /// How a text and its label's word make a text for the language model; \n stands for a line break
    #[arg(long, value_name = "TEXT", default_value = "{text}\\nLabel: {label}")]
    pub label_template: String,
    /// Direct preference optimisation.
    #[command(flatten)]
    #[serde(flatten)]
    pub dpo: DpoSettings,
    /// How it goes through them.
    #[command(flatten)]
    #[serde(flatten)]
    pub examples: ExampleSettings,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
    /// What the training programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: TrainingSettings,
}

impl SftSettings {
    /// With everything that is left to a default, as it is recorded.
    fn resolved(&self) -> Self {
        SftSettings { training: self.training.resolved(self.full_learning_rate()), ..self.clone() }
    }

    /// Which rows it learns from, and in which order.
    fn source(&self) -> Source<'_> {
        Source::new(&self.data, &self.examples, &self.training, &self.common)
    }

    /// What it reads.
    fn inputs(&self) -> Result<Inputs> {
        let inputs = Inputs::default().model("--model", &self.model.model, &self.model.adapter)?;
        inputs.data("--data", &self.data)?.evaluation("--evaluation-data", self.examples.evaluation_data.as_ref())
    }

    /// The learning rate of each of so many steps.
    fn schedule(&self, total_steps: usize) -> Schedule {
        let training = &self.training;
        Schedule::new(&training.optimizer, training.learning_rate(self.full_learning_rate()), total_steps)
    }

    /// The learning rate of each step of a run over these examples.
    fn schedule_of<T>(&self, examples: &Examples<T>) -> Schedule {
        self.schedule(examples.total_steps(self.examples.epochs as f64, self.training.max_steps))
    }

    /// What the run is about to do, with models that are in memory in addition to the one that trains.
    fn plan(&self, model: &Model, schedule: &Schedule, examples: &Workload, beside: &[Footprint]) -> Result<Plan> {
        let plan = TrainingPlan {
            program: "sft",
            model,
            source: &self.model,
            beside,
            common: &self.common,
            training: &self.training,
            examples,
            schedule,
            steps: ("optimizer steps", examples.steps(schedule.total_steps, self.training.batch_size)),
            cache: 0,
        };
        plan.plan()
    }

    /// The default peak learning rate of full weights.
    fn full_learning_rate(&self) -> f64 {
        if self.objective == Objective::Dpo { DPO_LEARNING_RATE } else { LEARNING_RATE }
    }
}

impl Program for SftSettings {
    fn flags() -> Flags<Self> {
        let classifies = |sft: &Self| sft.objective == Objective::Classification;
        let by_words = move |sft: &Self| classifies(sft) && !sft.label_words.is_empty();
        let has_head = move |sft: &Self| classifies(sft) && sft.label_words.is_empty();
        Flags::new()
            .of(|sft: &Self| &sft.model, ModelSettings::flags())
            .always(&["data", "objective"])
            .only("with --objective classification", &["labels", "label_words"], classifies)
            .only("with --objective classification and --label-words", &["label_template"], by_words)
            .of(|sft: &Self| sft, DpoSettings::flags())
            .of(|sft: &Self| &sft.examples, ExampleSettings::flags())
            .of(|sft: &Self| &sft.common, CommonSettings::flags())
            .of(|sft: &Self| &sft.training, TrainingSettings::flags())
            .only("with --objective classification and no --label-words", &["pooling"], has_head)
            .only(
                "with --objective classification and no --label-words, or with --method probing",
                &["probe_hidden_size"],
                move |sft| has_head(sft) || sft.training.method.has(Method::Probing),
            )
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "Input and output",
                flags: &[
                    ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                    ShortFlag("data", "FILES", "Demonstrations, labelled texts or rankings"),
                    ShortFlag("evaluation_data", "FILES", "Held-out examples; else a share of --data"),
                    ShortFlag("output", "FOLDER", "Run folder: model, metrics, checkpoints"),
                    ShortFlag("objective", "NAME", "or classification, or dpo"),
                    ShortFlag("inspect", "N", "Print N examples token by token, and stop"),
                ],
            },
            short_help::TRAINING,
            short_help::MEMORY,
            short_help::GENERAL,
        ]
    }
}

/// What is learned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The completions' tokens
    #[default]
    LanguageModelling,
    /// The texts' classes
    Classification,
    /// Which answers are preferred, without a reward model (Rafailov et al. 2023)
    Dpo,
}

/// Names in a checkpoint's state.
const REPORT: &str = "report";
const OPTIMIZER: &str = "optimizer";

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SftReport {
    /// Optimizer steps.
    pub steps: usize,
    /// Loss of the last step.
    pub training_loss: f64,
    /// Loss on the evaluation split at the end, where there is one.
    pub evaluation_loss: Option<f64>,
}

impl SftReport {
    /// That of a run that only showed examples.
    const NOTHING: SftReport = SftReport { steps: 0, training_loss: f64::NAN, evaluation_loss: None };
}

/// Runs the whole stage: reads, trains, evaluates, saves.
pub fn run(settings: &SftSettings) -> Result<SftReport> {
    match settings.objective {
        Objective::LanguageModelling => language_modelling::run(settings),
        Objective::Classification => classification::run(settings),
        Objective::Dpo => dpo::run(settings),
    }
}

/// What a task found out in one optimizer step.
struct Accumulated {
    /// The mean loss.
    loss: f64,
    /// Tokens read.
    tokens: usize,
    /// What else is recorded.
    metrics: Vec<(&'static str, f64)>,
}

/// What the objectives differ in.
trait Task {
    /// What is learned from one row.
    type Value: Send + Sync;

    /// Adds the gradient of one optimizer step's mean loss over the chosen examples, of which there is at least one.
    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[&Self::Value], step: u64) -> Result<Accumulated>;

    /// Evaluates the model as it is on some examples, of which there is at least one: the loss first, under the name `evaluation_loss`.
    fn evaluate(&self, examples: &[&Self::Value]) -> Result<Vec<(&'static str, f64)>>;
}

/// Trains by a task, keeping the best model and the last. A model is evaluated as it is saved.
///
/// # Errors
/// Where nothing was learned, too.
fn train<T: Task>(
    settings: &SftSettings,
    model: &Model,
    task: &T,
    examples: &mut Examples<T::Value>,
    run: &mut Run,
    save: impl Fn(&Path) -> Result<()>,
) -> Result<SftReport> {
    let schedule = settings.schedule_of(examples);
    let total_steps = schedule.total_steps;
    let mut optimizer = Optimizer::of(model, &settings.training, &settings.model)?;
    let evaluate_every = settings.examples.evaluate_every.unwrap_or(examples.steps_per_epoch());
    let mut report = SftReport { steps: total_steps, ..SftReport::NOTHING };
    let turns = run.restore(|state| {
        report = state.value(REPORT)?;
        report.steps = total_steps;
        optimizer.take_from(state, OPTIMIZER)
    })?;
    for Turn { step, is_learned } in turns {
        if !is_learned {
            let (optimizer, report, rate) = (&mut optimizer, &mut report, schedule.learning_rate(step));
            examples.during(step, total_steps, |chosen| learn(task, &chosen, optimizer, (step, rate), report, run))?;
        }
        if step + 1 == total_steps || (step + 1) % evaluate_every == 0 {
            let held_out = values(examples.evaluation()?);
            let evaluating = run.evaluating()?;
            let evaluation = match held_out.is_empty() {
                true => Ok(Vec::new()),
                false => as_saved(model, || task.evaluate(&held_out)),
            };
            let found =
                run.evaluated(evaluating, evaluation, step + 1, |state| add_to_state(state, &optimizer, &report))?;
            if let Some((_, loss)) = found.first() {
                run.evaluation(step + 1, &found)?;
                report.evaluation_loss = Some(*loss);
            }
            run.keep(step + 1, report.evaluation_loss, |folder| {
                save(folder)?;
                // What an adapter needs to train on; of full weights it would be twice the model.
                if model.adapters().is_empty() { Ok(()) } else { optimizer.save(folder) }
            })?;
        }
        run.checkpoint(step + 1, |state| add_to_state(state, &optimizer, &report))?;
    }
    drop(optimizer);
    check_trained(model, run)?;
    Ok(report)
}

/// One optimizer step, recorded. Of streamed data all rows of a step may hold nothing to learn: it changes nothing then and has no loss.
fn learn<T: Task>(
    task: &T,
    chosen: &[Arc<Example<T::Value>>],
    optimizer: &mut Optimizer,
    (step, learning_rate): (usize, f64),
    report: &mut SftReport,
    run: &mut Run,
) -> Result<()> {
    let Accumulated { loss, tokens, mut metrics } = match chosen {
        [] => Accumulated { loss: f64::NAN, tokens: 0, metrics: Vec::new() },
        chosen => task.accumulate(optimizer, &values(chosen), step as u64)?,
    };
    if !chosen.is_empty() {
        report.training_loss = loss;
    }
    let stepped = optimizer.step(learning_rate);
    let origins = chosen.iter().map(|example| &example.origin);
    let stepped = run.stepped(step, stepped, origins, |state| add_to_state(state, optimizer, report))?;
    metrics.extend([
        ("learning_rate", learning_rate),
        ("gradient_norm", stepped.gradient_norm),
        ("skipped_steps", optimizer.skipped_steps() as f64),
    ]);
    run.step(step + 1, loss, tokens, &metrics)
}

/// What a checkpoint holds of the training.
fn add_to_state<'a>(state: &mut StateWriter<'a>, optimizer: &'a Optimizer, report: &SftReport) -> Result<()> {
    state.value(REPORT, report)?;
    optimizer.add_to(state, OPTIMIZER)
}
