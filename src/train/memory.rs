//! The memory that a training run is expected to need, by what holds it: from the models' configurations,
//! before any is read, or from the models.

use std::path::{Path, PathBuf};

use candle_core::DType;
use indicatif::DecimalBytes;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::adapt;
use crate::bail;
use crate::data::batch::{Continuation, TokenTree};
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::architecture::{Architecture, FeedForward};
use crate::model::weight_files;
use crate::model::weights::tensor_specs;
use crate::ops::{Arithmetic, BaseForm, ROWS_OF_LOGITS, count_kept};
use crate::settings::{CommonSettings, GradientCheckpointing, ModelSettings, TrainingSettings};

/// A model in its role, as it stands in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint {
    /// What it is there for.
    pub role: &'static str,
    /// What tells its base weights from others: roles with the same share one copy.
    pub copy: String,
    /// Bytes of the base weights.
    pub base: usize,
    /// Bytes of what they would be packed to for products in bf16.
    pub packed: usize,
    /// Bytes of its tokenizer's file.
    pub tokenizer: usize,
    /// Whether all of them train.
    pub trains_base: bool,
    /// Numbers of adapters and head.
    pub added: usize,
    /// Numbers that train.
    pub trained: usize,
    /// What its pass needs to be trained; nothing where nothing trains.
    pub pass: PassFootprint,
    /// About what it would need with gradient checkpointing.
    pub checkpointed: PassFootprint,
    /// What a pass needs that learns nothing.
    pub forward: PassFootprint,
    /// Numbers that are put aside while the model is evaluated rounded, as it is saved.
    pub rounded: usize,
}

/// The numbers that a pass holds for a model to be trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassFootprint {
    /// Those that are kept for the backward pass, a row of the pass.
    pub kept: usize,
    /// Those that the backward pass of one block works with, a row of the pass.
    pub working: usize,
    /// Those of them that are gradients of a feed-forward's rows, a row of the pass.
    pub gradients: usize,
    /// Those that are kept or worked with however many rows there are: a method's rows before those of the pass.
    pub fixed: usize,
    /// Those of a chunk of logits.
    pub logits: usize,
}

impl PassFootprint {
    /// The most that a pass of so many rows takes. Logits and the work on a block are not there at the same
    /// time, but the memory of the one is hardly ever that of the other: their blocks are of other sizes.
    pub fn numbers(&self, rows: usize) -> usize {
        let of_rows = self.kept.saturating_add(self.working).saturating_mul(rows);
        of_rows.saturating_add(self.fixed).saturating_add(self.logits)
    }

    /// The same in bytes, with what the allocator keeps of blocks that were freed and do not fit again: a share
    /// of the pass, but no less than the gradients of a feed-forward's rows, which come and go with every block.
    fn bytes(&self, rows: usize) -> u64 {
        let numbers = self.numbers(rows) as u64;
        let share =
            (numbers / 100).saturating_mul(if self.logits > 0 { KEPT_BESIDE_LOGITS } else { KEPT_BY_ALLOCATOR });
        let freed = share.max(self.gradients.saturating_mul(rows) as u64);
        numbers.saturating_add(freed).saturating_mul(4)
    }

    /// Of a model as it trains, by passes of a few tokens, in which what operations keep is counted.
    fn of(model: &Model) -> Result<Self> {
        let architecture = model.architecture();
        let (kept, fixed) = kept_by_passes(model)?;
        // A block that is run again keeps for a while what it would have kept.
        let (again, again_fixed) = match model.has_checkpoints() {
            true => kept_by_passes(&model.clone().with_checkpoints(false))?,
            false => (0, 0),
        };
        let layers = architecture.layers.max(1);
        Ok(PassFootprint {
            // The loss reads the last hidden state of targets and, beside it, its gradient.
            kept: kept + 2 * architecture.d_model,
            working: again / layers + working_numbers(architecture),
            gradients: gradient_numbers(architecture),
            fixed: fixed + again_fixed / layers,
            logits: if model.head().is_some() { 0 } else { chunk_of_logits(architecture) },
        })
    }

    /// Of a pass that learns nothing: what one block computes, as the memory of what it has used fits nothing else
    /// of it, and what enters it.
    fn forward(architecture: &Architecture, has_head: bool) -> Self {
        PassFootprint {
            kept: 0,
            working: kept_numbers(architecture) + architecture.d_model,
            gradients: 0,
            fixed: 0,
            logits: if has_head { 0 } else { chunk_of_logits(architecture) },
        }
    }

    /// The same by a model's configuration, as if all its weights trained.
    fn before_reading(architecture: &Architecture, checkpoints: bool) -> Self {
        let Architecture { layers, d_model, .. } = *architecture;
        let of_block = kept_numbers(architecture);
        let (kept, again) = match checkpoints {
            true => (layers * d_model, of_block),
            false => (layers * of_block, 0),
        };
        PassFootprint {
            kept: kept + 2 * d_model,
            working: again + working_numbers(architecture),
            gradients: gradient_numbers(architecture),
            fixed: 0,
            logits: chunk_of_logits(architecture),
        }
    }
}

/// Hundredths of what a pass takes that are held beside it: steps are of other sizes than the ones before.
/// Measured, 4 to 18 for models of 1 M to 135 M numbers ([`crate::ops::memory`]); a machine that does other work
/// too moves it.
const KEPT_BY_ALLOCATOR: u64 = 10;

/// The same where there are chunks of logits, whose memory fits nothing else. Measured, 10 to 20.
const KEPT_BESIDE_LOGITS: u64 = 15;

/// Tokens of the passes in which what they keep is counted.
const PROBED_TOKENS: [usize; 2] = [8, 32];

/// The numbers that a model's passes keep: a row, and beside their rows.
fn kept_by_passes(model: &Model) -> Result<(usize, usize)> {
    let vocabulary = model.architecture().vocabulary.max(1);
    let mut found = [(0, 0); 2];
    for (found, tokens) in found.iter_mut().zip(PROBED_TOKENS) {
        let tokens: Vec<u32> = (0..tokens).map(|token| (token % vocabulary) as u32).collect();
        let answer = Continuation { learned: vec![true; tokens.len()], tokens };
        let batch = model.pack([&TokenTree { prompt: Vec::new(), answers: vec![answer] }]);
        let bytes = count_kept(|| model.hidden(&batch, &Pass::default()))?;
        *found = (bytes / size_of::<f32>(), model.rows(&batch));
    }
    let [(of_few, few), (of_more, more)] = found;
    let of_row = of_more.saturating_sub(of_few).div_ceil(more - few);
    Ok((of_row, of_few.saturating_sub(of_row * few)))
}

impl Footprint {
    /// Of a model that is read.
    ///
    /// # Errors
    /// Where a pass of the model fails.
    pub fn of(role: &'static str, model: &Model) -> Result<Self> {
        let trained = model.trainable_count();
        let pass = if trained > 0 { PassFootprint::of(model)? } else { PassFootprint::default() };
        let again = PassFootprint::before_reading(model.architecture(), true);
        let again = PassFootprint { logits: pass.logits, ..again };
        Ok(Footprint {
            role,
            copy: format!("{:p}", model.weights().as_ref()),
            base: model.weights().bytes(),
            packed: model.weights().packed_bytes(),
            tokenizer: 0,
            trains_base: model.weights().variables().next().is_some(),
            added: model.added_parameters(),
            trained,
            pass,
            checkpointed: if trained > 0 { again } else { PassFootprint::default() },
            forward: PassFootprint::forward(model.architecture(), model.head().is_some()),
            rounded: if model.saved_dtype() == DType::F32 { 0 } else { trained },
        })
    }

    /// Of a model that is not read yet, by its `config.json`. Adapters and heads, which are small, are left
    /// out; full weights that train are a copy of their own.
    pub fn before_reading(
        role: &'static str,
        folder: &Path,
        adapters: &[PathBuf],
        base_form: BaseForm,
        training: Option<&TrainingSettings>,
    ) -> Result<Self> {
        let (folder, architecture) = adapt::base(folder, adapters)?;
        let numbers = tensor_specs(&architecture).iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
        let trains_all = training.is_some_and(|training| training.method.is_full());
        let copy = if trains_all { format!("of the {role}") } else { folder.display().to_string() };
        let of = |checkpoints: bool| match training {
            Some(_) => PassFootprint::before_reading(&architecture, checkpoints),
            None => PassFootprint::default(),
        };
        let blocks = GradientCheckpointing::Blocks;
        let has_checkpoints = training.is_some_and(|training| training.gradient_checkpointing == blocks);
        let (pass, checkpointed) = (of(has_checkpoints), of(true));
        let base_form = if trains_all { BaseForm::F32 } else { base_form };
        let (base, packed) = weight_files::kept_bytes(&folder, &architecture, base_form)?;
        let trained = if trains_all { numbers } else { 0 };
        let trains_base = trains_all;
        let forward = PassFootprint::forward(&architecture, false);
        let weights = Footprint { role, copy, base, packed, ..Footprint::default() };
        Ok(Footprint { trains_base, trained, pass, checkpointed, forward, ..weights })
    }

    /// The same with a tokenizer, that of this folder: roles that are given tokens have none of their own.
    pub fn with_tokenizer(self, folder: &Path) -> Self {
        let file = std::fs::metadata(folder.join("tokenizer.json"));
        Footprint { tokenizer: file.map_or(0, |file| file.len() as usize), ..self }
    }

    /// Of a moving average of this many numbers.
    pub fn of_average(numbers: usize) -> Self {
        Self::of_weights("moving average", "moving average".to_string(), 4 * numbers)
    }

    /// Of weights that do not train, of which those of one `copy` are there once.
    pub fn of_weights(role: &'static str, copy: String, bytes: usize) -> Self {
        Footprint { role, copy, base: bytes, ..Footprint::default() }
    }
}

/// The most rows that go through a model at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassRows {
    /// Of a pass that it learns from.
    pub learned: usize,
    /// Of one that it learns nothing from: texts are evaluated, scored or looked up.
    pub forward: usize,
    /// Of one example, which no pass divides.
    pub of_one: usize,
}

impl PassRows {
    /// The same where a pass is to have at most so many.
    fn at_most(self, rows: usize) -> Self {
        let rows = rows.max(self.of_one);
        PassRows { learned: self.learned.min(rows), forward: self.forward.min(rows), ..self }
    }
}

/// The process itself: program, examples, buffers of the matrix products.
const BESIDES: u64 = 100_000_000;

/// The memory of a tokenizer, by the size of its file: measured, for one of 49,152 tokens and 3.5 MB.
const TOKENIZER: u64 = 13;

/// What each thread works with in a pass that learns nothing; one that learns has freed as much before. Measured.
const OF_THREAD: u64 = 12_500_000;

/// Refuses a run that cannot fit the memory of this machine, or of the control group that it runs in; its sampler
/// has a `cache` of so many bytes.
///
/// # Errors
/// Says how much is needed for what, how much there is, and which setting would make it fit.
pub fn check(models: &[Footprint], rows: PassRows, cache: u64) -> Result<()> {
    check_against(machine(), models, rows, cache)
}

/// The same of a run whose models are not read yet, by their configurations; nothing but the weights and
/// their training is counted.
pub fn check_before_reading(model: &ModelSettings, common: &CommonSettings, training: &TrainingSettings) -> Result<()> {
    let form = common.base_precision.form();
    let footprint = Footprint::before_reading("model", &model.model, &model.adapter, form, Some(training))?;
    check(&[footprint], PassRows { learned: 1, ..PassRows::default() }, 0)
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

fn check_against(machine: u64, models: &[Footprint], rows: PassRows, cache: u64) -> Result<()> {
    let total = |models: &[Footprint], most: usize| -> u64 {
        let parts = expected(models, rows.at_most(most), cache);
        parts.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes))
    };
    let all = rows.learned.max(rows.forward);
    let needed = total(models, all);
    if needed <= machine {
        return Ok(());
    }
    // The most rows at a time that fit, if they are worth a pass of their own.
    let fitting = |models: &[Footprint]| {
        let steps = (1..=all as u64 / LEAST_TOKENS).rev();
        steps.map(|step| step * LEAST_TOKENS).find(|&tokens| total(models, tokens as usize) <= machine)
    };
    let few = PassRows { of_one: 0, ..rows }.at_most(LEAST_TOKENS as usize);
    let total_of_few = |models: &[Footprint]| expected(models, few, cache).iter().map(|(_, bytes)| bytes).sum::<u64>();
    let with = |change: &dyn Fn(&Footprint) -> Footprint| models.iter().map(change).collect::<Vec<_>>();
    let again = with(&|model| Footprint { pass: model.checkpointed, ..model.clone() });
    let light = with(&|model| Footprint { trained: 0, ..model.clone() });
    let advice = match (fitting(models), fitting(&again)) {
        (Some(tokens), _) if tokens >= MANY_TOKENS => format!("--tokens-per-batch {tokens} would fit"),
        (_, Some(tokens)) if tokens == all as u64 / LEAST_TOKENS * LEAST_TOKENS => {
            "--gradient-checkpointing blocks would fit".to_string()
        }
        (_, Some(tokens)) => format!("--gradient-checkpointing blocks with --tokens-per-batch {tokens} would fit"),
        (Some(tokens), None) => format!("--tokens-per-batch {tokens} would fit"),
        (None, None) if models.iter().any(|model| model.trained > 0) && fitting(&light).is_some() => {
            "a lightweight method, such as --method lora, would fit".to_string()
        }
        _ if total_of_few(&again) <= machine => {
            format!("one example has {} tokens: a smaller --max-length would fit", rows.of_one)
        }
        _ => "take a smaller model or a machine with more".to_string(),
    };
    let parts = expected(models, rows, cache);
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
/// With fewer at a time than these, running blocks again costs less.
const MANY_TOKENS: u64 = 512;

/// The bytes held at the peak of a training step by what holds them, all numbers being `f32` but those of
/// frozen matrices: each base model once, with what it is packed to for products in bf16, for each trained
/// parameter its gradient, which those of all micro-batches are added to, and AdamW's two moments, and what one
/// micro-batch holds for its backward pass (models train in turn), or the `cache` of a sampler, in bytes, or a
/// pass that learns nothing, where that is larger.
pub fn expected(models: &[Footprint], rows: PassRows, cache: u64) -> Vec<(String, u64)> {
    let bytes = |numbers: usize| (numbers as u64).saturating_mul(4);
    let (mut parts, mut tokenizers) = (Vec::new(), 0);
    for (index, model) in models.iter().enumerate() {
        let sharer = models[..index].iter().find(|other| other.copy == model.copy);
        let (own, note) = match sharer {
            Some(other) => (0, format!(" (on the weights of {})", other.role)),
            // Packed for products in bf16: what trains, while answers are sampled.
            None if Arithmetic::current().packs() && (!model.trains_base || cache > 0) => {
                (model.base.saturating_add(model.packed), String::new())
            }
            None => (model.base, String::new()),
        };
        tokenizers += TOKENIZER * model.tokenizer as u64;
        let others = model.added.saturating_add(model.trained.saturating_mul(3));
        parts.push((format!("{}{note}", model.role), (own as u64).saturating_add(bytes(others))));
    }
    let pass = models.iter().map(|model| model.pass.bytes(rows.learned)).max().unwrap_or(0);
    parts.push(("kept for the backward pass".to_string(), pass));
    // Nothing is kept for a backward pass while a model is evaluated or answers are sampled.
    let rounded = models.iter().map(|model| model.rounded).max().unwrap_or(0);
    let threads = OF_THREAD * rayon::current_num_threads() as u64;
    let forward = models.iter().map(|model| model.forward.bytes(rows.forward).saturating_add(threads)).max();
    let meanwhile = [
        ("weights put aside while rounded ones are evaluated", bytes(rounded)),
        ("keys and values of the sampler", cache),
        ("passes that learn nothing", forward.filter(|_| rows.forward > 0).unwrap_or(0)),
    ];
    let together = meanwhile.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
    if together > pass {
        let held: Vec<&str> = meanwhile.iter().filter(|(_, bytes)| *bytes > 0).map(|(what, _)| *what).collect();
        parts.push((format!("{}, beyond that", held.join(" and ")), together - pass));
    }
    parts.push(("program, tokenizer and buffers".to_string(), BESIDES + tokenizers));
    parts
}

/// The numbers a row that a block all of whose weights train keeps for its backward pass: what enters it,
/// both norms' output and the sum between the sub-layers; queries, keys and values, what attention gives; and
/// gate, input and output of the feed-forward's non-linearity.
fn kept_numbers(architecture: &Architecture) -> usize {
    let Architecture { d_model, d_ff, .. } = *architecture;
    let inner = if matches!(architecture.feed_forward, FeedForward::Plain(_)) { 2 * d_ff } else { 3 * d_ff };
    4 * d_model + 2 * architecture.query_width() + 2 * architecture.kv_width() + inner
}

/// The numbers a row that the backward pass of a block works with: the gradients of the feed-forward's rows
/// and of the stream.
fn working_numbers(architecture: &Architecture) -> usize {
    gradient_numbers(architecture) + 3 * architecture.d_model
}

/// The numbers a row that are gradients of a feed-forward's rows.
fn gradient_numbers(architecture: &Architecture) -> usize {
    3 * architecture.d_ff
}

/// The logits that are held at a time, and the output matrix as it is packed meanwhile for products in bf16,
/// in half of a number each.
fn chunk_of_logits(architecture: &Architecture) -> usize {
    let packed = if Arithmetic::current().packs() { architecture.d_model / 2 } else { 0 };
    architecture.vocabulary.saturating_mul(ROWS_OF_LOGITS + packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{CachePrecision, CacheSize};
    use crate::model::architecture::Config;
    use crate::model::family;

    #[test]
    fn what_does_not_fit_is_refused_with_the_setting_that_would() {
        let model = Footprint {
            role: "model",
            copy: "a".to_string(),
            base: 40_000_000,
            packed: 20_000_000,
            tokenizer: 0,
            trains_base: true,
            added: 0,
            trained: 10_000_000,
            pass: PassFootprint { kept: 2304, working: 0, gradients: 0, fixed: 0, logits: 0 },
            checkpointed: PassFootprint { kept: 300, working: 700, gradients: 0, fixed: 0, logits: 0 },
            forward: PassFootprint { working: 2500, ..PassFootprint::default() },
            rounded: 0,
        };
        let rows = PassRows { learned: 4096, forward: 0, of_one: 100 };
        let check = |machine| check_against(machine, std::slice::from_ref(&model), rows, 0);
        // Weights, gradients and two moments are 160 MB, the process 100 MB; the pass takes 10,138 bytes a
        // row, 42 MB, or 4,400 bytes, 18 MB.
        check(304_000_000).unwrap();
        let fault = |machine| check(machine).unwrap_err().to_string();
        let tokens = fault(270_000_000);
        assert!(tokens.ends_with("and there are 270.00 MB; --tokens-per-batch 960 would fit"), "{tokens}");
        assert!(tokens.contains("model 160.00 MB"), "{tokens}");
        let both = fault(263_000_000);
        assert!(both.ends_with("; --gradient-checkpointing blocks with --tokens-per-batch 640 would fit"), "{both}");
        let few = check_against(262_500_000, std::slice::from_ref(&model), rows.at_most(448), 0).unwrap_err();
        assert!(few.to_string().ends_with("; --gradient-checkpointing blocks would fit"), "{few}");
        // What is one example is not divided by a smaller pass.
        let long = PassRows { of_one: 4096, ..rows };
        let fault_of = |of: PassRows| check_against(263_000_000, std::slice::from_ref(&model), of, 0).unwrap_err();
        let fault_of_long = fault_of(long).to_string();
        assert!(fault_of_long.ends_with("--method lora, would fit"), "{fault_of_long}");
        let frozen = Footprint { trained: 0, base: 160_000_000, ..model.clone() };
        let fault_of_frozen = check_against(263_000_000, &[frozen], long, 0).unwrap_err().to_string();
        assert!(fault_of_frozen.ends_with("4096 tokens: a smaller --max-length would fit"), "{fault_of_frozen}");
        assert!(fault(150_000_000).ends_with("--method lora, would fit"), "{}", fault(150_000_000));
        assert!(fault(100_000_000).ends_with("a smaller model or a machine with more"));
        assert!(machine() > 100_000_000);
        // What the allocator keeps is a share of the pass, 943,710 numbers, or all gradients of a feed-forward.
        let with = |gradients| PassFootprint { gradients, ..model.pass }.bytes(4096) - model.pass.bytes(4096);
        assert_eq!((with(230), with(231)), (0, 4 * (231 * 4096 - 943_710)));
        // More with logits, which are 1,000,000 numbers themselves.
        let logits = PassFootprint { logits: 1_000_000, ..model.pass }.bytes(4096);
        assert_eq!(logits, 4 * (10_437_184 + 15 * 104_371));
        // Of rounded weights, only what is more than the pass keeps counts.
        let rounded = Footprint { rounded: 20_000_000, ..model.clone() };
        let total = |model: &Footprint| -> u64 {
            let parts = expected(std::slice::from_ref(model), rows, 0);
            parts.iter().map(|(_, bytes)| bytes).sum()
        };
        assert_eq!(total(&rounded) - total(&model), 4 * 20_000_000 - model.pass.bytes(4096));
        // So of passes that learn nothing; a tokenizer counts beside everything.
        let more = Footprint { tokenizer: 1_000_000, ..model.clone() };
        let parts = expected(&[more], PassRows { forward: 8192, ..rows }, 0);
        let part = |name: &str| parts.iter().find(|(what, _)| what == name).map(|(_, bytes)| *bytes);
        let forward = 4 * (20_480_000 + 10 * 204_800) + OF_THREAD * rayon::current_num_threads() as u64;
        assert_eq!(part("passes that learn nothing, beyond that"), Some(forward - model.pass.bytes(4096)));
        assert_eq!(part("program, tokenizer and buffers"), Some(113_000_000));
        // Keys and values of 60,000 tokens, 256 numbers each, are 61.44 MB in f32 and half of it in bf16, which
        // is less than the pass takes when none is there.
        let json = serde_json::json!({ "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4 });
        let architecture = &family::architecture(&Config::new(&json, "config.json")).unwrap();
        let sampling = |precision| {
            let cache = CacheSize { architecture, tokens: 60_000, precision }.bytes();
            check_against(315_000_000, std::slice::from_ref(&model), rows, cache)
        };
        sampling(CachePrecision::Bf16).unwrap();
        let fault = sampling(CachePrecision::F32).unwrap_err().to_string();
        assert!(fault.contains("keys and values of the sampler, beyond that 19.92 MB"), "{fault}");
    }
}
