//! Export: adapters folded into their base model's weights, as a plain Hugging Face folder.

use candle_core::{DType, Device};
use clap::Parser;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, Continuation, TokenTree};
use crate::error::Result;
use crate::files::replace_folder_atomically;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::random;
use crate::say;
use crate::settings::{CommonSettings, ElementType, Flags, ModelSettings, Program, Section, ShortFlag};
use crate::train::plan::Plan;

/// Folds adapters (lora, bitfit, ia3) into the weights of a Hugging Face folder
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(
    name = "export",
    version,
    mut_arg("max_length", |argument| argument.hide(true)),
    mut_arg("tokens_per_batch", |argument| argument.hide(true))
)]
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

impl Program for ExportSettings {
    fn flags() -> Flags<Self> {
        // It reads no data: what it compares are short sequences of random tokens, in f32.
        let unread = &["max_length", "tokens_per_batch", "precision"];
        Flags::new()
            .of(|export: &Self| &export.model, ModelSettings::flags())
            .always(&["dtype"])
            .of(|export: &Self| &export.common, CommonSettings::flags().without(unread))
            .never(unread)
    }

    fn short_help() -> Vec<Section> {
        vec![Section {
            heading: "Input and output",
            flags: &[
                ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                ShortFlag("adapter", "FOLDER", "Adapters on top of it"),
                ShortFlag("output", "FOLDER", "Folder to write to"),
                ShortFlag("dtype", "X", "f32, bf16 or f16 [that of the base model]"),
            ],
        }]
    }
}

/// Sequences and their tokens, at which both models are compared.
const SEQUENCES: usize = 4;
const LENGTH: usize = 32;

/// What the fold may change, relative to the largest output: rounding of f32 sums in another order.
const FOLD_TOLERANCE: f32 = 1e-3;

/// What storing weights in an element type may change, relative to the largest output: a weight is rounded by at most one half of 2^-7 (bf16)
/// or 2^-10 (f16) of itself, and the roundings of all layers add up.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 0.25,
        DType::F16 => 0.05,
        _ => FOLD_TOLERANCE,
    }
}

/// Runs the program: merges, writes, reads again, and prints the largest absolute change in logits (or in what a head says). Gives that change.
///
/// # Errors
/// Where a method cannot be folded into weights, a file cannot be read or written, the outputs change beyond what rounding explains, or one of
/// them is not finite; then `--output` is as it was.
pub fn run(settings: &ExportSettings) -> Result<f32> {
    let common = &settings.common;
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::Frozen,
        head: Head::AsFound,
        seed: common.seed,
    };
    let model = Bases::of(common, Device::Cpu).load(&role)?;
    let methods: Vec<&str> = model.adapters().iter().map(|adapter| adapter.method()).collect();
    let dtype = settings.dtype.map_or(model.folder().form.dtype, ElementType::dtype);
    Plan::new("export")
        .line("model", settings.model.model.display())
        .line("adapters", if methods.is_empty() { "none".to_string() } else { methods.join(", ") })
        .line("element type", format!("{dtype:?}"))
        .print(common.quiet);
    let before = Outputs::of(&model, common.seed)?;
    before.check_finite(
        &format!("{}: the model", model.folder().name()),
        "its weights are damaged; export a healthy one",
    )?;
    let merged = adapt::merged(&model)?.stored_as(dtype);
    check_weights(&merged)?;
    before.check_change(&Outputs::of(&merged, common.seed)?, "folding the adapters in", FOLD_TOLERANCE)?;
    let mut change = 0.0;
    replace_folder_atomically(&common.output, |folder| {
        merged.save(folder)?;
        let written = Bases::new(Device::Cpu).load(&Role { folder, adapters: &[], ..role })?;
        let after = Outputs::of(&written, common.seed)?;
        after.check_finite(
            &format!("{}: the model in {dtype:?}", common.output.display()),
            "give --dtype bf16, which has the range of f32, or f32",
        )?;
        change = before.check_change(&after, &format!("storing the weights in {dtype:?}"), tolerance(dtype))?;
        Ok(())
    })?;
    let largest = before.largest();
    say!(
        "largest absolute change in {}: {change:.2e} (largest value {largest:.2}), at {SEQUENCES} sequences of {LENGTH} random tokens",
        before.what,
    );
    say!("{}", common.output.display());
    Ok(change)
}

/// Refuses weights that are not finite, which random tokens need not come across.
fn check_weights(model: &Model) -> Result<()> {
    for (name, tensor) in model.weights().iter() {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        let count = values.iter().filter(|x| !x.is_finite()).count();
        if count > 0 {
            bail!(
                "{}: tensor \"{name}\" holds {count} of {} numbers that are not finite, expected none; export a healthy model; nothing was written",
                model.folder().name(),
                values.len()
            );
        }
    }
    Ok(())
}

/// What a model says of random tokens: logits at every token, or what the head says of every sequence.
struct Outputs {
    values: Vec<f32>,
    what: &'static str,
}

impl Outputs {
    fn of(model: &Model, seed: u64) -> Result<Self> {
        let what = if model.head().is_some() { "what the head says" } else { "logits" };
        Ok(Outputs { values: outputs(model, seed)?, what })
    }

    fn largest(&self) -> f32 {
        self.values.iter().fold(0f32, |largest, x| largest.max(x.abs()))
    }

    /// Refuses outputs that are not finite.
    fn check_finite(&self, who: &str, advice: &str) -> Result<()> {
        let count = self.values.iter().filter(|x| !x.is_finite()).count();
        if count > 0 {
            bail!(
                "{who} gives {count} of {} numbers that are not finite ({}) for random tokens; {advice}; nothing was written",
                self.values.len(),
                self.what
            );
        }
        Ok(())
    }

    /// The largest absolute difference, which must not be beyond `tolerance` times the largest output. A head's numbers are compared with 1 where
    /// they are smaller, as a normalised reward is near 0.
    fn check_change(&self, after: &Outputs, step: &str, tolerance: f32) -> Result<f32> {
        let differences = self.values.iter().zip(&after.values).map(|(before, after)| (before - after).abs());
        let change = differences.fold(0f32, |largest, x| if largest.is_nan() || x <= largest { largest } else { x });
        let least = if self.what == "logits" { f32::MIN_POSITIVE } else { 1.0 };
        let allowed = tolerance * self.largest().max(least);
        let is_within = self.values.len() == after.values.len() && change <= allowed;
        if !is_within {
            bail!(
                "{step} changes {} by up to {change:.2e}, expected at most {allowed:.2e} (largest value {:.2}); nothing was written; keep the adapter, or give --dtype f32",
                self.what,
                self.largest()
            );
        }
        Ok(change)
    }
}

/// Logits at every token, or what the head says of every sequence (of a model without either, its hidden states).
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
        (Some(_), _) => model.classes(&hidden, &batch)?.tensor().clone(),
        (None, true) => model.logits(&hidden, &(0..batch.tokens.len() as u32).collect::<Vec<_>>(), &[])?,
        (None, false) => hidden.tensor().clone(),
    };
    Ok(values.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f32], what: &'static str) -> Outputs {
        Outputs { values: values.to_vec(), what }
    }

    #[test]
    fn a_change_counts_relative_to_the_largest_output_and_nan_is_beyond_all() {
        let before = of(&[1.0, -10.0], "logits");
        assert_eq!(before.check_change(&of(&[1.5, -10.0], "logits"), "it", 0.1).unwrap(), 0.5);
        for after in [&[1.0, -12.0][..], &[f32::NAN, -10.0], &[1.0, f32::INFINITY], &[1.0]] {
            let error = before.check_change(&of(after, "logits"), "the fold", 0.1).unwrap_err().to_string();
            assert!(error.starts_with("the fold changes logits"), "{error}");
        }
        let reward = of(&[0.01], "what the head says");
        assert!(reward.check_change(&of(&[0.05], "what the head says"), "it", 0.1).is_ok());
    }

    #[test]
    fn outputs_that_are_not_finite_are_refused() {
        assert!(of(&[1.0], "logits").check_finite("m", "a").is_ok());
        let error = of(&[1.0, f32::NAN, f32::INFINITY], "logits").check_finite("m", "a").unwrap_err().to_string();
        assert!(error.contains("2 of 3 numbers that are not finite"), "{error}");
    }
}
