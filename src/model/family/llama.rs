//! Llama (Touvron et al. 2023) and the families that differ from it in a few points: Mistral has a sliding window, Qwen2 biases on queries, keys
//! and values, Qwen3 norms of each query and key, SmolLM3 layers without rotation, Granite multipliers.

use super::rotary::{Defaults, Sizes, context, rotary};
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, LinearName, NormKind, Positions, QueryKeyNorms,
    TensorNames, shortened,
};

/// What a family of Llama's shape says beside the file.
pub(super) struct Shape {
    /// `transformers`' classes: language model, classifier.
    pub classes: (&'static str, &'static str),
    /// Which linears have a bias.
    pub biases: Biases,
    /// The width of a head where the file has none; otherwise it follows from the other sizes.
    pub head_dim: Option<usize>,
    /// Added to the variance in the norms, where the file says nothing.
    pub norm_epsilon: f64,
    /// Whether the output matrix is the embeddings, where the file says nothing.
    pub tied_output: bool,
    /// The field that names the feed-forward's non-linearity, and its default.
    pub activation: (&'static str, &'static str),
    /// `max_position_embeddings` where the file has none.
    pub longest: usize,
    /// Rotations, where all layers rotate alike; otherwise the family reads them itself.
    pub rotary: Option<Defaults>,
}

/// Which linears have a bias.
#[derive(Default)]
pub(super) struct Biases {
    pub query_key_value: bool,
    pub output: bool,
    pub feed_forward: bool,
}

impl Biases {
    /// Those of attention, as `attention_bias` says.
    pub(super) fn of_attention(config: &Config) -> Result<Self> {
        let bias = config.flag("attention_bias", false)?;
        Ok(Biases { query_key_value: bias, output: bias, feed_forward: false })
    }

    /// Those of attention and, as `mlp_bias` says, of the feed-forward.
    pub(super) fn of_both(config: &Config) -> Result<Self> {
        Ok(Biases { feed_forward: config.flag("mlp_bias", false)?, ..Biases::of_attention(config)? })
    }
}

impl Shape {
    pub(super) fn new(classes: (&'static str, &'static str), biases: Biases) -> Self {
        Shape {
            classes,
            biases,
            head_dim: None,
            norm_epsilon: 1e-6,
            tied_output: false,
            activation: ("hidden_act", "silu"),
            longest: 2048,
            rotary: Some(Defaults::default()),
        }
    }
}

pub(super) fn llama(config: &Config) -> Result<Architecture> {
    // SmolLM2's files say so; it is what model_type says.
    config.ignore(&["is_llama_config"]);
    of_shape(config, Shape::new(("LlamaForCausalLM", "LlamaForSequenceClassification"), Biases::of_both(config)?))
}

pub(super) fn mistral(config: &Config) -> Result<Architecture> {
    let shape = Shape::new(("MistralForCausalLM", "MistralForSequenceClassification"), Biases::default());
    let mut architecture = of_shape(config, Shape { longest: 4096 * 32, ..shape })?;
    let window = config.size_or_none("sliding_window", Some(4096))?;
    architecture.windows = vec![window; architecture.layers];
    // `transformers` reads the window alone; a list of layers that are all of its kind says the same.
    if let Some(sliding) = sliding_layers(config, architecture.layers)?
        && sliding.iter().any(|&slides| slides != window.is_some())
    {
        bail!(
            "{}: field \"layer_types\" is {}, but every layer of this family has the sliding_window {window:?}; remove the field",
            config.file,
            shortened(&config.json["layer_types"])
        );
    }
    Ok(architecture)
}

pub(super) fn qwen2(config: &Config) -> Result<Architecture> {
    let biases = Biases { query_key_value: true, ..Biases::default() };
    let shape = Shape::new(("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"), biases);
    let mut architecture = of_shape(config, Shape { longest: 32768, ..shape })?;
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    architecture.windows = late_windows(config, architecture.layers)?;
    Ok(architecture)
}

/// Qwen3 (Yang et al. 2025).
pub(super) fn qwen3(config: &Config) -> Result<Architecture> {
    let classes = ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification");
    let shape = Shape::new(classes, Biases::of_attention(config)?);
    let mut architecture = of_shape(config, Shape { head_dim: Some(128), longest: 32768, ..shape })?;
    architecture.names.query_key_norms = Some(QueryKeyNorms::ByHead(["self_attn.q_norm", "self_attn.k_norm"]));
    architecture.default_ia3_targets = &["q_proj", "v_proj", "down_proj"];
    architecture.windows = late_windows(config, architecture.layers)?;
    Ok(architecture)
}

/// Windows where `use_sliding_window` asks for them: in the layers that `layer_types` names, or in those after the first `max_window_layers`.
fn late_windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>> {
    let is_used = config.flag("use_sliding_window", false)?;
    let window = config.size_or_none("sliding_window", Some(4096))?.filter(|_| is_used);
    let full_layers = config.not_negative("max_window_layers", 28.0)? as usize;
    let sliding = sliding_layers(config, layers)?;
    let sliding = sliding.unwrap_or((0..layers).map(|layer| window.is_some() && layer >= full_layers).collect());
    windows_of(config, window, sliding)
}

/// The window of each layer that slides.
pub(super) fn windows_of(config: &Config, window: Option<usize>, sliding: Vec<bool>) -> Result<Vec<Option<usize>>> {
    if window.is_none() && sliding.contains(&true) {
        bail!(
            "{}: field \"layer_types\" names sliding layers, but there is no window (sliding_window, use_sliding_window); name them full_attention, or give the window",
            config.file
        );
    }
    Ok(windows(window, &sliding))
}

/// The window in the layers that slide.
pub(super) fn windows(window: Option<usize>, sliding: &[bool]) -> Vec<Option<usize>> {
    sliding.iter().map(|&slides| window.filter(|_| slides)).collect()
}

/// What `layer_types` says of each layer, in files of current `transformers`.
pub(super) fn sliding_layers(config: &Config, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.get("layer_types") else { return Ok(None) };
    let of_layer = |value: &serde_json::Value| match value.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention" | "attention") => Some(false),
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

/// SmolLM3 (Bakouch et al. 2025): every fourth layer does not rotate.
pub(super) fn smollm3(config: &Config) -> Result<Architecture> {
    let shape = Shape::new(("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"), Biases::of_both(config)?);
    let rotary = Some(Defaults { theta: 2_000_000.0, ..Defaults::default() });
    let mut architecture = of_shape(config, Shape { tied_output: true, longest: 32768, rotary, ..shape })?;
    let layers = architecture.layers;
    let rotates = rotating_layers(config, layers)?;
    if let Positions::Rotary(rotary) = &mut architecture.positions {
        rotary.of_layer = rotates.iter().map(|&rotates| Some(0).filter(|_| rotates)).collect();
    }
    let is_used = config.flag("use_sliding_window", false)?;
    let window = config.optional_size("sliding_window")?;
    let slides = |&rotates: &bool| is_used && window.is_some() && !rotates;
    let sliding = sliding_layers(config, layers)?.unwrap_or(rotates.iter().map(slides).collect());
    architecture.windows = windows_of(config, window, sliding)?;
    // Of Qwen's windows; the family's first files hold it.
    config.ignore(&["max_window_layers"]);
    Ok(architecture)
}

/// Whether each layer rotates: 1 in `no_rope_layers`, or all but every `no_rope_layer_interval`-th.
fn rotating_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    let interval = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    let Some(list) = config.get("no_rope_layers") else {
        return Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    let flags: Option<Vec<bool>> = list.as_array().and_then(|items| {
        items.iter().map(|item| item.as_bool().or(item.as_u64().map(|number| number != 0))).collect()
    });
    match flags {
        Some(mut flags) if flags.len() >= layers => {
            flags.truncate(layers);
            Ok(flags)
        }
        _ => bail!(
            "{}: field \"no_rope_layers\" is {}, expected {layers} times 1 (the layer rotates) or 0",
            config.file,
            shortened(list)
        ),
    }
}

/// Granite 3 (IBM 2024): embeddings, attention's scores, what is added to the residual stream, and logits are scaled by numbers of the file.
pub(super) fn granite(config: &Config) -> Result<Architecture> {
    let shape = Shape::new(("GraniteForCausalLM", "GraniteForSequenceClassification"), Biases::of_both(config)?);
    let mut architecture = of_shape(config, shape)?;
    let multiplier =
        |field: &str| -> Result<Option<f64>> { Ok(Some(config.number(field, 1.0)?).filter(|x| *x != 1.0)) };
    architecture.embedding_scale = multiplier("embedding_multiplier")?;
    architecture.residual_scale = multiplier("residual_multiplier")?;
    architecture.attention_scale = config.number("attention_multiplier", 1.0)?;
    architecture.output_scale = Some(1.0 / config.positive("logits_scaling", 1.0)?).filter(|scale| *scale != 1.0);
    Ok(architecture)
}

/// A model of Llama's shape.
pub(super) fn of_shape(config: &Config, shape: Shape) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.layers("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = match config.optional_size("head_dim")?.or(shape.head_dim) {
        Some(head_dim) => head_dim,
        None if d_model.is_multiple_of(heads) => d_model / heads,
        None => bail!("{}: hidden_size {d_model} is not a multiple of num_attention_heads {heads}", config.file),
    };
    let longest = config.optional_size("max_position_embeddings")?.unwrap_or(shape.longest);
    let sizes = Sizes { head_dim, layers, longest };
    Ok(Architecture {
        language_model_class: shape.classes.0,
        classifier_class: shape.classes.1,
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: config.optional_size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        d_ff: config.size("intermediate_size")?,
        max_positions: context(config, longest),
        block: BlockForm::PreNorm,
        first_attention_norm: true,
        norm: NormKind::Rms,
        norm_epsilon: config.positive("rms_norm_eps", shape.norm_epsilon)?,
        positions: match &shape.rotary {
            Some(defaults) => Positions::Rotary(rotary(config, &sizes, defaults)?),
            None => Positions::Learned,
        },
        position_offset: 0,
        token_types: 0,
        embedding_scale: None,
        residual_scale: None,
        attention_scale: 1.0 / (head_dim as f64).sqrt(),
        attention_soft_cap: None,
        output_scale: None,
        output_soft_cap: None,
        feed_forward: FeedForward::Gated(config.activation(shape.activation.0, shape.activation.1)?),
        windows: vec![None; layers],
        causal: true,
        tied_output: config.tied_output(shape.tied_output)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: false,
        default_lora_targets: &["q_proj", "v_proj"],
        default_ia3_targets: &["k_proj", "v_proj", "down_proj"],
        default_ia3_feed_forward: &["down_proj"],
        names: names(&shape.biases),
    })
}

fn names(biases: &Biases) -> TensorNames {
    let linear = |name: &'static str, bias: bool| LinearName { name, bias };
    TensorNames {
        prefix: "model.",
        embeddings: "embed_tokens.weight",
        positions: "",
        token_types: None,
        embedding_norm: None,
        blocks: "layers",
        attention_norm: Some("input_layernorm"),
        attention_output_norm: None,
        query_key_norms: None,
        attention_input: AttentionInput::Separate {
            query: linear("self_attn.q_proj", biases.query_key_value),
            key: linear("self_attn.k_proj", biases.query_key_value),
            value: linear("self_attn.v_proj", biases.query_key_value),
        },
        attention_output: linear("self_attn.o_proj", biases.output),
        feed_forward_norm: Some("post_attention_layernorm"),
        feed_forward_output_norm: None,
        gate: Some(linear("mlp.gate_proj", biases.feed_forward)),
        up: linear("mlp.up_proj", biases.feed_forward),
        down: linear("mlp.down_proj", biases.feed_forward),
        final_norm: Some("norm"),
        output: "lm_head.weight",
        output_module: "lm_head",
        head: super::DECODER_HEAD,
        bottlenecks: super::DECODER_BOTTLENECKS,
        transposed_linears: false,
        norm_weights_less_one: false,
    }
}
