//! The forward pass, once for all families, over a flat stream of tokens.

use candle_core::{Device, Tensor};

use super::adapter::{Linear, NormChange, Pass, SubLayer};
use super::architecture::{
    Architecture, AttentionInput, BlockForm, FeedForward, LinearName, NormKind, Positions, QueryKeyNorms,
};
use super::layout::Layout;
use super::rotary::RotaryForm;
use super::sites::{Sites, Stack, SumNorm, prefixes, virtual_tokens};
use super::weights::{Weights, block_prefix, output_name};
use crate::error::Result;
use crate::ops::{self, Value};

/// A transformer of some architecture over some weights: typed access to the tensors, which it shares.
#[derive(Debug, Clone)]
pub struct Transformer {
    architecture: Architecture,
    embeddings: Value,
    positions: Option<Value>,
    token_types: Option<Value>,
    embedding_norm: Option<Norm>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    output: Value,
}

#[derive(Debug, Clone)]
struct Block {
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
struct Norm {
    name: String,
    weight: Value,
    bias: Option<Value>,
    epsilon: f64,
}

/// What goes through the transformer: tokens, and how they are laid out.
pub struct Stream<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// For every token, which text of a pair it belongs to; may be empty where the model does not tell them apart.
    pub types: &'a [u32],
    /// Positions, attention, and which rows run with which adapters.
    pub layout: &'a Layout,
}

/// Where keys and values are kept between passes (generation). Without one, a pass attends to its own rows.
pub trait KeyValueStore {
    /// Takes the keys and values `[rows, kv_heads * head_dim]` of this pass, and gives all that the pass's attention plan refers to, the
    /// prefixes included.
    fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)>;
}

/// Cosines and sines of a stream's rotary angles, `[rows, rotary dimensions / 2]` each.
struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Transformer {
    /// A transformer over these weights.
    pub fn new(architecture: &Architecture, weights: &Weights) -> Result<Self> {
        let names = &architecture.names;
        let named = |name: &str| format!("{}{name}", names.prefix);
        let norm = |name: Option<&str>| name.map(|name| Norm::new(architecture, weights, &named(name))).transpose();
        let table = |name: &str| Ok::<_, crate::Error>(Value::of(&weights.get(&named(name))?));
        let embeddings = table(names.embeddings)?;
        let positions = match architecture.positions {
            Positions::Learned => Some(table(names.positions)?),
            Positions::Rotary(_) => None,
        };
        // A classifier's folder may lack an output matrix; nothing reads it there.
        let output = output_name(architecture).and_then(|name| weights.find(name));
        let output = output.map_or_else(|| embeddings.clone(), Value::of);
        Ok(Transformer {
            positions,
            token_types: names.token_types.map(table).transpose()?,
            embedding_norm: norm(names.embedding_norm)?,
            blocks: (0..architecture.layers)
                .map(|layer| Block::new(architecture, weights, layer))
                .collect::<Result<_>>()?,
            final_norm: norm(names.final_norm)?,
            architecture: architecture.clone(),
            embeddings,
            output,
        })
    }

    /// The token embeddings, `[vocabulary, d_model]`.
    pub fn embeddings(&self) -> &Tensor {
        self.embeddings.tensor()
    }

    /// The output matrix, `[vocabulary, d_model]`.
    pub fn output(&self) -> &Tensor {
        self.output.tensor()
    }

    /// The output matrix, which may train.
    pub(super) fn output_value(&self) -> &Value {
        &self.output
    }

    /// The hidden state after the last norm at every token, `[tokens, d_model]`, each row by the blocks and with the changes of its own stack.
    ///
    /// With a `store`, the layout's attention plan refers to the rows of the store, which hold the prefixes too.
    pub fn forward(
        &self,
        stream: &Stream,
        stacks: &[Stack],
        pass: &Pass,
        mut store: Option<&mut dyn KeyValueStore>,
    ) -> Result<Value> {
        let layout = stream.layout;
        let sites = Sites { stacks, groups: &layout.groups, pass };
        let mut x = self.embed(stream, &sites)?; // [rows, d_model]
        let angles = self.angles(layout, x.device())?;
        let prefixes = if store.is_some() { Vec::new() } else { prefixes(stacks)? };
        let depths: Vec<usize> = layout.groups.iter().map(|group| sites.depth(group, self.blocks.len())).collect();
        let deepest = depths.iter().copied().max().unwrap_or(0);
        let mut parts: Vec<Option<Value>> = vec![None; depths.len()];
        for (layer, block) in self.blocks.iter().enumerate().take(deepest) {
            let store = store.as_mut().map(|store| &mut **store as &mut dyn KeyValueStore);
            let angles = match &self.architecture.positions {
                Positions::Rotary(rotary) => rotary.of_layer[layer].map(|form| &angles[form]),
                Positions::Learned => None,
            };
            let context = Context { architecture: &self.architecture, layout, sites: &sites, layer, angles };
            x = context.block(block, x, prefixes.get(layer), store)?;
            for (part, _) in
                parts.iter_mut().zip(&depths).filter(|(_, depth)| **depth == layer + 1 && layer + 1 < deepest)
            {
                *part = Some(x.clone());
            }
        }
        if parts.iter().any(Option::is_some) {
            let rows = layout.groups.iter().zip(&parts);
            let rows =
                rows.map(|(group, part)| part.as_ref().unwrap_or(&x).narrow_rows(group.rows.start, group.rows.len));
            let rows = rows.collect::<Result<Vec<_>>>()?;
            x = Value::cat_rows(&rows.iter().collect::<Vec<_>>())?;
        }
        let mut x = sites.last_block(&x)?;
        if let Some(rows) = &layout.token_rows {
            x = x.select_rows(rows)?; // [tokens, d_model]
        }
        let sites = Sites { groups: &layout.token_groups, ..sites };
        self.final_norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x, &sites))
    }

    fn embed(&self, stream: &Stream, sites: &Sites) -> Result<Value> {
        let layout = stream.layout;
        let mut x = sites.embed(&self.embeddings, stream.tokens, &layout.token_groups)?; // [tokens, d_model]
        if let Some(scale) = self.architecture.embedding_scale {
            x = x.scale(scale)?;
        }
        let most = self.architecture.token_types.saturating_sub(1) as u32;
        let mut types: Vec<u32> = stream.types.iter().map(|&kind| kind.min(most)).collect();
        types.resize(stream.tokens.len(), 0);
        if let Some(gather) = &layout.gather {
            let virtual_tokens = virtual_tokens(sites.stacks, sites.pass)?.expect("the layout has virtual rows");
            let virtual_rows = virtual_tokens.dim(0)?;
            x = Value::cat_rows(&[&virtual_tokens, &x])?.select_rows(gather)?; // [rows, d_model]
            let type_of = |&row: &u32| (row as usize).checked_sub(virtual_rows).map_or(0, |token| types[token]);
            types = gather.iter().map(type_of).collect();
        }
        if let Some(table) = &self.token_types {
            x = x.add(&table.select_rows(&types)?)?;
        }
        if let Some(table) = &self.positions {
            let longest = layout.positions.iter().max().map_or(0, |&position| position as usize + 1);
            self.architecture.check_length(longest)?;
            let offset = self.architecture.position_offset as u32;
            let positions: Vec<u32> = layout.positions.iter().map(|position| position + offset).collect();
            x = x.add(&table.select_rows(&positions)?)?;
        }
        self.embedding_norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x, sites))
    }

    /// The angles of every form of rotation.
    fn angles(&self, layout: &Layout, device: &Device) -> Result<Vec<Angles>> {
        let Positions::Rotary(rotary) = &self.architecture.positions else { return Ok(Vec::new()) };
        let rows = layout.positions.len();
        let of_form = |form: &RotaryForm| -> Result<Angles> {
            let [cos, sin] = form.cos_sin(&layout.positions, &layout.lengths);
            let shape = (rows, cos.len().checked_div(rows).unwrap_or(0));
            Ok(Angles { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
        };
        rotary.forms.iter().map(of_form).collect()
    }
}

/// What the parts of one block share during a pass.
struct Context<'a> {
    architecture: &'a Architecture,
    layout: &'a Layout,
    sites: &'a Sites<'a>,
    layer: usize,
    angles: Option<&'a Angles>,
}

impl Context<'_> {
    /// The residual stream `[rows, d_model]` after a block.
    fn block(
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
        self.linear(&block.attention_output, &attended)
    }

    fn queries_keys_values(&self, block: &Block, x: &Value) -> Result<(Value, Value, Value)> {
        let architecture = self.architecture;
        let head_dim = architecture.head_dim;
        let (mut q, mut k, v) = match &block.attention_input {
            AttentionProjection::Separate { query, key, value } => {
                (self.linear(query, x)?, self.linear(key, x)?, self.linear(value, x)?)
            }
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
        let up = self.linear(&block.up, x)?; // [rows, d_ff], or [rows, 2 d_ff] where it holds the gate
        let inner = match (self.architecture.feed_forward, &block.gate) {
            (FeedForward::Gated(activation), Some(gate)) => ops::gated(&self.linear(gate, x)?, &up, activation)?,
            (FeedForward::GatedPacked(activation), _) => {
                let d_ff = self.architecture.d_ff;
                ops::gated(&up.narrow_columns(0, d_ff)?, &up.narrow_columns(d_ff, d_ff)?, activation)?
            }
            (FeedForward::Plain(activation) | FeedForward::Gated(activation), _) => ops::activate(&up, activation)?,
        }; // [rows, d_ff]
        self.linear(&block.down, &inner)
    }
}

impl Block {
    fn new(architecture: &Architecture, weights: &Weights, layer: usize) -> Result<Self> {
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
    let weight = Value::of(&weights.get(&format!("{name}.weight"))?);
    let bias = linear.bias.then(|| weights.get(&format!("{name}.bias"))).transpose()?;
    Ok(Linear { name, weight, bias: bias.as_ref().map(Value::of) })
}

impl Norm {
    fn new(architecture: &Architecture, weights: &Weights, name: &str) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?;
        let bias = match architecture.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(Value::of(&weights.get(&format!("{name}.bias"))?)),
            NormKind::LayerWithoutBias => Some(Value::constant(weight.detach().zeros_like()?)),
        };
        let weight = Value::of(&weight);
        Ok(Norm { name: name.to_string(), weight, bias, epsilon: architecture.norm_epsilon })
    }

    fn forward(&self, x: &Value, sites: &Sites) -> Result<Value> {
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
