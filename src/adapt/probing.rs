//! Probing (Alain & Bengio 2017): the model is frozen, and what stands on top of it trains.
//!
//! For rewards and classes that is a head, linear or with one hidden layer, over a layer's hidden states. A language model's head is its output
//! matrix, as large as the vocabulary; here a small map before it trains instead: `h' = h + A h + b` (Belrose et al. 2023, the tuned lens), or
//! `h' = h + V tanh(W h + a) + b` with a hidden layer, between the residual stream and the last norm.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, Parameter, Saving};
use crate::model::weights::Weights;
use crate::ops::{self, Activation, Value};
use crate::random;
use crate::settings::{MethodSettings, ProbeSettings};

const HIDDEN: [&str; 2] = ["probe.hidden.weight", "probe.hidden.bias"];
const OUT: [&str; 2] = ["probe.out.weight", "probe.out.bias"];

/// What is read after some block of a frozen model.
#[derive(Debug, Clone)]
pub struct Probing {
    /// The map before the output matrix; empty where a head stands on top.
    tensors: Weights,
    /// How many blocks the rows pass through.
    layer: Option<usize>,
}

impl Probing {
    /// A new probe that changes nothing yet: its last layer is zero. With `has_head` a head is what trains.
    pub fn new(settings: &ProbeSettings, has_head: bool, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let (layers, d_model) = (architecture.layers, architecture.d_model);
        if let Some(layer) = settings.probe_layer.filter(|layer| *layer > layers) {
            bail!("--probe-layer {layer}: the model has layers 1 to {layers}");
        }
        let mut tensors = Weights::default();
        if !has_head {
            let zero = |shape: &[usize]| Tensor::zeros(shape, DType::F32, base.device());
            let width = match settings.probe_hidden_size.filter(|&width| width > 0) {
                None => d_model,
                Some(width) => {
                    let bound = 1.0 / (d_model as f64).sqrt();
                    let weight = random::uniform(&mut base.stream(HIDDEN[0]), &[width, d_model], bound, base.device())?;
                    tensors.set(HIDDEN[0], weight);
                    tensors.set(HIDDEN[1], zero(&[width])?);
                    width
                }
            };
            tensors.set(OUT[0], zero(&[d_model, width])?);
            tensors.set(OUT[1], zero(&[d_model])?);
        }
        Ok(Probing { tensors: tensors.trainable()?, layer: settings.probe_layer })
    }

    /// Reads a probe.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let d_model = base.architecture().d_model;
        let mut tensors = Weights::default();
        if let Some(hidden) = files.take(HIDDEN[0]) {
            let bias = files.take_of_shape(HIDDEN[1], &[hidden.dim(0)?])?;
            tensors.set(HIDDEN[0], hidden);
            tensors.set(HIDDEN[1], bias);
        }
        let width = tensors.find(HIDDEN[1]).map_or(d_model, |bias| bias.dims()[0]);
        if let Some(weight) = files.take_if_of_shape(OUT[0], &[d_model, width])? {
            tensors.set(OUT[0], weight);
            tensors.set(OUT[1], files.take_of_shape(OUT[1], &[d_model])?);
        }
        Ok(Probing { tensors, layer: files.config().optional_size("layer")? })
    }
}

impl Adapter for Probing {
    fn depth(&self) -> Option<usize> {
        self.layer
    }

    fn last_block(&self, x: Value) -> Result<Value> {
        let find = |name: &str| self.tensors.find(name).map(Value::from);
        let [Some(weight), Some(bias)] = OUT.map(find) else { return Ok(x) };
        let inner = match HIDDEN.map(find) {
            [Some(weight), bias] => ops::activate(&ops::linear(&x, &weight, bias.as_ref())?, Activation::Tanh)?,
            _ => x.clone(),
        };
        x.add(&ops::linear(&inner, &weight, Some(&bias))?)
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(name, variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(Probing { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Probing { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "probing"
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let tensors: BTreeMap<String, Tensor> =
            self.tensors.iter().map(|(name, tensor)| (peft::key(name), tensor)).collect();
        peft::write(folder, json!({ "peft_type": "PROBING", "layer": self.layer }), tensors, saving)
    }
}
