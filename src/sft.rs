//! Supervised fine-tuning: demonstrations to cross-entropy.

use std::path::Path;

use candle_core::Device;
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree, split_by_budget};
use crate::data::inspect;
use crate::data::schema;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::data::train_tokenizer::{SpecialTokens, train_bpe_on_files};
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::model::folder::read_architecture;
use crate::model::weight_files;
use crate::model::{Model, dropout_seed};
use crate::settings::{CommonSettings, ExampleSettings, ModelSettings, TrainingSettings, learning_rate_help};
use crate::train::optimizer::Optimizer;
use crate::train::order::{self, Order};
use crate::train::plan::{Examples, training_plan};
use crate::train::run::Run;
use crate::train::schedule::Schedule;

/// The default peak learning rate of full weights.
const LEARNING_RATE: f64 = 1e-5;

/// Fine-tunes a language model on demonstrations
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "sft", version, mut_arg("learning_rate", learning_rate_help(LEARNING_RATE)))]
pub struct SftSettings {
    /// The model to start from.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Parquet file, folder or glob of demonstrations (columns prompt and completion, messages, instruction and output, or text)
    #[arg(long, value_name = "FILES")]
    pub data: String,
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

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SftReport {
    /// Optimizer steps.
    pub steps: usize,
    /// Loss of the last step.
    pub training_loss: f64,
    /// Loss on the evaluation split at the end, where there is one.
    pub evaluation_loss: Option<f64>,
}

/// Runs the whole stage: reads, trains, evaluates, saves.
pub fn run(settings: &SftSettings) -> Result<SftReport> {
    let common = &settings.common;
    let tokenizer = tokenizer(settings)?;
    let (trees, truncation) = read(&settings.data, &tokenizer, common.max_length)?;
    if let Some(count) = settings.examples.inspect {
        for tree in trees.iter().take(count) {
            println!("{}", inspect::inspect(tree, &tokenizer)?);
        }
        return Ok(SftReport { steps: 0, training_loss: f64::NAN, evaluation_loss: None });
    }
    let (training, evaluation) = match &settings.examples.evaluation_data {
        Some(pattern) => (trees, read(pattern, &tokenizer, common.max_length)?.0),
        None => order::split(trees, settings.examples.evaluation_share, common.seed),
    };
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::Language,
        seed: common.seed,
    };
    let model = Bases::new(Device::Cpu).load(&role)?;
    tokenizer.fits(model.architecture().vocabulary)?;
    let longest = training.iter().chain(&evaluation).map(TokenTree::longest).max();
    model.architecture().check_length(longest.unwrap_or(0))?;
    let order = Order::new((0..training.len()).collect(), settings.training.batch_size, common.seed);
    let tokens = training.iter().map(TokenTree::tokens).sum();
    let (what, count) = ("demonstrations", training.len());
    let examples = Examples { what, training: count, evaluation: evaluation.len(), tokens, truncation };
    let plan = training_plan("sft", &[&model], common, &settings.training, &examples, 0);
    let total_steps = order.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    let mut run = Run::start(settings, common, &plan, total_steps)?;
    let save = |folder: &Path| {
        model.save(folder)?;
        // In the folder already, unless it was made for this run.
        tokenizer.save(folder)
    };
    let report = train(settings, &model, &training, &evaluation, order, &mut run, save)?;
    run.finish()?;
    Ok(report)
}

/// The model's tokenizer; for a bare `config.json` without one, a byte-level BPE trained on the demonstrations, as large as the
/// configuration's vocabulary.
fn tokenizer(settings: &SftSettings) -> Result<Tokenizer> {
    let folder = adapt::tokenizer_folder(&settings.model.model)?;
    if folder.join("tokenizer.json").is_file() || weight_files::has_weights(&folder) {
        return Tokenizer::load(folder);
    }
    let vocabulary = read_architecture(&folder)?.1.vocabulary;
    train_bpe_on_files(&settings.data, vocabulary, &SpecialTokens::default())
}

/// Reads demonstrations as token trees; those without a token to learn are left out.
fn read(pattern: &str, tokenizer: &Tokenizer, max_length: usize) -> Result<(Vec<TokenTree>, Truncation)> {
    let mut truncation = Truncation::default();
    let mut trees = Vec::new();
    for demonstration in schema::demonstrations(pattern)? {
        let tree = tokenizer.demonstration(&demonstration?, max_length, &mut truncation)?;
        if tree.learned_tokens() > 0 {
            trees.push(tree);
        }
    }
    if trees.is_empty() {
        bail!(
            "{pattern}: no demonstration with a token to learn is left after reading; check the completions and --max-length"
        );
    }
    Ok((trees, truncation))
}

fn train(
    settings: &SftSettings,
    model: &Model,
    trees: &[TokenTree],
    evaluation: &[TokenTree],
    mut order: Order,
    run: &mut Run,
    save: impl Fn(&Path) -> Result<()>,
) -> Result<SftReport> {
    let (common, training) = (&settings.common, &settings.training);
    let total_steps = order.total_steps(settings.examples.epochs as f64, training.max_steps);
    let schedule = Schedule::new(&training.optimizer, training.learning_rate(LEARNING_RATE), total_steps);
    let mut optimizer = Optimizer::new(model.trainable_parameters(), &training.optimizer)?;
    let evaluate_every = settings.examples.evaluate_every.unwrap_or(order.steps_per_epoch());
    let mut report = SftReport { steps: total_steps, training_loss: f64::NAN, evaluation_loss: None };
    for step in 0..total_steps {
        let chosen: Vec<&TokenTree> = order.step(step).iter().map(|&index| &trees[index]).collect();
        report.training_loss = accumulate(model, &mut optimizer, &chosen, common, step as u64)?;
        let learning_rate = schedule.learning_rate(step);
        let done = optimizer.step(learning_rate)?;
        let tokens = chosen.iter().map(|tree| tree.tokens()).sum();
        let metrics = [
            ("learning_rate", learning_rate),
            ("gradient_norm", done.gradient_norm),
            ("skipped_steps", optimizer.skipped_steps() as f64),
        ];
        run.step(step + 1, report.training_loss, tokens, &metrics)?;
        let last = step + 1 == total_steps;
        if !last && (step + 1) % evaluate_every != 0 {
            continue;
        }
        if !evaluation.is_empty() {
            let loss = evaluation_loss(&model.frozen()?, evaluation, common.tokens_per_batch)?;
            run.evaluation(step + 1, &[("evaluation_loss", loss), ("evaluation_perplexity", loss.exp())])?;
            report.evaluation_loss = Some(loss);
        }
        run.keep(step + 1, report.evaluation_loss, &save)?;
    }
    Ok(report)
}

/// Adds the gradient of one optimizer step's mean loss a target token, micro-batch by micro-batch, and gives the loss.
fn accumulate(
    model: &Model,
    optimizer: &mut Optimizer,
    trees: &[&TokenTree],
    common: &CommonSettings,
    step: u64,
) -> Result<f64> {
    let targets: usize = trees.iter().map(|tree| tree.learned_tokens()).sum();
    let sizes: Vec<usize> = trees.iter().map(|tree| tree.tokens()).collect();
    let mut total = 0.0;
    for (index, range) in split_by_budget(&sizes, common.tokens_per_batch).into_iter().enumerate() {
        let batch = Batch::pack(trees[range].iter().copied());
        let pass = Pass { dropout_seed: Some(dropout_seed(common.seed, step, index as u64)) };
        let hidden = model.hidden(&batch, &pass)?; // [tokens, d_model]
        let log_probs = model.log_probs(&hidden, &batch, 1.0)?.log_probs; // [targets]
        let loss = log_probs.sum_all()?.affine(-1.0 / targets as f64, 0.0)?;
        optimizer.accumulate(&loss.backward()?)?;
        total += f64::from(loss.to_scalar::<f32>()?);
    }
    Ok(total)
}

/// Mean cross-entropy a target token of a frozen model.
pub fn evaluation_loss(model: &Model, trees: &[TokenTree], tokens_per_batch: usize) -> Result<f64> {
    let sizes: Vec<usize> = trees.iter().map(TokenTree::tokens).collect();
    let (mut total, mut targets) = (0.0, 0);
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let batch = Batch::pack(&trees[range]);
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        let log_probs = model.log_probs(&hidden, &batch, 1.0)?.log_probs; // [targets]
        total -= f64::from(log_probs.sum_all()?.to_scalar::<f32>()?);
        targets += batch.targets.len();
    }
    Ok(total / targets as f64)
}
