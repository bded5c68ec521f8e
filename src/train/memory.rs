//! The memory that a training run is expected to need, by what holds it: from the models' configurations, before any is read, or from the models.

use std::path::{Path, PathBuf};

use indicatif::DecimalBytes;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::adapt;
use crate::bail;
use crate::error::Result;
use crate::model::Model;
use crate::model::architecture::{Architecture, FeedForward};
use crate::model::weights::tensor_specs;
use crate::settings::{ModelSettings, TrainingSettings};

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

/// Refuses a run that cannot fit the memory of this machine, or of the control group that it runs in.
///
/// # Errors
/// Says how much is needed for what, how much there is, and which setting would make it fit.
pub fn check(models: &[Footprint], micro_batch_tokens: usize, sampler: (&Architecture, usize)) -> Result<()> {
    check_against(machine(), models, micro_batch_tokens, sampler)
}

/// The same of a run whose models are not read yet, by their configurations; nothing but the weights and their training is counted.
pub fn check_before_reading(model: &ModelSettings, training: &TrainingSettings) -> Result<()> {
    let footprint = Footprint::before_reading("model", &model.model, &model.adapter, Some(training))?;
    let (_, architecture) = adapt::base(&model.model, &model.adapter)?;
    check(&[footprint], 1, (&architecture, 0))
}

/// The memory of this machine, or of the control group that this process runs in, in bytes.
fn machine() -> u64 {
    let ram = MemoryRefreshKind::nothing().with_ram();
    // Where the system does not say, nothing is too much.
    let Ok(system) = System::new_with_specifics(RefreshKind::nothing().with_memory(ram)) else { return u64::MAX };
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory);
    match system.total_memory().min(group) {
        0 => u64::MAX,
        bytes => bytes,
    }
}

fn check_against(
    machine: u64,
    models: &[Footprint],
    micro_batch_tokens: usize,
    sampler: (&Architecture, usize),
) -> Result<()> {
    let total = |models: &[Footprint], tokens| -> u64 {
        expected(models, tokens, sampler).iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes))
    };
    let needed = total(models, micro_batch_tokens);
    if needed <= machine {
        return Ok(());
    }
    let least = total(models, 0);
    let a_token = (needed - least) / micro_batch_tokens.max(1) as u64;
    let tokens = machine.saturating_sub(least).checked_div(a_token).unwrap_or(0);
    let light: Vec<Footprint> = models.iter().map(|model| Footprint { trained: 0, ..model.clone() }).collect();
    let advice = if tokens >= LEAST_TOKENS {
        format!("--tokens-per-batch {} would fit", tokens / LEAST_TOKENS * LEAST_TOKENS)
    } else if models.iter().any(|model| model.trained > 0) && total(&light, LEAST_TOKENS as usize) <= machine {
        "a lightweight method, such as --method lora, would fit".to_string()
    } else {
        "take a smaller model or a machine with more".to_string()
    };
    let parts = expected(models, micro_batch_tokens, sampler);
    let parts: Vec<String> = parts.iter().map(|(what, bytes)| format!("{what} {}", DecimalBytes(*bytes))).collect();
    bail!(
        "the run needs about {} of memory ({}), and there are {}; {advice}",
        DecimalBytes(needed),
        parts.join(", "),
        DecimalBytes(machine)
    )
}

/// The fewest tokens that are worth a pass of their own.
const LEAST_TOKENS: u64 = 64;

/// The bytes held at the peak of a training step by what holds them, all numbers being `f32`: each base model once, for each trained parameter its
/// gradient, the sum of the gradients of earlier micro-batches and AdamW's two moments, what one micro-batch keeps for its backward pass (models train in turn),
/// and the keys and values of a sampler of this architecture.
pub fn expected(
    models: &[Footprint],
    micro_batch_tokens: usize,
    (sampler, cached_tokens): (&Architecture, usize),
) -> Vec<(String, u64)> {
    let bytes = |numbers: usize| (numbers as u64).saturating_mul(4);
    let mut parts = Vec::new();
    for (index, model) in models.iter().enumerate() {
        let sharer = models[..index].iter().find(|other| other.copy == model.copy);
        let (own, note) = match sharer {
            Some(other) => (0, format!(" (on the weights of {})", other.role)),
            None => (model.base, String::new()),
        };
        let trained = model.trained.saturating_mul(4);
        parts.push((format!("{}{note}", model.role), bytes(own.saturating_add(model.added).saturating_add(trained))));
    }
    let kept = models.iter().map(|model| model.kept).max().unwrap_or(0);
    parts.push(("kept for the backward pass".to_string(), bytes(kept.saturating_mul(micro_batch_tokens))));
    if cached_tokens > 0 {
        let cache = (2 * sampler.layers * sampler.kv_width()).saturating_mul(cached_tokens);
        parts.push(("keys and values of the sampler".to_string(), bytes(cache)));
    }
    parts.push(("program and buffers".to_string(), BESIDES));
    parts
}

/// The numbers a token that a pass keeps for its backward pass. Of each block: what enters it, both norms' output, both sub-layers' output and
/// the sum between them; queries and keys before and after their rotation, values, what attention gives; and the rows of the feed-forward, those that
/// hold gate and input together also apart.
fn kept_numbers(architecture: &Architecture) -> usize {
    let Architecture { layers, d_model, d_ff, .. } = *architecture;
    let inner = if matches!(architecture.feed_forward, FeedForward::GatedPacked(_)) { 5 * d_ff } else { 3 * d_ff };
    layers * (6 * d_model + 3 * architecture.query_width() + 3 * architecture.kv_width() + inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::architecture::Config;
    use crate::model::family;

    #[test]
    fn what_does_not_fit_is_refused_with_the_setting_that_would() {
        let json = serde_json::json!({ "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4 });
        let architecture = family::architecture(&Config::new(&json, "config.json")).unwrap();
        let model = Footprint {
            role: "model",
            copy: "a".to_string(),
            base: 10_000_000,
            added: 0,
            trained: 10_000_000,
            kept: kept_numbers(&architecture),
        };
        let check = |machine| check_against(machine, std::slice::from_ref(&model), 4096, (&architecture, 0));
        // Weights, gradients, their sum and two moments are 200 MB; the pass keeps 9,216 bytes a token, 38 MB.
        check(340_000_000).unwrap();
        let fault = |machine| check(machine).unwrap_err().to_string();
        let tokens = fault(310_000_000);
        assert!(tokens.ends_with("and there are 310.00 MB; --tokens-per-batch 1024 would fit"), "{tokens}");
        assert!(tokens.contains("model 200.00 MB"), "{tokens}");
        assert!(fault(150_000_000).ends_with("--method lora, would fit"), "{}", fault(150_000_000));
        assert!(fault(100_000_000).ends_with("a smaller model or a machine with more"));
        assert!(machine() > 100_000_000);
    }
}
