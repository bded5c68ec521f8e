//! Adapter folders in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::lora::{Lora, Update, linears};
use crate::bail;
use crate::error::{Error, Result};
use crate::model::architecture::{Architecture, Config};
use crate::model::folder::read_json;
use crate::model::head::ScalarHead;
use crate::model::weight_files;
use crate::settings::LoraSettings;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";
const SCORE_KEY: &str = "base_model.model.score.weight";

/// An adapter as read, nothing of it trainable.
pub struct PeftAdapter {
    /// The updates.
    pub lora: Lora,
    /// A scalar head's weight, `[1, d_model]`, where the folder holds one.
    pub score: Option<Tensor>,
}

/// The key of a linear's `A`.
pub fn down_key(name: &str) -> String {
    format!("{PREFIX}{name}.lora_A.weight")
}

/// The key of a linear's `B`.
pub fn up_key(name: &str) -> String {
    format!("{PREFIX}{name}.lora_B.weight")
}

/// Whether the folder is an adapter's.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

/// The folder of the base model that an adapter's configuration names, relative to the working folder or to the adapter.
pub fn base_folder(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(CONFIG);
    let config = read_json(&path)?;
    let Some(base) = config.get("base_model_name_or_path").and_then(Value::as_str) else {
        bail!(
            "{}: field \"base_model_name_or_path\" is missing; give the base model with --model and this folder with --adapter",
            path.display()
        );
    };
    let candidates = [PathBuf::from(base), folder.join(base)];
    match candidates.into_iter().find(|candidate| candidate.is_dir()) {
        Some(found) => Ok(found),
        None => bail!(
            "{}: the base model \"{base}\" is no folder here; give the base model with --model and this folder with --adapter",
            path.display()
        ),
    }
}

/// Reads an adapter for a base model of this architecture.
pub fn read(folder: &Path, architecture: &Architecture, device: &Device) -> Result<PeftAdapter> {
    let config_path = folder.join(CONFIG);
    let json = read_json(&config_path)?;
    let settings = read_settings(&Config { json: &json, file: &config_path.display().to_string() })?;
    let path = folder.join(TENSORS);
    let mut tensors = weight_files::read_file(&path, device)?;
    let score = tensors.remove(SCORE_KEY);
    if let Some(score) = &score
        && score.dims() != [1, architecture.d_model]
    {
        bail!(
            "{}: tensor \"{SCORE_KEY}\" has shape {:?}, expected [1, {}]",
            path.display(),
            score.dims(),
            architecture.d_model
        );
    }
    let mut updates = BTreeMap::new();
    for linear in linears(architecture) {
        let (Some(down), Some(up)) = (tensors.remove(&down_key(&linear.name)), tensors.remove(&up_key(&linear.name)))
        else {
            continue;
        };
        let rank = down.dim(0)?;
        if down.dims() != [rank, linear.d_in] || up.dims() != [linear.d_out, rank] {
            bail!(
                "{}: the update of \"{}\" has shapes {:?} and {:?}, but the base model's linear is [{}, {}]; this adapter belongs to another base model",
                path.display(),
                linear.name,
                down.dims(),
                up.dims(),
                linear.d_out,
                linear.d_in
            );
        }
        updates.insert(linear.name, Update::new(down, up));
    }
    if let Some(key) = tensors.keys().next() {
        bail!(
            "{}: tensor \"{key}\" has no place in the base model; this adapter belongs to another base model or is of an unknown form",
            path.display()
        );
    }
    if updates.is_empty() && score.is_none() {
        bail!("{}: holds no tensor", path.display());
    }
    Ok(PeftAdapter { lora: Lora { settings, updates, transposed_base: architecture.names.transposed_linears }, score })
}

fn read_settings(config: &Config) -> Result<LoraSettings> {
    let kind = config.text("peft_type", "")?;
    if kind != "LORA" {
        bail!("{}: peft_type is \"{kind}\"; expected LORA", config.file);
    }
    for unsupported in ["use_dora", "lora_bias", "use_qalora", "use_bdlora"] {
        if config.flag(unsupported, false)? {
            bail!("{}: \"{unsupported}\": true is not supported", config.file);
        }
    }
    if config.text("bias", "none")? != "none" {
        bail!("{}: \"bias\" is not \"none\"; adapters with biases are not supported", config.file);
    }
    let patterned = |field: &str| config.get(field).and_then(Value::as_object).is_some_and(|map| !map.is_empty());
    if patterned("alpha_pattern") {
        bail!("{}: \"alpha_pattern\" is not supported", config.file);
    }
    let rank = config.size("r")?;
    let targets = match config.get("target_modules") {
        Some(Value::String(target)) => vec![target.clone()],
        Some(Value::Array(targets)) => targets.iter().filter_map(|target| Some(target.as_str()?.to_string())).collect(),
        _ => Vec::new(),
    };
    Ok(LoraSettings {
        lora_rank: rank,
        lora_alpha: config.number("lora_alpha", 8.0)?,
        lora_dropout: config.number("lora_dropout", 0.0)?,
        lora_target_modules: targets,
        lora_rslora: config.flag("use_rslora", false)?,
    })
}

/// Writes an adapter's folder.
pub fn write(folder: &Path, lora: &Lora, base: &str, head: Option<&ScalarHead>) -> Result<()> {
    let settings = &lora.settings;
    let modules: BTreeSet<&str> = lora.updates.keys().filter_map(|name| name.rsplit('.').next()).collect();
    // "c_proj" stands for two linears of GPT-2's block; whole names say exactly which.
    let exact =
        lora.updates.keys().filter(|name| name.ends_with(".0.mlp.c_proj") || name.ends_with(".0.attn.c_proj")).count()
            == 1;
    let targets: Vec<&str> =
        if exact { lora.updates.keys().map(String::as_str).collect() } else { modules.into_iter().collect() };
    let config = json!({
        "peft_type": "LORA",
        "task_type": if head.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" },
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.lora_rslora,
        "target_modules": targets,
        "fan_in_fan_out": lora.transposed_base,
        "bias": "none",
        "modules_to_save": head.map(|_| ["score"]),
    });
    let path = folder.join(CONFIG);
    std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
    let mut tensors = BTreeMap::new();
    for (name, update) in &lora.updates {
        tensors.insert(down_key(name), update.down.clone());
        tensors.insert(up_key(name), update.up.clone());
    }
    if let Some(head) = head {
        tensors.insert(SCORE_KEY.to_string(), head.weight.clone());
    }
    weight_files::write_file(&folder.join(TENSORS), &tensors, DType::F32)
}
