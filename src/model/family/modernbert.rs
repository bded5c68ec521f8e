//! ModernBERT (Warner et al. 2024): an encoder with rotary positions, local attention in two of three layers, packed projections, a gated
//! feed-forward and no norm before the first block's attention, whose input is normalised as embeddings.

use super::llama::{sliding_layers, windows};
use super::rotary::{Kinds, context, rotary_by_kind};
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, HeadForm, HeadHidden, LinearName, NormKind, Pooling,
    Positions, TensorNames,
};

const LONGEST: usize = 8192;

pub(super) fn modernbert(config: &Config) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.layers("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    if !d_model.is_multiple_of(heads) {
        bail!("{}: hidden_size {d_model} is not a multiple of num_attention_heads {heads}", config.file);
    }
    let head_dim = d_model / heads;
    let every = config.optional_size("global_attn_every_n_layers")?.unwrap_or(3);
    let sliding = sliding_layers(config, layers)?;
    let sliding = sliding.unwrap_or((0..layers).map(|layer| !layer.is_multiple_of(every)).collect());
    let kinds = Kinds {
        sliding: &sliding,
        thetas: [config.positive("global_rope_theta", 160_000.0)?, config.positive("local_rope_theta", 10_000.0)?],
        scaled: [true, true],
        longest: LONGEST,
    };
    // A token sees as far as half of `local_attention` on both sides.
    let window = config.optional_size("local_attention")?.unwrap_or(128) / 2 + 1;
    let has_norm_bias = config.flag("norm_bias", false)?;
    // How it is computed and trained, and the head that predicts tokens, which is not read; the last two are not read by transformers.
    config.ignore(&[
        "deterministic_flash_attn",
        "reference_compile",
        "repad_logits_with_grad",
        "initializer_cutoff_factor",
    ]);
    config.ignore(&["decoder_bias", "sparse_prediction", "sparse_pred_ignore_index"]);
    config.ignore(&["layer_norm_eps", "position_embedding_type"]);
    Ok(Architecture {
        language_model_class: "ModernBertModel",
        classifier_class: "ModernBertForSequenceClassification",
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: heads,
        head_dim,
        d_ff: config.size("intermediate_size")?,
        max_positions: context(config, config.optional_size("max_position_embeddings")?.unwrap_or(LONGEST)),
        block: BlockForm::PreNorm,
        first_attention_norm: false,
        norm: if has_norm_bias { NormKind::Layer } else { NormKind::LayerWithoutBias },
        norm_epsilon: config.positive("norm_eps", 1e-5)?,
        positions: Positions::Rotary(rotary_by_kind(config, head_dim, &kinds)?),
        position_offset: 0,
        token_types: 0,
        embedding_scale: None,
        residual_scale: None,
        attention_scale: 1.0 / (head_dim as f64).sqrt(),
        attention_soft_cap: None,
        output_scale: None,
        output_soft_cap: None,
        feed_forward: FeedForward::GatedPacked(config.activation("hidden_activation", "gelu")?),
        windows: windows(Some(window), &sliding),
        causal: false,
        tied_output: config.tied_output(true)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: true,
        default_lora_targets: &["Wqkv"],
        default_ia3_targets: &["Wqkv", "mlp.Wo"],
        default_ia3_feed_forward: &["mlp.Wo"],
        names: names(config)?,
    })
}

fn names(config: &Config) -> Result<TensorNames> {
    let attention_bias = config.flag("attention_bias", false)?;
    let feed_forward_bias = config.flag("mlp_bias", false)?;
    Ok(TensorNames {
        prefix: "model.",
        embeddings: "embeddings.tok_embeddings.weight",
        positions: "",
        token_types: None,
        embedding_norm: Some("embeddings.norm"),
        blocks: "layers",
        attention_norm: Some("attn_norm"),
        attention_output_norm: None,
        query_key_norms: None,
        attention_input: AttentionInput::Packed(LinearName { name: "attn.Wqkv", bias: attention_bias }),
        attention_output: LinearName { name: "attn.Wo", bias: attention_bias },
        feed_forward_norm: Some("mlp_norm"),
        feed_forward_output_norm: None,
        gate: None,
        up: LinearName { name: "mlp.Wi", bias: feed_forward_bias },
        down: LinearName { name: "mlp.Wo", bias: feed_forward_bias },
        final_norm: Some("final_norm"),
        // Of masked language modelling; nothing here reads it but as the embeddings that it is tied to.
        output: "decoder.weight",
        output_module: "decoder",
        head: head(config)?,
        bottlenecks: super::DECODER_BOTTLENECKS,
        transposed_linears: false,
        norm_weights_less_one: false,
    })
}

/// Its classifier reads the first token or the mean through the prediction head of the pretrained model.
fn head(config: &Config) -> Result<HeadForm> {
    let pooling = match config.text("classifier_pooling", "cls")? {
        "cls" => Pooling::First,
        "mean" => Pooling::Mean,
        other => bail!("{}: field \"classifier_pooling\" is \"{other}\", expected \"cls\" or \"mean\"", config.file),
    };
    let hidden = HeadHidden {
        name: "head.dense",
        bias: config.flag("classifier_bias", false)?,
        activation: config.activation("classifier_activation", "gelu")?,
        norm: Some("head.norm"),
    };
    Ok(HeadForm { pooling, hidden: Some(hidden), out: "classifier", out_bias: true })
}
