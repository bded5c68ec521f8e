//! Trained weights as they will read back from what is saved: those that are saved in 16 bits are rounded.
//!
//! Training goes on in f32. What is measured of a model that is saved, and so which is the best, is measured
//! of the rounded weights.

use std::collections::BTreeSet;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::run::Run;
use crate::bail;
use crate::error::Result;
use crate::model::Model;
use crate::model::dtype;
use crate::model::folder::{self, WithoutWeights};
use crate::model::weights::{Stored, tensor_specs};
use crate::ops::BaseForm;

/// The share of the changed weights that round back to what they were, from which on the run warns.
const LARGE_SHARE: f64 = 0.5;

/// Runs `with` while the weights that train are what will be read back after saving; after it they are as
/// they were.
///
/// # Errors
/// Those of `with`, and where a weight is beyond the range of the element type.
pub fn as_saved<T>(model: &Model, with: impl FnOnce() -> Result<T>) -> Result<T> {
    let dtype = model.saved_dtype();
    if dtype == DType::F32 {
        return with();
    }
    let (parameters, less_one) = (model.trainable_parameters(), less_one(model));
    let mut before = Vec::with_capacity(parameters.len());
    let mut round = || {
        for parameter in &parameters {
            let values = parameter.variable.as_tensor().detach().copy()?;
            let rounded = rounded(&parameter.name, &values, dtype, less_one.contains(&parameter.name))?;
            parameter.variable.set(&rounded)?;
            before.push(values);
        }
        Ok(())
    };
    let result = round().and_then(|()| with());
    for (parameter, values) in parameters.iter().zip(&before) {
        parameter.variable.set(values)?;
    }
    result
}

/// What a run checks once its last step is done: that it learned something, and whether saving keeps it.
/// Warns where most of what a model learned is lost by saving it in 16 bits: where its weights round back to
/// those of its base.
///
/// # Errors
/// Where the run learned nothing ([`Run::check_learned`]).
pub fn check_trained(model: &Model, run: &mut Run) -> Result<()> {
    run.check_learned()?;
    let Some(share) = share_rounded_back(model)? else { return Ok(()) };
    if share < LARGE_SHARE {
        return Ok(());
    }
    let dtype = dtype::name(model.saved_dtype());
    run.warn(&format!(
        "warning: {:.0}% of the weights that training changed round back to what they were when saved as {dtype}, so most of what was learned is lost; \
         give --save-dtype f32, a larger --learning-rate or more steps (the evaluation is of the rounded weights)",
        100.0 * share
    ))
}

/// Of the weights of a model that differ from those of its base, the share that does not when rounded; `None`
/// where nothing is rounded or changed.
fn share_rounded_back(model: &Model) -> Result<Option<f64>> {
    let dtype = model.saved_dtype();
    let folder = model.folder();
    // Adapters are new, and so are weights that are made from a seed.
    if dtype == DType::F32 || !model.adapters().is_empty() || folder.new_from_seed.is_some() {
        return Ok(None);
    }
    let (_, _, base) = folder::open(&folder.path, WithoutWeights::Refuse, BaseForm::Stored, model.device())?;
    let less_one = less_one(model);
    let (mut changed, mut back) = (0usize, 0usize);
    for (name, variable) in model.weights().variables() {
        let Some(old) = base.find(name).filter(|old| old.dims() == variable.dims()) else { continue };
        let round = |tensor: &Tensor| -> Result<Vec<f32>> {
            Ok(rounded(name, tensor, dtype, less_one.contains(name))?.flatten_all()?.to_vec1()?)
        };
        let now: Vec<f32> = variable.as_tensor().flatten_all()?.to_vec1()?;
        let old_values: Vec<f32> = old.flatten_all()?.to_vec1()?;
        let (now_rounded, old_rounded) = (round(variable.as_tensor())?, round(&old)?);
        for (index, (now, old)) in now.iter().zip(&old_values).enumerate() {
            changed += usize::from(now != old);
            back += usize::from(now != old && now_rounded[index] == old_rounded[index]);
        }
    }
    Ok((changed > 0).then(|| back as f64 / changed as f64))
}

/// The names of tensors that are stored less one, which is rounded.
fn less_one(model: &Model) -> BTreeSet<String> {
    let specs = tensor_specs(model.architecture()).into_iter();
    specs.filter(|spec| spec.stored == Stored::LessOne).map(|spec| spec.name).collect()
}

/// A tensor as it reads back from this element type.
fn rounded(name: &str, tensor: &Tensor, dtype: DType, less_one: bool) -> Result<Tensor> {
    let stored = if less_one { (tensor - 1.0)? } else { tensor.clone() };
    let values: Vec<f32> = stored.flatten_all()?.to_vec1()?;
    let rounded: Vec<f32> = values.par_iter().map(|&value| dtype::rounded(value, dtype)).collect();
    let beyond = dtype::count_beyond(&values, dtype);
    if beyond > 0 {
        bail!(
            "tensor \"{name}\": {beyond} of its values are beyond the range of {}, in which the model is to be saved; give --save-dtype bf16 or f32",
            dtype::name(dtype)
        );
    }
    let rounded = Tensor::from_vec(rounded, tensor.shape(), tensor.device())?;
    Ok(if less_one { (rounded + 1.0)? } else { rounded })
}
