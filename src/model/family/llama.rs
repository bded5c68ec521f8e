//! Llama (Touvron et al. 2023) and the families of its shape: Mistral adds a sliding window, Qwen2 biases on queries, keys
//! and values, Qwen3 norms of each query and key, Gemma 2 norms on both sides of a sub-layer and soft caps.

use super::rotary::{context, rotary_frequencies};
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, LinearName, NormKind, Positions, TensorNames,
    shortened,
};

/// `transformers`' classes: language model, classifier.
type Classes = (&'static str, &'static str);

const LLAMA: Classes = ("LlamaForCausalLM", "LlamaForSequenceClassification");
const MISTRAL: Classes = ("MistralForCausalLM", "MistralForSequenceClassification");
const QWEN2: Classes = ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification");
const QWEN3: Classes = ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification");
const GEMMA2: Classes = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification");

pub(super) fn llama(config: &Config) -> Result<Architecture> {
    let attention_bias = config.flag("attention_bias", false)?;
    llama_shape(config, LLAMA, attention_bias, attention_bias, config.flag("mlp_bias", false)?)
}

pub(super) fn mistral(config: &Config) -> Result<Architecture> {
    let mut architecture = llama_shape(config, MISTRAL, false, false, false)?;
    architecture.windows = vec![config.optional_size("sliding_window")?; architecture.layers];
    Ok(architecture)
}

pub(super) fn qwen2(config: &Config) -> Result<Architecture> {
    let mut architecture = llama_shape(config, QWEN2, true, false, false)?;
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    architecture.windows = late_windows(config, architecture.layers)?;
    Ok(architecture)
}

/// Qwen3 (Yang et al. 2025).
pub(super) fn qwen3(config: &Config) -> Result<Architecture> {
    let bias = config.flag("attention_bias", false)?;
    let mut architecture = llama_shape(config, QWEN3, bias, bias, false)?;
    architecture.names.query_key_norms = Some(["self_attn.q_norm", "self_attn.k_norm"]);
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    architecture.windows = late_windows(config, architecture.layers)?;
    Ok(architecture)
}

/// Gemma 2 (Gemma Team 2024). Its files leave out what its defaults say.
pub(super) fn gemma2(config: &Config) -> Result<Architecture> {
    let bias = config.flag("attention_bias", false)?;
    let mut architecture = llama_shape(config, GEMMA2, bias, bias, false)?;
    let soft_cap = |field: &str, default: f64| match config.json.get(field) {
        Some(value) if value.is_null() => Ok(None),
        _ => config.positive(field, default).map(Some),
    };
    architecture.block = BlockForm::Sandwich;
    architecture.tied_output = config.flag("tie_word_embeddings", true)?;
    let activation = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    architecture.feed_forward = FeedForward::Gated(config.activation(activation, "gelu_pytorch_tanh")?);
    architecture.embedding_scale = Some((architecture.d_model as f64).sqrt());
    architecture.attention_scale = 1.0 / config.positive("query_pre_attn_scalar", 256.0)?.sqrt();
    architecture.attention_soft_cap = soft_cap("attn_logit_softcapping", 50.0)?;
    architecture.output_soft_cap = soft_cap("final_logit_softcapping", 30.0)?;
    // Every other layer slides, the first one does.
    let window = Some(config.optional_size("sliding_window")?.unwrap_or(4096));
    architecture.windows = match sliding_layers(config, architecture.layers)? {
        Some(sliding) => sliding.into_iter().map(|slides| window.filter(|_| slides)).collect(),
        None => (0..architecture.layers).map(|layer| window.filter(|_| layer % 2 == 0)).collect(),
    };
    architecture.names.attention_output_norm = Some("post_attention_layernorm");
    architecture.names.feed_forward_norm = "pre_feedforward_layernorm";
    architecture.names.feed_forward_output_norm = Some("post_feedforward_layernorm");
    architecture.names.norm_weights_less_one = true;
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    Ok(architecture)
}

/// Windows where `use_sliding_window` asks for them: in the layers that `layer_types` names, or in those after the first `max_window_layers`.
fn late_windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; layers]);
    }
    let window = config.optional_size("sliding_window")?;
    let full_layers = config.number("max_window_layers", layers as f64)? as usize;
    Ok(match sliding_layers(config, layers)? {
        Some(sliding) => sliding.into_iter().map(|slides| window.filter(|_| slides)).collect(),
        None => (0..layers).map(|layer| window.filter(|_| layer >= full_layers)).collect(),
    })
}

/// What `layer_types` says of each layer, in files of current `transformers`.
fn sliding_layers(config: &Config, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.get("layer_types") else { return Ok(None) };
    let of_layer = |value: &serde_json::Value| match value.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let sliding: Option<Vec<bool>> = types.as_array().and_then(|types| types.iter().map(of_layer).collect());
    match sliding {
        Some(sliding) if sliding.len() == layers => Ok(Some(sliding)),
        _ => bail!(
            "{}: field \"layer_types\" is {}, expected {layers} times \"sliding_attention\" or \"full_attention\"",
            config.file,
            shortened(types)
        ),
    }
}

fn llama_shape(
    config: &Config,
    classes: Classes,
    qkv_bias: bool,
    output_bias: bool,
    feed_forward_bias: bool,
) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.layers("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if classes == GEMMA2 => 256,
        None if classes == QWEN3 => 128,
        None if d_model.is_multiple_of(heads) => d_model / heads,
        None => bail!("{}: hidden_size {d_model} is not a multiple of num_attention_heads {heads}", config.file),
    };
    Ok(Architecture {
        language_model_class: classes.0,
        classifier_class: classes.1,
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: config.optional_size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        d_ff: config.size("intermediate_size")?,
        max_positions: context(config, 2048)?,
        block: BlockForm::PreNorm,
        norm: NormKind::Rms,
        norm_epsilon: config.positive("rms_norm_eps", 1e-6)?,
        positions: Positions::Rotary { frequencies: rotary_frequencies(config, head_dim)? },
        position_offset: 0,
        token_types: 0,
        embedding_scale: None,
        attention_scale: 1.0 / (head_dim as f64).sqrt(),
        attention_soft_cap: None,
        output_soft_cap: None,
        feed_forward: FeedForward::Gated(config.activation("hidden_act", "silu")?),
        windows: vec![None; layers],
        causal: true,
        tied_output: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: false,
        default_lora_targets: &["q_proj", "v_proj"],
        default_ia3_targets: &["k_proj", "v_proj", "down_proj"],
        default_ia3_feed_forward: &["down_proj"],
        names: names(qkv_bias, output_bias, feed_forward_bias),
    })
}

fn names(qkv_bias: bool, output_bias: bool, feed_forward_bias: bool) -> TensorNames {
    TensorNames {
        prefix: "model.",
        embeddings: "embed_tokens.weight",
        positions: "",
        token_types: None,
        embedding_norm: None,
        blocks: "layers",
        attention_norm: "input_layernorm",
        attention_output_norm: None,
        query_key_norms: None,
        attention_input: AttentionInput::Separate {
            query: LinearName { name: "self_attn.q_proj", bias: qkv_bias },
            key: LinearName { name: "self_attn.k_proj", bias: qkv_bias },
            value: LinearName { name: "self_attn.v_proj", bias: qkv_bias },
        },
        attention_output: LinearName { name: "self_attn.o_proj", bias: output_bias },
        feed_forward_norm: "post_attention_layernorm",
        feed_forward_output_norm: None,
        gate: Some(LinearName { name: "mlp.gate_proj", bias: feed_forward_bias }),
        up: LinearName { name: "mlp.up_proj", bias: feed_forward_bias },
        down: LinearName { name: "mlp.down_proj", bias: feed_forward_bias },
        final_norm: Some("norm"),
        output: "lm_head.weight",
        head: super::DECODER_HEAD,
        bottlenecks: super::DECODER_BOTTLENECKS,
        transposed_linears: false,
        norm_weights_less_one: false,
    }
}
