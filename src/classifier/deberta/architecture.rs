//! What a `config.json` says of a DeBERTa.

use serde_json::Value;

use super::attention::RelativePositions;
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{Config, shortened};
use crate::ops::Activation;

/// Sizes and switches.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Architecture {
    pub(super) vocabulary: usize,
    pub(super) d_model: usize,
    pub(super) d_embedding: usize,
    pub(super) d_ff: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) max_positions: usize,
    pub(super) token_types: usize,
    pub(super) norm_epsilon: f64,
    pub(super) has_absolute_positions: bool,
    pub(super) relative: Option<RelativePositions>,
    /// Relative positions are projected by the weights of content.
    pub(super) shares_projections: bool,
    pub(super) content_to_position: bool,
    pub(super) position_to_content: bool,
    pub(super) norms_relative_embeddings: bool,
    pub(super) convolution: Option<ConvolutionForm>,
    pub(super) activation: Activation,
    pub(super) pooler_activation: Activation,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ConvolutionForm {
    pub(super) kernel: usize,
    pub(super) groups: usize,
    pub(super) activation: Activation,
}

impl Architecture {
    pub(super) fn read(config: &Config) -> Result<Self> {
        let d_model = config.size("hidden_size")?;
        let heads = config.size("num_attention_heads")?;
        let head_dim = config.optional_size("attention_head_size")?.unwrap_or(d_model / heads.max(1));
        let pooled = config.optional_size("pooler_hidden_size")?.unwrap_or(d_model);
        if heads * head_dim != d_model || pooled != d_model {
            bail!(
                "{}: {heads} attention heads of width {head_dim} and a pooler of width {pooled} do not fit hidden_size {d_model}; both are expected to add up to it",
                config.file
            );
        }
        let max_positions = config.optional_size("max_position_embeddings")?.unwrap_or(512);
        let kinds = position_attention(config)?;
        let attends = |name: &str| kinds.iter().any(|kind| kind == name);
        let architecture = Architecture {
            vocabulary: config.size("vocab_size")?,
            d_model,
            d_embedding: config.optional_size("embedding_size")?.unwrap_or(d_model),
            d_ff: config.size("intermediate_size")?,
            layers: config.layers("num_hidden_layers")?,
            heads,
            max_positions,
            token_types: positive(config, "type_vocab_size")?.unwrap_or(0),
            norm_epsilon: config.positive("layer_norm_eps", 1e-7)?,
            has_absolute_positions: config.flag("position_biased_input", true)?,
            relative: relative_positions(config, max_positions)?,
            shares_projections: config.flag("share_att_key", false)?,
            content_to_position: attends("c2p"),
            position_to_content: attends("p2c"),
            norms_relative_embeddings: config
                .text("norm_rel_ebd", "none")?
                .to_lowercase()
                .split('|')
                .any(|kind| kind.trim() == "layer_norm"),
            convolution: ConvolutionForm::read(config, d_model)?,
            activation: config.activation("hidden_act", "gelu")?,
            pooler_activation: config.activation("pooler_hidden_act", "gelu")?,
        };
        // Of training and of the head that predicts tokens; and what is read only beside a switch, where that is off.
        config.ignore(&["initializer_range", "legacy", "tie_word_embeddings", "padding_idx"]);
        config.ignore(&["max_relative_positions", "position_buckets", "conv_groups", "conv_act"]);
        config.check_all_read("DeBERTa")?;
        Ok(architecture)
    }

    /// Scores are divided by the root of their width times the number of their kinds.
    pub(super) fn attention_scale(&self) -> f32 {
        let kinds = 1 + usize::from(self.content_to_position) + usize::from(self.position_to_content);
        1.0 / ((self.d_model / self.heads * kinds) as f32).sqrt()
    }
}

/// `pos_att_type`: a list, or names with bars between them.
fn position_attention(config: &Config) -> Result<Vec<String>> {
    let kinds: Option<Vec<String>> = match config.get("pos_att_type") {
        None => Some(Vec::new()),
        Some(Value::String(kinds)) => {
            Some(kinds.to_lowercase().split('|').map(|kind| kind.trim().to_string()).collect())
        }
        Some(kinds) => {
            kinds.as_array().and_then(|kinds| kinds.iter().map(|kind| Some(kind.as_str()?.to_string())).collect())
        }
    };
    match kinds {
        Some(kinds) if kinds.iter().all(|kind| ["c2p", "p2c", ""].contains(&kind.as_str())) => Ok(kinds),
        _ => bail!(
            "{}: field \"pos_att_type\" is {}, expected c2p, p2c or both",
            config.file,
            shortened(&config.json["pos_att_type"])
        ),
    }
}

/// The field where it is above 0; -1 and 0 stand for "none".
fn positive(config: &Config, field: &str) -> Result<Option<usize>> {
    Ok(if config.number(field, -1.0)? < 1.0 { None } else { config.optional_size(field)? })
}

fn relative_positions(config: &Config, max_positions: usize) -> Result<Option<RelativePositions>> {
    if !config.flag("relative_attention", false)? {
        return Ok(None);
    }
    let longest = positive(config, "max_relative_positions")?.unwrap_or(max_positions);
    let buckets = positive(config, "position_buckets")?;
    if let Some(buckets) = buckets
        && (buckets < 2 || buckets / 2 + 1 >= longest)
    {
        bail!(
            "{}: {buckets} position_buckets for {longest} relative positions; expected at least 2, and fewer than twice the positions",
            config.file
        );
    }
    Ok(Some(RelativePositions { buckets, longest }))
}

impl ConvolutionForm {
    fn read(config: &Config, d_model: usize) -> Result<Option<Self>> {
        let Some(kernel) = positive(config, "conv_kernel_size")? else { return Ok(None) };
        let groups = config.optional_size("conv_groups")?.unwrap_or(1);
        if kernel.is_multiple_of(2) || !d_model.is_multiple_of(groups) {
            bail!(
                "{}: a convolution of conv_kernel_size {kernel} in {groups} conv_groups; expected an odd size, and groups that divide hidden_size {d_model}",
                config.file
            );
        }
        Ok(Some(ConvolutionForm { kernel, groups, activation: config.activation("conv_act", "tanh")? }))
    }
}
