//! The tensors of a model: which an architecture has, and new ones from a seed. Their files are in [`super::weight_files`].

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_128;

use super::architecture::{Architecture, AttentionInput, FeedForward, LinearName, NormKind, Positions, QueryKeyNorms};
use super::kept::Kept;
use crate::error::Result;
use crate::ops::{PackedWeight, Weight};
use crate::{bail, random};

/// The most parameters of a model that is made from its `config.json` alone.
const MOST_NEW_PARAMETERS: f64 = (1u64 << 32) as f64;

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
    /// How it lies on disk.
    pub stored: Stored,
}

/// How a tensor lies on disk, compared with its form in computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The same.
    AsIs,
    /// Transposed (GPT-2's linears).
    Transposed,
    /// Each number less one (Gemma's norms).
    LessOne,
}

/// All tensors of a transformer with its output matrix, in the order of the forward pass.
pub fn tensor_specs(architecture: &Architecture) -> Vec<TensorSpec> {
    let a = architecture;
    let names = &a.names;
    let mut specs = Specs { architecture, list: Vec::new() };
    let named = |name: &str| format!("{}{name}", names.prefix);
    specs.push(embedding_name(a), &[a.vocabulary, a.d_model], Role::Embedding);
    if a.positions == Positions::Learned {
        specs.push(named(names.positions), &[a.max_positions, a.d_model], Role::Embedding);
    }
    if let Some(name) = names.token_types {
        specs.push(named(name), &[a.token_types, a.d_model], Role::Embedding);
    }
    if let Some(norm) = names.embedding_norm {
        specs.norm(&named(norm), a.d_model);
    }
    (0..a.layers).for_each(|layer| specs.block(layer));
    if let Some(norm) = names.final_norm {
        specs.norm(&named(norm), a.d_model);
    }
    if let Some(output) = output_name(a) {
        specs.push(output.to_string(), &[a.vocabulary, a.d_model], Role::Embedding);
    }
    specs.list
}

/// Name of the token embeddings.
pub fn embedding_name(architecture: &Architecture) -> String {
    format!("{}{}", architecture.names.prefix, architecture.names.embeddings)
}

/// Name of the output matrix, where there is one beside the embeddings; an encoder has none.
pub fn output_name(architecture: &Architecture) -> Option<&'static str> {
    (architecture.causal && !architecture.tied_output).then_some(architecture.names.output)
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
        self.list.push(TensorSpec { name, shape: shape.to_vec(), role, stored: Stored::AsIs });
    }

    fn block(&mut self, layer: usize) {
        let a = self.architecture;
        let names = &a.names;
        let block = &*block_prefix(a, layer);
        let named = |name: &str| format!("{block}{name}");
        if let Some(norm) = names.attention_norm.filter(|_| layer > 0 || a.first_attention_norm) {
            self.norm(&named(norm), a.d_model);
        }
        match names.attention_input {
            AttentionInput::Separate { query, key, value } => {
                self.linear(block, query, a.query_width(), a.d_model, Role::Linear);
                self.linear(block, key, a.kv_width(), a.d_model, Role::Linear);
                self.linear(block, value, a.kv_width(), a.d_model, Role::Linear);
            }
            AttentionInput::Packed(linear) | AttentionInput::PackedByHead(linear) => {
                self.linear(block, linear, a.query_width() + 2 * a.kv_width(), a.d_model, Role::Linear);
            }
        }
        if let Some(norms) = names.query_key_norms {
            let widths = match norms {
                QueryKeyNorms::ByHead(_) => [a.head_dim; 2],
                QueryKeyNorms::Whole(_) => [a.query_width(), a.kv_width()],
            };
            for (norm, width) in norms.names().into_iter().zip(widths) {
                self.norm(&named(norm), width);
            }
        }
        self.linear(block, names.attention_output, a.d_model, a.query_width(), Role::ResidualLinear);
        let outer = [names.feed_forward_norm, names.attention_output_norm, names.feed_forward_output_norm];
        for norm in outer.into_iter().flatten() {
            self.norm(&named(norm), a.d_model);
        }
        if let Some(gate) = names.gate {
            self.linear(block, gate, a.d_ff, a.d_model, Role::Linear);
        }
        let up_width = if matches!(a.feed_forward, FeedForward::GatedPacked(_)) { 2 * a.d_ff } else { a.d_ff };
        self.linear(block, names.up, up_width, a.d_model, Role::Linear);
        self.linear(block, names.down, a.d_model, a.d_ff, Role::ResidualLinear);
    }

    fn norm(&mut self, name: &str, width: usize) {
        let stored = if self.architecture.names.norm_weights_less_one { Stored::LessOne } else { Stored::AsIs };
        let (name, role) = (name.to_string(), Role::NormWeight);
        self.list.push(TensorSpec { name: format!("{name}.weight"), shape: vec![width], role, stored });
        if self.architecture.norm == NormKind::Layer {
            self.push(format!("{name}.bias"), &[width], Role::Bias);
        }
    }

    fn linear(&mut self, block: &str, linear: LinearName, d_out: usize, d_in: usize, role: Role) {
        let stored = if self.architecture.names.transposed_linears { Stored::Transposed } else { Stored::AsIs };
        let name = format!("{block}{}.weight", linear.name);
        self.list.push(TensorSpec { name, shape: vec![d_out, d_in], role, stored });
        if linear.bias {
            self.push(format!("{block}{}.bias", linear.name), &[d_out], Role::Bias);
        }
    }
}

/// Named tensors in computation form; those that train are variables, and frozen matrices may be kept in
/// fewer bytes than f32.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Kept>,
    variables: BTreeMap<String, Var>,
    /// Whether some of the tensors are variables' storage, whose numbers change.
    is_view: bool,
    /// [`Weights::hash`], once it is known, of numbers that do not change.
    hash: OnceLock<String>,
    /// What tensors whose numbers never change are packed to for products.
    packed: BTreeMap<String, Arc<PackedWeight>>,
}

impl Weights {
    /// New weights from a seed: each tensor from a stream of its own name.
    pub fn random(architecture: &Architecture, seed: u64, device: &Device) -> Result<Self> {
        let specs = tensor_specs(architecture);
        let numbers = |spec: &TensorSpec| spec.shape.iter().map(|&size| size as f64).product::<f64>();
        let count: f64 = specs.iter().map(numbers).sum();
        if count > MOST_NEW_PARAMETERS {
            bail!(
                "a new model of this config.json would have {count:.2e} parameters, expected at most {MOST_NEW_PARAMETERS:.2e}; lower its sizes, or put the model's weights beside it"
            );
        }
        let mut tensors = BTreeMap::new();
        for spec in specs {
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
            tensors.insert(spec.name, Kept::Plain(tensor));
        }
        Ok(Weights { tensors, ..Weights::default() }.fixed())
    }

    /// The tensor `name` in f32; it was checked to be there when the weights were read.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        Ok(self.needed(name)?.to_tensor())
    }

    /// The tensor `name` in f32, if the model has it.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).map(Kept::to_tensor)
    }

    /// Whether the model has the tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether the tensor `name` has the numbers of this one where the model was read, quantised or not.
    pub fn was_read_as(&self, name: &str, tensor: &Tensor) -> Result<bool> {
        let other = Kept::Plain(tensor.clone());
        Ok(match self.tensors.get(name) {
            Some(kept) => kept.dims() == other.dims() && kept.hash()? == other.hash()?,
            None => false,
        })
    }

    /// The matrix `name` for products, which are made in the precision that is set.
    pub fn matrix(&self, name: &str) -> Result<Weight> {
        let packed = self.packed.get(name);
        Ok(match self.needed(name)? {
            Kept::Plain(tensor) => Weight::new(tensor, packed),
            Kept::Compact { matrix, .. } => Weight::compact(matrix, packed),
        })
    }

    fn needed(&self, name: &str) -> Result<&Kept> {
        match self.tensors.get(name) {
            Some(kept) => Ok(kept),
            None => bail!("tensor \"{name}\" is missing from the model"),
        }
    }

    /// These weights as ones that were just made or read, so that the numbers of those that do not train
    /// never change: nothing else shares their storage. What they are packed to for products is then kept.
    pub fn fixed(mut self) -> Self {
        for (name, kept) in &self.tensors {
            if kept.dims().len() == 2 && !self.variables.contains_key(name) {
                self.packed.entry(name.clone()).or_default();
            }
        }
        self
    }

    /// Puts a frozen tensor in, or in place of another. It may share the storage of a variable.
    pub fn set(&mut self, name: &str, tensor: Tensor) {
        self.set_kept(name, Kept::Plain(tensor));
    }

    /// The same, in whatever form it is kept.
    pub fn set_kept(&mut self, name: &str, kept: Kept) {
        self.remove(name);
        self.tensors.insert(name.to_string(), kept);
    }

    /// Puts the tensor `from` in under another name too; both are then one.
    pub fn set_same(&mut self, name: &str, from: &str) -> Result<()> {
        let kept = self.needed(from)?.detach();
        self.set_kept(name, kept);
        Ok(())
    }

    /// Takes a tensor out, if it is there.
    pub fn remove(&mut self, name: &str) {
        self.hash.take();
        self.packed.remove(name);
        self.variables.remove(name);
        self.tensors.remove(name);
    }

    /// Puts a variable in, or in place of another.
    pub fn set_variable(&mut self, name: &str, variable: Var) {
        self.hash.take();
        self.packed.remove(name);
        self.tensors.insert(name.to_string(), Kept::Plain(variable.as_tensor().clone()));
        self.variables.insert(name.to_string(), variable);
    }

    /// All tensors in f32 by name, in the order of their names. Each is widened when its turn comes.
    pub fn iter(&self) -> impl Iterator<Item = (&String, Tensor)> {
        self.tensors.iter().map(|(name, kept)| (name, kept.to_tensor()))
    }

    /// The same as they are kept.
    pub fn kept(&self) -> impl Iterator<Item = (&String, &Kept)> {
        self.tensors.iter()
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// Those that train.
    pub fn variables(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.variables.iter()
    }

    /// The same storage seen as frozen: what is computed with it leaves no gradient. Later updates of the variables are seen.
    pub fn frozen(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, kept)| (name.clone(), kept.detach())).collect();
        let is_view = self.is_view || !self.variables.is_empty();
        Weights { tensors, is_view, packed: self.packed.clone(), ..Weights::default() }
    }

    /// The same, to be dropped before a variable is updated: what its tensors are packed to for products is
    /// kept as long.
    pub fn snapshot(&self) -> Self {
        self.frozen().fixed()
    }

    /// A copy in which everything trains.
    pub fn trainable(&self) -> Result<Self> {
        let mut copy = Weights::default();
        for (name, kept) in &self.tensors {
            copy.set_variable(name, Var::from_tensor(&kept.to_tensor())?);
        }
        Ok(copy)
    }

    /// A hash of names, shapes and values, by which an adapter knows the base that it belongs to (XXH3, 128 bits, in hexadecimal). It does not
    /// depend on how the weights lie on disk or in memory. Of weights that do not train it is computed once.
    pub fn hash(&self) -> Result<String> {
        if self.is_view || !self.variables.is_empty() {
            return self.hash_of_numbers();
        }
        if let Some(hash) = self.hash.get() {
            return Ok(hash.clone());
        }
        let hash = self.hash_of_numbers()?;
        Ok(self.hash.get_or_init(|| hash).clone())
    }

    fn hash_of_numbers(&self) -> Result<String> {
        // Those in fewer bytes are widened by all threads, one tensor after the other; others are hashed side
        // by side.
        let is_plain = |kept: &Kept| matches!(kept, Kept::Plain(_));
        let early = |kept: &Kept| if is_plain(kept) { Ok(None) } else { kept.hash().map(Some) };
        let hashes = self.tensors.values().map(early).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<((&String, &Kept), Option<u128>)> = self.tensors.iter().zip(hashes).collect();
        let of_tensor = |((name, kept), hash): &((&String, &Kept), Option<u128>)| -> Result<Vec<u8>> {
            let (shape, hash) = (format!("{:?}", kept.dims()), hash.map_or_else(|| kept.hash(), Ok)?);
            Ok([name.as_bytes(), shape.as_bytes(), &hash.to_le_bytes()].concat())
        };
        let hashes = tensors.par_iter().map(of_tensor).collect::<Result<Vec<_>>>()?;
        Ok(format!("{:032x}", xxh3_128(&hashes.concat())))
    }

    /// Number of scalars.
    pub fn count(&self) -> usize {
        self.tensors.values().map(Kept::count).sum()
    }

    /// The bytes that they take, apart from what is packed.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(Kept::bytes).sum()
    }

    /// The bytes of what they are packed to for products in bf16.
    pub fn packed_bytes(&self) -> usize {
        let of = |kept: &Kept| match kept {
            Kept::Plain(tensor) if tensor.rank() == 2 => 2 * tensor.elem_count(),
            Kept::Compact { matrix, .. } if !matrix.form().is_quantised() => 2 * kept.count(),
            _ => 0,
        };
        self.tensors.values().map(of).sum()
    }

    /// In which forms they are kept, and how many numbers in each, the most first.
    pub fn forms(&self) -> Vec<(String, usize)> {
        let mut forms: BTreeMap<String, usize> = BTreeMap::new();
        for kept in self.tensors.values() {
            let form = match kept {
                Kept::Plain(_) => "f32".to_string(),
                Kept::Compact { matrix, .. } => matrix.form().to_string(),
            };
            *forms.entry(form).or_default() += kept.count();
        }
        let mut forms: Vec<(String, usize)> = forms.into_iter().collect();
        forms.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        forms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Compact, CompactForm};

    #[test]
    fn only_what_never_changes_is_kept_packed() -> Result<()> {
        let mut weights = Weights::default();
        let ones = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
        ["a", "b", "c"].into_iter().for_each(|name| weights.set(name, ones.clone()));
        assert!(weights.packed.is_empty());
        weights.set("bias", ones.get(0)?);
        let mut fixed = weights.fixed();
        let names = |weights: &Weights| weights.packed.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&fixed), ["a", "b", "c"]);
        // Copies and frozen views share it.
        for copy in [fixed.clone(), fixed.frozen(), fixed.snapshot()] {
            assert!(copy.packed.iter().all(|(name, packed)| Arc::ptr_eq(packed, &fixed.packed[name])));
        }
        // What is put in may be a view of a variable, and is none of what was packed.
        fixed.set("a", ones.clone());
        fixed.set_variable("b", Var::from_tensor(&ones)?);
        assert_eq!(names(&fixed), ["c"]);
        let view = fixed.frozen();
        assert_eq!(names(&view), ["c"]);
        assert_eq!(names(&fixed.trainable()?), [""; 0]);
        // A snapshot is of numbers of its time.
        let snapshots = [fixed.snapshot(), view.snapshot()];
        assert_eq!(snapshots.each_ref().map(names), [["a", "b", "c"]; 2]);
        assert!(!Arc::ptr_eq(&snapshots[0].packed["b"], &snapshots[1].packed["b"]));
        fixed.remove("c");
        assert_eq!(names(&fixed), [""; 0]);
        Ok(())
    }

    #[test]
    fn a_hash_is_of_the_numbers_as_they_are() -> Result<()> {
        let ones = Tensor::ones(4, DType::F32, &Device::Cpu)?;
        let of = |tensor: &Tensor| {
            let mut weights = Weights::default();
            weights.set("a", tensor.clone());
            weights
        };
        let mut weights = of(&ones);
        let hash = weights.hash()?;
        assert_eq!((weights.hash()?, weights.clone().hash()?), (hash.clone(), hash.clone()));
        let many: Vec<f32> = (0..50_000).map(|index| index as f32 * 0.3).collect();
        let bytes: Vec<u8> = many.iter().flat_map(|value| value.to_le_bytes()).collect();
        let many = Tensor::from_vec(many, (100, 500), &Device::Cpu)?;
        assert_eq!(Kept::Plain(many.clone()).hash()?, xxh3_128(&bytes));
        // Kept in fewer bytes, it is of the same numbers, or of those that were stored.
        let matrix = Compact::of(&many, CompactForm::BF16)?;
        let widened = Kept::Plain(matrix.to_tensor()).hash()?;
        let compact = |hash| Kept::Compact { matrix: matrix.clone(), hash };
        assert_eq!(compact(None).hash()?, widened);
        assert_ne!(widened, xxh3_128(&bytes));
        assert_eq!(compact(Some(7)).hash()?, 7);
        weights.set("b", ones.clone());
        assert_ne!(weights.hash()?, hash);
        weights.remove("b");
        assert_eq!(weights.hash()?, hash);
        weights.set("a", ones.zeros_like()?);
        assert_eq!(weights.hash()?, of(&ones.zeros_like()?).hash()?);
        // Variables change in place, and what sees their storage with them.
        let trained = of(&ones).trainable()?;
        let views = [trained.frozen(), trained.frozen().frozen()];
        assert!(trained.hash()? == hash && views[0].hash()? == hash && views[1].hash()? == hash);
        trained.variables["a"].set(&ones.zeros_like()?)?;
        for weights in std::iter::once(&trained).chain(&views) {
            assert_eq!(weights.hash()?, of(&ones.zeros_like()?).hash()?);
        }
        Ok(())
    }
}
