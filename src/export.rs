//! Export: adapters folded into their base model's weights, as a plain Hugging Face folder.

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::data::batch::{Batch, Continuation, TokenTree};
use crate::error::Result;
use crate::files::replace_folder_atomically;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::random;
use crate::say;
use crate::settings::{CommonSettings, ModelSettings};
use crate::train::plan::Plan;

/// Folds adapters (lora, bitfit, ia3) into the weights and writes a plain Hugging Face folder
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "export", version)]
pub struct ExportSettings {
    /// The model with its adapters.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// Element type of the weights that are written [default: the base model's]
    #[arg(long, value_enum)]
    pub dtype: Option<ElementType>,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
}

/// An element type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// 32 bits
    F32,
    /// 16 bits with the range of 32
    Bf16,
    /// 16 bits
    F16,
}

/// Sequences and their tokens, at which both models are compared.
const SEQUENCES: usize = 4;
const LENGTH: usize = 32;

/// Runs the program: merges, writes, reads again, and prints the largest absolute change in logits (or in what a head says). Gives that change.
///
/// # Errors
/// Where a method cannot be folded into weights, or a file cannot be read or written; then `--output` is as it was.
pub fn run(settings: &ExportSettings) -> Result<f32> {
    let common = &settings.common;
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::Frozen,
        head: Head::AsFound,
        seed: common.seed,
    };
    let model = Bases::new(Device::Cpu).load(&role)?;
    let methods: Vec<&str> = model.adapters().iter().map(|adapter| adapter.method()).collect();
    let dtype = match settings.dtype {
        None => model.folder().form.dtype,
        Some(ElementType::F32) => DType::F32,
        Some(ElementType::Bf16) => DType::BF16,
        Some(ElementType::F16) => DType::F16,
    };
    Plan::new("export")
        .line("model", settings.model.model.display())
        .line("adapters", if methods.is_empty() { "none".to_string() } else { methods.join(", ") })
        .line("element type", format!("{dtype:?}"))
        .print(common.quiet);
    let merged = adapt::merged(&model)?.stored_as(dtype);
    replace_folder_atomically(&common.output, |folder| merged.save(folder))?;
    let written = Bases::new(Device::Cpu).load(&Role { folder: &common.output, adapters: &[], ..role })?;
    let (before, after) = (outputs(&model, common.seed)?, outputs(&written, common.seed)?);
    let change = before.iter().zip(&after).map(|(before, after)| (before - after).abs()).fold(0.0, f32::max);
    let largest = before.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    say!(
        "largest absolute change in {}: {change:.2e} (largest value {largest:.2}), at {SEQUENCES} sequences of {LENGTH} random tokens",
        if model.head().is_some() { "what the head says" } else { "logits" },
    );
    say!("{}", common.output.display());
    Ok(change)
}

/// Logits at every token, or what the head says of every sequence.
fn outputs(model: &Model, seed: u64) -> Result<Vec<f32>> {
    let mut stream = random::stream(seed, "export", 0);
    let vocabulary = model.architecture().vocabulary as u32;
    let sequence = |_| {
        let tokens: Vec<u32> = (0..LENGTH).map(|_| stream.random_range(0..vocabulary)).collect();
        let learned = vec![false; tokens.len()];
        TokenTree { prompt: Vec::new(), answers: vec![Continuation { tokens, learned }] }
    };
    let trees: Vec<TokenTree> = (0..SEQUENCES).map(sequence).collect();
    let model = model.frozen()?;
    let batch: Batch = model.pack(&trees);
    let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
    let values = match (model.head(), model.has_output_matrix()) {
        (Some(_), _) => model.classes(&hidden, &batch)?,
        (None, true) => model.logits(&hidden, &(0..batch.tokens.len() as u32).collect::<Vec<_>>(), &[])?,
        (None, false) => hidden,
    };
    Ok(values.flatten_all()?.to_vec1()?)
}
