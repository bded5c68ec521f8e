//! LoRA's part of `adapter_config.json`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::adapt::peft;
use crate::bail;
use crate::error::Result;
use crate::model::architecture::Config;
use crate::settings::{LoraBias, LoraInit, LoraSettings, Pattern};

/// Whether the tensors belong to what PiSSA leaves of the weights, as in folders of PEFT that were not converted. Other starts that change the
/// weights are refused.
pub(super) fn is_pissa(config: &Config) -> Result<bool> {
    let Some(start) = config.get("init_lora_weights").and_then(Value::as_str) else { return Ok(false) };
    match start {
        start if start.starts_with("pissa") => Ok(true),
        "olora" | "loftq" | "corda" => bail!(
            "{}: init_lora_weights is \"{start}\", so that its tensors belong to other weights than the base's; let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion)",
            config.file
        ),
        _ => Ok(false),
    }
}

/// PEFT wants whole numbers.
pub(super) fn ranks(patterns: &[Pattern]) -> BTreeMap<String, u64> {
    Pattern::map(patterns).into_iter().map(|(name, rank)| (name, rank as u64)).collect()
}

fn dropout(config: &Config) -> Result<f64> {
    match config.number("lora_dropout", 0.0)? {
        dropout if (0.0..1.0).contains(&dropout) => Ok(dropout),
        dropout => bail!("{}: field \"lora_dropout\" is {dropout}, expected a number from 0 to below 1", config.file),
    }
}

/// The settings that a folder's configuration stands for.
pub(super) fn read_settings(config: &Config) -> Result<LoraSettings> {
    for unsupported in ["lora_bias", "use_qalora", "use_bdlora"] {
        if config.flag(unsupported, false)? {
            bail!("{}: \"{unsupported}\": true is not supported", config.file);
        }
    }
    let patterns = |field: &str| -> Vec<Pattern> {
        let map = config.get(field).and_then(Value::as_object);
        let pattern =
            |(name, number): (&String, &Value)| Some(Pattern { name: name.clone(), number: number.as_f64()? });
        map.into_iter().flatten().filter_map(pattern).collect()
    };
    Ok(LoraSettings {
        lora_r: config.size("r")?,
        lora_alpha: config.number("lora_alpha", 8.0)?,
        lora_dropout: dropout(config)?,
        target_modules: peft::names(config, "target_modules"),
        feedforward_modules: Vec::new(),
        use_rslora: config.flag("use_rslora", false)?,
        use_dora: config.flag("use_dora", false)?,
        init_lora_weights: LoraInit::Kaiming,
        rank_pattern: patterns("rank_pattern"),
        alpha_pattern: patterns("alpha_pattern"),
        lora_bias: match config.text("bias", "none")? {
            "none" => LoraBias::None,
            "all" => LoraBias::All,
            "lora_only" => LoraBias::LoraOnly,
            other => bail!("{}: \"bias\" is \"{other}\"; expected none, all or lora_only", config.file),
        },
        modules_to_save: peft::names(config, "modules_to_save"),
        loraplus_lr_ratio: 1.0,
    })
}
