//! The layers of a head.

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;
use crate::model::adapter::Parameter;
use crate::model::architecture::{Architecture, NormKind};
use crate::ops::{self, Value};
use crate::random;

/// One linear of a head.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) name: String,
    /// `[d_out, d_in]`.
    pub(super) weight: Tensor,
    /// `[d_out]`.
    pub(super) bias: Option<Tensor>,
    pub(super) variables: Vec<Parameter>,
}

/// Layer normalisation of what the last layer reads: the weight and, where there is one, the bias,
/// `[d_model]` each.
#[derive(Debug, Clone)]
pub(super) struct HeadNorm {
    pub(super) layer: Layer,
    pub(super) epsilon: f64,
}

impl HeadNorm {
    /// That of the base where it has one, or ones.
    pub(super) fn new(
        name: &str,
        architecture: &Architecture,
        pretrained: impl Fn(&str) -> Option<Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let number = |part: &str, number: f64| match pretrained(&format!("{name}.{part}")) {
            Some(found) => Ok(found),
            None => Tensor::ones(architecture.d_model, DType::F32, device)?.affine(number, 0.0),
        };
        let weight = number("weight", 1.0)?;
        let bias = (architecture.norm == NormKind::Layer).then(|| number("bias", 0.0)).transpose()?;
        let layer = Layer { name: name.to_string(), weight, bias, variables: Vec::new() };
        Ok(HeadNorm { layer, epsilon: architecture.norm_epsilon })
    }

    pub(super) fn trainable(&self) -> Result<Self> {
        Ok(HeadNorm { layer: self.layer.trainable()?, ..*self })
    }

    pub(super) fn forward(&self, x: &Value) -> Result<Value> {
        let Layer { weight, bias, .. } = &self.layer;
        let bias = match bias {
            Some(bias) => Value::of(bias),
            None => Value::constant(weight.detach().zeros_like()?),
        };
        ops::layer_norm(x, &Value::of(weight), &bias, self.epsilon)
    }
}

impl Layer {
    pub(super) fn find(name: &str, find: impl Fn(&str) -> Option<Tensor>) -> Option<Self> {
        let weight = find(&format!("{name}.weight"))?;
        Some(Layer { name: name.to_string(), weight, bias: find(&format!("{name}.bias")), variables: Vec::new() })
    }

    pub(super) fn random(
        name: &str,
        shape: [usize; 2],
        bias: bool,
        deviation: f64,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut stream = random::stream(seed, &format!("initialize {name}.weight"), 0);
        Ok(Layer {
            name: name.to_string(),
            weight: random::normal(&mut stream, &shape, deviation, device)?,
            bias: bias.then(|| Tensor::zeros(shape[0], DType::F32, device)).transpose()?,
            variables: Vec::new(),
        })
    }

    pub(super) fn trainable(&self) -> Result<Self> {
        let weight = Var::from_tensor(&self.weight)?;
        let bias = self.bias.as_ref().map(Var::from_tensor).transpose()?;
        let mut variables = vec![Parameter::new(format!("{}.weight", self.name), &weight)];
        variables.extend(bias.iter().map(|bias| Parameter::new(format!("{}.bias", self.name), bias)));
        let bias = bias.map(|bias| bias.as_tensor().clone());
        Ok(Layer { name: self.name.clone(), weight: weight.as_tensor().clone(), bias, variables })
    }

    pub(super) fn frozen(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::detach);
        Layer { name: self.name.clone(), weight: self.weight.detach(), bias, variables: Vec::new() }
    }

    pub(super) fn forward(&self, x: &Value) -> Result<Value> {
        ops::linear(x, &Value::of(&self.weight), self.bias.as_ref().map(Value::of).as_ref())
    }
}
