//! The sites at which a lightweight method may change the forward pass. The transformer calls them and knows no method.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::head::Head;
use super::weights::Weights;
use crate::bail;
use crate::error::Result;
use crate::settings::MethodSettings;

/// What a site is told about the pass it is part of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass {
    /// Present while training with dropout: the seed of this pass's masks.
    pub dropout_seed: Option<u64>,
}

/// A linear of the base model.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Its name on disk, without `.weight`.
    pub name: String,
    /// `[d_out, d_in]`.
    pub weight: Tensor,
    /// `[d_out]`, where it has one.
    pub bias: Option<Tensor>,
}

/// What a method makes of a linear `y = W x + b`:
///
/// `y = output_scale ⊙ (f ⊙ (W (input_scale ⊙ x) + Σ s B A x) + b)`, where `b` is the base's unless the method has its own, and `f` is
/// 1, or with a magnitude `m` the factor `m / |W + s B A|` of each output, the norm being that of a row (DoRA, Liu et al. 2024, eq. 5).
#[derive(Debug, Clone, Default)]
pub struct LinearChange {
    /// `[d_in]` (IA3 on the feed-forward).
    pub input_scale: Option<Tensor>,
    /// Low-rank updates (LoRA).
    pub low_rank: Vec<LowRankChange>,
    /// `m`, `[d_out]` (DoRA).
    pub magnitude: Option<Tensor>,
    /// In place of the base's bias, `[d_out]` (BitFit).
    pub bias: Option<Tensor>,
    /// `[d_out]` (IA3).
    pub output_scale: Option<Tensor>,
}

/// One update `s B A x`.
#[derive(Debug, Clone)]
pub struct LowRankChange {
    /// `A`, `[rank, d_in]`.
    pub down: Tensor,
    /// `B`, `[d_out, rank]`.
    pub up: Tensor,
    /// `s`.
    pub scale: f64,
    /// Probability with which elements of the update's input are dropped in training.
    pub dropout: f64,
}

/// What a method has in place of a norm's parameters, `[d_model]` each. Root-mean-square norms may be given a bias.
#[derive(Debug, Clone, Default)]
pub struct NormChange {
    /// The weight.
    pub weight: Option<Tensor>,
    /// The bias.
    pub bias: Option<Tensor>,
}

/// What a method makes of the token embeddings: `e = E[token] + s B A[:, token]`.
#[derive(Debug, Clone, Default)]
pub struct EmbeddingChange {
    /// In place of `E`, `[vocabulary, d_model]`.
    pub table: Option<Tensor>,
    /// `A` is `[rank, vocabulary]`, `B` `[d_model, rank]`.
    pub low_rank: Option<LowRankChange>,
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
pub type RowsNorm<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

/// The rows `[rows, d_model]` at which a sub-layer is left, before its output is added to the residual stream.
pub struct SubLayerRows<'a> {
    /// The block.
    pub layer: usize,
    /// The sub-layer.
    pub which: SubLayer,
    /// The residual stream, to which the output will be added.
    pub residual: &'a Tensor,
    /// What came out.
    pub output: Tensor,
    /// The norm of the sum of the two, where the family normalises it.
    pub norm: Option<&'a RowsNorm<'a>>,
}

impl SubLayerRows<'_> {
    /// The residual stream with the output in it, normalised where the family does so there.
    pub fn joined(&self) -> Result<Tensor> {
        let sum = (self.residual + &self.output)?;
        self.norm.map_or(Ok(sum.clone()), |norm| norm(&sum))
    }
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
}

/// A lightweight method: it overrides the sites it needs, and each default leaves the base model as it is.
pub trait Adapter: Send + Sync {
    /// How many rows [`Adapter::virtual_tokens`] gives.
    fn virtual_rows(&self) -> usize {
        0
    }

    /// Rows placed before the embeddings of every document, `[virtual rows, d_model]` (prompt tuning, P-tuning).
    fn virtual_tokens(&self, _pass: &Pass) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// How many rows [`Adapter::prefixes`] places before the keys of every layer.
    fn prefix_rows(&self) -> usize {
        0
    }

    /// For each layer, keys and values placed before its own, `[prefix rows, kv_heads * head_dim]` each, not rotated (prefix tuning,
    /// P-tuning v2); empty without.
    fn prefixes(&self) -> Result<Vec<(Tensor, Tensor)>> {
        Ok(Vec::new())
    }

    /// What becomes of the token embeddings.
    fn embedding(&self) -> Option<EmbeddingChange> {
        None
    }

    /// What becomes of the linear of this name (LoRA, BitFit, IA3).
    fn linear(&self, _name: &str) -> Option<LinearChange> {
        None
    }

    /// What becomes of the norm of this name (BitFit, layer norms trained beside bottleneck adapters).
    fn norm(&self, _name: &str) -> Option<NormChange> {
        None
    }

    /// What a sub-layer adds to the residual stream, `[rows, d_model]` (bottleneck adapters).
    fn sub_layer(&self, rows: SubLayerRows) -> Result<Tensor> {
        Ok(rows.output)
    }

    /// The blocks that its rows pass through, where these are not all.
    fn depth(&self) -> Option<usize> {
        None
    }

    /// The residual stream after the last block, `[rows, d_model]` (a probe of a language model).
    fn last_block(&self, x: Tensor) -> Result<Tensor> {
        Ok(x)
    }

    /// In place of the output matrix, `[vocabulary, d_model]`.
    fn output(&self) -> Option<Tensor> {
        None
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
