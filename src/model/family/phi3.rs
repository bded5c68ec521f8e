//! Phi-3 (Abdin et al. 2024) and Phi-4-mini: Llama with queries, keys and values in one linear, gate and up projection in another, and LongRoPE.

use super::llama::{Biases, Shape, of_shape};
use super::rotary::Defaults;
use crate::error::Result;
use crate::model::architecture::{Architecture, AttentionInput, Config, FeedForward, LinearName};

pub(super) fn phi3(config: &Config) -> Result<Architecture> {
    let rotary = Defaults {
        share: Some(("partial_rotary_factor", 1.0)),
        original_length: Some(4096),
        only_long: true,
        ..Defaults::default()
    };
    let shape = Shape::new(("Phi3ForCausalLM", "Phi3ForSequenceClassification"), Biases::default());
    let shape = Shape { norm_epsilon: 1e-5, longest: 4096, rotary: Some(rotary), ..shape };
    let mut architecture = of_shape(config, shape)?;
    if let FeedForward::Gated(activation) = architecture.feed_forward {
        architecture.feed_forward = FeedForward::GatedPacked(activation);
    }
    architecture.windows = vec![config.optional_size("sliding_window")?; architecture.layers];
    let names = &mut architecture.names;
    names.attention_input = AttentionInput::Packed(LinearName { name: "self_attn.qkv_proj", bias: false });
    names.gate = None;
    names.up = LinearName { name: "mlp.gate_up_proj", bias: false };
    architecture.default_lora_targets = &["qkv_proj"];
    architecture.default_ia3_targets = &["qkv_proj", "down_proj"];
    // Phi-4-mini's file holds settings of another implementation, which transformers does not read.
    config.ignore(&["full_attn_mod", "interpolate_factor"]);
    Ok(architecture)
}
