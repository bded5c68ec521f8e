use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::adapt::{Bases, Head, Role, Training};
use crate::data::tokenize::Tokenizer;
use crate::generate::{CachePrecision, SamplingSettings, Stop};
use crate::model::transformer::KeyValueStore;
use crate::settings::from_arguments;
use crate::settings::testing::OnlyTraining;

fn base() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/data/base"))
}

/// The base model that ships with the project, as it is or with a new prefix.
fn model(has_prefix: bool) -> Result<Model> {
    let settings = from_arguments::<OnlyTraining>(["--method", "prefix-tuning", "--num-virtual-tokens", "5"])?.training;
    let training = if has_prefix { Training::With(&settings) } else { Training::Frozen };
    let role = Role { folder: base(), adapters: &[], training, head: Head::Language, seed: 7 };
    Bases::new(Device::Cpu).load(&role)?.snapshot().map(|model| model.resolved())
}

/// The keys and values that a cache kept of one sequence, prefix included, widened: another pass over the sequence
/// reads them in place of its own.
struct KeptRows {
    layers: Vec<[Tensor; 2]>,
    prefix_rows: usize,
    /// The largest difference between what a pass computes and what was kept, relative to the number and a tenth.
    largest_error: f32,
}

impl KeyValueStore for KeptRows {
    fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)> {
        let [kept_keys, kept_values] = &self.layers[layer];
        for (computed, kept) in [(&keys, kept_keys), (&values, kept_values)] {
            let kept = kept.narrow(0, self.prefix_rows, computed.dim(0)?)?;
            let error = ((computed - kept)?.abs()? / computed.abs()?.affine(1.0, 0.1)?)?;
            self.largest_error = self.largest_error.max(error.max_all()?.to_scalar()?);
        }
        Ok((kept_keys.clone(), kept_values.clone()))
    }
}

/// What the cache holds of a prompt alone in it and its only answer.
fn kept_rows(batch: &mut ContinuousBatch, rows: usize) -> Result<KeptRows> {
    let prefix_rows = batch.own_rows[0].prefix_rows;
    batch.cache.write_next_to(Vec::new());
    let architecture = batch.model.architecture();
    let none = Tensor::zeros((0, architecture.kv_width()), DType::F32, &Device::Cpu)?;
    let layer = |layer| -> Result<[Tensor; 2]> {
        let (keys, values) = batch.cache.extend(layer, none.clone(), none.clone())?;
        let widened = |x: Tensor| x.narrow(0, 0, prefix_rows + rows)?.to_dtype(DType::F32);
        Ok([widened(keys)?, widened(values)?])
    };
    let layers = (0..architecture.layers).map(layer).collect::<Result<_>>()?;
    Ok(KeptRows { layers, prefix_rows, largest_error: 0.0 })
}

/// Answers that are sampled token by token have the probabilities that one pass over prompt and answer gives, all of
/// whose keys and values are rounded as the cache says.
#[test]
fn a_cache_in_bf16_gives_the_log_probabilities_of_a_pass_with_rounded_keys_and_values() -> Result<()> {
    let tokenizer = Tokenizer::load(base())?;
    let text = "Ruvan lives in Morhale. Ruvan keeps a goat and a drum. Ruvan is a potter.\n\nWhat does Ruvan keep?\n";
    let prompts = [PromptTokens::from(tokenizer.encode(text)?)];
    for has_prefix in [false, true] {
        let model = model(has_prefix)?;
        // Half a unit in the last place of 8 bits of mantissa, at most; and what two orders of summation differ by.
        for (cache_precision, least, most) in [(CachePrecision::F32, 0.0, 1e-4), (CachePrecision::Bf16, 3e-3, 3.95e-3)]
        {
            let sampling = SamplingSettings { response_length: 30, cache_precision, ..Default::default() };
            let stop = Stop::default();
            let generation = Generation { answers: 1, sampling, stop, seed: 5, first: 0, tokens_per_pass: 64 };
            let mut batch = ContinuousBatch::new(&model, &prompts, &generation)?;
            while !batch.is_done() {
                batch.admit()?;
                batch.step()?;
            }
            let prompt = &prompts[0].tokens[..];
            let mut kept = kept_rows(&mut batch, prompt.len() + 29)?;
            let answer = batch.generated().answers[0][0].clone();
            let sequence = [prompt, &answer.tokens[..29]].concat();
            let rows = Span { start: kept.prefix_rows, len: sequence.len() };
            let pass = Pass::of_roots(&[Root { tokens: &sequence, stack: 0, rows }], &model.own_rows());
            let hidden = model.hidden_with_store(&pass.tokens, &pass.layout, &mut kept)?;
            let of_answer: Vec<u32> = (prompt.len() as u32 - 1..sequence.len() as u32).collect();
            let logits = model.logits(&hidden, &of_answer, &[0; 30])?.to_dtype(DType::F64)?;
            let log_probs = candle_nn::ops::log_softmax(&logits, 1)?.to_vec2::<f64>()?;
            for ((&token, &found), expected) in answer.tokens.iter().zip(&answer.log_probs).zip(log_probs) {
                let expected = expected[token as usize];
                assert!((f64::from(found) - expected).abs() < 1e-5, "{cache_precision}: {found} is not {expected}");
            }
            let error = kept.largest_error;
            assert!(least <= error && error <= most, "{cache_precision}: kept with an error of {error}");
        }
    }
    Ok(())
}
