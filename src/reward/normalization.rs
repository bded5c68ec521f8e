//! Scores of demonstrations to mean 0, and by choice variance 1 (Ziegler et al. 2019; Ouyang et al. 2022): kept in the head, applied wherever it is read.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::batch::TokenTree;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::adapter::Pass;

/// What becomes of the scores of the demonstrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// They stay as they are
    None,
    /// Mean 0
    Mean,
    /// Mean 0 and variance 1
    MeanAndVariance,
}

/// Changes the head's shift and divisor so that the answers of these trees have such scores.
///
/// # Errors
/// Where a score is not finite.
pub fn normalize(
    model: &mut Model,
    trees: &[TokenTree],
    normalization: Normalization,
    tokens_per_batch: usize,
) -> Result<()> {
    if normalization == Normalization::None {
        return Ok(());
    }
    let frozen = model.frozen()?;
    let mut scores: Vec<f64> = Vec::new();
    for range in frozen.passes(trees, tokens_per_batch) {
        let batch = frozen.pack(&trees[range]);
        let found = frozen.rewards(&frozen.hidden(&batch, &Pass::default())?, &batch)?; // [answers]
        scores.extend(found.to_vec1()?.into_iter().map(f64::from));
    }
    let count = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / count;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / count;
    if !variance.is_finite() {
        return Err(Error::NotFinite(format!(
            "the scores of the {} answers whose mean is to become 0 are not all finite numbers, so the model says nothing of them; try a smaller \
             --learning-rate, or start from weights that are finite",
            scores.len()
        )));
    }
    let whole = normalization == Normalization::MeanAndVariance && variance > 0.0;
    let deviation = if whole { variance.sqrt() } else { 1.0 };
    if let Some(head) = model.head_mut() {
        // (x - shift) / divisor, less the mean, divided by the deviation, as one shift and one divisor.
        head.form.shift += (mean * f64::from(head.form.divisor)) as f32;
        head.form.divisor *= deviation as f32;
    }
    Ok(())
}
