//! LoRA's part of `adapter_config.json`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::adapt::peft;
use crate::bail;
use crate::error::Result;
use crate::model::architecture::{Config, shortened};
use crate::settings::{LoraBias, LoraInit, LoraSettings, Pattern};

/// Whether the tensors belong to what PiSSA leaves of the weights, as in folders of PEFT that were not converted. Other starts that change the
/// weights are refused, and so is one that is not known. Names count without regard to case.
pub(super) fn is_pissa(config: &Config) -> Result<bool> {
    let start = match config.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => return Ok(false),
        Some(Value::String(start)) => start,
        Some(other) => bail!(
            "{}: field \"init_lora_weights\" is {}, expected true, false or a text",
            config.file,
            shortened(other)
        ),
    };
    match start.to_lowercase().as_str() {
        name if name == "pissa" || name.starts_with("pissa_niter_") => Ok(true),
        // They say where the numbers began, which a trained adapter holds.
        "gaussian" | "orthogonal" | "eva" | "mica" => Ok(false),
        name if ["olora", "loftq", "lora_ga"].contains(&name) || name.starts_with("corda") => bail!(
            "{}: init_lora_weights is \"{start}\", so that its tensors belong to other weights than the base's; let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion)",
            config.file
        ),
        _ => bail!(
            "{}: init_lora_weights is \"{start}\", which is not known; expected true, false, gaussian, orthogonal, eva, mica or pissa",
            config.file
        ),
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
    let patterns = |field: &str| -> Result<Vec<Pattern>> {
        let Some(value) = config.get(field) else { return Ok(Vec::new()) };
        let pattern =
            |(name, number): (&String, &Value)| Some(Pattern { name: name.clone(), number: number.as_f64()? });
        match value.as_object().and_then(|map| map.iter().map(pattern).collect()) {
            Some(patterns) => Ok(patterns),
            None => {
                bail!("{}: field \"{field}\" is {}, expected a number for each name", config.file, shortened(value))
            }
        }
    };
    let null = ["lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern"];
    if let Some(field) = null.into_iter().find(|field| config.raw(field).is_some_and(Value::is_null)) {
        bail!(
            "{}: field \"{field}\" is null, which PEFT cannot load either; give it the value it was trained with",
            config.file
        );
    }
    Ok(LoraSettings {
        lora_r: config.size("r")?,
        lora_alpha: config.number("lora_alpha", 8.0)?,
        lora_dropout: dropout(config)?,
        target_modules: peft::names(config, "target_modules"),
        feedforward_modules: Vec::new(),
        use_rslora: config.flag("use_rslora", false)?,
        use_dora: config.flag("use_dora", false)?,
        init_lora_weights: LoraInit::Kaiming,
        rank_pattern: patterns("rank_pattern")?,
        alpha_pattern: patterns("alpha_pattern")?,
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
