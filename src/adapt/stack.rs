//! Adapters on top of each other: which ones can be, and what they make of one linear together.

use std::path::PathBuf;
use std::sync::Arc;

use super::targets;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, Linear, LinearChange};
use crate::model::architecture::Architecture;
use crate::model::linear_change::{folded, magnitude_beside_updates};
use crate::model::sites::Stack;
use crate::model::weights::Weights;
use crate::ops::Value;

/// Refuses a stack in which one linear has a magnitude (DoRA) and updates beside the one that the magnitude
/// belongs to: its norm would be that of another weight. `folders` are those of the stack's first adapters;
/// what comes after them is new.
///
/// # Errors
/// Names the linear, and the adapter that has the magnitude.
pub fn check(stack: &Stack, folders: &[PathBuf], architecture: &Architecture) -> Result<()> {
    let output = architecture.causal.then(|| targets::output_linear(architecture));
    for linear in targets::linears(architecture).into_iter().chain(output) {
        let changes =
            stack.iter().enumerate().filter_map(|(index, adapter)| Some((index, adapter.linear(&linear.name)?)));
        let (adapters, changes): (Vec<usize>, Vec<_>) = changes.unzip();
        let Some(change) = magnitude_beside_updates(&changes) else { continue };
        let name =
            folders.get(adapters[change]).map_or("--use-dora".to_string(), |folder| folder.display().to_string());
        bail!(
            "{name}: has a magnitude for \"{}\" (use_dora), which another update of the same linear changes too; put the other adapter into the \
             base's weights with `export` first, or train without use_dora",
            linear.name
        );
    }
    Ok(())
}

/// Folds linears that several adapters of the stack change. Folded one after the other, an update would miss
/// the scales of an adapter before it, which count for it in a forward pass. `unfolded` are the weights
/// without the adapters, `weights` those with each folded in by itself.
pub fn fold_together(
    weights: &mut Weights,
    unfolded: &Weights,
    stack: &[Arc<dyn Adapter>],
    architecture: &Architecture,
) -> Result<()> {
    let of_blocks =
        targets::linears(architecture).into_iter().map(|linear| (format!("{}.weight", linear.name), linear.name));
    let names = &architecture.names;
    let output = architecture.causal.then(|| (names.output.to_string(), names.output_module.to_string()));
    for (key, name) in of_blocks.chain(output) {
        let changes: Vec<LinearChange> = stack.iter().filter_map(|adapter| adapter.linear(&name)).collect();
        // Nothing reads an output matrix that a classifier's folder lacks.
        if changes.len() < 2 || !unfolded.has(&key) {
            continue;
        }
        let bias_key = format!("{name}.bias");
        let (weight, bias) = (unfolded.matrix(&key)?, unfolded.find(&bias_key).map(Value::from));
        let linear = folded(&Linear { name, weight, bias }, &changes)?;
        weights.set(&key, linear.weight.to_tensor()?);
        linear.bias.iter().for_each(|bias| weights.set(&bias_key, bias.tensor().clone()));
    }
    Ok(())
}
