//! The sites at which a lightweight method may change the forward pass. The transformer calls them and knows no method.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};

use super::head::Head;
use super::weights::Weights;
use crate::bail;
use crate::error::Result;
use crate::ops::{self, Value, Weight};
use crate::settings::MethodSettings;

/// What a site is told about the pass it is part of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass {
    /// Present while training with dropout.
    pub dropout: Option<StepRows>,
}

/// Where the rows of a pass stand in their optimizer step. By it the masks of dropout belong to the rows of the step, and do not change with the
/// micro-batches that it is divided into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// The seed of the step's masks.
    pub seed: u64,
    /// The rows of the step that were in passes before.
    pub first_row: usize,
}

/// A linear of the base model.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Its name on disk, without `.weight`.
    pub name: String,
    /// `[d_out, d_in]`.
    pub weight: Weight,
    /// `[d_out]`, where it has one.
    pub bias: Option<Value>,
}

/// What a method makes of a linear `y = W x + b`:
///
/// `y = output_scale ⊙ (f ⊙ (W (input_scale ⊙ x) + Σ s B A x) + b)`, where `W` and `b` are the base's unless the method has its own, and `f` is
/// 1, or with a magnitude `m` the factor `m / |W + s B A|` of each output, the norm being that of a row (DoRA, Liu et al. 2024, eq. 5).
#[derive(Debug, Clone, Default)]
pub struct LinearChange {
    /// In place of the base's weight and of all changes before this one, `[d_out, d_in]` (PEFT's `modules_to_save`).
    pub weight: Option<Weight>,
    /// In place of single rows of the weight (trainable tokens in the output matrix).
    pub rows: Option<RowsChange>,
    /// `[d_in]` (IA3 on the feed-forward).
    pub input_scale: Option<Value>,
    /// Low-rank updates (LoRA).
    pub low_rank: Vec<LowRankChange>,
    /// `m`, `[d_out]` (DoRA).
    pub magnitude: Option<Value>,
    /// In place of the base's bias, `[d_out]` (BitFit).
    pub bias: Option<Value>,
    /// `[d_out]` (IA3).
    pub output_scale: Option<Value>,
}

/// One update `s B A x`.
#[derive(Debug, Clone)]
pub struct LowRankChange {
    /// `A`, `[rank, d_in]`.
    pub down: Value,
    /// `B`, `[d_out, rank]`.
    pub up: Value,
    /// `s`.
    pub scale: f64,
    /// Probability with which elements of the update's input are dropped in training.
    pub dropout: f64,
}

/// What a method has in place of a norm's parameters, `[d_model]` each. Root-mean-square norms may be given a bias.
#[derive(Debug, Clone, Default)]
pub struct NormChange {
    /// The weight.
    pub weight: Option<Value>,
    /// The bias.
    pub bias: Option<Value>,
}

/// Rows in place of some of a matrix `[n, d]`, such as the embeddings of single tokens (PEFT's trainable tokens).
#[derive(Debug, Clone)]
pub struct RowsChange {
    /// Which rows, each once.
    pub ids: Arc<[u32]>,
    /// Their values, `[ids, d]`.
    pub values: Value,
}

impl RowsChange {
    /// The matrix `[n, d]` with these rows in it, in candle's operations.
    pub fn applied(&self, matrix: &Tensor) -> Result<Tensor> {
        let ids = Tensor::from_slice(&self.ids, self.ids.len(), matrix.device())?;
        // x - x is zero, and so is the gradient of what is replaced.
        let cleared = matrix.index_add(&ids, &matrix.index_select(&ids, 0)?.neg()?, 0)?;
        Ok(cleared.index_add(&ids, &self.values.in_candle(), 0)?)
    }

    /// The embeddings `x` `[tokens, d]` of these tokens, those of them that have a row here replaced.
    pub fn of_tokens(&self, x: &Value, tokens: &[u32]) -> Result<Value> {
        let picks = self.picks(x.dim(0)?, tokens.iter().copied());
        Value::cat_rows(&[x, &self.values])?.select_rows(&picks)
    }

    /// The outputs `y` `[rows, n]` of a linear for `x` `[rows, d]`, the columns of replaced rows of its weight replaced.
    pub fn of_outputs(&self, y: &Value, x: &Value) -> Result<Value> {
        let picks = self.picks(y.dim(1)?, 0..y.dim(1)? as u32);
        y.select_columns(&ops::linear(x, &self.values, None)?, &picks)
    }

    /// Of `count` things and the replacements, laid end to end, what belongs to each of `ids`.
    fn picks(&self, count: usize, ids: impl Iterator<Item = u32>) -> Vec<u32> {
        let places: HashMap<u32, usize> = self.ids.iter().enumerate().map(|(place, &id)| (id, place)).collect();
        let place = |(index, id): (usize, u32)| places.get(&id).map_or(index, |place| count + place) as u32;
        ids.enumerate().map(place).collect()
    }
}

/// What a method makes of the token embeddings: `e = E[token] + s B A[:, token]`, or a row of its own.
#[derive(Debug, Clone, Default)]
pub struct EmbeddingChange {
    /// In place of `E` and of all changes before this one, `[vocabulary, d_model]`.
    pub table: Option<Weight>,
    /// `A` is `[rank, vocabulary]`, `B` `[d_model, rank]`.
    pub low_rank: Option<LowRankChange>,
    /// In place of the embeddings of single tokens.
    pub rows: Option<RowsChange>,
}

/// A sub-layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubLayer {
    /// Attention, after its output projection.
    Attention,
    /// Feed-forward, after its down projection.
    FeedForward,
}

/// A norm of rows `[rows, d_model]`.
pub type RowsNorm<'a> = dyn Fn(&Value) -> Result<Value> + 'a;

/// The rows `[rows, d_model]` at which a sub-layer is left, before its output is added to the residual stream.
pub struct SubLayerRows<'a> {
    /// The block.
    pub layer: usize,
    /// The sub-layer.
    pub which: SubLayer,
    /// The residual stream, to which the output will be added.
    pub residual: &'a Value,
    /// What came out.
    pub output: Value,
    /// The norm of the sum of the two, where the family normalises it.
    pub norm: Option<&'a RowsNorm<'a>>,
}

impl SubLayerRows<'_> {
    /// The residual stream with the output in it, normalised where the family does so there.
    pub fn joined(&self) -> Result<Value> {
        let sum = self.residual.add(&self.output)?;
        self.norm.map_or(Ok(sum.clone()), |norm| norm(&sum))
    }
}

/// What a method makes of the outputs of sub-layers.
pub trait SubLayerChange {
    /// What a sub-layer adds to the residual stream, `[rows, d_model]`.
    fn output(&self, rows: SubLayerRows) -> Result<Value>;
}

/// A parameter that trains.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name, unique in a model.
    pub name: String,
    /// Its values.
    pub variable: Var,
    /// What the learning rate is multiplied with (LoRA+, Hayou et al. 2024).
    pub learning_rate_scale: f64,
}

impl Parameter {
    /// A parameter that trains at the run's learning rate.
    pub fn new(name: impl Into<String>, variable: &Var) -> Self {
        Parameter { name: name.into(), variable: variable.clone(), learning_rate_scale: 1.0 }
    }
}

/// What an adapter is saved with.
#[derive(Debug, Clone, Copy)]
pub struct Saving<'a> {
    /// How the base model is called: its folder, or its name on the hub.
    pub base: &'a str,
    /// Its revision on the hub, where the user gave one.
    pub revision: Option<&'a str>,
    /// The hash of the base's weights.
    pub base_hash: &'a str,
    /// The head that stands on top, saved with the adapter.
    pub head: Option<&'a Head>,
    /// Whether the base is the text part of the model in that folder.
    pub is_text_part: bool,
    /// Tables in place of the base's own ([`super::tables`]), by their modules, which are stored with the adapter.
    pub tables: &'a [(String, Tensor)],
    /// The element type of the files.
    pub dtype: DType,
}

/// A lightweight method: it overrides the sites it needs, and each default leaves the base model as it is.
pub trait Adapter: Send + Sync {
    /// How many rows [`Adapter::virtual_tokens`] gives.
    fn virtual_rows(&self) -> usize {
        0
    }

    /// Rows placed before the embeddings of every document, `[virtual rows, d_model]` (prompt tuning, P-tuning).
    fn virtual_tokens(&self, _pass: &Pass) -> Result<Option<Value>> {
        Ok(None)
    }

    /// How many rows [`Adapter::prefixes`] places before the keys of every layer.
    fn prefix_rows(&self) -> usize {
        0
    }

    /// For each layer, keys and values placed before its own, `[prefix rows, kv_heads * head_dim]` each, not rotated (prefix tuning,
    /// P-tuning v2); empty without.
    fn prefixes(&self) -> Result<Vec<(Value, Value)>> {
        Ok(Vec::new())
    }

    /// What becomes of the token embeddings.
    fn embedding(&self) -> Option<EmbeddingChange> {
        None
    }

    /// What becomes of the linear of this name (LoRA, BitFit, IA3). The output matrix is the linear that is called
    /// [`TensorNames::output_module`](super::architecture::TensorNames::output_module).
    fn linear(&self, _name: &str) -> Option<LinearChange> {
        None
    }

    /// What becomes of the norm of this name (BitFit, layer norms trained beside bottleneck adapters).
    fn norm(&self, _name: &str) -> Option<NormChange> {
        None
    }

    /// What becomes of the sub-layers' outputs (bottleneck adapters).
    fn sub_layer_change(&self) -> Option<&dyn SubLayerChange> {
        None
    }

    /// The blocks that its rows pass through, where these are not all.
    fn depth(&self) -> Option<usize> {
        None
    }

    /// The residual stream after the last block, `[rows, d_model]` (a probe of a language model).
    fn last_block(&self, x: Value) -> Result<Value> {
        Ok(x)
    }

    /// Number of scalars it adds to the base model.
    fn parameters(&self) -> usize;

    /// What trains.
    fn trainable_parameters(&self) -> Vec<Parameter>;

    /// The same storage seen as frozen: what is computed with it leaves no gradient.
    fn frozen(&self) -> Arc<dyn Adapter>;

    /// A copy that trains on, under the settings that concern training alone, such as dropout.
    fn trainable(&self, settings: &MethodSettings) -> Result<Arc<dyn Adapter>>;

    /// The kind of adapter, by the name of its method on the command line.
    fn method(&self) -> &'static str;

    /// What the plan should say of it.
    fn note(&self) -> Option<String> {
        None
    }

    /// The base weights with the adapter folded in.
    ///
    /// # Errors
    /// Where the method cannot be folded into weights.
    fn merge(&self, _weights: &Weights) -> Result<Weights> {
        bail!(
            "{} cannot be folded into the weights of the base model; train a lightweight method on top of it, or keep it as an adapter",
            self.method()
        )
    }

    /// Writes the adapter's folder, the head in it.
    fn save(&self, folder: &Path, saving: &Saving) -> Result<()>;
}
