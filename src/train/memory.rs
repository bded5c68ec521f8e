//! The memory that a training run is expected to need, by what holds it: from the models' configurations, before any is read, or from the models.

use std::path::{Path, PathBuf};

use crate::adapt;
use crate::error::Result;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::model::weights::tensor_specs;
use crate::settings::TrainingSettings;

/// A model in its role, as it stands in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    /// What it is there for.
    pub role: &'static str,
    /// What tells its base weights from others: roles with the same share one copy.
    pub copy: String,
    /// Numbers of the base weights.
    pub base: usize,
    /// Numbers of adapters and head.
    pub added: usize,
    /// Numbers that train.
    pub trained: usize,
    /// Numbers a token that its pass keeps for the backward pass; none where nothing trains.
    pub kept: usize,
}

impl Footprint {
    /// Of a model that is read.
    pub fn of(role: &'static str, model: &Model) -> Self {
        let trained = model.trainable_count();
        Footprint {
            role,
            copy: format!("{:p}", model.weights().as_ref()),
            base: model.base_parameters(),
            added: model.added_parameters(),
            trained,
            kept: if trained > 0 { kept_numbers(model.architecture()) } else { 0 },
        }
    }

    /// Of a model that is not read yet, by its `config.json`. Adapters and heads, which are small, are left out; full weights that train are a copy of their own.
    pub fn before_reading(
        role: &'static str,
        folder: &Path,
        adapters: &[PathBuf],
        training: Option<&TrainingSettings>,
    ) -> Result<Self> {
        let (folder, architecture) = adapt::base(folder, adapters)?;
        let base = tensor_specs(&architecture).iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
        let trains_all = training.is_some_and(|training| training.method.is_full());
        let copy = if trains_all { format!("of the {role}") } else { folder.display().to_string() };
        let kept = if training.is_some() { kept_numbers(&architecture) } else { 0 };
        Ok(Footprint { role, copy, base, added: 0, trained: if trains_all { base } else { 0 }, kept })
    }

    /// Of a moving average of this many numbers.
    pub fn of_average(numbers: usize) -> Self {
        let role = "moving average";
        Footprint { role, copy: role.to_string(), base: numbers, added: 0, trained: 0, kept: 0 }
    }
}

/// The process itself: program, tokenizer, examples, buffers of the matrix products.
const BESIDES: u64 = 100_000_000;

/// The bytes held at the peak of a training step by what holds them, all numbers being `f32`: each base model once, for each trained parameter its
/// gradient, the sum of the gradients of earlier micro-batches and AdamW's two moments, what one micro-batch keeps for its backward pass (models train in turn),
/// and the keys and values of a sampler of this architecture.
pub fn expected(
    models: &[Footprint],
    micro_batch_tokens: usize,
    (sampler, cached_tokens): (&Architecture, usize),
) -> Vec<(String, u64)> {
    let bytes = |numbers: usize| 4 * numbers as u64;
    let mut parts = Vec::new();
    for (index, model) in models.iter().enumerate() {
        let sharer = models[..index].iter().find(|other| other.copy == model.copy);
        let (own, note) = match sharer {
            Some(other) => (0, format!(" (on the weights of {})", other.role)),
            None => (model.base, String::new()),
        };
        parts.push((format!("{}{note}", model.role), bytes(own + model.added + 4 * model.trained)));
    }
    let kept = models.iter().map(|model| model.kept).max().unwrap_or(0);
    parts.push(("kept for the backward pass".to_string(), bytes(kept * micro_batch_tokens)));
    if cached_tokens > 0 {
        let cache = 2 * sampler.layers * sampler.kv_width() * cached_tokens;
        parts.push(("keys and values of the sampler".to_string(), bytes(cache)));
    }
    parts.push(("program and buffers".to_string(), BESIDES));
    parts
}

/// The numbers a token that a pass keeps for its backward pass. Of each block: what enters it, both norms' output, both sub-layers' output and
/// the sum between them; queries and keys before and after their rotation, values, what attention gives; and the rows of the feed-forward.
fn kept_numbers(architecture: &Architecture) -> usize {
    let Architecture { layers, d_model, d_ff, .. } = *architecture;
    layers * (6 * d_model + 3 * architecture.query_width() + 3 * architecture.kv_width() + 3 * d_ff)
}
