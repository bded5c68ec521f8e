//! LoRA (Hu et al. 2021): `y = W x + s B A x`, with `W` frozen; and what PEFT calls by that name: rsLoRA, DoRA, updates of embeddings, biases and
//! whole modules that train beside it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use serde_json::{Value, json};

use super::base::Base;
use super::bitfit;
use super::peft::{self, AdapterFiles};
use super::targets::{self, Targets};
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, EmbeddingChange, LinearChange, LowRankChange, NormChange, Parameter, Saving};
use crate::model::sites::updated_row_norms;
use crate::model::weights::Weights;
use crate::settings::{LoraBias, LoraInit, LoraSettings, MethodSettings, Pattern};

mod config;
mod initial;

use config::{is_pissa, ranks, read_settings};
pub use initial::update as initial_update;

/// A LoRA adapter.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Its settings, as they are saved.
    settings: LoraSettings,
    /// Every linear that has an update, with the update's scale.
    scales: BTreeMap<String, f64>,
    /// The updates, biases and whole modules, by PEFT's keys without their common beginning.
    tensors: Weights,
    /// PiSSA: the updates as they were at the start, which are subtracted from the base's weights.
    start: Weights,
    /// The name of the token embeddings.
    embedding: String,
    /// The name of the output matrix.
    output: String,
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
        for linear in targets::chosen(architecture, &targets, "--target-modules")? {
            lora.add(&linear, base)?;
        }
        if lora
            .settings
            .target_modules
            .iter()
            .any(|target| target != targets::ALL_LINEAR && targets::is_target(&lora.embedding, target))
        {
            lora.add_embedding(base)?;
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
            output: targets::output(architecture),
            transposed_base: architecture.names.transposed_linears,
            shape: peft::BaseShape::of(architecture),
        }
    }

    fn add(&mut self, linear: &targets::TargetLinear, base: &Base) -> Result<()> {
        let name = &linear.name;
        let rank = self.rank(name)?;
        let scale = self.scale(name, rank)?;
        let weight = base.model.weights().get(&format!("{name}.weight"))?; // [d_out, d_in]
        let (down, up) = initial::update(self.settings.init_lora_weights, &weight, name, rank, scale, base.seed)?;
        if self.settings.init_lora_weights == LoraInit::Pissa {
            self.start.set(&down_key(name), down.clone());
            self.start.set(&up_key(name), up.clone());
        }
        if self.settings.use_dora {
            let update = LowRankChange { down: down.clone(), up: up.clone(), scale, dropout: 0.0 };
            self.tensors.set(&magnitude_key(name), updated_row_norms(&weight, &update)?);
        }
        self.tensors.set(&down_key(name), down);
        self.tensors.set(&up_key(name), up);
        self.scales.insert(name.clone(), scale);
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
        let wanted: Vec<String> = (base.model.weights().iter())
            .filter_map(|(name, _)| name.strip_suffix(".bias"))
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
        for module in self.settings.modules_to_save.clone() {
            let weight = [&self.embedding, &self.output].into_iter().find(|name| targets::is_target(name, &module));
            let Some(name) = weight else {
                bail!(
                    "--modules-to-save: \"{module}\" cannot train as a whole; expected {} or {}",
                    self.embedding,
                    self.output
                );
            };
            let tensor = if *name == self.output {
                base.model.transformer().output()
            } else {
                base.model.transformer().embeddings()
            };
            self.tensors.set(&format!("{name}.weight"), tensor.clone());
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
        let (down, up) = (tensors.find(&down_key(name))?.clone(), tensors.find(&up_key(name))?.clone());
        Some(LowRankChange { down, up, scale, dropout: self.settings.lora_dropout })
    }

    /// The updates of a linear: its own, and with PiSSA what it was at the start, subtracted.
    fn updates(&self, name: &str) -> Vec<LowRankChange> {
        let Some(&scale) = self.scales.get(name) else { return Vec::new() };
        let start = self.update(&self.start, name, -scale);
        self.update(&self.tensors, name, scale).into_iter().chain(start).collect()
    }

    /// Reads an adapter of PEFT's form.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let mut lora = Lora::empty(read_settings(&files.config())?, base);
        let starts_from_base = is_pissa(&files.config())?;
        for linear in targets::linears(architecture) {
            let name = &linear.name;
            let (Some(down), Some(up)) = (files.take(&down_key(name)), files.take(&up_key(name))) else { continue };
            let rank = down.dims().first().copied().unwrap_or(0);
            if rank == 0 || down.dims() != [rank, linear.d_in] || up.dims() != [linear.d_out, rank] {
                bail!(
                    "{}: the update of \"{name}\" has shapes {:?} and {:?}, but the base model's linear is [{}, {}]; this adapter belongs to another base model",
                    files.path.display(),
                    down.dims(),
                    up.dims(),
                    linear.d_out,
                    linear.d_in
                );
            }
            let scale = lora.scale(name, rank)?;
            if starts_from_base {
                let weight = base.model.weights().get(&format!("{name}.weight"))?;
                let (down, up) = initial::update(LoraInit::Pissa, &weight, name, rank, scale, base.seed)?;
                lora.start.set(&down_key(name), down);
                lora.start.set(&up_key(name), up);
            }
            lora.scales.insert(name.clone(), scale);
            lora.tensors.set(&down_key(name), down);
            lora.tensors.set(&up_key(name), up);
            if lora.settings.use_dora {
                let key = magnitude_key(name);
                lora.tensors.set(&key, files.take_of_shape(&key, &[linear.d_out])?);
            }
        }
        lora.read_embedding(files, base)?;
        for (name, tensor) in base.model.weights().iter().filter(|(name, _)| name.ends_with(".bias")) {
            let module = name.trim_end_matches(".bias");
            // PEFT keeps a wrapped layer's own bias under `base_layer`.
            for key in [name.clone(), format!("{module}.base_layer.bias")] {
                if let Some(bias) = files.take_if_of_shape(&key, tensor.dims())? {
                    lora.tensors.set(name, bias);
                }
            }
        }
        Ok(lora)
    }

    fn read_embedding(&mut self, files: &mut AdapterFiles, base: &Base) -> Result<()> {
        let architecture = base.architecture();
        let (d_model, vocabulary) = (architecture.d_model, architecture.vocabulary);
        let name = self.embedding.clone();
        if let Some(down) = files.take(&format!("{name}.lora_embedding_A")) {
            let rank = down.dims().first().copied().unwrap_or(0);
            if rank == 0 || down.dims() != [rank, vocabulary] {
                bail!(
                    "{}: the update of \"{name}\" has shape {:?}, expected [rank, {vocabulary}]; this adapter belongs to another base model",
                    files.path.display(),
                    down.dims()
                );
            }
            let up = files.take_of_shape(&format!("{name}.lora_embedding_B"), &[d_model, rank])?;
            self.scales.insert(name.clone(), self.scale(&name, rank)?);
            self.tensors.set(&format!("{name}.lora_embedding_A"), down);
            self.tensors.set(&format!("{name}.lora_embedding_B"), up);
            // PEFT writes the base's table too.
            files.take(&format!("{name}.base_layer.weight"));
        }
        for module in [&name, &self.output] {
            let key = format!("{module}.weight");
            if let Some(weight) = files.take_if_of_shape(&key, &[vocabulary, d_model])? {
                self.tensors.set(&key, weight);
            }
        }
        Ok(())
    }

    /// The adapter as PEFT has it: an update that started from principal components becomes one of twice the rank on the original weights.
    fn without_start(&self) -> Result<Self> {
        let mut plain = Lora { start: Weights::default(), ..self.clone() };
        if self.start.iter().next().is_none() {
            return Ok(plain);
        }
        for name in self.scales.keys() {
            let [own, start] = &self.updates(name)[..] else { continue };
            plain.tensors.set(&down_key(name), Tensor::cat(&[own.down.detach(), start.down.clone()], 0)?);
            plain.tensors.set(&up_key(name), Tensor::cat(&[own.up.detach(), start.up.neg()?], 1)?);
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

    fn config(&self, saving: &Saving) -> Value {
        let settings = &self.settings;
        let linears = self.scales.keys().filter(|name| **name != self.embedding);
        let mut targets = self.shape.target_modules(&linears.map(String::as_str).collect::<Vec<_>>());
        targets.extend(self.scales.contains_key(&self.embedding).then(|| self.embedding.clone()));
        let mut modules: Vec<String> = settings.modules_to_save.clone();
        modules.extend(saving.head.into_iter().flat_map(|head| head.modules()).map(String::from));
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
            "modules_to_save": if modules.is_empty() { Value::Null } else { json!(modules) },
        })
    }
}

impl Adapter for Lora {
    fn embedding(&self) -> Option<EmbeddingChange> {
        let name = &self.embedding;
        let part = |part: &str| self.tensors.find(&format!("{name}.lora_embedding_{part}")).cloned();
        let low_rank = part("A").zip(part("B")).zip(self.scales.get(name));
        let low_rank = low_rank.map(|((down, up), &scale)| LowRankChange { down, up, scale, dropout: 0.0 });
        let table = self.tensors.find(&format!("{name}.weight")).cloned();
        (low_rank.is_some() || table.is_some()).then_some(EmbeddingChange { table, low_rank })
    }

    fn linear(&self, name: &str) -> Option<LinearChange> {
        let bias = self.tensors.find(&format!("{name}.bias")).cloned();
        let low_rank = self.updates(name);
        let magnitude = self.tensors.find(&magnitude_key(name)).cloned();
        let changes = bias.is_some() || !low_rank.is_empty();
        changes.then_some(LinearChange { low_rank, magnitude, bias, ..LinearChange::default() })
    }

    fn norm(&self, name: &str) -> Option<NormChange> {
        bitfit::norm_bias(&self.tensors, name)
    }

    fn output(&self) -> Option<Tensor> {
        self.tensors.find(&format!("{}.weight", self.output)).cloned()
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
        for name in self.scales.keys().filter(|name| **name != self.embedding) {
            let key = format!("{name}.weight");
            let mut weight = merged.get(&key)?; // [d_out, d_in]
            let mut factor = None;
            for update in self.updates(name) {
                if let Some(magnitude) = self.tensors.find(&magnitude_key(name)) {
                    factor = Some(magnitude.detach().div(&updated_row_norms(&weight, &update)?)?.unsqueeze(1)?); // [d_out, 1]
                }
                weight = (weight + update.up.detach().matmul(&update.down.detach())?.affine(update.scale, 0.0)?)?;
            }
            if let Some(factor) = factor {
                weight = weight.broadcast_mul(&factor)?;
            }
            merged.set(&key, weight);
        }
        if let Some(change) = self.embedding() {
            self.merge_embedding(&mut merged, change)?;
        }
        bitfit::set_biases(&mut merged, &self.tensors);
        if let Some(output) = self.output() {
            merged.set(&format!("{}.weight", self.output), output.detach());
        }
        Ok(merged)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let plain = self.without_start()?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in plain.tensors.iter() {
            tensors.insert(self.key(name), tensor.clone());
        }
        peft::write(folder, plain.config(saving), tensors, saving)
    }
}

impl Lora {
    fn merge_embedding(&self, merged: &mut Weights, change: EmbeddingChange) -> Result<()> {
        let key = format!("{}.weight", self.embedding);
        let mut table = change.table.map_or_else(|| merged.get(&key), |table| Ok(table.detach()))?;
        if let Some(LowRankChange { down, up, scale, .. }) = change.low_rank {
            table = (table + down.detach().t()?.matmul(&up.detach().t()?)?.affine(scale, 0.0)?)?;
        }
        let output = format!("{}.weight", self.output);
        if merged.find(&output).is_none() && self.output().is_none() {
            bail!(
                "an update of \"{}\" cannot be folded into a model whose output matrix is its embedding matrix, as the output keeps the original; keep the adapter",
                self.embedding
            );
        }
        merged.set(&key, table);
        Ok(())
    }
}
