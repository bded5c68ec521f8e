//! P-tuning (Liu et al. 2021): virtual tokens that come out of an encoder. The encoder trains; what it says is all that is needed afterwards.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::prompt_tuning::KEY;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, Parameter, Pass, Saving};
use crate::model::weights::Weights;
use crate::ops::activation::activate_reference;
use crate::ops::{self, Activation, Value};
use crate::random;
use crate::settings::{MethodSettings, PromptEncoder, PromptSettings};

/// An encoder over trained embeddings `[virtual tokens, d_model]`, as PEFT builds it: a perceptron with two hidden layers and ReLU, or a bidirectional LSTM
/// and a perceptron with one.
#[derive(Debug, Clone)]
pub struct PTuning {
    encoder: PromptEncoder,
    layers: usize,
    /// By the names that PEFT's encoder has.
    tensors: Weights,
    shape: peft::BaseShape,
}

impl PTuning {
    /// A new encoder, with PyTorch's initialisation.
    pub fn new(settings: &PromptSettings, base: &Base) -> Result<Self> {
        let d_model = base.architecture().d_model;
        let hidden = settings.encoder_hidden_size.unwrap_or(d_model);
        let mut shapes = Vec::new();
        match settings.encoder_reparameterization_type {
            PromptEncoder::Mlp => {
                shapes.extend(perceptron(&[(0, d_model, hidden), (2, hidden, hidden), (4, hidden, d_model)]))
            }
            PromptEncoder::Lstm => {
                for layer in 0..settings.encoder_num_layers {
                    let d_in = if layer == 0 { d_model } else { 2 * hidden };
                    shapes.extend(lstm_layer(layer, d_in, hidden));
                }
                shapes.extend(perceptron(&[(0, 2 * hidden, 2 * hidden), (2, 2 * hidden, d_model)]));
            }
        }
        let mut tensors = Weights::default();
        let embeddings = [settings.num_virtual_tokens, d_model];
        tensors.set(EMBEDDING, random::normal(&mut base.stream(EMBEDDING), &embeddings, 1.0, base.device())?);
        for (name, shape, fan_in) in shapes {
            let bound = 1.0 / (fan_in as f64).sqrt();
            tensors.set(&name, random::uniform(&mut base.stream(&name), &shape, bound, base.device())?);
        }
        let (encoder, layers) = (settings.encoder_reparameterization_type, settings.encoder_num_layers);
        let shape = peft::BaseShape::of(base.architecture());
        Ok(PTuning { encoder, layers, tensors: tensors.trainable()?, shape })
    }

    /// Reads an encoder that was saved beside its virtual tokens; `None` where there is none, as in PEFT's own folders.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Option<Self>> {
        let Some(tensors) = files.encoder(base.device())? else { return Ok(None) };
        files.take(KEY);
        let config = files.config();
        let encoder = match config.text("encoder_reparameterization_type", "MLP")? {
            "MLP" => PromptEncoder::Mlp,
            "LSTM" => PromptEncoder::Lstm,
            other => bail!("{}: encoder_reparameterization_type is \"{other}\"; expected MLP or LSTM", config.file),
        };
        let layers = config.optional_size("encoder_num_layers")?.unwrap_or(2);
        let adapter = PTuning { encoder, layers, tensors, shape: peft::BaseShape::of(base.architecture()) };
        let width = adapter.embeddings()?.dim(1)?;
        if width != base.architecture().d_model {
            bail!(
                "{}: virtual tokens of width {width}, the base model's are {}; this adapter belongs to another base model",
                files.path.display(),
                base.architecture().d_model
            );
        }
        Ok(Some(adapter))
    }

    /// The virtual tokens, `[virtual tokens, d_model]`, in candle's operations: the encoder is small, and an
    /// LSTM's steps are many.
    fn embeddings(&self) -> Result<Tensor> {
        let mut x = self.tensors.get(EMBEDDING)?; // [virtual tokens, d_model]
        let layers: &[usize] = match self.encoder {
            PromptEncoder::Mlp => &[0, 2, 4],
            PromptEncoder::Lstm => {
                for layer in 0..self.layers {
                    let forward = self.direction(&x, layer, false)?;
                    x = Tensor::cat(&[forward, self.direction(&x, layer, true)?], 1)?; // [virtual tokens, 2 hidden]
                }
                &[0, 2]
            }
        };
        for (index, layer) in layers.iter().enumerate() {
            if index > 0 {
                x = activate_reference(&x, Activation::Relu)?;
            }
            let part = |part: &str| self.tensors.get(&format!("mlp_head.{layer}.{part}"));
            x = linear(&x, &part("weight")?, Some(&part("bias")?))?;
        }
        Ok(x)
    }

    /// One direction of one layer of the LSTM (Hochreiter & Schmidhuber 1997, with forget gates), `[virtual tokens, hidden]`:
    /// `c' = σ(f) c + σ(i) tanh(g)`, `h' = σ(o) tanh(c')`.
    fn direction(&self, x: &Tensor, layer: usize, reverse: bool) -> Result<Tensor> {
        let suffix = if reverse { "_reverse" } else { "" };
        let part = |part: &str| self.tensors.get(&format!("lstm_head.{part}_l{layer}{suffix}"));
        let from_input = linear(x, &part("weight_ih")?, Some(&part("bias_ih")?))?; // [virtual tokens, 4 hidden]
        let (weight, bias) = (part("weight_hh")?, part("bias_hh")?);
        let (rows, hidden) = (x.dim(0)?, weight.dim(1)?);
        let mut h = Tensor::zeros((1, hidden), DType::F32, x.device())?;
        let mut c = h.clone();
        let mut outputs = vec![h.clone(); rows];
        for step in 0..rows {
            let row = if reverse { rows - 1 - step } else { step };
            let gates = (from_input.narrow(0, row, 1)? + linear(&h, &weight, Some(&bias))?)?; // [1, 4 hidden]
            let gate = |index: usize| gates.narrow(1, index * hidden, hidden)?.contiguous();
            let [i, f, o] = [gate(0)?, gate(1)?, gate(3)?].map(|x| sigmoid(&x));
            let g = activate_reference(&gate(2)?, Activation::Tanh)?;
            c = ((f? * c)? + (i? * g)?)?;
            h = (o? * activate_reference(&c, Activation::Tanh)?)?;
            outputs[row] = h.clone();
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }
}

const EMBEDDING: &str = "embedding.weight";

/// Names, shapes and inputs of the linears of a perceptron: its place in PyTorch's list, `d_in` and `d_out`.
fn perceptron(layers: &[(usize, usize, usize)]) -> Vec<(String, Vec<usize>, usize)> {
    let of_layer = |&(place, d_in, d_out): &(usize, usize, usize)| {
        let name = |part: &str| format!("mlp_head.{place}.{part}");
        [(name("weight"), vec![d_out, d_in], d_in), (name("bias"), vec![d_out], d_in)]
    };
    layers.iter().flat_map(of_layer).collect()
}

/// The same of both directions of a layer of the LSTM.
fn lstm_layer(layer: usize, d_in: usize, hidden: usize) -> Vec<(String, Vec<usize>, usize)> {
    let mut all = Vec::new();
    for suffix in ["", "_reverse"] {
        let name = |part: &str| format!("lstm_head.{part}_l{layer}{suffix}");
        all.push((name("weight_ih"), vec![4 * hidden, d_in], hidden));
        all.push((name("weight_hh"), vec![4 * hidden, hidden], hidden));
        all.push((name("bias_ih"), vec![4 * hidden], hidden));
        all.push((name("bias_hh"), vec![4 * hidden], hidden));
    }
    all
}

/// `x Wᵀ + b`.
fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let d_out = weight.dim(0)?;
    if let Some(bias) = bias.filter(|bias| bias.dims() != [d_out]) {
        bail!("an encoder's bias has shape {:?} beside a weight {:?}, expected [{d_out}]", bias.dims(), weight.dims());
    }
    ops::linear::reference(x, weight, bias)
}

/// `σ(x) = (1 + tanh(x / 2)) / 2`.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok(activate_reference(&x.affine(0.5, 0.0)?, Activation::Tanh)?.affine(0.5, 0.5)?)
}

impl Adapter for PTuning {
    fn virtual_rows(&self) -> usize {
        self.tensors.find(EMBEDDING).map_or(0, |embeddings| embeddings.dims()[0])
    }

    fn virtual_tokens(&self, _pass: &Pass) -> Result<Option<Value>> {
        Ok(Some(Value::of(&self.embeddings()?)))
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        let name = |name: &str| format!("prompt_encoder.{name}");
        self.tensors.variables().map(|(tensor, variable)| Parameter::new(name(tensor), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(PTuning { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(PTuning { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "p-tuning"
    }

    fn note(&self) -> Option<String> {
        let kept = self.virtual_rows() * self.shape.d_model;
        Some(format!(
            "what trains is an encoder; the virtual tokens that it makes, all that is needed afterwards, are {kept} numbers"
        ))
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let (kind, layer) = match self.encoder {
            PromptEncoder::Mlp => ("MLP", "mlp_head.0.bias"),
            PromptEncoder::Lstm => ("LSTM", "lstm_head.bias_ih_l0"),
        };
        let gates = if self.encoder == PromptEncoder::Lstm { 4 } else { 1 };
        let mut config = json!({
            "peft_type": "P_TUNING",
            "num_virtual_tokens": self.virtual_rows(),
            "encoder_reparameterization_type": kind,
            "encoder_hidden_size": self.tensors.get(layer)?.dim(0)? / gates,
            "encoder_num_layers": self.layers,
            "encoder_dropout": 0.0,
        });
        self.shape.describe(&mut config, self.shape.d_model, self.shape.heads);
        let embeddings = self.embeddings()?.detach();
        peft::write(folder, config, BTreeMap::from([(KEY.to_string(), embeddings)]), saving)?;
        peft::write_encoder(folder, &self.tensors)
    }
}
