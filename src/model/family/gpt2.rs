//! GPT-2 (Radford et al. 2019): layer norms, learned positions, packed Conv1D projections, tied output.

use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, LinearName, NormKind, Positions, TensorNames,
};

const NAMES: TensorNames = TensorNames {
    prefix: "transformer.",
    embeddings: "wte.weight",
    positions: "wpe.weight",
    token_types: None,
    embedding_norm: None,
    blocks: "h",
    attention_norm: Some("ln_1"),
    attention_output_norm: None,
    query_key_norms: None,
    attention_input: AttentionInput::Packed(LinearName { name: "attn.c_attn", bias: true }),
    attention_output: LinearName { name: "attn.c_proj", bias: true },
    feed_forward_norm: Some("ln_2"),
    feed_forward_output_norm: None,
    gate: None,
    up: LinearName { name: "mlp.c_fc", bias: true },
    down: LinearName { name: "mlp.c_proj", bias: true },
    final_norm: Some("ln_f"),
    output: "lm_head.weight",
    output_module: "lm_head",
    head: super::DECODER_HEAD,
    bottlenecks: super::DECODER_BOTTLENECKS,
    transposed_linears: true,
    norm_weights_less_one: false,
};

pub(super) fn gpt2(config: &Config) -> Result<Architecture> {
    let d_model = config.size("n_embd")?;
    let layers = config.layers("n_layer")?;
    let heads = config.size("n_head")?;
    if !d_model.is_multiple_of(heads) {
        bail!("{}: n_embd {d_model} is not a multiple of n_head {heads}", config.file);
    }
    config.refuse_flag("scale_attn_by_inverse_layer_idx", "set it to false if the model was trained so")?;
    // Computes the same numbers in another order and precision; add_cross_attention adds what reads an encoder.
    config.ignore(&["reorder_and_upcast_attn"]);
    config.refuse_flag("add_cross_attention", "give the model without what reads an encoder")?;
    // Of a head that is not read here, of the older name of n_positions, and of what transformers does not read.
    config.ignore(&[
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ]);
    config.ignore(&["n_ctx", "is_decoder"]);
    let head_dim = d_model / heads;
    let attention_scale = if config.flag("scale_attn_weights", true)? { 1.0 / (head_dim as f64).sqrt() } else { 1.0 };
    Ok(Architecture {
        language_model_class: "GPT2LMHeadModel",
        classifier_class: "GPT2ForSequenceClassification",
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: heads,
        head_dim,
        d_ff: config.optional_size("n_inner")?.unwrap_or(4 * d_model),
        max_positions: config.size("n_positions")?,
        block: BlockForm::PreNorm,
        first_attention_norm: true,
        norm: NormKind::Layer,
        norm_epsilon: config.positive("layer_norm_epsilon", 1e-5)?,
        positions: Positions::Learned,
        position_offset: 0,
        token_types: 0,
        embedding_scale: None,
        residual_scale: None,
        attention_scale,
        attention_soft_cap: None,
        output_scale: None,
        output_soft_cap: None,
        feed_forward: FeedForward::Plain(config.activation("activation_function", "gelu_new")?),
        windows: vec![None; layers],
        causal: true,
        tied_output: config.tied_output(true)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: true,
        default_lora_targets: &["c_attn"],
        default_ia3_targets: &["c_attn", "mlp.c_proj"],
        default_ia3_feed_forward: &["mlp.c_proj"],
        names: NAMES,
    })
}
