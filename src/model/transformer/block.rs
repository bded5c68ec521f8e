//! One block of the transformer: attention and feed-forward, in the order and with the norms of the family.

use std::sync::Arc;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{KeyValueStore, Transformer};
use crate::error::Result;
use crate::model::adapter::{Linear, NormChange, Pass, SubLayer};
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, FeedForward, LinearName, NormKind, QueryKeyNorms,
};
use crate::model::layout::Layout;
use crate::model::sites::{Sites, Stack, SumNorm};
use crate::model::weights::{Weights, block_prefix};
use crate::ops::{self, Value};

#[derive(Debug, Clone)]
pub(super) struct Block {
    attention_norm: Option<Norm>,
    attention_input: AttentionProjection,
    query_key_norms: Option<[Norm; 2]>,
    attention_output: Linear,
    attention_output_norm: Option<Norm>,
    feed_forward_norm: Option<Norm>,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    feed_forward_output_norm: Option<Norm>,
}

#[derive(Debug, Clone)]
enum AttentionProjection {
    Separate { query: Linear, key: Linear, value: Linear },
    Packed(Linear),
    PackedByHead(Linear),
}

#[derive(Debug, Clone)]
pub(super) struct Norm {
    name: String,
    weight: Value,
    bias: Option<Value>,
    epsilon: f64,
}

/// Cosines and sines of a stream's rotary angles, `[rows, rotary dimensions / 2]` each.
#[derive(Clone)]
pub(super) struct Angles {
    pub cos: Tensor,
    pub sin: Tensor,
}

/// What a block needs to be run again in the backward pass.
#[derive(Clone)]
pub(super) struct Again {
    architecture: Arc<Architecture>,
    blocks: Arc<[Block]>,
    layout: Arc<Layout>,
    stacks: Arc<[Stack]>,
    pass: Pass,
}

impl Again {
    pub(super) fn new(transformer: &Transformer, layout: &Layout, stacks: &[Stack], pass: &Pass) -> Self {
        Again {
            architecture: transformer.architecture.clone(),
            blocks: transformer.blocks.clone(),
            layout: Arc::new(layout.clone()),
            stacks: stacks.into(),
            pass: *pass,
        }
    }

    /// The residual stream after a block, of which nothing but the input is kept.
    pub(super) fn block(
        &self,
        layer: usize,
        x: &Value,
        prefix: Option<&(Value, Value)>,
        angles: Option<&Angles>,
    ) -> Result<Value> {
        let (again, angles) = (self.clone(), angles.cloned());
        let inputs: Vec<&Value> = match prefix {
            Some((keys, values)) => vec![x, keys, values],
            None => vec![x],
        };
        ops::checkpoint(&inputs, move |inputs, is_run_again| {
            let Again { architecture, blocks, layout, stacks, pass } = &again;
            let sites = Sites { stacks, groups: &layout.groups, pass };
            let run = if is_run_again { Run::ForGradients } else { Run::Once };
            let context = Context { architecture, layout, sites: &sites, layer, angles: angles.as_ref(), run };
            let prefix = inputs.get(1).cloned().zip(inputs.get(2).cloned());
            context.block(&blocks[layer], inputs[0].clone(), prefix.as_ref(), None)
        })
    }
}

/// What the parts of one block share during a pass.
pub(super) struct Context<'a> {
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
    pub sites: &'a Sites<'a>,
    pub layer: usize,
    pub angles: Option<&'a Angles>,
    pub run: Run,
}

/// What a block is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// For what it gives.
    Once,
    /// Again, for its gradients: nothing reads what it gives.
    ForGradients,
    /// For the next tokens of sequences, without gradients: mostly a row of each.
    Generation,
}

/// Rows up to which several products with them are made side by side.
const FEW_ROWS: usize = 64;

impl Context<'_> {
    /// The residual stream `[rows, d_model]` after a block.
    pub(super) fn block(
        &self,
        block: &Block,
        x: Value,
        prefix: Option<&(Value, Value)>,
        store: Option<&mut dyn KeyValueStore>,
    ) -> Result<Value> {
        let form = self.architecture.block;
        let attention_norm = |sum: &Value, sites: &Sites| normed(block.attention_norm.as_ref(), sum, sites);
        let feed_forward_norm = |sum: &Value, sites: &Sites| normed(block.feed_forward_norm.as_ref(), sum, sites);
        let is_after = form == BlockForm::PostNorm;
        let attend = |input: &Value, residual: &Value, store| {
            let output = self.attention(block, input, prefix, store)?;
            let output = self.output(block.attention_output_norm.as_ref(), output)?;
            let norm: Option<&SumNorm> = if is_after { Some(&attention_norm) } else { None };
            self.sites.sub_layer((self.layer, SubLayer::Attention), residual, output, norm)
        };
        let transform = |input: &Value, residual: &Value| {
            let output = self.output(block.feed_forward_output_norm.as_ref(), self.feed_forward(block, input)?)?;
            let norm: Option<&SumNorm> = if is_after { Some(&feed_forward_norm) } else { None };
            self.sites.sub_layer((self.layer, SubLayer::FeedForward), residual, output, norm)
        };
        match form {
            BlockForm::PreNorm | BlockForm::OutputNorm | BlockForm::Sandwich => {
                let x = x.add(&attend(&attention_norm(&x, self.sites)?, &x, store)?)?;
                x.add(&transform(&feed_forward_norm(&x, self.sites)?, &x)?)
            }
            BlockForm::Parallel => {
                let attended = attend(&attention_norm(&x, self.sites)?, &x, store)?;
                let transformed = transform(&feed_forward_norm(&x, self.sites)?, &x)?;
                x.add(&attended)?.add(&transformed)
            }
            BlockForm::PostNorm => {
                let x = attention_norm(&x.add(&attend(&x, &x, store)?)?, self.sites)?;
                feed_forward_norm(&x.add(&transform(&x, &x)?)?, self.sites)
            }
        }
    }

    /// What a sub-layer gives, given what its last linear gives.
    fn output(&self, norm: Option<&Norm>, output: Value) -> Result<Value> {
        let output = normed(norm, &output, self.sites)?;
        self.architecture.residual_scale.map_or(Ok(output.clone()), |scale| output.scale(scale))
    }

    fn linear(&self, linear: &Linear, x: &Value) -> Result<Value> {
        self.sites.linear(linear, x)
    }

    /// Several linears of the same rows, side by side for the few rows of generation: of a small model each alone is
    /// over before all threads are awake.
    fn linears<const N: usize>(&self, linears: [&Linear; N], x: &Value) -> Result<[Value; N]> {
        let outputs: Vec<Value> = match self.run == Run::Generation && x.dim(0)? <= FEW_ROWS {
            true => linears.par_iter().map(|linear| self.linear(linear, x)).collect::<Result<_>>()?,
            false => linears.iter().map(|linear| self.linear(linear, x)).collect::<Result<_>>()?,
        };
        Ok(outputs.try_into().expect("an output of each linear"))
    }

    /// The last linear of a sub-layer; `norm` is that of what it gives.
    fn last_linear(&self, which: SubLayer, linear: &Linear, norm: Option<&Norm>, x: &Value) -> Result<Value> {
        // Between it and the block's output there are sums and a constant factor, which need no numbers to pass a
        // gradient on.
        let is_added = match self.architecture.block {
            BlockForm::PreNorm | BlockForm::OutputNorm | BlockForm::Sandwich => which == SubLayer::FeedForward,
            BlockForm::Parallel => true,
            BlockForm::PostNorm => false,
        };
        match self.run == Run::ForGradients && is_added && norm.is_none() {
            true => self.sites.unread_linear(linear, x),
            false => self.linear(linear, x),
        }
    }

    fn attention(
        &self,
        block: &Block,
        x: &Value,
        prefix: Option<&(Value, Value)>,
        store: Option<&mut dyn KeyValueStore>,
    ) -> Result<Value> {
        let architecture = self.architecture;
        let shape = ops::AttentionShape {
            heads: architecture.heads,
            kv_heads: architecture.kv_heads,
            head_dim: architecture.head_dim,
            scale: architecture.attention_scale,
            soft_cap: architecture.attention_soft_cap,
            window: architecture.windows[self.layer],
            causal: architecture.causal,
        };
        let plan = &self.layout.plan;
        let attended = match &block.attention_input {
            AttentionProjection::Packed(linear) if self.angles.is_none() && prefix.is_none() && store.is_none() => {
                ops::attention_packed(&self.linear(linear, x)?, &shape, plan)?
            }
            _ => {
                let (q, k, v) = self.queries_keys_values(block, x)?;
                let (k, v) = match (prefix, store) {
                    (_, Some(store)) => {
                        let (keys, values) = store.extend(self.layer, k.tensor().clone(), v.tensor().clone())?;
                        (Value::constant(keys), Value::constant(values))
                    }
                    (Some((keys, values)), None) => (Value::cat_rows(&[keys, &k])?, Value::cat_rows(&[values, &v])?),
                    (None, None) => (k, v),
                };
                ops::attention(&q, &k, &v, &shape, plan)?
            }
        }; // [rows, heads * head_dim]
        let norm = block.attention_output_norm.as_ref();
        self.last_linear(SubLayer::Attention, &block.attention_output, norm, &attended)
    }

    fn queries_keys_values(&self, block: &Block, x: &Value) -> Result<(Value, Value, Value)> {
        let architecture = self.architecture;
        let head_dim = architecture.head_dim;
        let (mut q, mut k, v) = match &block.attention_input {
            AttentionProjection::Separate { query, key, value } => self.linears([query, key, value], x)?.into(),
            AttentionProjection::Packed(linear) => {
                let packed = self.linear(linear, x)?;
                let (q_width, kv_width) = (architecture.query_width(), architecture.kv_width());
                (
                    packed.narrow_columns(0, q_width)?,
                    packed.narrow_columns(q_width, kv_width)?,
                    packed.narrow_columns(q_width + kv_width, kv_width)?,
                )
            }
            AttentionProjection::PackedByHead(linear) => {
                let rows = x.dim(0)?;
                // Of every head, queries, keys and values side by side.
                let packed = self.linear(linear, x)?.reshape((rows * architecture.heads, 3 * head_dim))?;
                let part = |index: usize| -> Result<Value> {
                    packed.narrow_columns(index * head_dim, head_dim)?.reshape((rows, architecture.query_width()))
                };
                (part(0)?, part(1)?, part(2)?)
            }
        };
        if let Some([query_norm, key_norm]) = &block.query_key_norms {
            let widths = match architecture.names.query_key_norms {
                Some(QueryKeyNorms::Whole(_)) => [architecture.query_width(), architecture.kv_width()],
                _ => [head_dim; 2],
            };
            q = query_norm.forward_by_part(&q, widths[0], self.sites)?;
            k = key_norm.forward_by_part(&k, widths[1], self.sites)?;
        }
        match self.angles {
            None => Ok((q, k, v)),
            Some(Angles { cos, sin }) => {
                Ok((ops::rotary(&q, cos, sin, head_dim)?, ops::rotary(&k, cos, sin, head_dim)?, v))
            }
        }
    }

    fn feed_forward(&self, block: &Block, x: &Value) -> Result<Value> {
        let inner = match (self.architecture.feed_forward, &block.gate) {
            (FeedForward::Gated(activation), Some(gate)) => {
                let [up, gate] = self.linears([&block.up, gate], x)?; // [rows, d_ff] each
                ops::gated(&gate, &up, activation)?
            }
            (FeedForward::GatedPacked(activation), _) => {
                let d_ff = self.architecture.d_ff;
                let up = self.linear(&block.up, x)?; // [rows, 2 d_ff], the gate first
                ops::gated(&up.narrow_columns(0, d_ff)?, &up.narrow_columns(d_ff, d_ff)?, activation)?
            }
            (FeedForward::Plain(activation) | FeedForward::Gated(activation), _) => {
                ops::activate(&self.linear(&block.up, x)?, activation)?
            }
        }; // [rows, d_ff]
        self.last_linear(SubLayer::FeedForward, &block.down, block.feed_forward_output_norm.as_ref(), &inner)
    }
}

impl Block {
    pub(super) fn new(architecture: &Architecture, weights: &Weights, layer: usize) -> Result<Self> {
        let names = &architecture.names;
        let prefix = block_prefix(architecture, layer);
        let linear = |name: LinearName| read_linear(weights, &prefix, name);
        let norm = |name: &str| Norm::new(architecture, weights, &format!("{prefix}{name}"));
        let query_key_norms = match names.query_key_norms.map(QueryKeyNorms::names) {
            Some([query, key]) => Some([norm(query)?, norm(key)?]),
            None => None,
        };
        let attention_norm = names.attention_norm.filter(|_| layer > 0 || architecture.first_attention_norm);
        Ok(Block {
            attention_norm: attention_norm.map(norm).transpose()?,
            attention_input: match names.attention_input {
                AttentionInput::Separate { query, key, value } => {
                    AttentionProjection::Separate { query: linear(query)?, key: linear(key)?, value: linear(value)? }
                }
                AttentionInput::Packed(packed) => AttentionProjection::Packed(linear(packed)?),
                AttentionInput::PackedByHead(packed) => AttentionProjection::PackedByHead(linear(packed)?),
            },
            query_key_norms,
            attention_output: linear(names.attention_output)?,
            attention_output_norm: names.attention_output_norm.map(norm).transpose()?,
            feed_forward_norm: names.feed_forward_norm.map(norm).transpose()?,
            gate: names.gate.map(linear).transpose()?,
            up: linear(names.up)?,
            down: linear(names.down)?,
            feed_forward_output_norm: names.feed_forward_output_norm.map(norm).transpose()?,
        })
    }
}

fn read_linear(weights: &Weights, prefix: &str, linear: LinearName) -> Result<Linear> {
    let name = format!("{prefix}{}", linear.name);
    let weight = weights.matrix(&format!("{name}.weight"))?;
    let bias = linear.bias.then(|| weights.get(&format!("{name}.bias"))).transpose()?;
    Ok(Linear { name, weight, bias: bias.as_ref().map(Value::of) })
}

impl Norm {
    pub(super) fn new(architecture: &Architecture, weights: &Weights, name: &str) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?;
        let bias = match architecture.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(Value::of(&weights.get(&format!("{name}.bias"))?)),
            NormKind::LayerWithoutBias => Some(Value::constant(weight.detach().zeros_like()?)),
        };
        let weight = Value::of(&weight);
        Ok(Norm { name: name.to_string(), weight, bias, epsilon: architecture.norm_epsilon })
    }

    pub(super) fn forward(&self, x: &Value, sites: &Sites) -> Result<Value> {
        sites.norm(&self.name, x, |x, change| self.changed(x, change))
    }

    /// Normalises each part of `x` `[rows, parts * part]` by itself.
    fn forward_by_part(&self, x: &Value, part: usize, sites: &Sites) -> Result<Value> {
        sites.norm(&self.name, x, |x, change| {
            let (rows, width) = x.dims2()?;
            let parts = x.reshape((rows * width / part, part))?; // [rows * parts, part]
            self.changed(&parts, change)?.reshape((rows, width))
        })
    }

    /// The norm of each row, with what a method has in place of its parameters.
    fn changed(&self, x: &Value, change: Option<NormChange>) -> Result<Value> {
        let NormChange { weight, bias } = change.unwrap_or_default();
        let weight = weight.as_ref().unwrap_or(&self.weight);
        match (&self.bias, bias) {
            (Some(own), bias) => ops::layer_norm(x, weight, bias.as_ref().unwrap_or(own), self.epsilon),
            (None, None) => ops::rms_norm(x, weight, self.epsilon),
            (None, Some(bias)) => ops::rms_norm(x, weight, self.epsilon)?.add_to_columns(&bias),
        }
    }
}

/// The rows after a norm, or as they are where there is none.
fn normed(norm: Option<&Norm>, x: &Value, sites: &Sites) -> Result<Value> {
    norm.map_or(Ok(x.clone()), |norm| norm.forward(x, sites))
}
