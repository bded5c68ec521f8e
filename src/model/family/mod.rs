//! The families: each a small file that reads its `config.json` and names its tensors.

mod gpt2;
mod llama;

use super::architecture::{Architecture, Config, HeadForm, Pooling};
use crate::bail;
use crate::error::Result;

/// The classification head of every decoder: one linear at the last token.
const DECODER_HEAD: HeadForm = HeadForm { pooling: Pooling::Last, dense: None, out: "score", out_bias: false };

/// The bottleneck adapters of every decoder.
const DECODER_BOTTLENECKS: [&str; 2] = ["attention_adapters", "output_adapters"];

/// Reads the architecture from a `config.json`; `model_type` says which family it is.
pub fn architecture(config: &Config) -> Result<Architecture> {
    let architecture = match config.text("model_type", "")? {
        "llama" => llama::llama(config)?,
        "mistral" => llama::mistral(config)?,
        "qwen2" => llama::qwen2(config)?,
        "gpt2" => gpt2::gpt2(config)?,
        "" => bail!(
            "{}: field \"model_type\" is missing; known model types are llama, mistral, qwen2 and gpt2",
            config.file
        ),
        other => bail!(
            "{}: unknown architecture, model_type is \"{other}\"; known model types are llama, mistral, qwen2 and gpt2",
            config.file
        ),
    };
    architecture.check(config.file)?;
    Ok(architecture)
}
