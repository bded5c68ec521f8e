//! Demonstrations to cross-entropy over the tokens of their completions.

use std::path::Path;

use candle_core::Device;

use super::{Accumulated, SftReport, SftSettings, Task, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree, split_by_budget};
use crate::data::inspect;
use crate::data::mixture::{self, Mixture, Part};
use crate::data::schema::{self, Demonstration};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::data::train_tokenizer::{SpecialTokens, train_bpe, train_bpe_on_files};
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::model::folder::read_architecture;
use crate::model::weight_files;
use crate::model::{Model, dropout_seed};
use crate::say;
use crate::settings::CommonSettings;
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::order::{self, Order};
use crate::train::plan::{Examples, training_plan};
use crate::train::run::Run;

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    let common = &settings.common;
    adapt::refuse_encoder(&adapt::architecture(&settings.model.model)?, &settings.model.model)?;
    let mixture = mixture_of(&settings.data, common)?;
    let tokenizer = tokenizer(settings, mixture.as_ref())?;
    let described = mixture.as_ref().map(Mixture::describe);
    let (trees, truncation) = read(&settings.data, mixture, &tokenizer, common)?;
    if let Some(count) = settings.examples.inspect {
        for tree in trees.iter().take(count) {
            say!("{}", inspect::inspect(tree, &tokenizer)?);
        }
        return Ok(SftReport::NOTHING);
    }
    let (training, evaluation) = match &settings.examples.evaluation_data {
        Some(pattern) => (trees, read(pattern, mixture_of(pattern, common)?, &tokenizer, common)?.0),
        None => order::split(trees, settings.examples.evaluation_share, common.seed),
    };
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::Language,
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, &settings.training)?;
    let model = Bases::new(Device::Cpu).load(&role)?;
    tokenizer.fits(model.architecture().vocabulary)?;
    let longest = training.iter().chain(&evaluation).map(TokenTree::longest).max();
    model.architecture().check_length(longest.unwrap_or(0))?;
    let order = Order::new((0..training.len()).collect(), settings.training.batch_size, common.seed);
    let tokens = training.iter().map(TokenTree::tokens).sum();
    let (what, count) = ("demonstrations", training.len());
    let examples = Examples { what, training: count, evaluation: evaluation.len(), tokens, truncation };
    let mut plan = training_plan("sft", &model, &[], common, &settings.training, &examples, 0)?;
    if let Some(described) = described {
        plan = plan.line("mixture", described);
    }
    let total_steps = order.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    let checkpoints = &settings.training.checkpoints;
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let save = |folder: &Path| {
        model.save(folder)?;
        // In the folder already, unless it was made for this run.
        tokenizer.save(folder)
    };
    let task = LanguageModelling { model: &model, trees: &training, evaluation: &evaluation, common };
    let report = train(settings, &model, &task, order, &mut run, save)?;
    run.finish()?;
    Ok(report)
}

/// The model's tokenizer; for a bare `config.json` without one, a byte-level BPE trained on the demonstrations, as large as the
/// configuration's vocabulary.
fn tokenizer(settings: &SftSettings, mixture: Option<&Mixture>) -> Result<Tokenizer> {
    let folder = adapt::tokenizer_folder(&settings.model.model)?;
    if folder.join("tokenizer.json").is_file() || weight_files::has_weights(&folder) {
        return Tokenizer::load(folder);
    }
    let vocabulary = read_architecture(&folder)?.1.vocabulary;
    match mixture {
        Some(mixture) => train_bpe(mixture.texts(), vocabulary, &SpecialTokens::default()),
        None => train_bpe_on_files(&settings.data, vocabulary, &SpecialTokens::default()),
    }
}

/// The token trees of a mixture, or else of the Parquet files that `pattern` names.
fn read(
    pattern: &str,
    mixture: Option<Mixture>,
    tokenizer: &Tokenizer,
    common: &CommonSettings,
) -> Result<(Vec<TokenTree>, Truncation)> {
    match mixture {
        Some(mixture) => trees(pattern, mixture.into_demonstrations().map(Ok), tokenizer, common.max_length),
        None => trees(pattern, schema::demonstrations(pattern)?, tokenizer, common.max_length),
    }
}

/// The mixture that a pattern names, if it names one.
fn mixture_of(pattern: &str, common: &CommonSettings) -> Result<Option<Mixture>> {
    mixture::is_mixture(pattern).then(|| mixture::read(pattern, Part::Training, common.seed)).transpose()
}

/// Makes token trees of demonstrations; those without a token to learn are left out.
fn trees(
    pattern: &str,
    demonstrations: impl Iterator<Item = Result<Demonstration>>,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<(Vec<TokenTree>, Truncation)> {
    let mut truncation = Truncation::default();
    let mut trees = Vec::new();
    for demonstration in demonstrations {
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

struct LanguageModelling<'a> {
    model: &'a Model,
    trees: &'a [TokenTree],
    evaluation: &'a [TokenTree],
    common: &'a CommonSettings,
}

impl Task for LanguageModelling<'_> {
    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[usize], step: u64) -> Result<Accumulated> {
        let trees: Vec<&TokenTree> = chosen.iter().map(|&index| &self.trees[index]).collect();
        let loss = accumulate(self.model, optimizer, &trees, self.common, step)?;
        let tokens = trees.iter().map(|tree| tree.tokens()).sum();
        Ok(Accumulated { loss, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self) -> Result<Vec<(&'static str, f64)>> {
        if self.evaluation.is_empty() {
            return Ok(Vec::new());
        }
        let loss = evaluation_loss(&self.model.frozen()?, self.evaluation, self.common.tokens_per_batch)?;
        Ok(vec![("evaluation_loss", loss), ("evaluation_perplexity", loss.exp())])
    }
}

/// Adds the gradient of one optimizer step's mean loss a target token, micro-batch by micro-batch, and gives the loss.
pub(super) fn accumulate(
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
