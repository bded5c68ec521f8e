//! Scores of demonstrations to mean 0, and by choice variance 1 (Ziegler et al. 2019; Ouyang et al. 2022): kept in the head, applied wherever it is read.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::batch::{TokenTree, split_by_budget};
use crate::error::Result;
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

/// What scores were normalised by: they are `(score - mean) / deviation` of what they were.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Before {
    /// What became 0.
    pub mean: f64,
    /// What became 1.
    pub deviation: f64,
}

/// Changes the head's shift and divisor so that the answers of these trees have such scores.
pub fn normalize(
    model: &mut Model,
    trees: &[TokenTree],
    normalization: Normalization,
    tokens_per_batch: usize,
) -> Result<Before> {
    let mut before = Before { mean: 0.0, deviation: 1.0 };
    if normalization == Normalization::None {
        return Ok(before);
    }
    let frozen = model.frozen()?;
    let sizes: Vec<usize> = trees.iter().map(TokenTree::tokens).collect();
    let mut scores: Vec<f64> = Vec::new();
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let batch = frozen.pack(&trees[range]);
        let found = frozen.rewards(&frozen.hidden(&batch, &Pass::default())?, &batch)?; // [answers]
        scores.extend(found.to_vec1::<f32>()?.into_iter().map(f64::from));
    }
    let count = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / count;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / count;
    before.mean = mean;
    if normalization == Normalization::MeanAndVariance && variance > 0.0 {
        before.deviation = variance.sqrt();
    }
    if let Some(head) = model.head_mut() {
        // (x - shift) / divisor, less the mean, divided by the deviation, as one shift and one divisor.
        head.form.shift += (before.mean * f64::from(head.form.divisor)) as f32;
        head.form.divisor *= before.deviation as f32;
    }
    Ok(before)
}
