//! Reward modelling: k ranked answers to a prompt, to a scalar head that scores them.

pub mod agreement;
mod evaluation;
pub mod loss;
mod normalization;

use candle_core::Device;
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{TokenTree, split_by_budget};
use crate::data::inspect;
use crate::data::schema::{DEMONSTRATIONS, Demonstration, RANKINGS, Ranking};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::model::{Model, dropout_seed};
use crate::say;
use crate::settings::{CommonSettings, ExampleSettings, ModelSettings, TrainingSettings, learning_rate_help};
use crate::train::examples::{Examples, Source, values};
use crate::train::inputs::Inputs;
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Plan, Workload, check_lengths, training_plan};
use crate::train::run::Run;
use crate::train::schedule::Schedule;
use crate::train::state::StateWriter;
use evaluation::score;
pub use evaluation::{RewardEvaluation, evaluate};
use loss::{LossSettings, pairs};
pub use normalization::Normalization;

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
}

/// Of data larger than a window, the examples whose mean reward stands for that of all.
const MOST_FOR_ZERO_POINT: usize = 10_000;

/// Names in a checkpoint's state.
const SHIFT_AND_DIVISOR: &str = "shift_and_divisor";
const OPTIMIZER: &str = "optimizer";

/// A prompt with its ranked answers, as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedTree {
    /// Prompt and answers.
    pub tree: TokenTree,
    /// The rank of each answer, lower is better.
    pub ranks: Vec<i64>,
    /// By how much a better answer's score has to be higher, where the data says so.
    pub margin: Option<f32>,
    /// How much the prompt counts.
    pub weight: f32,
    /// The share of labellers who agree with the order, where the data says so.
    pub agreement: Option<f32>,
}

/// Runs the whole stage: reads, trains, evaluates, shifts, saves.
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
    memory::check_before_reading(&settings.model, &settings.training)?;
    let mut model = Bases::new(Device::Cpu).load(&role)?;
    let length = |ranked: &RankedTree| ranked.tree.longest();
    let too_long = check_lengths(model.architecture(), &examples, length, common.max_length)?;
    let total_steps = examples.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    // Read before the training, which a fault in them would make useless.
    let (zero_point, described) = zero_point(settings, &mut examples, &reader)?;
    let plan = plan(settings, &model, &examples, described)?
        .chat_format(tokenizer)
        .warning(too_long)
        .warning(model.padding_warning(tokenizer));
    let checkpoints = &settings.training.checkpoints;
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let mut optimizer = Optimizer::of(&model, &settings.training, &settings.model)?;
    let done = run.restore(|state| {
        if let Some(head) = model.head_mut() {
            (head.form.shift, head.form.divisor) = state.value(SHIFT_AND_DIVISOR)?;
        }
        optimizer.take_from(state, OPTIMIZER)
    })?;
    if settings.normalize_first && done == 0 {
        normalization::normalize(&mut model, &zero_point, settings.normalize, common.tokens_per_batch)?;
    }
    let mut report = train(settings, &model, &mut examples, done, &mut optimizer, &mut run)?;
    let before = normalization::normalize(&mut model, &zero_point, settings.normalize, common.tokens_per_batch)?;
    run.keep(total_steps, None, |folder| {
        model.save(folder)?;
        if model.adapters().is_empty() { Ok(()) } else { optimizer.save(folder) }
    })?;
    if let Some(report) = &mut report
        && before.deviation != 1.0
    {
        // Losses and calibration are those of the scores that are saved.
        *report = evaluate(&model.frozen()?, &values(examples.evaluation()?), &settings.loss, common)?;
    } else if let Some(report) = &mut report {
        report.mean_reward -= before.mean;
    }
    if let Some(evaluation) = &report {
        run.note(&evaluation.tables());
        run.write("evaluation.json", &format!("{:#}\n", evaluation.json()))?;
        evaluation.figure().write(run.folder().join("calibration.svg"))?;
    }
    run.finish()?;
    Ok(report)
}

/// What the run is about to do; `zero_point` says over what the mean reward becomes 0, where that is a sample.
fn plan(
    settings: &RewardSettings,
    model: &Model,
    examples: &Examples<RankedTree>,
    zero_point: Option<String>,
) -> Result<Plan> {
    let workload = Workload::new("rankings", examples, |ranked| ranked.tree.tokens());
    let mut plan = training_plan("reward", model, &[], &settings.common, &settings.training, &workload, 0)?;
    if examples.left_out() > 0 {
        let ties = format!("{} prompts whose answers are one tie", workload.counted(examples.left_out()));
        plan = plan.line("left out", ties);
    }
    Ok(zero_point.into_iter().fold(plan, |plan, text| plan.line("mean reward 0", text)))
}

/// Reads examples in the way that the model wants them.
struct Reader {
    tokenizer: Tokenizer,
    /// An encoder reads prompt and answer as a pair of texts.
    is_encoder: bool,
    max_length: usize,
}

impl Reader {
    fn new(settings: &RewardSettings) -> Result<Self> {
        let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
        let is_encoder = !adapt::architecture(&settings.model.model)?.causal;
        Ok(Reader { tokenizer, is_encoder, max_length: settings.common.max_length })
    }

    fn ranking(&self, ranking: &Ranking, truncation: &mut Truncation) -> Result<TokenTree> {
        if !self.is_encoder {
            return self.tokenizer.ranking(ranking, self.max_length, truncation);
        }
        let Ranking { prompt, responses, origin, .. } = ranking;
        self.tokenizer.answer_pairs(Some(prompt), responses, origin, self.max_length, truncation)
    }

    fn demonstration(&self, demonstration: &Demonstration, truncation: &mut Truncation) -> Result<TokenTree> {
        if !self.is_encoder {
            return self.tokenizer.demonstration(demonstration, self.max_length, truncation);
        }
        let Demonstration { prompt, completion, origin } = demonstration;
        let answers = std::slice::from_ref(completion);
        self.tokenizer.answer_pairs(prompt.as_ref(), answers, origin, self.max_length, truncation)
    }

    /// The rankings of a run; those whose answers are one tie are left out.
    fn rankings(&self, settings: &RewardSettings) -> Result<Examples<'_, RankedTree>> {
        let source = Source::new(&settings.data, &settings.examples, &settings.training, &settings.common);
        let examples = Examples::open(&source, RANKINGS, |ranking: Ranking, truncation| {
            if pairs(&ranking.ranks).is_empty() {
                return Ok(None);
            }
            let tree = self.ranking(&ranking, truncation)?;
            let Ranking { ranks, margin, weight, agreement, .. } = ranking;
            Ok(Some(RankedTree { tree, ranks, margin, weight, agreement }))
        })?;
        if let Some(pattern) = examples.nothing_in(&source) {
            let ties = if pattern == source.data { examples.left_out().to_string() } else { "all".to_string() };
            bail!(
                "{pattern}: no ranking is left after reading ({ties} were one tie); at least one prompt with a better and a worse answer is needed"
            );
        }
        Ok(examples)
    }
}

fn train(
    settings: &RewardSettings,
    model: &Model,
    examples: &mut Examples<RankedTree>,
    done: usize,
    optimizer: &mut Optimizer,
    run: &mut Run,
) -> Result<Option<RewardEvaluation>> {
    let (common, training) = (&settings.common, &settings.training);
    let total_steps = examples.total_steps(settings.examples.epochs as f64, training.max_steps);
    let schedule = Schedule::new(&training.optimizer, training.learning_rate(LEARNING_RATE), total_steps);
    let evaluate_every = settings.examples.evaluate_every.unwrap_or(examples.steps_per_epoch());
    let mut latest = None;
    for step in done..total_steps {
        learn(settings, model, examples, optimizer, (step, schedule.learning_rate(step)), run)?;
        if step + 1 == total_steps || (step + 1) % evaluate_every == 0 {
            let evaluation = values(examples.evaluation()?);
            if !evaluation.is_empty() {
                let evaluation = evaluate(&model.frozen()?, &evaluation, &settings.loss, common)?;
                run.evaluation(step + 1, &evaluation.metrics())?;
                latest = Some(evaluation);
            }
        }
        run.checkpoint(step + 1, |state| add_to_state(state, model, optimizer))?;
    }
    if latest.is_none() {
        // The last step was done, and evaluated, before the run was interrupted.
        let evaluation = values(examples.evaluation()?);
        if !evaluation.is_empty() {
            latest = Some(evaluate(&model.frozen()?, &evaluation, &settings.loss, common)?);
        }
    }
    Ok(latest)
}

/// One optimizer step, recorded. Of streamed data all rows of a step may be ties: it changes nothing then and has no loss.
fn learn(
    settings: &RewardSettings,
    model: &Model,
    examples: &mut Examples<RankedTree>,
    optimizer: &mut Optimizer,
    (step, learning_rate): (usize, f64),
    run: &mut Run,
) -> Result<()> {
    let chosen = examples.step(step)?;
    let ranked = values(&chosen);
    let (loss, accuracy) = match &ranked[..] {
        [] => (f64::NAN, f64::NAN),
        ranked => accumulate(model, optimizer, ranked, settings, step as u64)?,
    };
    let stepped = optimizer.step(learning_rate);
    let origins = chosen.iter().map(|example| &example.origin);
    let stepped = run.stepped(step, stepped, origins, |state| add_to_state(state, model, optimizer))?;
    let tokens = ranked.iter().map(|ranked| ranked.tree.tokens()).sum();
    let metrics = [
        ("accuracy", accuracy),
        ("learning_rate", learning_rate),
        ("gradient_norm", stepped.gradient_norm),
        ("skipped_steps", optimizer.skipped_steps() as f64),
    ];
    run.step(step + 1, loss, tokens, &metrics)
}

/// What a checkpoint holds of the training.
fn add_to_state<'a>(state: &mut StateWriter<'a>, model: &Model, optimizer: &'a Optimizer) -> Result<()> {
    if let Some(head) = model.head() {
        state.value(SHIFT_AND_DIVISOR, &(head.form.shift, head.form.divisor))?;
    }
    optimizer.add_to(state, OPTIMIZER)
}

/// Adds the gradient of one optimizer step's mean loss a prompt, and gives the loss and the accuracy before the step.
fn accumulate(
    model: &Model,
    optimizer: &mut Optimizer,
    ranked: &[&RankedTree],
    settings: &RewardSettings,
    step: u64,
) -> Result<(f64, f64)> {
    let sizes: Vec<usize> = ranked.iter().map(|ranked| ranked.tree.tokens()).collect();
    let weight: f64 = ranked.iter().map(|ranked| f64::from(ranked.weight)).sum();
    let (mut total, mut judged) = (0.0, Vec::new());
    for (index, range) in split_by_budget(&sizes, settings.common.tokens_per_batch).into_iter().enumerate() {
        let pass = Pass { dropout_seed: Some(dropout_seed(settings.common.seed, step, index as u64)) };
        let scored = score(model, &ranked[range.clone()], &settings.loss, &pass)?;
        judged.extend(scored.pairs(&ranked[range]));
        let loss = scored.loss.affine(1.0 / weight.max(f64::MIN_POSITIVE), 0.0)?;
        optimizer.accumulate(&loss.backward()?)?;
        total += f64::from(loss.to_scalar::<f32>()?);
    }
    Ok((total, agreement::accuracy(&judged).accuracy))
}

/// The trees whose mean reward becomes 0: the demonstrations, or the prompts with their best-ranked answers; of data larger than a window a sample,
/// with a line about it for the plan.
fn zero_point(
    settings: &RewardSettings,
    examples: &mut Examples<RankedTree>,
    reader: &Reader,
) -> Result<(Vec<TokenTree>, Option<String>)> {
    if settings.normalize == Normalization::None {
        return Ok((Vec::new(), None));
    }
    let (trees, is_sample): (Vec<TokenTree>, bool) = match &settings.demonstrations {
        None => {
            let some = examples.training_or_some(MOST_FOR_ZERO_POINT)?;
            (values(&some).into_iter().map(best_answers).collect(), examples.is_streamed())
        }
        Some(pattern) => {
            let source = Source::new(pattern, &settings.examples, &settings.training, &settings.common);
            let source = Source { evaluation_data: None, evaluation_share: 0.0, ..source };
            let mut examples = Examples::open(&source, DEMONSTRATIONS, |demonstration, truncation| {
                reader.demonstration(&demonstration, truncation).map(Some)
            })?;
            let some = examples.training_or_some(MOST_FOR_ZERO_POINT)?;
            (values(&some).into_iter().cloned().collect(), examples.is_streamed())
        }
    };
    let of = if settings.demonstrations.is_some() { "demonstrations" } else { "rankings" };
    let count = indicatif::HumanCount(trees.len() as u64);
    let described = is_sample.then(|| format!("over {count} random {of}"));
    Ok((trees, described))
}

/// The prompt with its best-ranked answers only.
fn best_answers(ranked: &RankedTree) -> TokenTree {
    let best = ranked.ranks.iter().min();
    let answers = ranked.tree.answers.iter().zip(&ranked.ranks).filter(|(_, rank)| Some(*rank) == best);
    TokenTree { prompt: ranked.tree.prompt.clone(), answers: answers.map(|(answer, _)| answer.clone()).collect() }
}
