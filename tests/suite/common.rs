//! What several tests need.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::Field;
use candle_core::Device;
use rlhf::Result;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::generate::{Answer, Generated, Generation, PromptTokens, SamplingSettings, Stop, generate};
use rlhf::model::Model;
use rlhf::settings::{Flags, Program, TrainingSettings, from_arguments};

/// Real data beside the checkout; the tests that want it say so and pass where it is absent.
pub fn shared(name: &str) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(name);
    if path.exists() {
        return Some(path.display().to_string());
    }
    eprintln!("skipped: there is no {}", path.display());
    None
}

/// A tiny model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Rotary positions, gated feed-forward, grouped heads.
    Llama,
    /// The same with a sliding window that is shorter than the tests' sequences.
    Mistral,
    /// Learned positions, packed projections, layer norms.
    Gpt2,
    /// Norms of queries and keys.
    Qwen3,
    /// Attention and feed-forward side by side, projections packed by head, heads rotated in part.
    GptNeox,
    /// Norms on both sides of a sub-layer, soft caps, a sliding window in every other layer, scaled embeddings.
    Gemma2,
    /// The same with norms of queries and keys, and rotations by the kind of layer.
    Gemma3,
    /// A layer without rotation, biases.
    Smollm3,
    /// Norms of the sub-layers' outputs and of all queries and keys, a sliding window, rotations by YaRN.
    Olmo3,
    /// Packed projections, and rotations of a part of each head that change beyond 14 tokens.
    Phi3,
    /// Multipliers everywhere.
    Granite,
}

/// Writes a bare `config.json` of this shape.
pub fn write_config(shape: Shape, folder: &Path) {
    let llama = |kind: &str, window: &str| {
        format!(
            r#"{{"model_type": "{kind}", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 2{window}}}"#
        )
    };
    let config = match shape {
        Shape::Llama => llama("llama", ""),
        Shape::Mistral => llama("mistral", r#", "sliding_window": 4"#),
        Shape::Qwen3 => llama("qwen3", r#", "head_dim": 16"#),
        Shape::Gemma2 => llama(
            "gemma2",
            r#", "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0"#,
        ),
        Shape::Gemma3 => llama(
            "gemma3_text",
            r#", "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 9, "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0, "rope_local_base_freq": 50.0"#,
        ),
        Shape::Smollm3 => llama("smollm3", r#", "no_rope_layers": [1, 0], "attention_bias": true, "mlp_bias": true"#),
        Shape::Olmo3 => llama(
            "olmo3",
            r#", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}"#,
        ),
        Shape::Phi3 => llama(
            "phi3",
            r#", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 14, "max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}"#,
        ),
        Shape::Granite => llama(
            "granite",
            r#", "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 0.5"#,
        ),
        Shape::GptNeox => r#"{"model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "rotary_pct": 0.25, "initializer_range": 0.3, "eos_token_id": 2}"#
            .to_string(),
        Shape::Gpt2 => r#"{"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
            "n_positions": 64, "initializer_range": 0.3, "eos_token_id": 2}"#
            .to_string(),
    };
    std::fs::write(folder.join("config.json"), config).expect("the folder can be written to");
}

/// Writes a tiny random model of this shape: its `config.json` and the weights of seed 7.
pub fn write_model(shape: Shape, folder: &Path) -> Result<()> {
    write_config(shape, folder);
    let settings = training_settings(&["--method", "full"]);
    let training = Training::With(&settings);
    let role = Role { folder, adapters: &[], training, head: Head::Language, seed: 7 };
    Bases::new(Device::Cpu).load(&role)?.save(folder)
}

/// A tiny random model, all weights of which train if asked to.
pub fn tiny_model(shape: Shape, trainable: bool) -> Result<Model> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_model(shape, folder.path())?;
    let settings = training_settings(&["--method", "full"]);
    let training = if trainable { Training::With(&settings) } else { Training::Frozen };
    let role = Role { folder: folder.path(), adapters: &[], training, head: Head::Language, seed: 7 };
    Bases::new(Device::Cpu).load(&role)
}

#[derive(clap::Parser, serde::Serialize)]
struct OnlyTraining {
    #[command(flatten)]
    training: TrainingSettings,
}

impl Program for OnlyTraining {
    fn flags() -> Flags<Self> {
        // No program: the tests give the same flags to all methods.
        Flags::new()
    }
}

/// Training settings as the command line gives them.
pub fn training_settings(arguments: &[&str]) -> TrainingSettings {
    from_arguments::<OnlyTraining>(arguments).expect("valid arguments").training
}

/// A column of strings.
pub fn strings(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// A table of these columns.
pub fn table(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true))).unwrap()
}

/// A column of lists, each of which ends at one of `ends` among the items.
pub fn lists(items: ArrayRef, ends: &[i32]) -> ArrayRef {
    let offsets = OffsetBuffer::new(ScalarBuffer::from_iter(std::iter::once(0).chain(ends.iter().copied())));
    let field = Arc::new(Field::new("element", items.data_type().clone(), true));
    Arc::new(ListArray::new(field, offsets, items, None))
}

/// Two answers to each prompt, which end with one of these tokens; the first of them is number `first` of
/// those of this seed.
pub fn answers_to(
    model: &Model,
    prompts: &[PromptTokens],
    sampling: SamplingSettings,
    stop: &[u32],
    seed: u64,
    first: u64,
) -> Result<Generated> {
    let generation = Generation { answers: 2, sampling, stop: Stop::at(stop), seed, first, tokens_per_pass: 64 };
    generate(model, prompts, &generation)
}

/// Fails unless both are the same answers, but for rounding in their log-probabilities.
pub fn assert_same_answers(found: &[Answer], expected: &[Answer], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((&found.tokens, found.ended), (&expected.tokens, expected.ended), "{what}");
        for (found, expected) in found.log_probs.iter().zip(&expected.log_probs) {
            assert!((found - expected).abs() < 2e-5, "{what}: {found} is not {expected}");
        }
    }
}
