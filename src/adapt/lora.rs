//! LoRA (Hu et al. 2021): `y = W x + s B A x`, with `W` frozen; and what PEFT calls by that name: rsLoRA, DoRA, updates of embeddings, biases and
//! whole modules that train beside it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use serde_json::{Value as Json, json};

use super::base::Base;
use super::peft;
use super::targets::{self, Output, Targets};
use super::tokens::TokenRows;
use super::whole;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, EmbeddingChange, LinearChange, LowRankChange, NormChange, Parameter, Saving};
use crate::model::linear_change::updated_row_norms;
use crate::model::weights::Weights;
use crate::ops::{Value, Weight};
use crate::settings::{LoraBias, LoraInit, LoraSettings, MethodSettings, Pattern};

mod config;
mod initial;
mod read;

use config::ranks;
pub use initial::update as initial_update;

/// A LoRA adapter.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Its settings, as they are saved.
    settings: LoraSettings,
    /// Every linear that has an update, with the update's scale.
    scales: BTreeMap<String, f64>,
    /// The updates, whole tensors and rows of single tokens, by PEFT's keys without their common beginning.
    tensors: Weights,
    /// PiSSA: the updates as they were at the start, which are subtracted from the base's weights.
    start: Weights,
    /// The name of the token embeddings.
    embedding: String,
    /// The output matrix.
    output: Output,
    /// Trainable tokens.
    tokens: TokenRows,
    /// Whether the output matrix has all changes of the embeddings (PEFT's `ensure_weight_tying` with a base that ties the two).
    tied: bool,
    /// Whether the base keeps its linears as `[d_in, d_out]`, which PEFT wants to know.
    transposed_base: bool,
    shape: peft::BaseShape,
}

fn down_key(name: &str) -> String {
    format!("{name}.lora_A.weight")
}

fn up_key(name: &str) -> String {
    format!("{name}.lora_B.weight")
}

fn magnitude_key(name: &str) -> String {
    format!("{name}.lora_magnitude_vector")
}

impl Lora {
    /// A new adapter that changes nothing yet.
    pub fn new(settings: &LoraSettings, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let mut settings = settings.clone();
        if settings.target_modules.is_empty() {
            settings.target_modules = architecture.default_lora_targets.iter().map(|name| name.to_string()).collect();
        }
        // As PEFT keeps them; the first that fits counts.
        settings.rank_pattern.sort_by(|a, b| a.name.cmp(&b.name));
        settings.alpha_pattern.sort_by(|a, b| a.name.cmp(&b.name));
        if settings.use_dora && settings.init_lora_weights == LoraInit::Pissa {
            bail!("--use-dora and --init-lora-weights pissa cannot be combined; choose one of them");
        }
        let targets = Targets::Names(settings.target_modules.clone());
        let mut lora = Lora::empty(settings, base);
        let is_whole = |name: &str, lora: &Lora| targets::is_whole(architecture, name, &lora.settings.modules_to_save);
        for linear in targets::chosen(architecture, &targets, "--target-modules")? {
            if !is_whole(&linear.name, &lora) {
                lora.add(&linear, base)?;
            }
        }
        let named = |is_target: &dyn Fn(&str) -> bool| {
            let mut targets = lora.settings.target_modules.iter().filter(|target| **target != targets::ALL_LINEAR);
            targets.any(|target| is_target(target))
        };
        let of_embedding =
            named(&|target| targets::is_target(&lora.embedding, target)) && !is_whole(&lora.embedding, &lora);
        if named(&|target| lora.output.is_target(target)) && !is_whole(&lora.output.module, &lora) {
            lora.add_output(base)?;
        }
        if of_embedding {
            lora.add_embedding(base)?;
        }
        if lora.scales.is_empty() {
            bail!(
                "--target-modules: all of these layers train as a whole (--modules-to-save); name one that gets an update"
            );
        }
        lora.add_biases(base)?;
        lora.add_modules(base)?;
        lora.tensors = lora.tensors.trainable()?;
        Ok(lora)
    }

    fn empty(settings: LoraSettings, base: &Base) -> Self {
        let architecture = base.architecture();
        Lora {
            settings,
            scales: BTreeMap::new(),
            tensors: Weights::default(),
            start: Weights::default(),
            embedding: targets::embedding(architecture),
            output: Output::of(architecture),
            tokens: TokenRows::default(),
            tied: false,
            transposed_base: architecture.names.transposed_linears,
            shape: peft::BaseShape::of(architecture),
        }
    }

    fn add(&mut self, linear: &targets::TargetLinear, base: &Base) -> Result<()> {
        let weight = base.model.weights().matrix(&format!("{}.weight", linear.name))?; // [d_out, d_in]
        self.add_update(&linear.name, &weight, base)
    }

    fn add_output(&mut self, base: &Base) -> Result<()> {
        if !base.architecture().causal {
            bail!("--target-modules: \"{}\": an encoder has no output matrix", self.output.module);
        }
        if self.settings.lora_dropout > 0.0 {
            bail!(
                "--lora-dropout: dropout before the update of the output matrix ({}) is not supported; set it to 0, or leave the matrix out of --target-modules",
                self.output.module
            );
        }
        self.add_update(&self.output.module.clone(), base.model.transformer().output(), base)
    }

    /// A new update of a linear `[d_out, d_in]` of this name.
    fn add_update(&mut self, name: &str, weight: &Weight, base: &Base) -> Result<()> {
        let rank = self.rank(name)?;
        let scale = self.scale(name, rank)?;
        let (down, up) = initial::update(self.settings.init_lora_weights, weight, name, rank, scale, base.seed)?;
        if self.settings.init_lora_weights == LoraInit::Pissa {
            self.start.set(&down_key(name), down.clone());
            self.start.set(&up_key(name), up.clone());
        }
        if self.settings.use_dora {
            let update = LowRankChange { down: Value::of(&down), up: Value::of(&up), scale, dropout: 0.0 };
            self.tensors.set(&magnitude_key(name), updated_row_norms(weight, &update)?);
        }
        self.tensors.set(&down_key(name), down);
        self.tensors.set(&up_key(name), up);
        self.scales.insert(name.to_string(), scale);
        Ok(())
    }

    fn rank(&self, name: &str) -> Result<usize> {
        let rank = targets::patterned(&self.settings.rank_pattern, name, self.settings.lora_r as f64)?;
        if rank.fract() != 0.0 || rank > 1e6 {
            bail!("--rank-pattern: the rank of \"{name}\" is {rank}, expected a whole number, 1 or more");
        }
        Ok(rank as usize)
    }

    /// `s`: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    fn scale(&self, name: &str, rank: usize) -> Result<f64> {
        let alpha = targets::patterned(&self.settings.alpha_pattern, name, self.settings.lora_alpha)?;
        let rank = rank as f64;
        Ok(alpha / if self.settings.use_rslora { rank.sqrt() } else { rank })
    }

    /// PEFT's start for embeddings: `A` zero, `B` normal.
    fn add_embedding(&mut self, base: &Base) -> Result<()> {
        let architecture = base.architecture();
        let name = self.embedding.clone();
        if self.settings.use_dora {
            bail!(
                "--use-dora: an update of the embeddings ({name}) with magnitudes is not supported; leave it out of --target-modules"
            );
        }
        let rank = self.rank(&name)?;
        let down = Tensor::zeros((rank, architecture.vocabulary), DType::F32, base.device())?;
        let mut stream = base.stream(&format!("{name}.lora_embedding_B"));
        let up = crate::random::normal(&mut stream, &[architecture.d_model, rank], 1.0, base.device())?;
        self.tensors.set(&format!("{name}.lora_embedding_A"), down);
        self.tensors.set(&format!("{name}.lora_embedding_B"), up);
        self.scales.insert(name.clone(), self.scale(&name, rank)?);
        Ok(())
    }

    /// Biases that train beside the updates; only those that the model has, as in PEFT.
    fn add_biases(&mut self, base: &Base) -> Result<()> {
        let wanted: Vec<String> = (base.model.weights().names())
            .filter_map(|name| name.strip_suffix(".bias"))
            .filter(|module| match self.settings.lora_bias {
                LoraBias::None => false,
                LoraBias::All => true,
                LoraBias::LoraOnly => self.scales.contains_key(*module),
            })
            .map(|module| format!("{module}.bias"))
            .collect();
        for name in wanted {
            self.tensors.set(&name, base.model.weights().get(&name)?);
        }
        Ok(())
    }

    /// Modules that train as a whole.
    fn add_modules(&mut self, base: &Base) -> Result<()> {
        let whole = whole::new(&self.settings.modules_to_save, base)?;
        for (name, tensor) in whole.iter() {
            self.tensors.set(name, tensor);
        }
        Ok(())
    }

    /// A tensor's key in PEFT's files, where a layer with an update keeps its own bias under `base_layer`.
    fn key(&self, name: &str) -> String {
        match name.strip_suffix(".bias") {
            Some(module) if self.scales.contains_key(module) => peft::key(&format!("{module}.base_layer.bias")),
            _ => peft::key(name),
        }
    }

    fn update(&self, tensors: &Weights, name: &str, scale: f64) -> Option<LowRankChange> {
        let (down, up) = (Value::from(tensors.find(&down_key(name))?), Value::from(tensors.find(&up_key(name))?));
        Some(LowRankChange { down, up, scale, dropout: self.settings.lora_dropout })
    }

    /// The updates of a linear: its own, and with PiSSA what it was at the start, subtracted.
    fn updates(&self, name: &str) -> Vec<LowRankChange> {
        let Some(&scale) = self.scales.get(name) else { return Vec::new() };
        let start = self.update(&self.start, name, -scale);
        self.update(&self.tensors, name, scale).into_iter().chain(start).collect()
    }

    /// The adapter as PEFT has it: an update that started from principal components becomes one of twice the rank on the original weights.
    fn without_start(&self) -> Result<Self> {
        let mut plain = Lora { start: Weights::default(), ..self.clone() };
        if self.start.names().next().is_none() {
            return Ok(plain);
        }
        for name in self.scales.keys() {
            let [own, start] = &self.updates(name)[..] else { continue };
            plain.tensors.set(&down_key(name), Tensor::cat(&[own.down.tensor(), start.down.tensor()], 0)?);
            plain.tensors.set(&up_key(name), Tensor::cat(&[own.up.tensor(), &start.up.tensor().neg()?], 1)?);
        }
        let settings = &mut plain.settings;
        // The scale stays: alpha / r, or alpha / sqrt(r).
        let growth = if settings.use_rslora { 2f64.sqrt() } else { 2.0 };
        settings.lora_r *= 2;
        settings.lora_alpha *= growth;
        settings.rank_pattern.iter_mut().for_each(|pattern| pattern.number *= 2.0);
        settings.alpha_pattern.iter_mut().for_each(|pattern| pattern.number *= growth);
        settings.init_lora_weights = LoraInit::Kaiming;
        Ok(plain)
    }

    fn config(&self, saving: &Saving) -> Json {
        let settings = &self.settings;
        let tables = [&self.embedding, &self.output.module];
        let linears = self.scales.keys().filter(|name| !tables.contains(name));
        let mut targets = self.shape.target_modules(&linears.map(String::as_str).collect::<Vec<_>>());
        targets.extend(tables.into_iter().filter(|name| self.scales.contains_key(*name)).cloned());
        let of_output = |module: &String| self.output.is_target(module);
        let name = |module: &String| if of_output(module) { self.output.module.clone() } else { module.clone() };
        let modules = settings.modules_to_save.iter().map(name);
        json!({
            "peft_type": "LORA",
            "r": settings.lora_r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            "rank_pattern": ranks(&settings.rank_pattern),
            "alpha_pattern": Pattern::map(&settings.alpha_pattern),
            "target_modules": targets,
            "fan_in_fan_out": self.transposed_base,
            "bias": settings.lora_bias,
            "ensure_weight_tying": self.tied,
            "trainable_token_indices": self.tokens.field(),
            "modules_to_save": peft::modules_to_save(modules, saving),
        })
    }
}

impl Adapter for Lora {
    fn embedding(&self) -> Option<EmbeddingChange> {
        let name = &self.embedding;
        let part = |part: &str| self.tensors.find(&format!("{name}.lora_embedding_{part}")).map(Value::from);
        let low_rank = part("A").zip(part("B")).zip(self.scales.get(name));
        let low_rank = low_rank.map(|((down, up), &scale)| LowRankChange { down, up, scale, dropout: 0.0 });
        let rows = self.tokens.of_embedding(&self.tensors);
        let change = EmbeddingChange { low_rank, rows, ..whole::embedding(&self.tensors, name) };
        (change.low_rank.is_some() || change.table.is_some() || change.rows.is_some()).then_some(change)
    }

    fn linear(&self, name: &str) -> Option<LinearChange> {
        let magnitude = self.tensors.find(&magnitude_key(name)).map(Value::from);
        let own = whole::linear(&self.tensors, name);
        let mut change = LinearChange { low_rank: self.updates(name), magnitude, ..own };
        if name == self.output.module {
            change.rows = self.tokens.of_output(&self.tensors);
            self.tie(&mut change);
        }
        let changes = change.weight.is_some() || change.bias.is_some() || change.rows.is_some();
        (changes || !change.low_rank.is_empty()).then_some(change)
    }

    fn norm(&self, name: &str) -> Option<NormChange> {
        whole::norm(&self.tensors, name)
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        let ratio = self.settings.loraplus_lr_ratio;
        let parameter = |(name, variable): (&String, &Var)| {
            let parameter = Parameter::new(self.key(name), variable);
            // LoRA+: B learns faster than A.
            let is_up = name.ends_with("lora_B.weight") || name.ends_with("lora_embedding_B");
            Parameter { learning_rate_scale: if is_up { ratio } else { 1.0 }, ..parameter }
        };
        self.tensors.variables().map(parameter).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(Lora { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        let mut lora = Lora { tensors: self.tensors.trainable()?, ..self.clone() };
        lora.settings.lora_dropout = settings.lora.lora_dropout;
        lora.settings.loraplus_lr_ratio = settings.lora.loraplus_lr_ratio;
        Ok(Arc::new(lora))
    }

    fn method(&self) -> &'static str {
        "lora"
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        let mut merged = weights.frozen();
        whole::set(&mut merged, &self.tensors, &self.output);
        for name in self.scales.keys().filter(|name| **name != self.embedding) {
            let key = if *name == self.output.module { self.output.tensor.clone() } else { format!("{name}.weight") };
            // Nothing reads an output matrix that a classifier's folder lacks.
            let Some(mut weight) = merged.find(&key) else { continue }; // [d_out, d_in]
            let mut factor = None;
            for update in self.updates(name) {
                if let Some(magnitude) = self.tensors.find(&magnitude_key(name)) {
                    factor = Some(
                        magnitude
                            .detach()
                            .div(&updated_row_norms(&Weight::new(&weight, None), &update)?)?
                            .unsqueeze(1)?,
                    ); // [d_out, 1]
                }
                weight = (weight + update.up.tensor().matmul(update.down.tensor())?.affine(update.scale, 0.0)?)?;
            }
            if let Some(factor) = factor {
                weight = weight.broadcast_mul(&factor)?;
            }
            merged.set(&key, weight);
        }
        if let Some(LowRankChange { down, up, scale, .. }) = self.embedding().and_then(|change| change.low_rank) {
            let key = format!("{}.weight", self.embedding);
            let update = down.tensor().t()?.matmul(&up.tensor().t()?)?.affine(scale, 0.0)?; // [vocabulary, d_model]
            merged.set(&key, (merged.get(&key)? + update)?);
        }
        self.tokens.merge(&mut merged, &self.tensors, &self.output)?;
        if let (true, Some(_)) = (self.tied, merged.find(&self.output.tensor)) {
            merged.set(&self.output.tensor, merged.get(&format!("{}.weight", self.embedding))?);
        }
        Ok(merged)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let plain = self.without_start()?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in plain.tensors.iter() {
            tensors.insert(self.key(name), self.shape.on_disk(name, &tensor)?);
        }
        tensors.extend(self.copies_of_tied(&plain.tensors)?);
        peft::write(folder, plain.config(saving), tensors, saving)
    }
}

impl Lora {
    /// Gives the output matrix the changes of the embeddings, where it is tied to them: of `E + s (B A)ᵀ` the update is `s Aᵀ Bᵀ`.
    fn tie(&self, change: &mut LinearChange) {
        if !self.tied {
            return;
        }
        let Some(EmbeddingChange { table, low_rank, rows }) = self.embedding() else { return };
        change.weight = table;
        change.rows = rows;
        let transposed = |low_rank: LowRankChange| {
            let transpose = |matrix: &Value| matrix.in_candle().t()?.contiguous();
            let transposed = |matrix: &Value| Value::of(&transpose(matrix).expect("a matrix"));
            let [down, up] = [&low_rank.up, &low_rank.down].map(transposed);
            LowRankChange { down, up, ..low_rank }
        };
        change.low_rank = low_rank.map(transposed).into_iter().collect();
    }

    /// What PEFT stores a second time of an output matrix that is tied to the embeddings.
    fn copies_of_tied(&self, tensors: &Weights) -> Result<BTreeMap<String, Tensor>> {
        let mut copies = BTreeMap::new();
        let (embedding, output) = (&self.embedding, &self.output.module);
        let mut copy = |of: &str, to: String, transposed: bool| -> Result<()> {
            if let Some(tensor) = tensors.find(of) {
                let tensor = if transposed { tensor.t()?.contiguous()? } else { tensor.clone() };
                copies.insert(peft::key(&to), tensor);
            }
            Ok(())
        };
        if self.tied {
            copy(&format!("{embedding}.lora_embedding_B"), down_key(output), true)?;
            copy(&format!("{embedding}.lora_embedding_A"), up_key(output), true)?;
            copy(&format!("{embedding}.weight"), self.output.module_weight.clone(), false)?;
        }
        Ok(copies)
    }
}
