//! Llama (Touvron et al. 2023) and the families of its shape: Mistral adds a sliding window, Qwen2 biases on queries, keys
//! and values.

use serde_json::Value;

use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, LinearName, NormKind, Positions, TensorNames,
};

/// `transformers`' classes: language model, classifier.
type Classes = (&'static str, &'static str);

const LLAMA: Classes = ("LlamaForCausalLM", "LlamaForSequenceClassification");
const MISTRAL: Classes = ("MistralForCausalLM", "MistralForSequenceClassification");
const QWEN2: Classes = ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification");

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
    if config.flag("use_sliding_window", false)? {
        let window = config.optional_size("sliding_window")?;
        // The first `max_window_layers` layers see everything.
        let full_layers = config.number("max_window_layers", architecture.layers as f64)? as usize;
        architecture.windows = (0..architecture.layers).map(|layer| window.filter(|_| layer >= full_layers)).collect();
    }
    Ok(architecture)
}

fn llama_shape(
    config: &Config,
    classes: Classes,
    qkv_bias: bool,
    output_bias: bool,
    feed_forward_bias: bool,
) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.size("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
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
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(2048),
        block: BlockForm::PreNorm,
        norm: NormKind::Rms,
        norm_epsilon: config.number("rms_norm_eps", 1e-6)?,
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
        initializer_range: config.number("initializer_range", 0.02)?,
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

/// `1 / theta^(2 i / head_dim)`, with Llama 3's scaling where the configuration asks for it.
///
/// The base stands at the top level with `rope_scaling` beside it, or, in files of current `transformers`, both in
/// `rope_parameters`. Arithmetic is in f32 as in `transformers`, so that angles agree at large positions too.
fn rotary_frequencies(config: &Config, head_dim: usize) -> Result<Vec<f32>> {
    let file = format!("{} (rotary positions)", config.file);
    let empty = Value::Object(Default::default());
    let scaling = config.get("rope_parameters").or_else(|| config.get("rope_scaling")).unwrap_or(&empty);
    let scaling = Config { json: scaling, file: &file };
    let theta = scaling.number("rope_theta", config.number("rope_theta", 10_000.0)?)?;
    let frequencies: Vec<f32> =
        (0..head_dim / 2).map(|index| 1.0 / (theta as f32).powf((2 * index) as f32 / head_dim as f32)).collect();
    match scaling.text("rope_type", scaling.text("type", "default")?)? {
        "default" => Ok(frequencies),
        "linear" => {
            let factor = scaling.number("factor", 1.0)? as f32;
            Ok(frequencies.into_iter().map(|frequency| frequency / factor).collect())
        }
        "llama3" => {
            let original = scaling.size("original_max_position_embeddings")? as f32;
            let factor = scaling.number("factor", 8.0)? as f32;
            let low_factor = scaling.number("low_freq_factor", 1.0)? as f32;
            let high_factor = scaling.number("high_freq_factor", 4.0)? as f32;
            let scale = |frequency: f32| llama3_frequency(frequency, original, factor, low_factor, high_factor);
            Ok(frequencies.into_iter().map(scale).collect())
        }
        other => bail!("{file}: rope_type is \"{other}\"; known types are default, linear and llama3"),
    }
}

/// Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`, short ones are kept, and those
/// between are interpolated.
fn llama3_frequency(frequency: f32, original: f32, factor: f32, low_factor: f32, high_factor: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength > original / low_factor {
        frequency / factor
    } else if wavelength < original / high_factor {
        frequency
    } else {
        let smooth = (original / wavelength - low_factor) / (high_factor - low_factor);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
