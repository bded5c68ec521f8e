//! IA3 (Liu et al. 2022b, section 3.3): vectors that scale keys, values and the inside of the feed-forward.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::targets::{self, Output, Targets};
use super::whole;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, EmbeddingChange, LinearChange, NormChange, Parameter, Saving};
use crate::model::weights::Weights;
use crate::ops;
use crate::settings::{LoraSettings, MethodSettings};

/// One vector a linear: of its output's width, or, in the feed-forward, of its input's.
#[derive(Debug, Clone)]
pub struct Ia3 {
    /// `{linear}.ia3_l`, `[width]`, and whole tensors of the base by their names.
    tensors: Weights,
    /// The linears that are scaled at their input.
    feed_forward: BTreeSet<String>,
    /// The modules that train as a whole.
    modules_to_save: Vec<String>,
    embedding: String,
    output: Output,
    /// Whether the base keeps its linears as `[d_in, d_out]`, which PEFT wants to know.
    transposed_base: bool,
    shape: peft::BaseShape,
}

fn vector_key(name: &str) -> String {
    format!("{name}.ia3_l")
}

impl Ia3 {
    /// New vectors, all one.
    pub fn new(settings: &LoraSettings, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let or_default = |given: &Vec<String>, default: &[&str]| -> Vec<String> {
            if given.is_empty() { default.iter().map(|name| name.to_string()).collect() } else { given.clone() }
        };
        let names = or_default(&settings.target_modules, architecture.default_ia3_targets);
        let mut ia3 = Ia3::empty(base);
        let is_table = |name: &&String| targets::is_target(&ia3.embedding, name) && *name != targets::ALL_LINEAR;
        if let Some(name) = names.iter().find(is_table) {
            bail!("--target-modules: \"{name}\" is a table of embeddings, which ia3 does not scale; expected linears");
        }
        let scales_output = architecture.causal && names.iter().any(|name| ia3.output.is_target(name));
        let targets = Targets::Names(names);
        let feed_forward =
            Targets::Names(or_default(&settings.feedforward_modules, architecture.default_ia3_feed_forward));
        let mut linears = targets::chosen(architecture, &targets, "--target-modules")?;
        linears.extend(scales_output.then(|| targets::output_linear(architecture)));
        linears.retain(|linear| !targets::is_whole(architecture, &linear.name, &settings.modules_to_save));
        for linear in linears {
            let is_feed_forward = feed_forward.matches(&linear.name)?;
            let width = if is_feed_forward { linear.d_in } else { linear.d_out };
            ia3.tensors.set(&vector_key(&linear.name), Tensor::ones(width, DType::F32, base.device())?);
            if is_feed_forward {
                ia3.feed_forward.insert(linear.name);
            }
        }
        ia3.modules_to_save = settings.modules_to_save.clone();
        for (name, tensor) in whole::new(&ia3.modules_to_save, base)?.iter() {
            ia3.tensors.set(name, tensor.clone());
        }
        ia3.tensors = ia3.tensors.trainable()?;
        Ok(ia3)
    }

    fn empty(base: &Base) -> Self {
        Ia3 {
            tensors: Weights::default(),
            feed_forward: BTreeSet::new(),
            modules_to_save: Vec::new(),
            embedding: targets::embedding(base.architecture()),
            output: Output::of(base.architecture()),
            transposed_base: base.architecture().names.transposed_linears,
            shape: peft::BaseShape::of(base.architecture()),
        }
    }

    /// Reads vectors in PEFT's form, where a linear's output is scaled by `[d_out, 1]` and its input by `[1, d_in]`.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let feed_forward = peft::targets(&files.config(), "feedforward_modules");
        let mut ia3 = Ia3::empty(base);
        ia3.modules_to_save = peft::names(&files.config(), "modules_to_save");
        let architecture = base.architecture();
        let output = architecture.causal.then(|| targets::output_linear(architecture));
        for linear in targets::linears(architecture).into_iter().chain(output) {
            let Some(vector) = files.take(&vector_key(&linear.name)) else { continue };
            let is_feed_forward = feed_forward.matches(&linear.name)?;
            let width = if is_feed_forward { linear.d_in } else { linear.d_out };
            if vector.elem_count() != width {
                bail!(
                    "{}: the vector of \"{}\" has shape {:?}, expected {width} numbers; this adapter belongs to another base model",
                    files.path.display(),
                    linear.name,
                    vector.dims()
                );
            }
            ia3.tensors.set(&vector_key(&linear.name), vector.flatten_all()?);
            if is_feed_forward {
                ia3.feed_forward.insert(linear.name);
            }
        }
        let scaled: Vec<String> = ia3.linears().map(|(name, _)| name.to_string()).collect();
        let output = (architecture.causal && files.is_of_language_model()?).then(|| ia3.output.module.clone());
        peft::check_selected(files, &scaled.iter().collect(), output.into_iter(), architecture)?;
        for (name, tensor) in whole::take(files, base)?.iter() {
            ia3.tensors.set(name, tensor.clone());
        }
        Ok(ia3)
    }

    fn linears(&self) -> impl Iterator<Item = (&str, Tensor)> {
        self.tensors.iter().filter_map(|(key, vector)| Some((key.strip_suffix(".ia3_l")?, vector)))
    }
}

impl Adapter for Ia3 {
    fn embedding(&self) -> Option<EmbeddingChange> {
        let change = whole::embedding(&self.tensors, &self.embedding);
        change.table.is_some().then_some(change)
    }

    fn linear(&self, name: &str) -> Option<LinearChange> {
        let mut change = whole::linear(&self.tensors, name);
        let vector = self.tensors.find(&vector_key(name)).map(ops::Value::from);
        match self.feed_forward.contains(name) {
            true => change.input_scale = vector,
            false => change.output_scale = vector,
        }
        let scales = change.input_scale.is_some() || change.output_scale.is_some();
        (scales || change.weight.is_some() || change.bias.is_some()).then_some(change)
    }

    fn norm(&self, name: &str) -> Option<NormChange> {
        whole::norm(&self.tensors, name)
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(peft::key(name), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(Ia3 { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Ia3 { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "ia3"
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        let mut merged = weights.frozen();
        whole::set(&mut merged, &self.tensors, &self.output);
        for (name, vector) in self.linears() {
            let key = if name == self.output.module { self.output.tensor.clone() } else { format!("{name}.weight") };
            // Nothing reads an output matrix that a classifier's folder lacks.
            let Some(weight) = merged.find(&key) else { continue };
            let is_feed_forward = self.feed_forward.contains(name);
            let vector = vector.detach();
            let factor = if is_feed_forward { vector.unsqueeze(0)? } else { vector.unsqueeze(1)? };
            merged.set(&key, weight.broadcast_mul(&factor)?);
            let bias = format!("{name}.bias");
            if let (false, Some(own)) = (is_feed_forward, merged.find(&bias)) {
                merged.set(&bias, own.mul(&vector)?);
            }
        }
        Ok(merged)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let mut tensors = BTreeMap::new();
        for (name, vector) in self.linears() {
            let is_feed_forward = self.feed_forward.contains(name);
            let vector = if is_feed_forward { vector.unsqueeze(0)? } else { vector.unsqueeze(1)? };
            tensors.insert(peft::key(&vector_key(name)), vector);
        }
        for (name, tensor) in self.tensors.iter().filter(|(name, _)| !name.ends_with(".ia3_l")) {
            tensors.insert(peft::key(name), self.shape.on_disk(name, &tensor)?);
        }
        let (output, linears): (Vec<&str>, Vec<&str>) =
            self.linears().map(|(name, _)| name).partition(|name| *name == self.output.module);
        let mut targets = self.shape.target_modules(&linears);
        targets.extend(output.iter().map(|name| name.to_string()));
        // PEFT wants these to be among the targets.
        let is_feed_forward = |target: &&String| self.feed_forward.iter().any(|name| targets::is_target(name, target));
        let feed_forward: Vec<&String> = targets.iter().filter(is_feed_forward).collect();
        let name = |module: &String| match self.output.is_target(module) {
            true => self.output.module.clone(),
            false => module.clone(),
        };
        let config = json!({
            "peft_type": "IA3",
            "target_modules": targets,
            "feedforward_modules": feed_forward,
            "fan_in_fan_out": self.transposed_base,
            "modules_to_save": peft::modules_to_save(self.modules_to_save.iter().map(name), saving),
        });
        peft::write(folder, config, tensors, saving)
    }
}
