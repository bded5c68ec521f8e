//! What the tests against golden files share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::training_settings;
use candle_core::{DType, Device, Tensor};
use rlhf::Result;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::model::Model;
use rlhf::model::adapter::Pass;
use rlhf::ops::{Gradients, Outputs};

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A golden folder.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// What the oracle made of it.
pub fn expected(name: &str) -> Result<Tensors> {
    let tensors = candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu)?;
    Ok(tensors.into_iter().collect())
}

/// A tensor's numbers.
pub fn floats(tensors: &Tensors, name: &str) -> Result<Vec<f32>> {
    let tensor = tensors.get(name).unwrap_or_else(|| panic!("the golden file holds {name}"));
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The same of integers.
pub fn integers(tensors: &Tensors, name: &str) -> Result<Vec<i64>> {
    Ok(tensors.get(name).unwrap_or_else(|| panic!("the golden file holds {name}")).flatten_all()?.to_vec1()?)
}

/// Every number within `tolerance` of the expected one, relative to the largest expected number or absolute, whichever is wider.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let scale = expected.iter().fold(1f32, |scale, x| scale.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance * scale, "{what}[{index}]: found {found}, expected {expected}");
    }
}

/// A gradient of PyTorch's as it lies with us: GPT-2's Conv1D weights are transposed.
pub fn as_ours(name: &str, gradient: &Tensor) -> Result<Tensor> {
    let is_transposed = ["c_attn.weight", "c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end));
    Ok(if is_transposed { gradient.t()?.contiguous()? } else { gradient.clone() })
}

/// Gradients are compared relative to the largest number of the tensor, however small it is.
pub fn assert_gradient(what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    let expected = as_ours(what, expected)?;
    assert_eq!(found.dims(), expected.dims(), "shape of the gradient of {what}");
    let (found, expected): (Vec<f32>, Vec<f32>) = (found.flatten_all()?.to_vec1()?, expected.flatten_all()?.to_vec1()?);
    let scale = expected.iter().fold(0f32, |scale, x| scale.max(x.abs()));
    // A key's bias shifts every key of a softmax alike where keys are not rotated: its gradient is zero, and what is found is rounding. So it is
    // with absolute positions, and in the one layer of SmolLM3's golden model that has no rotation.
    let is_zero = what.ends_with("self.key.bias") || what.ends_with("smollm3: model.layers.0.self_attn.k_proj.bias");
    let scale = if is_zero { scale.max(1e-3) } else { scale };
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-4 * scale, "gradient of {what}: found {found}, expected {expected}");
    }
    Ok(())
}

/// The model of a folder, trained as the arguments say.
pub fn load(folder: &Path, arguments: Option<&[&str]>, head: Head) -> Result<Model> {
    let settings = arguments.map(training_settings);
    let training = settings.as_ref().map_or(Training::Frozen, Training::With);
    Bases::new(Device::Cpu).load(&Role { folder, adapters: &[], training, head, seed: 0 })
}

/// The rows of `input_ids` as documents; what `loss_mask` marks is learned.
pub fn documents(tensors: &Tensors) -> Result<Vec<TokenTree>> {
    let rows = tensors["input_ids"].dim(0)?;
    let ids = integers(tensors, "input_ids")?;
    let learned = match tensors.contains_key("loss_mask") {
        true => integers(tensors, "loss_mask")?,
        false => vec![1; ids.len()],
    };
    let length = ids.len() / rows;
    let document = |row: usize| {
        let range = row * length..(row + 1) * length;
        let tokens = ids[range.clone()].iter().map(|&id| id as u32).collect();
        let learned = learned[range].iter().map(|&learned| learned == 1).collect();
        TokenTree { prompt: Vec::new(), answers: vec![Continuation { tokens, learned }] }
    };
    Ok((0..rows).map(document).collect())
}

/// The logits at every token.
pub fn logits(model: &Model, batch: &Batch) -> Result<Vec<f32>> {
    let hidden = model.hidden(batch, &Pass::default())?;
    let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
    Ok(model.logits(&hidden, &rows, &[])?.flatten_all()?.to_vec1()?)
}

/// Compares logits and loss with the oracle's, and gives the loss's gradients.
pub fn check_logits_and_loss(name: &str, model: &Model, tensors: &Tensors) -> Result<Gradients> {
    let batch = Batch::pack(&documents(tensors)?);
    assert_close(&format!("{name}: logits"), &logits(model, &batch)?, &floats(tensors, "logits")?, 1e-4);
    let hidden = model.hidden(&batch, &Pass::default())?;
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, &batch, 1.0)?.log_probs)?;
    let loss = log_probs.mean_all()?.neg()?;
    assert_close(&format!("{name}: loss"), &[loss.to_scalar()?], &floats(tensors, "loss")?, 1e-5);
    outputs.gradients(&loss)
}

/// The rows of an encoder's golden file: the first text of each as prompt, the second as answer.
pub fn pairs(tensors: &Tensors) -> Result<Vec<TokenTree>> {
    let rows = tensors["input_ids"].to_vec2::<i64>()?;
    let types = tensors.get("token_type_ids").map(|types| types.to_vec2::<i64>()).transpose()?;
    let tree = |(index, row): (usize, &Vec<i64>)| {
        let tokens: Vec<u32> = row.iter().map(|&id| id as u32).collect();
        let first = types.as_ref().map_or(0, |types| types[index].iter().filter(|&&kind| kind == 0).count());
        let (prompt, answer) = tokens.split_at(first);
        let learned = vec![false; answer.len()];
        TokenTree { prompt: prompt.to_vec(), answers: vec![Continuation { tokens: answer.to_vec(), learned }] }
    };
    Ok(rows.iter().enumerate().map(tree).collect())
}
