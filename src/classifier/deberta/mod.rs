//! DeBERTa-v2 and v3 (He et al. 2021 and 2023) as a classifier. It computes and does not train.
//!
//! It stands beside the model core because its attention adds scores of relative positions, which no other family has.

mod architecture;
mod attention;

use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::bail;
use crate::data::tokenize::EncodedTexts;
use crate::error::Result;
use crate::model::architecture::Config;
use crate::model::weight_files::TensorFiles;
use crate::model::weights::{Role, Stored, TensorSpec};
use crate::ops::{self, Activation, Value};
use crate::stop;
use architecture::{Architecture, ConvolutionForm};
use attention::{Attention, PositionProjections, by_head};

/// What `config.json` calls the family, v3 too.
pub const MODEL_TYPE: &str = "deberta-v2";
/// The class of its classifiers in `transformers`.
pub const CLASS: &str = "DebertaV2ForSequenceClassification";
/// The last layer of the head, `[labels, d_model]`.
pub const OUT: &str = "classifier";
/// What stands before the encoder's tensors.
const PREFIX: &str = "deberta.";

/// A classifier with its weights.
pub struct Deberta {
    architecture: Architecture,
    embeddings: Embeddings,
    blocks: Vec<Block>,
    convolution: Option<Convolution>,
    pooler: Linear,
    out: Linear,
}

struct Embeddings {
    words: Tensor,
    positions: Option<Tensor>,
    types: Option<Tensor>,
    /// From the embeddings' width to the model's.
    projection: Option<Tensor>,
    norm: Norm,
}

struct Block {
    query: Linear,
    key: Linear,
    value: Linear,
    positions: PositionProjections,
    attention_output: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    feed_forward_norm: Norm,
}

/// Beside the first block: neighbours' embeddings (DeBERTa-v2).
struct Convolution {
    form: ConvolutionForm,
    /// `[d_model, d_model / groups, kernel]`.
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
}

struct Linear {
    /// `[d_out, d_in]`.
    weight: Tensor,
    bias: Tensor,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

/// [`ops::linear`] of constants.
fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = ops::linear(&Value::of(x), &Value::of(weight), bias.map(Value::of).as_ref())?;
    Ok(y.tensor().clone())
}

/// [`ops::activate`] of a constant.
fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(ops::activate(&Value::of(x), activation)?.tensor().clone())
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
    }
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [x, weight, bias] = [x, &self.weight, &self.bias].map(Value::of);
        Ok(ops::layer_norm(&x, &weight, &bias, self.epsilon)?.tensor().clone())
    }
}

/// Reads tensors by name.
struct Reader<'a> {
    files: TensorFiles,
    architecture: &'a Architecture,
    device: &'a Device,
}

impl Reader<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (shape, role) = (shape.to_vec(), Role::Linear);
        let spec = TensorSpec { name: name.to_string(), shape, role, stored: Stored::AsIs };
        Ok(self.files.read(&spec, PREFIX, self.device)?.0)
    }

    fn linear(&mut self, name: &str, [d_out, d_in]: [usize; 2]) -> Result<Linear> {
        let weight = self.tensor(&format!("{name}.weight"), &[d_out, d_in])?;
        Ok(Linear { weight, bias: self.tensor(&format!("{name}.bias"), &[d_out])? })
    }

    fn norm(&mut self, name: &str) -> Result<Norm> {
        let Architecture { d_model, norm_epsilon: epsilon, .. } = *self.architecture;
        let weight = self.tensor(&format!("{name}.weight"), &[d_model])?;
        Ok(Norm { weight, bias: self.tensor(&format!("{name}.bias"), &[d_model])?, epsilon })
    }

    fn embeddings(&mut self) -> Result<Embeddings> {
        let a = self.architecture;
        let named = |name: &str| format!("{PREFIX}embeddings.{name}");
        let words = self.tensor(&named("word_embeddings.weight"), &[a.vocabulary, a.d_embedding])?;
        let mut table = |name: &str, rows: usize, is_there: bool| {
            is_there.then(|| self.tensor(&named(name), &[rows, a.d_embedding])).transpose()
        };
        let positions = table("position_embeddings.weight", a.max_positions, a.has_absolute_positions)?;
        let types = table("token_type_embeddings.weight", a.token_types, a.token_types > 0)?;
        let projection = table("embed_proj.weight", a.d_model, a.d_embedding != a.d_model)?;
        Ok(Embeddings { words, positions, types, projection, norm: self.norm(&named("LayerNorm"))? })
    }

    /// The table of relative positions, `[2 span, d_model]`, as all blocks read it.
    fn relative_embeddings(&mut self) -> Result<Option<Tensor>> {
        let Some(relative) = self.architecture.relative else { return Ok(None) };
        let shape = [2 * relative.span(), self.architecture.d_model];
        let table = self.tensor(&format!("{PREFIX}encoder.rel_embeddings.weight"), &shape)?;
        Ok(Some(match self.architecture.norms_relative_embeddings {
            true => self.norm(&format!("{PREFIX}encoder.LayerNorm"))?.forward(&table)?,
            false => table,
        }))
    }

    fn block(&mut self, layer: usize, relative: Option<&Tensor>) -> Result<Block> {
        let Architecture { d_model, d_ff, .. } = *self.architecture;
        let named = |name: &str| format!("{PREFIX}encoder.layer.{layer}.{name}");
        let square = [d_model, d_model];
        let query = self.linear(&named("attention.self.query_proj"), square)?;
        let key = self.linear(&named("attention.self.key_proj"), square)?;
        let positions = self.positions(&named("attention.self."), relative, (&query, &key))?;
        Ok(Block {
            query,
            key,
            value: self.linear(&named("attention.self.value_proj"), square)?,
            positions,
            attention_output: self.linear(&named("attention.output.dense"), square)?,
            attention_norm: self.norm(&named("attention.output.LayerNorm"))?,
            up: self.linear(&named("intermediate.dense"), [d_ff, d_model])?,
            down: self.linear(&named("output.dense"), [d_model, d_ff])?,
            feed_forward_norm: self.norm(&named("output.LayerNorm"))?,
        })
    }

    /// The block's projections of the table, by weights of their own or by those of content.
    fn positions(
        &mut self,
        attention: &str,
        relative: Option<&Tensor>,
        (query, key): (&Linear, &Linear),
    ) -> Result<PositionProjections> {
        let a = self.architecture;
        let mut projected = |is_used: bool, name: &str, shared: &Linear| -> Result<Option<Tensor>> {
            let (Some(relative), true) = (relative, is_used) else { return Ok(None) };
            let rows = match a.shares_projections {
                true => shared.forward(relative)?,
                false => self.linear(&format!("{attention}{name}"), [a.d_model, a.d_model])?.forward(relative)?,
            }; // [2 span, d_model]
            by_head(&rows, a.heads).map(Some)
        };
        let keys = projected(a.content_to_position, "pos_key_proj", key)?;
        Ok(PositionProjections { keys, queries: projected(a.position_to_content, "pos_query_proj", query)? })
    }

    fn convolution(&mut self) -> Result<Option<Convolution>> {
        let Some(form) = self.architecture.convolution else { return Ok(None) };
        let d_model = self.architecture.d_model;
        let named = |name: &str| format!("{PREFIX}encoder.conv.{name}");
        Ok(Some(Convolution {
            form,
            weight: self.tensor(&named("conv.weight"), &[d_model, d_model / form.groups, form.kernel])?,
            bias: self.tensor(&named("conv.bias"), &[d_model])?,
            norm: self.norm(&named("LayerNorm"))?,
        }))
    }
}

impl Deberta {
    /// Reads the classifier that `config` describes from the weights in `folder`.
    ///
    /// # Errors
    /// Where a tensor is missing, those of the head too, or of another shape.
    pub fn load(folder: &Path, config: &Config, device: &Device) -> Result<Self> {
        let architecture = Architecture::read(config)?;
        let files = TensorFiles::open(folder)?;
        let d_model = architecture.d_model;
        let labels = match files.shape(&format!("{OUT}.weight")) {
            Some(&[labels, width]) if width == d_model => labels,
            Some(shape) => bail!(
                "{}: tensor \"{OUT}.weight\" has shape {shape:?}, expected [labels, {d_model}]; check that config.json belongs to these weights",
                folder.display()
            ),
            None => bail!(
                "{}: tensor \"{OUT}.weight\" is missing, so there is no classification head; expected the folder of a {CLASS}",
                folder.display()
            ),
        };
        let mut reader = Reader { files, architecture: &architecture, device };
        let relative = reader.relative_embeddings()?;
        let blocks = (0..architecture.layers).map(|layer| reader.block(layer, relative.as_ref()));
        let blocks = blocks.collect::<Result<_>>()?;
        let (embeddings, convolution) = (reader.embeddings()?, reader.convolution()?);
        let pooler = reader.linear("pooler.dense", [d_model, d_model])?;
        let out = reader.linear(OUT, [labels, d_model])?;
        Ok(Deberta { architecture, embeddings, blocks, convolution, pooler, out })
    }

    /// Number of tokens that it knows.
    pub fn vocabulary(&self) -> usize {
        self.architecture.vocabulary
    }

    /// Number of labels.
    pub fn labels(&self) -> usize {
        self.out.weight.dims()[0]
    }

    /// The longest sequence that it was made for.
    pub fn longest(&self) -> usize {
        self.architecture.max_positions
    }

    /// The labels' numbers of every text, `[texts, labels]`. The texts lie end to end, without padding, and each attends to itself alone.
    ///
    /// # Errors
    /// Where a signal ends what may be given up ([`stop::check`]), too.
    pub fn logits(&self, texts: &[EncodedTexts]) -> Result<Tensor> {
        stop::check()?;
        let mut start = 0;
        let range = |text: &EncodedTexts| {
            start += text.tokens.len();
            start - text.tokens.len()..start
        };
        let ranges: Vec<Range<usize>> = texts.iter().map(range).collect();
        let embedded = self.embed(texts)?; // [tokens, d_model]
        let mut x = embedded.clone();
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &ranges, &self.architecture)?;
            if let (0, Some(convolution)) = (layer, &self.convolution) {
                x = convolution.forward(&embedded, &x, &ranges)?;
            }
        }
        let first: Vec<u32> = ranges.iter().map(|range| range.start as u32).collect();
        let pooled = self.pooler.forward(&select(&x, &first)?)?; // [texts, d_model]
        self.out.forward(&activate(&pooled, self.architecture.pooler_activation)?)
    }

    fn embed(&self, texts: &[EncodedTexts]) -> Result<Tensor> {
        let Embeddings { words, positions, types, projection, norm } = &self.embeddings;
        let of_tokens =
            |of_text: &dyn Fn(&EncodedTexts) -> Vec<u32>| texts.iter().flat_map(of_text).collect::<Vec<u32>>();
        let mut x = select(words, &of_tokens(&|text| text.tokens.clone()))?; // [tokens, d_embedding]
        if let Some(table) = positions {
            x = (x + select(table, &of_tokens(&|text| (0..text.tokens.len() as u32).collect()))?)?;
        }
        if let Some(table) = types {
            let last = self.architecture.token_types as u32 - 1;
            x = (x + select(table, &of_tokens(&|text| text.types.iter().map(|&kind| kind.min(last)).collect()))?)?;
        }
        if let Some(projection) = projection {
            x = linear(&x, projection, None)?;
        }
        norm.forward(&x)
    }
}

impl Block {
    fn forward(&self, x: &Tensor, texts: &[Range<usize>], architecture: &Architecture) -> Result<Tensor> {
        let [q, k, v] = [self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?]; // [tokens, d_model]
        let attention = Attention {
            heads: architecture.heads,
            scale: architecture.attention_scale(),
            relative: architecture.relative.map(|positions| (positions, &self.positions)),
        };
        let attended = self.attention_output.forward(&attention.forward([&q, &k, &v], texts)?)?;
        let x = self.attention_norm.forward(&(attended + x)?)?;
        let inner = activate(&self.up.forward(&x)?, architecture.activation)?; // [tokens, d_ff]
        self.feed_forward_norm.forward(&(self.down.forward(&inner)? + x)?)
    }
}

impl Convolution {
    /// `norm(x + activation(convolution of the embeddings))`; beyond a text's ends stand zeros.
    fn forward(&self, embedded: &Tensor, x: &Tensor, texts: &[Range<usize>]) -> Result<Tensor> {
        let ConvolutionForm { kernel, groups, activation } = self.form;
        let of_text = |text: &Range<usize>| -> Result<Tensor> {
            let columns = embedded.narrow(0, text.start, text.len())?.t()?.unsqueeze(0)?.contiguous()?; // [1, d_model, length]
            let convolved = columns.conv1d(&self.weight, kernel / 2, 1, 1, groups)?;
            Ok(convolved.squeeze(0)?.t()?.contiguous()?) // [length, d_model]
        };
        let parts = texts.iter().map(of_text).collect::<Result<Vec<Tensor>>>()?;
        let convolved = Tensor::cat(&parts, 0)?.broadcast_add(&self.bias)?; // [tokens, d_model]
        self.norm.forward(&(activate(&convolved, activation)? + x)?)
    }
}

fn select(table: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(table.index_select(&Tensor::from_slice(rows, rows.len(), table.device())?, 0)?)
}
