//! The tensors of a model: which an architecture has, and new ones from a seed. Their files are in [`super::weight_files`].

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use super::architecture::{Architecture, AttentionInput, LinearName, NormKind, Positions};
use crate::error::Result;
use crate::{bail, random};

/// What a tensor is for, which decides how a new one is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Token or position embeddings and the output matrix: normal.
    Embedding,
    /// A linear's weight: normal.
    Linear,
    /// A linear's weight that writes into the residual stream: normal, scaled down where the family does so.
    ResidualLinear,
    /// Zero.
    Bias,
    /// One.
    NormWeight,
}

/// A tensor that a model of some architecture must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name on disk, with prefix.
    pub name: String,
    /// Shape in computation: a linear is `[d_out, d_in]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Whether it lies transposed on disk.
    pub transposed: bool,
}

/// Name of the output matrix, where it is not the embeddings.
pub const OUTPUT: &str = "lm_head.weight";

/// Name of a scalar head's weight, `[1, d_model]`.
pub const SCORE: &str = "score.weight";

/// All tensors of a transformer with its output matrix, in the order of the forward pass.
pub fn tensor_specs(architecture: &Architecture) -> Vec<TensorSpec> {
    let a = architecture;
    let names = &a.names;
    let mut specs = Specs { architecture, list: Vec::new() };
    specs.push(format!("{}{}", names.prefix, names.embeddings), &[a.vocabulary, a.d_model], Role::Embedding);
    if a.positions == Positions::Learned {
        specs.push(format!("{}{}", names.prefix, names.positions), &[a.max_positions, a.d_model], Role::Embedding);
    }
    for layer in 0..a.layers {
        let block = block_prefix(a, layer);
        specs.norm(&format!("{block}{}", names.attention_norm));
        match names.attention_input {
            AttentionInput::Separate { query, key, value } => {
                specs.linear(&block, query, a.query_width(), a.d_model, Role::Linear);
                specs.linear(&block, key, a.kv_width(), a.d_model, Role::Linear);
                specs.linear(&block, value, a.kv_width(), a.d_model, Role::Linear);
            }
            AttentionInput::Packed(linear) => {
                specs.linear(&block, linear, a.query_width() + 2 * a.kv_width(), a.d_model, Role::Linear);
            }
        }
        specs.linear(&block, names.attention_output, a.d_model, a.query_width(), Role::ResidualLinear);
        specs.norm(&format!("{block}{}", names.feed_forward_norm));
        if let Some(gate) = names.gate {
            specs.linear(&block, gate, a.d_ff, a.d_model, Role::Linear);
        }
        specs.linear(&block, names.up, a.d_ff, a.d_model, Role::Linear);
        specs.linear(&block, names.down, a.d_model, a.d_ff, Role::ResidualLinear);
    }
    specs.norm(&format!("{}{}", names.prefix, names.final_norm));
    if !a.tied_output {
        specs.push(OUTPUT.to_string(), &[a.vocabulary, a.d_model], Role::Embedding);
    }
    specs.list
}

/// What stands before the names of a block's tensors, for example `model.layers.3.`.
pub fn block_prefix(architecture: &Architecture, layer: usize) -> String {
    format!("{}{}.{layer}.", architecture.names.prefix, architecture.names.blocks)
}

struct Specs<'a> {
    architecture: &'a Architecture,
    list: Vec<TensorSpec>,
}

impl Specs<'_> {
    fn push(&mut self, name: String, shape: &[usize], role: Role) {
        self.list.push(TensorSpec { name, shape: shape.to_vec(), role, transposed: false });
    }

    fn norm(&mut self, name: &str) {
        let width = self.architecture.d_model;
        self.push(format!("{name}.weight"), &[width], Role::NormWeight);
        if self.architecture.norm == NormKind::Layer {
            self.push(format!("{name}.bias"), &[width], Role::Bias);
        }
    }

    fn linear(&mut self, block: &str, linear: LinearName, d_out: usize, d_in: usize, role: Role) {
        let transposed = self.architecture.names.transposed_linears;
        let name = format!("{block}{}.weight", linear.name);
        self.list.push(TensorSpec { name, shape: vec![d_out, d_in], role, transposed });
        if linear.bias {
            self.push(format!("{block}{}.bias", linear.name), &[d_out], Role::Bias);
        }
    }
}

/// Named tensors in computation form (f32, linears `[d_out, d_in]`); those that train are variables.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    variables: BTreeMap<String, Var>,
}

impl Weights {
    /// New weights from a seed: each tensor from a stream of its own name.
    pub fn random(architecture: &Architecture, seed: u64, device: &Device) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for spec in tensor_specs(architecture) {
            let mut stream = random::stream(seed, &format!("initialize {}", spec.name), 0);
            let deviation = architecture.initializer_range;
            let residual = match architecture.scaled_residual_initialization {
                true => deviation / (2.0 * architecture.layers as f64).sqrt(),
                false => deviation,
            };
            let tensor = match spec.role {
                Role::Embedding | Role::Linear => random::normal(&mut stream, &spec.shape, deviation, device)?,
                Role::ResidualLinear => random::normal(&mut stream, &spec.shape, residual, device)?,
                Role::Bias => Tensor::zeros(&spec.shape[..], DType::F32, device)?,
                Role::NormWeight => Tensor::ones(&spec.shape[..], DType::F32, device)?,
            };
            tensors.insert(spec.name, tensor);
        }
        Ok(Weights { tensors, variables: BTreeMap::new() })
    }

    /// The tensor `name`; it was checked to be there when the weights were read.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => bail!("tensor \"{name}\" is missing from the model"),
        }
    }

    /// The tensor `name`, if the model has it.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Puts a frozen tensor in, or in place of another.
    pub fn set(&mut self, name: &str, tensor: Tensor) {
        self.variables.remove(name);
        self.tensors.insert(name.to_string(), tensor);
    }

    /// Takes a tensor out, if it is there.
    pub fn remove(&mut self, name: &str) {
        self.variables.remove(name);
        self.tensors.remove(name);
    }

    /// Puts a variable in, or in place of another.
    pub fn set_variable(&mut self, name: &str, variable: Var) {
        self.tensors.insert(name.to_string(), variable.as_tensor().clone());
        self.variables.insert(name.to_string(), variable);
    }

    /// All tensors by name, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// Those that train.
    pub fn variables(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.variables.iter()
    }

    /// The same storage seen as frozen: what is computed with it leaves no gradient. Later updates of the variables are seen.
    pub fn frozen(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect();
        Weights { tensors, variables: BTreeMap::new() }
    }

    /// A copy in which everything trains.
    pub fn trainable(&self) -> Result<Self> {
        let mut copy = Weights::default();
        for (name, tensor) in &self.tensors {
            copy.set_variable(name, Var::from_tensor(tensor)?);
        }
        Ok(copy)
    }

    /// Number of scalars.
    pub fn count(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }
}
