//! Reward modelling: k ranked answers to a prompt, to a scalar head that scores them.

pub mod agreement;
mod evaluation;
pub mod loss;
mod normalization;
mod reading;
mod training;

use candle_core::Device;
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::adapt::{Bases, Head, Role, Training};
use crate::data::inspect;
use crate::error::Result;
use crate::model::Model;
use crate::say;
use crate::settings::{
    CommonSettings, ExampleSettings, Flags, ModelSettings, Program, Section, ShortFlag, TrainingSettings,
    learning_rate_help, short_help,
};
use crate::train::examples::{Examples, values};
use crate::train::inputs::Inputs;
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Plan, Sizes, TrainingPlan, Workload, check_lengths};
use crate::train::rounding::check_trained;
use crate::train::run::Run;
use crate::train::schedule::Schedule;
pub use evaluation::{RewardEvaluation, evaluate};
use loss::LossSettings;
pub use normalization::Normalization;
pub use reading::RankedTree;
use reading::{Reader, ZeroPoint, zero_point};
use training::Trainer;

/// The default peak learning rate of full weights.
const LEARNING_RATE: f64 = 9e-6;

/// Trains a reward model on ranked answers
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "reward", version, mut_arg("learning_rate", learning_rate_help(LEARNING_RATE)))]
pub struct RewardSettings {
    /// The model to start from, usually the output of `sft`.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of rankings (columns prompt, responses and ranks or scores; or prompt, chosen and rejected)
    #[arg(long, value_name = "FILES")]
    pub data: String,
    /// Demonstrations whose mean reward becomes 0 [default: the best-ranked answers]
    #[arg(long, value_name = "FILES")]
    pub demonstrations: Option<String>,
    /// What becomes of the scores of the demonstrations: mean 0, or mean 0 and variance 1
    #[arg(long, value_enum, default_value_t = Normalization::Mean)]
    pub normalize: Normalization,
    /// Normalise before training too, as Ziegler et al. 2019
    #[arg(long)]
    #[serde(default)]
    pub normalize_first: bool,
    /// What it is trained by.
    #[command(flatten)]
    #[serde(flatten)]
    pub loss: LossSettings,
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

impl RewardSettings {
    /// What it reads.
    fn inputs(&self) -> Result<Inputs> {
        let inputs = Inputs::default().model("--model", &self.model.model, &self.model.adapter)?;
        let inputs = inputs.data("--data", &self.data)?.optional("--demonstrations", self.demonstrations.as_ref())?;
        inputs.evaluation("--evaluation-data", self.examples.evaluation_data.as_ref())
    }

    /// With everything that is left to a default, as it is recorded.
    fn resolved(&self) -> Self {
        RewardSettings { training: self.training.resolved(LEARNING_RATE), ..self.clone() }
    }

    /// The learning rate of each of so many steps.
    fn schedule(&self, total_steps: usize) -> Schedule {
        Schedule::new(&self.training.optimizer, self.training.learning_rate(LEARNING_RATE), total_steps)
    }
}

impl Program for RewardSettings {
    fn flags() -> Flags<Self> {
        Flags::new()
            .of(|reward: &Self| &reward.model, ModelSettings::flags())
            .always(&["data", "normalize"])
            .only(
                "with --normalize mean or mean-and-variance",
                &["demonstrations", "normalize_first"],
                |reward: &Self| reward.normalize != Normalization::None,
            )
            .of(|reward: &Self| &reward.loss, LossSettings::flags())
            .of(|reward: &Self| &reward.examples, ExampleSettings::flags())
            .of(|reward: &Self| &reward.common, CommonSettings::flags())
            .of(|reward: &Self| &reward.training, TrainingSettings::flags())
            .always(&["pooling", "probe_hidden_size"])
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "Input and output",
                flags: &[
                    ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                    ShortFlag("data", "FILES", "Rankings: prompt and ranked or paired answers"),
                    ShortFlag("evaluation_data", "FILES", "Held-out examples; else a share of --data"),
                    ShortFlag("demonstrations", "FILES", "Answers whose mean reward becomes 0"),
                    ShortFlag("output", "FOLDER", "Run folder: model, metrics, checkpoints"),
                    ShortFlag("inspect", "N", "Print N examples token by token, and stop"),
                    ShortFlag("loss", "NAME", "pairwise or plackett-luce"),
                ],
            },
            short_help::TRAINING,
            short_help::MEMORY,
            short_help::GENERAL,
        ]
    }
}

/// Runs the whole stage: reads, trains, keeps the best model with its scores shifted, and reports on it.
pub fn run(settings: &RewardSettings) -> Result<Option<RewardEvaluation>> {
    let common = &settings.common;
    let reader = Reader::new(settings)?;
    let tokenizer = &reader.tokenizer;
    let mut examples = reader.rankings(settings)?;
    if let Some(count) = settings.examples.inspect {
        for example in examples.first(count)? {
            say!("{}", inspect::inspect(&example.value.tree, tokenizer)?);
        }
        examples.say_remarks();
        return Ok(None);
    }
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::ScalarOrNew,
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, common, &settings.training)?;
    let mut bases = Bases::of(common, Device::Cpu);
    let mut model = bases.load(&role)?;
    if settings.training.method.is_full() {
        // All weights are a copy that trains; those of the base are not needed any more.
        bases = Bases::of(common, Device::Cpu);
    }
    if let (Some(head), false) = (model.head_mut(), reader.is_encoder) {
        // As `Reader` makes them; what reads the head later ends answers alike.
        head.form.answers_end_with_eos = Some(true);
    }
    let length = |ranked: &RankedTree| ranked.tree.longest();
    let too_long = check_lengths(model.architecture(), &examples, length, common.max_length)?;
    let schedule =
        settings.schedule(examples.total_steps(settings.examples.epochs as f64, settings.training.max_steps));
    // Read before the training, which a fault in them would make useless.
    let zero_point = zero_point(settings, &mut examples, &reader)?;
    let plan = plan(settings, &model, &examples, &schedule, &zero_point)?
        .chat_format(tokenizer)
        .warning(too_long)
        .warning(model.padding_warning(tokenizer));
    let checkpoints = &settings.training.checkpoints;
    let total_steps = schedule.total_steps;
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let optimizer = Optimizer::of(&model, &settings.training, &settings.model)?;
    let mut trainer = Trainer { settings, model, optimizer, schedule, zero_point: zero_point.trees };
    trainer.train(&mut examples, &mut run)?;
    let Trainer { model, optimizer, .. } = trainer;
    drop(optimizer);
    check_trained(&model, &mut run)?;
    let report = run.heeding(|| report(settings, &mut bases, &mut examples, &run))?;
    run.finish()?;
    Ok(report)
}

/// Evaluates the best model as it reads back from the run's folder, and writes and prints what is found; nothing without examples to evaluate on.
fn report(
    settings: &RewardSettings,
    bases: &mut Bases,
    examples: &mut Examples<RankedTree>,
    run: &Run,
) -> Result<Option<RewardEvaluation>> {
    let common = &settings.common;
    let evaluation = values(examples.evaluation()?);
    let Some((best, folder)) = run.best().filter(|_| !evaluation.is_empty()) else { return Ok(None) };
    let role =
        Role { folder: &folder, adapters: &[], training: Training::Frozen, head: Head::Scalar, seed: common.seed };
    let evaluation = evaluate(&bases.load(&role)?.frozen()?, &evaluation, &settings.loss, common)?;
    run.note(&evaluation.tables(best.step));
    run.write("evaluation.json", &format!("{:#}\n", evaluation.json(best.step)))?;
    evaluation.figure(best.step).write(run.folder().join("calibration.svg"))?;
    Ok(Some(evaluation))
}

/// What the run is about to do.
fn plan(
    settings: &RewardSettings,
    model: &Model,
    examples: &Examples<RankedTree>,
    schedule: &Schedule,
    zero_point: &ZeroPoint,
) -> Result<Plan> {
    let rows = |ranked: &RankedTree| model.rows_of(&ranked.tree);
    let sizes = Sizes {
        tokens: &|ranked: &RankedTree| ranked.tree.tokens(),
        learned: &rows,
        evaluated: &rows,
        budget: settings.common.tokens_per_batch,
    };
    let mut workload = Workload::new("rankings", examples, schedule.total_steps, &sizes);
    if settings.normalize != Normalization::None {
        let scored = model.largest_pass(&zero_point.trees, settings.common.tokens_per_batch);
        workload.rows.forward = workload.rows.forward.max(scored);
    }
    let plan = TrainingPlan {
        program: "reward",
        model,
        source: &settings.model,
        beside: &[],
        common: &settings.common,
        training: &settings.training,
        examples: &workload,
        schedule,
        steps: ("optimizer steps", workload.steps(schedule.total_steps, settings.training.batch_size)),
        cache: 0,
    };
    let plan = plan.plan()?;
    let label = match settings.normalize {
        Normalization::MeanAndVariance => "mean reward 0, variance 1",
        _ => "mean reward 0",
    };
    Ok(zero_point.of.iter().fold(plan, |plan, of| plan.line(label, format!("{of} (--normalize)"))))
}
