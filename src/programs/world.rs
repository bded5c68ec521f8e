//! Makes every file of `data/` again from a seed, the base model included.

use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{publish, write_atomically};
use crate::settings::from_arguments;
use crate::sft;
use crate::world::files::{Sizes, write_all};
use crate::world::settings::WorldSettings;

/// A Llama of a million parameters.
const BASE_CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 640,
  "hidden_size": 128,
  "intermediate_size": 352,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "hidden_act": "silu",
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "attention_bias": false,
  "mlp_bias": false,
  "tie_word_embeddings": true,
  "initializer_range": 0.05,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "torch_dtype": "float32"
}
"#;

/// Writes the files and trains the base model.
pub(super) fn run(settings: &WorldSettings) -> Result<()> {
    let sizes = Sizes { pretrain: settings.documents, ..Sizes::default() };
    write_all(&settings.output, settings.seed, &sizes)?;
    if settings.files_only {
        return Ok(());
    }
    let scratch = tempfile::tempdir().map_err(Error::io(&settings.output))?;
    let config = scratch.path().join("config");
    write_atomically(config.join("config.json"), |file| std::io::Write::write_all(file, BASE_CONFIG.as_bytes()))?;
    let run = scratch.path().join("run");
    sft::run(&pretraining(settings, &config, &run)?)?;
    publish(&run.join("last"), &settings.output.join("base"))
}

/// The base model's training: `sft` on raw text from new weights.
fn pretraining(settings: &WorldSettings, config: &Path, run: &Path) -> Result<sft::SftSettings> {
    let data = settings.output.join("pretrain.parquet");
    let evaluation = settings.output.join("pretrain-test.parquet");
    let text = |path: &Path| path.display().to_string();
    from_arguments([
        "--model".to_string(),
        text(config),
        "--data".to_string(),
        text(&data),
        "--evaluation-data".to_string(),
        text(&evaluation),
        "--output".to_string(),
        text(run),
        "--seed".to_string(),
        settings.seed.to_string(),
        "--epochs".to_string(),
        settings.epochs.to_string(),
        "--learning-rate".to_string(),
        "3e-3".to_string(),
        "--weight-decay".to_string(),
        "0.01".to_string(),
        "--batch-size".to_string(),
        "32".to_string(),
        "--max-length".to_string(),
        "512".to_string(),
        "--evaluate-every".to_string(),
        "500".to_string(),
    ])
}
