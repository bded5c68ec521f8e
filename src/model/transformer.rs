//! The forward pass, once for all families, over a flat stream of tokens.

use candle_core::{Device, Tensor};

use super::adapter::{Adapter, Linear, Pass, SubLayer};
use super::architecture::{Architecture, AttentionInput, FeedForward, LinearName, NormKind, Positions};
use super::layout::Layout;
use super::weights::{OUTPUT, Weights, block_prefix};
use crate::error::Result;
use crate::ops;

/// A transformer of some architecture over some weights: typed access to the tensors, which it shares.
#[derive(Debug, Clone)]
pub struct Transformer {
    architecture: Architecture,
    embeddings: Tensor,
    positions: Option<Tensor>,
    blocks: Vec<Block>,
    final_norm: Norm,
    output: Tensor,
}

#[derive(Debug, Clone)]
struct Block {
    attention_norm: Norm,
    attention_input: AttentionProjection,
    attention_output: Linear,
    feed_forward_norm: Norm,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

#[derive(Debug, Clone)]
enum AttentionProjection {
    Separate { query: Linear, key: Linear, value: Linear },
    Packed(Linear),
}

#[derive(Debug, Clone)]
struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    epsilon: f64,
}

/// Where keys and values are kept between passes (generation). Without one, a pass attends to its own rows.
pub trait KeyValueStore {
    /// Takes the keys and values `[rows, kv_heads * head_dim]` of this pass, and an adapter's prefix, and gives all that the pass's
    /// attention plan refers to.
    fn extend(
        &mut self,
        layer: usize,
        keys: Tensor,
        values: Tensor,
        prefix: Option<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)>;
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
        let embeddings = weights.get(&format!("{}{}", names.prefix, names.embeddings))?;
        let positions = match architecture.positions {
            Positions::Learned => Some(weights.get(&format!("{}{}", names.prefix, names.positions))?),
            Positions::Rotary { .. } => None,
        };
        let blocks =
            (0..architecture.layers).map(|layer| Block::new(architecture, weights, layer)).collect::<Result<_>>()?;
        let final_norm = Norm::new(architecture, weights, &format!("{}{}", names.prefix, names.final_norm))?;
        // A classifier's folder may lack an output matrix; nothing reads it there.
        let output = match weights.find(OUTPUT) {
            Some(output) if !architecture.tied_output => output.clone(),
            _ => embeddings.clone(),
        };
        Ok(Transformer { architecture: architecture.clone(), embeddings, positions, blocks, final_norm, output })
    }

    /// The output matrix, `[vocabulary, d_model]`.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The hidden state after the last norm at every token, `[tokens, d_model]`.
    ///
    /// With a `store`, the layout's attention plan refers to the rows of the store.
    pub fn forward(
        &self,
        tokens: &[u32],
        layout: &Layout,
        sites: &dyn Adapter,
        pass: &Pass,
        mut store: Option<&mut dyn KeyValueStore>,
    ) -> Result<Tensor> {
        let mut x = self.embed(tokens, layout, sites)?; // [rows, d_model]
        let angles = self.angles(&layout.positions, x.device())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let normalised = block.attention_norm.forward(&x)?;
            let store = store.as_mut().map(|store| &mut **store as &mut dyn KeyValueStore);
            let context = Context { transformer: self, layout, sites, pass, layer };
            let attended = context.attention(block, &normalised, angles.as_ref(), store)?;
            x = (x + sites.sub_layer(layer, SubLayer::Attention, attended, pass)?)?;
            let normalised = block.feed_forward_norm.forward(&x)?;
            let transformed = context.feed_forward(block, &normalised)?;
            x = (x + sites.sub_layer(layer, SubLayer::FeedForward, transformed, pass)?)?;
        }
        if let Some(rows) = &layout.token_rows {
            x = x.index_select(&Tensor::from_slice(rows, rows.len(), x.device())?, 0)?; // [tokens, d_model]
        }
        self.final_norm.forward(&x)
    }

    fn embed(&self, tokens: &[u32], layout: &Layout, sites: &dyn Adapter) -> Result<Tensor> {
        let device = self.embeddings.device();
        let ids = Tensor::from_slice(tokens, tokens.len(), device)?;
        let mut x = self.embeddings.index_select(&ids, 0)?; // [tokens, d_model]
        if let (Some(gather), Some(virtual_tokens)) = (&layout.gather, sites.virtual_tokens()?) {
            let gather = Tensor::from_slice(gather, gather.len(), device)?;
            x = Tensor::cat(&[&virtual_tokens, &x], 0)?.index_select(&gather, 0)?; // [rows, d_model]
        }
        if let Some(positions) = &self.positions {
            let longest = layout.positions.iter().max().map_or(0, |&position| position as usize + 1);
            self.architecture.check_length(longest)?;
            let ids = Tensor::from_slice(&layout.positions, layout.positions.len(), device)?;
            x = (x + positions.index_select(&ids, 0)?)?;
        }
        Ok(x)
    }

    fn angles(&self, positions: &[u32], device: &Device) -> Result<Option<Angles>> {
        let Positions::Rotary { frequencies } = &self.architecture.positions else { return Ok(None) };
        let longest = positions.iter().max().map_or(0, |&position| position as usize + 1);
        let table: Vec<(f32, f32)> = (0..longest)
            .flat_map(|position| frequencies.iter().map(move |frequency| (position as f32 * frequency).sin_cos()))
            .collect();
        let half = frequencies.len();
        let of_rows = |part: fn(&(f32, f32)) -> f32| -> Result<Tensor> {
            let rows = positions.iter().map(|&position| &table[position as usize * half..][..half]);
            let values: Vec<f32> = rows.flatten().map(part).collect();
            Ok(Tensor::from_vec(values, (positions.len(), half), device)?)
        };
        Ok(Some(Angles { cos: of_rows(|angle| angle.1)?, sin: of_rows(|angle| angle.0)? }))
    }
}

/// What the parts of one block share during a pass.
struct Context<'a> {
    transformer: &'a Transformer,
    layout: &'a Layout,
    sites: &'a dyn Adapter,
    pass: &'a Pass,
    layer: usize,
}

impl Context<'_> {
    fn linear(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.sites.linear(linear, x, self.pass)
    }

    fn attention(
        &self,
        block: &Block,
        x: &Tensor,
        angles: Option<&Angles>,
        store: Option<&mut dyn KeyValueStore>,
    ) -> Result<Tensor> {
        let architecture = &self.transformer.architecture;
        let shape = ops::AttentionShape {
            heads: architecture.heads,
            kv_heads: architecture.kv_heads,
            head_dim: architecture.head_dim,
            scale: 1.0 / (architecture.head_dim as f64).sqrt(),
            window: architecture.windows[self.layer],
            causal: architecture.causal,
        };
        let plan = &self.layout.plan;
        let prefix = self.sites.prefix(self.layer)?;
        let attended = match &block.attention_input {
            AttentionProjection::Packed(linear) if angles.is_none() && prefix.is_none() && store.is_none() => {
                ops::attention_packed(&self.linear(linear, x)?, &shape, plan)?
            }
            projection => {
                let (q, k, v) = self.queries_keys_values(projection, x, angles)?;
                let (k, v) = match (prefix, store) {
                    (prefix, Some(store)) => store.extend(self.layer, k, v, prefix)?,
                    (Some((keys, values)), None) => (Tensor::cat(&[&keys, &k], 0)?, Tensor::cat(&[&values, &v], 0)?),
                    (None, None) => (k, v),
                };
                ops::attention(&q, &k, &v, &shape, plan)?
            }
        }; // [rows, heads * head_dim]
        self.linear(&block.attention_output, &attended)
    }

    fn queries_keys_values(
        &self,
        projection: &AttentionProjection,
        x: &Tensor,
        angles: Option<&Angles>,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let architecture = &self.transformer.architecture;
        let (q, k, v) = match projection {
            AttentionProjection::Separate { query, key, value } => {
                (self.linear(query, x)?, self.linear(key, x)?, self.linear(value, x)?)
            }
            AttentionProjection::Packed(linear) => {
                let packed = self.linear(linear, x)?;
                let (q_width, kv_width) = (architecture.query_width(), architecture.kv_width());
                (
                    packed.narrow(1, 0, q_width)?,
                    packed.narrow(1, q_width, kv_width)?,
                    packed.narrow(1, q_width + kv_width, kv_width)?,
                )
            }
        };
        match angles {
            None => Ok((q, k, v)),
            Some(Angles { cos, sin }) => Ok((
                ops::rotary(&q, cos, sin, architecture.head_dim)?,
                ops::rotary(&k, cos, sin, architecture.head_dim)?,
                v,
            )),
        }
    }

    fn feed_forward(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let up = self.linear(&block.up, x)?; // [rows, d_ff]
        let inner = match (self.transformer.architecture.feed_forward, &block.gate) {
            (FeedForward::Gated(activation), Some(gate)) => ops::gated(&self.linear(gate, x)?, &up, activation)?,
            (FeedForward::Plain(activation) | FeedForward::Gated(activation), _) => ops::activate(&up, activation)?,
        };
        self.linear(&block.down, &inner)
    }
}

impl Block {
    fn new(architecture: &Architecture, weights: &Weights, layer: usize) -> Result<Self> {
        let names = &architecture.names;
        let prefix = block_prefix(architecture, layer);
        let linear = |name: LinearName| read_linear(weights, &prefix, name);
        Ok(Block {
            attention_norm: Norm::new(architecture, weights, &format!("{prefix}{}", names.attention_norm))?,
            attention_input: match names.attention_input {
                AttentionInput::Separate { query, key, value } => {
                    AttentionProjection::Separate { query: linear(query)?, key: linear(key)?, value: linear(value)? }
                }
                AttentionInput::Packed(packed) => AttentionProjection::Packed(linear(packed)?),
            },
            attention_output: linear(names.attention_output)?,
            feed_forward_norm: Norm::new(architecture, weights, &format!("{prefix}{}", names.feed_forward_norm))?,
            gate: names.gate.map(linear).transpose()?,
            up: linear(names.up)?,
            down: linear(names.down)?,
        })
    }
}

fn read_linear(weights: &Weights, prefix: &str, linear: LinearName) -> Result<Linear> {
    let name = format!("{prefix}{}", linear.name);
    let weight = weights.get(&format!("{name}.weight"))?;
    let bias = linear.bias.then(|| weights.get(&format!("{name}.bias"))).transpose()?;
    Ok(Linear { name, weight, bias })
}

impl Norm {
    fn new(architecture: &Architecture, weights: &Weights, name: &str) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?;
        let bias = (architecture.norm == NormKind::Layer).then(|| weights.get(&format!("{name}.bias"))).transpose()?;
        Ok(Norm { weight, bias, epsilon: architecture.norm_epsilon })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => ops::layer_norm(x, &self.weight, bias, self.epsilon),
            None => ops::rms_norm(x, &self.weight, self.epsilon),
        }
    }
}
