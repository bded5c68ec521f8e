//! Gemma 2 (Gemma Team 2024) and Gemma 3 (Gemma Team 2025): norms on both sides of a sub-layer, whose weights are stored less one, scaled
//! embeddings, windows in most layers. Their files leave out what their defaults say.

use serde_json::{Value, json};

use super::llama::{Biases, Shape, of_shape, sliding_layers, windows};
use super::rotary::{Defaults, Kinds, rotary_by_kind};
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{Architecture, BlockForm, Config, Positions, QueryKeyNorms, shortened};

/// The longest sequence of Gemma 3 where the file says nothing.
const LONGEST_OF_GEMMA3: usize = 131_072;

pub(super) fn gemma2(config: &Config) -> Result<Architecture> {
    let classes = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification");
    let mut architecture = gemma(config, classes, Some(Defaults::default()), 8192)?;
    // Null is no cap, absence the family's.
    let soft_cap = |field: &str, default: f64| match config.raw(field) {
        Some(value) if value.is_null() => Ok(None),
        _ => config.positive(field, default).map(Some),
    };
    architecture.attention_soft_cap = soft_cap("attn_logit_softcapping", 50.0)?;
    architecture.output_soft_cap = soft_cap("final_logit_softcapping", 30.0)?;
    // Every other layer slides, the first one does.
    let layers = architecture.layers;
    let sliding = sliding_layers(config, layers)?;
    let sliding = sliding.unwrap_or((0..layers).map(|layer| layer % 2 == 0).collect());
    architecture.windows = windows(config.size_or_none("sliding_window", Some(4096))?, &sliding);
    Ok(architecture)
}

pub(super) fn gemma3(config: &Config) -> Result<Architecture> {
    let classes = ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification");
    let mut architecture = gemma(config, classes, None, LONGEST_OF_GEMMA3)?;
    architecture.names.query_key_norms = Some(QueryKeyNorms::ByHead(["self_attn.q_norm", "self_attn.k_norm"]));
    architecture.output_soft_cap = config.optional_positive("final_logit_softcapping")?;
    let pattern = config.optional_size("sliding_window_pattern")?.unwrap_or(6);
    let layers = architecture.layers;
    let sliding = sliding_layers(config, layers)?;
    let sliding = sliding.unwrap_or((0..layers).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect());
    architecture.windows = windows(config.size_or_none("sliding_window", Some(4096))?, &sliding);
    let kinds = Kinds {
        sliding: &sliding,
        thetas: [config.positive("rope_theta", 1_000_000.0)?, config.positive("rope_local_base_freq", 10_000.0)?],
        scaled: [true, false],
        longest: LONGEST_OF_GEMMA3,
    };
    architecture.positions = Positions::Rotary(rotary_by_kind(config, architecture.head_dim, &kinds)?);
    // transformers 5.24 keeps the pattern under another name beside layer_types, and does not cap this family's scores.
    config.ignore(&["_sliding_window_pattern", "attn_logit_softcapping"]);
    Ok(architecture)
}

/// What both have.
fn gemma(
    config: &Config,
    classes: (&'static str, &'static str),
    rotary: Option<Defaults>,
    longest: usize,
) -> Result<Architecture> {
    config.refuse_flag(
        "use_bidirectional_attention",
        "this family is read as a decoder, in which no token sees those after it",
    )?;
    let shape = Shape {
        head_dim: Some(256),
        tied_output: true,
        activation: ("hidden_activation", "gelu_pytorch_tanh"),
        rotary,
        longest,
        ..Shape::new(classes, Biases::of_attention(config)?)
    };
    // Older names of two fields, which transformers does not read.
    config.ignore(&["hidden_act", "sliding_window_size"]);
    let mut architecture = of_shape(config, shape)?;
    architecture.block = BlockForm::Sandwich;
    architecture.embedding_scale = Some((architecture.d_model as f64).sqrt());
    architecture.attention_scale = 1.0 / config.positive("query_pre_attn_scalar", 256.0)?.sqrt();
    architecture.names.attention_output_norm = Some("post_attention_layernorm");
    architecture.names.feed_forward_norm = Some("pre_feedforward_layernorm");
    architecture.names.feed_forward_output_norm = Some("post_feedforward_layernorm");
    architecture.names.norm_weights_less_one = true;
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    Ok(architecture)
}

/// The text part of a Gemma 3 of text and images, as the file of a `Gemma3ForCausalLM`: `text_config` over its defaults, and the fields around it
/// that are not of images.
pub(super) fn text_part(config: &Value, file: &str) -> Result<Value> {
    const OF_IMAGES: [&str; 9] = [
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        "image_token_index",
        "boi_token_index",
        "eoi_token_index",
        "image_token_id",
        "boi_token_id",
        "eoi_token_id",
    ];
    let text = match config.get("text_config") {
        Some(Value::Object(text)) => text,
        other => bail!(
            "{file}: field \"text_config\" is {}, expected the object that describes the text part of this model",
            shortened(other.unwrap_or(&Value::Null))
        ),
    };
    if let Some(other) = text.get("model_type").filter(|kind| *kind != "gemma3_text") {
        bail!("{file}: the model_type of \"text_config\" is {other}, expected \"gemma3_text\"");
    }
    let defaults = json!({
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": LONGEST_OF_GEMMA3,
    });
    let mut fields = defaults.as_object().cloned().unwrap_or_default();
    let around = config.as_object().into_iter().flatten().filter(|(field, _)| !OF_IMAGES.contains(&field.as_str()));
    fields.extend(around.map(|(field, value)| (field.clone(), value.clone())));
    fields.extend(text.iter().map(|(field, value)| (field.clone(), value.clone())));
    fields.insert("model_type".into(), "gemma3_text".into());
    // transformers caps the logits of the text part alone, and not those of the whole.
    fields.insert("final_logit_softcapping".into(), Value::Null);
    let classes = config.get("architectures").and_then(Value::as_array).into_iter().flatten();
    let classes: Vec<Value> = classes.map(|class| class_of_text(class.clone())).collect();
    if !classes.is_empty() {
        fields.insert("architectures".into(), classes.into());
    }
    Ok(Value::Object(fields))
}

/// The class of the text part of a model of this class.
fn class_of_text(class: Value) -> Value {
    match class.as_str() {
        Some("Gemma3ForConditionalGeneration") => "Gemma3ForCausalLM".into(),
        Some("Gemma3ForSequenceClassification") => "Gemma3TextForSequenceClassification".into(),
        _ => class,
    }
}
