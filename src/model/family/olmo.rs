//! OLMo 2 (OLMo Team 2025) and OLMo 3: norms of the sub-layers' outputs instead of their inputs, norms of all queries and of all keys together;
//! OLMo 3 has a window in three of four layers.

use super::llama::{Biases, Shape, of_shape, sliding_layers, windows_of};
use super::rotary::{Defaults, Kinds, rotary_by_kind};
use crate::error::Result;
use crate::model::architecture::{Architecture, BlockForm, Config, Positions, QueryKeyNorms};

const LONGEST: usize = 2048;

pub(super) fn olmo2(config: &Config) -> Result<Architecture> {
    olmo(config, ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification"), Some(Defaults::default()))
}

pub(super) fn olmo3(config: &Config) -> Result<Architecture> {
    let mut architecture = olmo(config, ("Olmo3ForCausalLM", "Olmo3ForSequenceClassification"), None)?;
    let layers = architecture.layers;
    let sliding = sliding_layers(config, layers)?;
    let sliding = sliding.unwrap_or((0..layers).map(|layer| !(layer + 1).is_multiple_of(4)).collect());
    // transformers reads a rope_theta outside rope_parameters for the full layers alone.
    let kinds = Kinds {
        sliding: &sliding,
        thetas: [config.positive("rope_theta", 500_000.0)?, 500_000.0],
        scaled: [true, false],
        longest: LONGEST,
    };
    architecture.positions = Positions::Rotary(rotary_by_kind(config, architecture.head_dim, &kinds)?);
    architecture.windows = windows_of(config, config.size_or_none("sliding_window", Some(4096))?, sliding)?;
    Ok(architecture)
}

fn olmo(config: &Config, classes: (&'static str, &'static str), rotary: Option<Defaults>) -> Result<Architecture> {
    let shape = Shape::new(classes, Biases::of_attention(config)?);
    let mut architecture = of_shape(config, Shape { norm_epsilon: 1e-5, longest: LONGEST, rotary, ..shape })?;
    architecture.block = BlockForm::OutputNorm;
    architecture.names.attention_norm = None;
    architecture.names.attention_output_norm = Some("post_attention_layernorm");
    architecture.names.feed_forward_norm = None;
    architecture.names.feed_forward_output_norm = Some("post_feedforward_layernorm");
    architecture.names.query_key_norms = Some(QueryKeyNorms::Whole(["self_attn.q_norm", "self_attn.k_norm"]));
    Ok(architecture)
}
