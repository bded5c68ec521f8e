//! GPT-NeoX (Black et al. 2022) and Pythia: layer norms, attention and feed-forward side by side, rotation of a part of each head.

use super::rotary::{Defaults, Sizes, context, rotary};
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, LinearName, NormKind, Positions, TensorNames,
};

pub(super) fn gpt_neox(config: &Config) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.layers("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    if !d_model.is_multiple_of(heads) {
        bail!("{}: hidden_size {d_model} is not a multiple of num_attention_heads {heads}", config.file);
    }
    let head_dim = d_model / heads;
    let rotations =
        Defaults { theta_field: "rotary_emb_base", share: Some(("rotary_pct", 0.25)), ..Defaults::default() };
    // transformers reads the base and the share by these names alone.
    config.ignore(&["rope_theta", "is_decoder"]);
    let longest = config.optional_size("max_position_embeddings")?.unwrap_or(2048);
    let rotary = rotary(config, &Sizes { head_dim, layers, longest }, &rotations)?;
    let is_parallel = config.flag("use_parallel_residual", true)?;
    Ok(Architecture {
        language_model_class: "GPTNeoXForCausalLM",
        classifier_class: "GPTNeoXForSequenceClassification",
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: heads,
        head_dim,
        d_ff: config.size("intermediate_size")?,
        max_positions: context(config, longest),
        block: if is_parallel { BlockForm::Parallel } else { BlockForm::PreNorm },
        first_attention_norm: true,
        norm: NormKind::Layer,
        norm_epsilon: config.positive("layer_norm_eps", 1e-5)?,
        positions: Positions::Rotary(rotary),
        position_offset: 0,
        token_types: 0,
        embedding_scale: None,
        residual_scale: None,
        attention_scale: 1.0 / (head_dim as f64).sqrt(),
        attention_soft_cap: None,
        output_scale: None,
        output_soft_cap: None,
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu")?),
        windows: vec![None; layers],
        causal: true,
        tied_output: config.tied_output(false)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: false,
        default_lora_targets: &["query_key_value"],
        default_ia3_targets: &["query_key_value", "dense_4h_to_h"],
        default_ia3_feed_forward: &["dense_4h_to_h"],
        names: names(config.flag("attention_bias", true)?),
    })
}

fn names(attention_bias: bool) -> TensorNames {
    TensorNames {
        prefix: "gpt_neox.",
        embeddings: "embed_in.weight",
        positions: "",
        token_types: None,
        embedding_norm: None,
        blocks: "layers",
        attention_norm: Some("input_layernorm"),
        attention_output_norm: None,
        query_key_norms: None,
        attention_input: AttentionInput::PackedByHead(LinearName {
            name: "attention.query_key_value",
            bias: attention_bias,
        }),
        attention_output: LinearName { name: "attention.dense", bias: attention_bias },
        feed_forward_norm: Some("post_attention_layernorm"),
        feed_forward_output_norm: None,
        gate: None,
        up: LinearName { name: "mlp.dense_h_to_4h", bias: true },
        down: LinearName { name: "mlp.dense_4h_to_h", bias: true },
        final_norm: Some("final_layer_norm"),
        output: "embed_out.weight",
        output_module: "lm_head",
        head: super::DECODER_HEAD,
        bottlenecks: super::DECODER_BOTTLENECKS,
        transposed_linears: false,
        norm_weights_less_one: false,
    }
}
