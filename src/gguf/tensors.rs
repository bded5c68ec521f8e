//! Tensors by the names that Hugging Face folders have for them, in the form that they have in computation.
//!
//! llama.cpp's converter changes some: it reorders the rows of queries and keys of Llama's relatives for its own form of rotary positions,
//! sorts GPT-NeoX's packed projection by query, key and value instead of by head, transposes GPT-2's linears, and adds 1 to Gemma's norms.

use candle_core::Device;
use candle_core::quantized::ggml_file::qtensor_from_ggml;

use super::container::{Gguf, TensorInfo};
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use crate::ops::{Compact, CompactBuilder, CompactForm};

/// Names within a block, Hugging Face's and llama.cpp's. Where a norm's name differs by family, [`GgufTensors::stored_name`] decides.
const BLOCK_NAMES: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
    ("attention.query_key_value", "attn_qkv"),
    ("attention.dense", "attn_output"),
    ("mlp.dense_h_to_4h", "ffn_up"),
    ("mlp.dense_4h_to_h", "ffn_down"),
];

/// Names outside the blocks.
const OUTER_NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("gpt_neox.embed_in", "token_embd"),
    ("gpt_neox.final_layer_norm", "output_norm"),
    ("embed_out", "output"),
];

/// What the converter did to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    /// The two halves of each head's rows are interleaved.
    Interleaved {
        heads: usize,
    },
    /// Rows of queries, keys and values of all heads, in this order, instead of head by head.
    ByKind {
        heads: usize,
    },
}

/// The tensors of a file by Hugging Face's names.
#[derive(Debug)]
pub struct GgufTensors {
    gguf: Gguf,
    architecture: String,
    heads: usize,
    kv_heads: usize,
}

impl GgufTensors {
    /// Those of a file.
    ///
    /// # Errors
    /// Where the file says nothing of its architecture or heads.
    pub fn new(gguf: Gguf) -> Result<Self> {
        let Some(architecture) = gguf.optional_text("general.architecture")?.map(str::to_owned) else {
            return Err(gguf.missing("general.architecture"));
        };
        let field = format!("{architecture}.attention.head_count");
        let heads = gguf.optional_u64(&field)?.ok_or_else(|| gguf.missing(&field))? as usize;
        let kv_heads = gguf.optional_u64(&format!("{field}_kv"))?.map_or(heads, |heads| heads as usize);
        Ok(GgufTensors { gguf, architecture, heads, kv_heads })
    }

    /// The file.
    pub fn file(&self) -> &Gguf {
        &self.gguf
    }

    /// The shape in computation of the tensor of this name, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.gguf.tensors.get(&self.stored_name(name)?)?.shape)
    }

    /// The tensor of this name in computation form, if it is there.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(own) = self.stored_name(name) else { return Ok(None) };
        let Some(info) = self.gguf.tensors.get(&own) else { return Ok(None) };
        let numbers = self.gguf.numbers(&own, info)?;
        let rows = info.shape[0];
        Ok(Some(match self.order(&own, rows)? {
            Some(from) => reordered(&numbers, rows, from),
            None => numbers,
        }))
    }

    /// The matrix of this name in computation form as it is stored, in fewer bytes than f32; `None` where it
    /// is not, or not there.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read_compact(&self, name: &str) -> Result<Option<Compact>> {
        let Some(own) = self.stored_name(name) else { return Ok(None) };
        let Some(info) = self.gguf.tensors.get(&own) else { return Ok(None) };
        let (&[rows, columns], Some(form)) = (&info.shape[..], CompactForm::of_ggml(info.dtype)) else {
            return Ok(None);
        };
        let bytes = self.gguf.bytes(info)?;
        let mut builder = CompactBuilder::new(form, rows, columns)?;
        match self.order(&own, rows)? {
            Some(from) => {
                let width = form.row_bytes(columns);
                (0..rows).for_each(|row| builder.push_bytes(&bytes[from(row) * width..][..width]));
            }
            None => builder.push_bytes(&bytes),
        }
        builder.build().map(Some)
    }

    /// From which row of a stored tensor each row comes, where the converter changed their order.
    fn order(&self, own: &str, rows: usize) -> Result<Option<Order>> {
        Ok(match self.change(own) {
            Change::None => None,
            Change::Interleaved { heads } if rows.is_multiple_of(2 * heads.max(1)) && heads > 0 => {
                let half = rows / heads / 2;
                // Row (head, half, place) lies at (head, place, half).
                Some(Box::new(move |row: usize| {
                    let (head, within) = (row / (2 * half), row % (2 * half));
                    head * 2 * half + within % half * 2 + within / half
                }))
            }
            Change::ByKind { heads } if rows.is_multiple_of(3 * heads.max(1)) && heads > 0 => {
                let head_dim = rows / heads / 3;
                // Row (head, kind, place) lies at (kind, head, place).
                Some(Box::new(move |row: usize| {
                    let (head, kind, place) = (row / (3 * head_dim), row / head_dim % 3, row % head_dim);
                    (kind * heads + head) * head_dim + place
                }))
            }
            _ => bail!(
                "{}: tensor \"{own}\" has {rows} rows, which cannot be divided among {} attention heads",
                self.gguf.path.display(),
                self.heads
            ),
        })
    }

    /// llama.cpp's name of a tensor, whether it is there or not.
    pub fn stored_name(&self, name: &str) -> Option<String> {
        let (stem, kind) = name.rsplit_once('.')?;
        if let Some((_, own)) = OUTER_NAMES.iter().find(|(outer, _)| *outer == stem) {
            return Some(format!("{own}.{kind}"));
        }
        let within = ["model.layers.", "transformer.h.", "gpt_neox.layers."]
            .iter()
            .find_map(|start| stem.strip_prefix(start))?;
        let (layer, place) = within.split_once('.')?;
        let own = match (place, self.architecture.as_str()) {
            ("post_attention_layernorm", "gemma2" | "gemma3" | "olmo2") => "post_attention_norm",
            ("post_attention_layernorm", _) => "ffn_norm",
            _ => BLOCK_NAMES.iter().find(|(outer, _)| *outer == place)?.1,
        };
        Some(format!("blk.{layer}.{own}.{kind}"))
    }

    /// What the converter did to a tensor of llama.cpp's name.
    fn change(&self, own: &str) -> Change {
        match self.architecture.as_str() {
            "llama" | "granite" | "smollm3" if own.contains(".attn_q.") => Change::Interleaved { heads: self.heads },
            "llama" | "granite" | "smollm3" if own.contains(".attn_k.") => Change::Interleaved { heads: self.kv_heads },
            "gptneox" if own.contains(".attn_qkv.") => Change::ByKind { heads: self.heads },
            _ => Change::None,
        }
    }
}

/// From which row each row comes.
type Order = Box<dyn Fn(usize) -> usize>;

/// Rows in another order: the row that comes to `row` is `from(row)`.
fn reordered(numbers: &[f32], rows: usize, from: impl Fn(usize) -> usize) -> Vec<f32> {
    let width = numbers.len() / rows.max(1);
    (0..rows).flat_map(|row| numbers[from(row) * width..][..width].iter().copied()).collect()
}

impl Gguf {
    /// The numbers of a tensor as f32.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn numbers(&self, name: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let bytes = self.bytes(info)?;
        let read = || {
            let tensor = qtensor_from_ggml(info.dtype, &bytes, info.shape.clone(), &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        };
        let fault = |reason: String| {
            Error::input(format!(
                "{}: tensor \"{name}\" ({:?}) cannot be read: {reason}",
                self.path.display(),
                info.dtype
            ))
        };
        let read =
            limits::without_panic(read).ok_or_else(|| fault("its bytes are not what they are said to be".into()))?;
        read.map_err(|error| fault(error.to_string()))
    }
}
