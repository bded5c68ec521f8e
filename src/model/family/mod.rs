//! The families: each a small file that reads its `config.json` and names its tensors.

mod bert;
mod gpt2;
mod gpt_neox;
mod llama;
mod rotary;

use super::architecture::{Architecture, Config, HeadForm, Pooling};
use crate::bail;
use crate::error::Result;

/// The classification head of every decoder: one linear at the last token.
const DECODER_HEAD: HeadForm = HeadForm { pooling: Pooling::Last, dense: None, out: "score", out_bias: false };

/// The bottleneck adapters of every decoder.
const DECODER_BOTTLENECKS: [&str; 2] = ["attention_adapters", "output_adapters"];

const KNOWN: &str =
    "known model types are llama, mistral, qwen2, qwen3, gemma2, gpt2, gpt_neox, bert, roberta and xlm-roberta";

/// The padding token that `transformers` takes for a decoder whose `config.json` has no field `pad_token_id`.
pub fn default_pad_token_id(model_type: &str) -> Option<u32> {
    (model_type == "gemma2").then_some(0)
}

/// Reads the architecture from a `config.json`; `model_type` says which family it is.
pub fn architecture(config: &Config) -> Result<Architecture> {
    let architecture = match config.text("model_type", "")? {
        "llama" => llama::llama(config)?,
        "mistral" => llama::mistral(config)?,
        "qwen2" => llama::qwen2(config)?,
        "qwen3" => llama::qwen3(config)?,
        "gemma2" => llama::gemma2(config)?,
        "gpt2" => gpt2::gpt2(config)?,
        "gpt_neox" => gpt_neox::gpt_neox(config)?,
        "bert" => bert::bert(config)?,
        "roberta" => bert::roberta(config)?,
        "xlm-roberta" => bert::xlm_roberta(config)?,
        "" => bail!("{}: field \"model_type\" is missing; {KNOWN}", config.file),
        other => bail!("{}: unknown architecture, model_type is \"{other}\"; {KNOWN}", config.file),
    };
    architecture.check(config.file)?;
    Ok(architecture)
}
