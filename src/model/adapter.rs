//! The sites at which a lightweight method may change the forward pass. The transformer calls them and knows no method.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::head::ScalarHead;
use super::weights::Weights;
use crate::error::Result;
use crate::ops;

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

/// A sub-layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubLayer {
    /// Attention, after its output projection.
    Attention,
    /// Feed-forward, after its down projection.
    FeedForward,
}

/// A lightweight method: it overrides the sites it needs, and each default leaves the base model as it is.
pub trait Adapter: Send + Sync {
    /// Rows placed before the embeddings of every document, `[virtual tokens, d_model]` (prompt tuning, P-tuning).
    fn virtual_tokens(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// How many rows [`Adapter::virtual_tokens`] gives.
    fn virtual_rows(&self) -> usize {
        0
    }

    /// How many rows [`Adapter::prefix`] places before the keys of every layer.
    fn prefix_rows(&self) -> usize {
        0
    }

    /// Keys and values placed before a layer's own, `[prefix rows, kv_heads * head_dim]` each, not rotated (prefix tuning, P-tuning v2).
    fn prefix(&self, _layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        Ok(None)
    }

    /// The output `[tokens, d_out]` of a linear, given its input `[tokens, d_in]` (LoRA, BitFit, IA3).
    fn linear(&self, linear: &Linear, input: &Tensor, _pass: &Pass) -> Result<Tensor> {
        ops::linear(input, &linear.weight, linear.bias.as_ref())
    }

    /// The output `[tokens, d_model]` of a sub-layer, before it is added to the residual stream (bottleneck adapters).
    fn sub_layer(&self, _layer: usize, _which: SubLayer, output: Tensor, _pass: &Pass) -> Result<Tensor> {
        Ok(output)
    }

    /// Number of scalars it adds to the base model.
    fn parameters(&self) -> usize;

    /// What trains, by name.
    fn variables(&self) -> Vec<(String, Var)>;

    /// The same storage seen as frozen: what is computed with it leaves no gradient.
    fn frozen(&self) -> Arc<dyn Adapter>;

    /// The base weights with the adapter folded in.
    fn merge(&self, weights: &Weights) -> Result<Weights>;

    /// Writes the adapter's folder, the head in it, with `base` as the name of the base model.
    fn save(&self, folder: &Path, base: &str, head: Option<&ScalarHead>) -> Result<()>;
}
