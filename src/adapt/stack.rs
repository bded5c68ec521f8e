//! Which adapters can be on top of each other.

use std::path::PathBuf;

use super::targets;
use crate::bail;
use crate::error::Result;
use crate::model::architecture::Architecture;
use crate::model::linear_change::magnitude_beside_updates;
use crate::model::sites::Stack;

/// Refuses a stack in which one linear has a magnitude (DoRA) and updates beside the one that the magnitude belongs to: its norm would be that
/// of another weight. `folders` are those of the stack's first adapters; what comes after them is new.
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
