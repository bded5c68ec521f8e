//! The families: each a small file that reads its `config.json` and names its tensors.

mod bert;
mod gemma;
mod gpt2;
mod gpt_neox;
mod llama;
mod modernbert;
mod olmo;
mod phi3;
mod rotary;
#[cfg(test)]
mod tests;

use serde_json::Value;

use super::architecture::{Architecture, Config, HeadForm, Pooling};
use crate::bail;
use crate::error::Result;

/// The classification head of every decoder: one linear at the last token.
const DECODER_HEAD: HeadForm = HeadForm { pooling: Pooling::Last, hidden: None, out: "score", out_bias: false };

/// The bottleneck adapters of every decoder.
const DECODER_BOTTLENECKS: [&str; 2] = ["attention_adapters", "output_adapters"];

const KNOWN: &str = "known model types are llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gemma3 (its text part), smollm3, olmo2, olmo3, phi3, granite, gpt2, gpt_neox, \
     bert, roberta, xlm-roberta and modernbert";

/// The padding token that `transformers` takes for a model whose `config.json` has no field `pad_token_id`.
pub fn default_pad_token_id(model_type: &str) -> Option<u32> {
    match model_type {
        "gemma2" | "gemma3_text" | "bert" => Some(0),
        "olmo2" | "olmo3" => Some(1),
        "roberta" | "xlm-roberta" => Some(bert::ROBERTA_PADDING),
        "modernbert" => Some(50_283),
        "phi3" => Some(32_000),
        "smollm3" => Some(128_004),
        _ => None,
    }
}

/// Reads the architecture from a `config.json`; `model_type` says which family it is. Every field of the file is read, known to change no number,
/// or refused.
pub fn architecture(config: &Config) -> Result<Architecture> {
    let family = config.text("model_type", "")?;
    let architecture = match family {
        "llama" => llama::llama(config)?,
        "mistral" => llama::mistral(config)?,
        "qwen2" => llama::qwen2(config)?,
        "qwen3" => llama::qwen3(config)?,
        "smollm3" => llama::smollm3(config)?,
        "granite" => llama::granite(config)?,
        "gemma2" => gemma::gemma2(config)?,
        "gemma3_text" => gemma::gemma3(config)?,
        "olmo2" => olmo::olmo2(config)?,
        "olmo3" => olmo::olmo3(config)?,
        "phi3" => phi3::phi3(config)?,
        "gpt2" => gpt2::gpt2(config)?,
        "gpt_neox" => gpt_neox::gpt_neox(config)?,
        "bert" => bert::bert(config)?,
        "roberta" => bert::roberta(config)?,
        "xlm-roberta" => bert::xlm_roberta(config)?,
        "modernbert" => modernbert::modernbert(config)?,
        "" => bail!("{}: field \"model_type\" is missing; {KNOWN}", config.file),
        other => bail!("{}: unknown architecture, model_type is \"{other}\"; {KNOWN}", config.file),
    };
    config.check_all_read(&format!("model type {family}"))?;
    architecture.check(&config.file)?;
    Ok(architecture)
}

/// The part of a `config.json` that is of text: the file itself, or, of a model of text and images whose text part is of a known family,
/// that part as if it were alone.
pub fn text_part(config: Value, file: &str) -> Result<Value> {
    match config.get("model_type").and_then(Value::as_str) {
        Some("gemma3") => gemma::text_part(&config, file),
        _ => Ok(config),
    }
}
