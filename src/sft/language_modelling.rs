//! Demonstrations to cross-entropy over the tokens of their completions.

use std::path::Path;

use candle_core::Device;

use super::{Accumulated, SftReport, SftSettings, Task, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::TokenTree;
use crate::data::inspect;
use crate::data::mixture::{self, Mixture, Part};
use crate::data::schema::{DEMONSTRATIONS, Demonstration};
use crate::data::splits::Pattern;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::data::train_tokenizer::{SpecialTokens, train_bpe, train_bpe_on_files};
use crate::error::Result;
use crate::gguf;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::passes::StepPasses;
use crate::model::weight_files;
use crate::ops::Outputs;
use crate::say;
use crate::settings::{CommonSettings, ModelSettings};
use crate::train::examples::{Example, Examples, Source};
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Sizes, Workload, check_lengths};
use crate::train::prepared::in_order;
use crate::train::run::Run;

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    let common = &settings.common;
    adapt::refuse_encoder(&adapt::architecture(&settings.model.model)?, &settings.model.model)?;
    let mixture = mixture_of((&settings.data).into(), common)?;
    let tokenizer = tokenizer(settings, mixture.as_ref())?;
    let described = mixture.as_ref().map(Mixture::describe);
    let mut examples = read(settings, mixture, &tokenizer)?;
    if let Some(count) = settings.examples.inspect {
        for example in examples.first(count)? {
            say!("{}", inspect::inspect(&example.value, &tokenizer)?);
        }
        examples.say_remarks();
        return Ok(SftReport::NOTHING);
    }
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: Head::Language,
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, common, &settings.training)?;
    let model = Bases::of(common, Device::Cpu).load(&role)?;
    let too_long = check_lengths(model.architecture(), &examples, TokenTree::longest, common.max_length)?;
    let schedule = settings.schedule_of(&examples);
    let rows = |tree: &TokenTree| model.rows_of(tree);
    let budget = common.tokens_per_batch;
    let sizes = Sizes { tokens: &TokenTree::tokens, learned: &rows, evaluated: &rows, budget };
    let workload = Workload::new("demonstrations", &examples, schedule.total_steps, &sizes);
    let mut plan = settings.plan(&model, &schedule, &workload, &[])?.chat_format(&tokenizer).warning(too_long);
    if let Some(described) = described {
        plan = plan.line("mixture", described);
    }
    let (checkpoints, total_steps) = (&settings.training.checkpoints, schedule.total_steps);
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let save = |folder: &Path| {
        model.save(folder)?;
        // In the folder already, unless it was made for this run.
        tokenizer.save(folder)
    };
    let task = LanguageModelling { model: &model, common };
    let report = train(settings, &model, &task, &mut examples, &mut run, save)?;
    run.finish()?;
    Ok(report)
}

/// The model's tokenizer; for a bare `config.json` without one, a byte-level BPE trained on the demonstrations, as large as the
/// configuration's vocabulary.
fn tokenizer(settings: &SftSettings, mixture: Option<&Mixture>) -> Result<Tokenizer> {
    let ModelSettings { model, adapter } = &settings.model;
    let folders = adapt::companions(model, adapter)?;
    let (base, architecture) = adapt::base(model, adapter)?;
    let places = folders.iter().map(|folder| gguf::has_file(folder, "tokenizer.json"));
    if places.collect::<Result<Vec<_>>>()?.contains(&true) || weight_files::has_weights(&base)? {
        return adapt::tokenizer(model, adapter);
    }
    let vocabulary = architecture.vocabulary;
    match mixture {
        Some(mixture) => train_bpe(mixture.texts(), vocabulary, &SpecialTokens::default()),
        None => train_bpe_on_files(&settings.data, vocabulary, &SpecialTokens::default()),
    }
}

/// The examples of a run: those of a mixture in memory, those of files as they are needed where they are many.
fn read<'a>(
    settings: &SftSettings,
    mixture: Option<Mixture>,
    tokenizer: &'a Tokenizer,
) -> Result<Examples<'a, TokenTree>> {
    let (source, max_length) = (settings.source(), settings.common.max_length);
    let prepare = move |demonstration: &Demonstration, truncation: &mut Truncation| {
        let tree = tokenizer.demonstration(demonstration, max_length, truncation)?;
        Ok((tree.learned_tokens() > 0).then_some(tree))
    };
    let in_memory = |mixture: Mixture, truncation: &mut Truncation| -> Result<Vec<_>> {
        let made = in_order(mixture.into_demonstrations().collect(), truncation, |demonstration, truncation| {
            let value = prepare(&demonstration, truncation)?;
            truncation.left_out += usize::from(value.is_none());
            Ok(value.map(|value| Example { origin: demonstration.origin, value }))
        })?;
        Ok(made.into_iter().flatten().collect())
    };
    // Mixtures are in memory, the ones to evaluate on too.
    let held_out = match source.evaluation_data {
        Some(pattern) => mixture_of(Pattern::evaluation(pattern), &settings.common)?,
        None => None,
    };
    let mut cut = Truncation::default();
    let held_out = held_out.map(|mixture| in_memory(mixture, &mut cut)).transpose()?;
    let of_data = match held_out {
        Some(_) => Source { evaluation_data: None, evaluation_share: 0.0, ..source },
        None => source,
    };
    let decoded = move |demonstration: Demonstration, truncation: &mut Truncation| prepare(&demonstration, truncation);
    let mut examples = match mixture {
        None => Examples::open(&of_data, DEMONSTRATIONS, decoded)?,
        Some(mixture) => {
            let mut truncation = Truncation::default();
            let all = in_memory(mixture, &mut truncation)?;
            let examples = Examples::in_memory(&of_data, all).counting(truncation);
            examples.with_evaluation_data(&of_data, DEMONSTRATIONS, decoded)?
        }
    };
    if let Some(held_out) = held_out {
        examples = examples.with_evaluation(held_out, cut);
    }
    if let Some(pattern) = examples.nothing_in(&source) {
        bail!(
            "{pattern}: no demonstration with a token to learn is left after reading; check the completions and --max-length"
        );
    }
    Ok(examples)
}

/// The mixture that a pattern names, if it names one.
fn mixture_of(pattern: Pattern, common: &CommonSettings) -> Result<Option<Mixture>> {
    mixture::is_mixture(pattern.text).then(|| mixture::read(pattern, Part::Training, common.seed)).transpose()
}

struct LanguageModelling<'a> {
    model: &'a Model,
    common: &'a CommonSettings,
}

impl Task for LanguageModelling<'_> {
    type Value = TokenTree;

    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[&TokenTree], step: u64) -> Result<Accumulated> {
        let loss = accumulate(self.model, optimizer, chosen, self.common, step)?;
        let tokens = chosen.iter().map(|tree| tree.tokens()).sum();
        Ok(Accumulated { loss, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self, examples: &[&TokenTree]) -> Result<Vec<(&'static str, f64)>> {
        let loss = evaluation_loss(&self.model.frozen()?, examples, self.common.tokens_per_batch)?;
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
    let (mut total, mut passes) = (0.0, StepPasses::new(common.seed, step));
    for range in model.passes(trees.iter().copied(), common.tokens_per_batch) {
        let batch = model.pack(trees[range].iter().copied());
        let pass = passes.next(model, &batch);
        let hidden = model.hidden(&batch, &pass)?; // [tokens, d_model]
        let mut outputs = Outputs::default();
        let log_probs = outputs.tensor(&model.log_probs(&hidden, &batch, 1.0)?.log_probs)?; // [targets]
        drop(hidden);
        let loss = log_probs.sum_all()?.affine(-1.0 / targets as f64, 0.0)?;
        optimizer.backward(&loss, outputs)?;
        total += f64::from(loss.to_scalar::<f32>()?);
    }
    Ok(total)
}

/// Mean cross-entropy a target token of a frozen model.
pub fn evaluation_loss(model: &Model, trees: &[&TokenTree], tokens_per_batch: usize) -> Result<f64> {
    let (mut total, mut targets) = (0.0, 0);
    for range in model.passes(trees.iter().copied(), tokens_per_batch) {
        let batch = model.pack(trees[range].iter().copied());
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        let log_probs = model.log_probs(&hidden, &batch, 1.0)?.log_probs; // [targets]
        total -= f64::from(log_probs.tensor().sum_all()?.to_scalar::<f32>()?);
        targets += batch.targets.len();
    }
    Ok(total / targets as f64)
}
