//! The forward pass, once for all families, over a flat stream of tokens.

mod block;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::adapter::Pass;
use super::architecture::{Architecture, Positions};
use super::layout::Layout;
use super::rotary::{RotaryForm, RotaryTables};
use super::sites::{Sites, Stack, prefixes, virtual_tokens};
use super::weights::{Weights, output_name};
use crate::error::Result;
use crate::ops::{Value, Weight};
use block::{Again, Angles, Block, Context, Norm, Run};

/// A transformer of some architecture over some weights: typed access to the tensors, which it shares.
#[derive(Debug, Clone)]
pub struct Transformer {
    architecture: Arc<Architecture>,
    embeddings: Weight,
    positions: Option<Value>,
    token_types: Option<Value>,
    embedding_norm: Option<Norm>,
    blocks: Arc<[Block]>,
    final_norm: Option<Norm>,
    output: Weight,
    rotary_tables: RotaryTables,
}

/// What goes through the transformer: tokens, and how they are laid out.
pub struct Stream<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// For every token, which text of a pair it belongs to; may be empty where the model does not tell them apart.
    pub types: &'a [u32],
    /// Positions, attention, and which rows run with which adapters.
    pub layout: &'a Layout,
    /// Whether blocks are run again in the backward pass instead of keeping what they compute (gradient
    /// checkpointing).
    pub checkpoints: bool,
}

/// Where keys and values are kept between passes (generation). Without one, a pass attends to its own rows.
pub trait KeyValueStore {
    /// Takes the keys and values `[rows, kv_heads * head_dim]` of this pass, and gives all that the pass's attention plan refers to, the
    /// prefixes included, in the element type in which they are kept: f32 or bf16.
    fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)>;
}

impl Transformer {
    /// A transformer over these weights.
    pub fn new(architecture: &Architecture, weights: &Weights) -> Result<Self> {
        let names = &architecture.names;
        let named = |name: &str| format!("{}{name}", names.prefix);
        let norm = |name: Option<&str>| name.map(|name| Norm::new(architecture, weights, &named(name))).transpose();
        let table = |name: &str| Ok::<_, crate::Error>(Value::of(&weights.get(&named(name))?));
        let embeddings = weights.matrix(&named(names.embeddings))?;
        let positions = match architecture.positions {
            Positions::Learned => Some(table(names.positions)?),
            Positions::Rotary(_) => None,
        };
        // A classifier's folder may lack an output matrix; nothing reads it there.
        let output = output_name(architecture).filter(|name| weights.has(name));
        let output = weights.matrix(output.unwrap_or(&named(names.embeddings)))?;
        Ok(Transformer {
            positions,
            token_types: names.token_types.map(table).transpose()?,
            embedding_norm: norm(names.embedding_norm)?,
            blocks: (0..architecture.layers)
                .map(|layer| Block::new(architecture, weights, layer))
                .collect::<Result<_>>()?,
            final_norm: norm(names.final_norm)?,
            architecture: Arc::new(architecture.clone()),
            embeddings,
            output,
            rotary_tables: RotaryTables::default(),
        })
    }

    /// The same with the rotary tables of another transformer.
    pub(super) fn with_tables_of(self, other: &Transformer) -> Self {
        Transformer { rotary_tables: other.rotary_tables.clone(), ..self }
    }

    /// The token embeddings, `[vocabulary, d_model]`.
    pub fn embeddings(&self) -> &Weight {
        &self.embeddings
    }

    /// The output matrix, `[vocabulary, d_model]`.
    pub fn output(&self) -> &Weight {
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
        let again = stream.checkpoints.then(|| Again::new(self, layout, stacks, pass));
        let depths: Vec<usize> = layout.groups.iter().map(|group| sites.depth(group, self.blocks.len())).collect();
        let deepest = depths.iter().copied().max().unwrap_or(0);
        let mut parts: Vec<Option<Value>> = vec![None; depths.len()];
        for (layer, block) in self.blocks.iter().enumerate().take(deepest) {
            let store = store.as_mut().map(|store| &mut **store as &mut dyn KeyValueStore);
            let angles = match &self.architecture.positions {
                Positions::Rotary(rotary) => rotary.of_layer[layer].map(|form| &angles[form]),
                Positions::Learned => None,
            };
            let run = if store.is_some() { Run::Generation } else { Run::Once };
            let context = Context { architecture: &self.architecture, layout, sites: &sites, layer, angles, run };
            x = match &again {
                Some(again) if store.is_none() => again.block(layer, &x, prefixes.get(layer), angles)?,
                _ => context.block(block, x, prefixes.get(layer), store)?,
            };
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
            let [cos, sin] = form.cos_sin(&layout.positions, &layout.lengths, &self.rotary_tables);
            let shape = (rows, cos.len().checked_div(rows).unwrap_or(0));
            Ok(Angles { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
        };
        rotary.forms.iter().map(of_form).collect()
    }
}
