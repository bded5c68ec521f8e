//! Adapter folders in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What PEFT does not keep and training on needs lies beside them: the encoder of virtual tokens (`encoder.safetensors`) and the hash of the base's weights
//! (`base_model.json`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::targets::{Targets, linears};
use crate::bail;
use crate::error::{Error, Result};
use crate::gguf::is_gguf;
use crate::model::adapter::Saving;
use crate::model::architecture::{Architecture, Config};
use crate::model::folder::read_json;
use crate::model::weight_files;
use crate::model::weights::Weights;
use crate::remote::hub::{self, HubName};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const TENSORS: &str = "adapter_model.safetensors";
const ENCODER: &str = "encoder.safetensors";
const BASE: &str = "base_model.json";
/// What stands before the names of the model's own tensors.
const PREFIX: &str = "base_model.model.";
/// The same in adapters of virtual tokens.
const PROMPT_PREFIX: &str = "base_model.";
/// What comes before the names of a transformer, and of the transformer of text in a model of text and images.
const WHOLE: &str = "model.";
const TEXT_PART: &str = "model.language_model.";

/// The key of a tensor that has this name in the model.
pub fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// Whether the folder is an adapter's.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

/// An adapter's folder as read; what is taken out of it is known.
pub struct AdapterFiles {
    folder: PathBuf,
    config_path: String,
    json: Value,
    /// The file of the tensors, for messages.
    pub path: PathBuf,
    /// By name, without what stands before the model's own.
    tensors: BTreeMap<String, Tensor>,
}

impl AdapterFiles {
    /// Reads the files.
    pub fn read(folder: &Path, device: &Device) -> Result<Self> {
        let config_path = folder.join(CONFIG);
        let json = read_json(&config_path)?;
        let path = folder.join(TENSORS);
        if !path.is_file() {
            weight_files::refuse_pickles(folder)?;
            bail!("{}: there is no such file; expected the tensors of the adapter", path.display());
        }
        let name = |key: String| {
            let bare = key.strip_prefix(PREFIX).or_else(|| key.strip_prefix(PROMPT_PREFIX)).unwrap_or(&key);
            let of_text = bare.strip_prefix(TEXT_PART).map(|name| format!("{WHOLE}{name}"));
            of_text.unwrap_or_else(|| bare.to_string())
        };
        let tensors = weight_files::read_file(&path, device)?;
        let tensors = tensors.into_iter().map(|(key, tensor)| (name(key), tensor)).collect();
        Ok(AdapterFiles {
            folder: folder.to_path_buf(),
            config_path: config_path.display().to_string(),
            json,
            path,
            tensors,
        })
    }

    /// `adapter_config.json`.
    pub fn config(&self) -> Config<'_> {
        Config::new(&self.json, self.config_path.as_str())
    }

    /// A tensor, if it is there.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    /// Takes a tensor, if it is there.
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// Takes a tensor that must have this shape, if it is there.
    pub fn take_if_of_shape(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        match self.tensors.remove(name) {
            Some(tensor) if tensor.dims() == shape => Ok(Some(tensor)),
            Some(tensor) => bail!(
                "{}: tensor \"{name}\" has shape {:?}, expected {shape:?}; this adapter belongs to another base model",
                self.path.display(),
                tensor.dims()
            ),
            None => Ok(None),
        }
    }

    /// Takes a tensor that must be there and have this shape.
    pub fn take_of_shape(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.take_if_of_shape(name, shape)? {
            Some(tensor) => Ok(tensor),
            None => bail!("{}: tensor \"{name}\" of shape {shape:?} is missing", self.path.display()),
        }
    }

    /// The tensors of an encoder of virtual tokens, where they lie beside.
    pub fn encoder(&self, device: &Device) -> Result<Option<Weights>> {
        let path = self.folder.join(ENCODER);
        if !path.is_file() {
            return Ok(None);
        }
        let mut weights = Weights::default();
        weight_files::read_file(&path, device)?.into_iter().for_each(|(name, tensor)| weights.set(&name, tensor));
        Ok(Some(weights))
    }

    /// Refuses tensors that nothing has taken.
    pub fn finish(self) -> Result<()> {
        match self.tensors.keys().next() {
            None => Ok(()),
            Some(name) => bail!(
                "{}: tensor \"{name}\" has no place in the base model; this adapter belongs to another base model or is of an unknown form",
                self.path.display()
            ),
        }
    }
}

/// Refuses a base model whose weights are not those that an adapter was trained on, where its folder says which they were.
pub fn check_base(folder: &Path, base: &Path, weights: &Weights) -> Result<()> {
    let path = folder.join(BASE);
    if !path.is_file() {
        return Ok(());
    }
    let json = read_json(&path)?;
    let Some(expected) = json.get("weights_xxh3").and_then(Value::as_str) else { return Ok(()) };
    let found = weights.hash()?;
    if found != expected {
        bail!(
            "{}: this adapter was trained on other weights (hash {expected}) than those of {} (hash {found}); give the base model that it belongs to, or delete {BASE} if you are sure",
            folder.display(),
            base.display()
        );
    }
    Ok(())
}

/// Writes which base model an adapter belongs to.
pub fn write_base(folder: &Path, saving: &Saving) -> Result<()> {
    let path = folder.join(BASE);
    let base = json!({ "weights_xxh3": saving.base_hash });
    std::fs::write(&path, format!("{base:#}\n")).map_err(Error::io(&path))
}

/// A field that holds a list of names, or one.
pub fn names(config: &Config, field: &str) -> Vec<String> {
    match config.get(field) {
        Some(Value::String(name)) => vec![name.clone()],
        Some(Value::Array(names)) => names.iter().filter_map(|name| Some(name.as_str()?.to_string())).collect(),
        _ => Vec::new(),
    }
}

/// The layers that a field names: a list of names, or a regular expression.
pub fn targets(config: &Config, field: &str) -> Targets {
    match config.get(field) {
        Some(Value::String(expression)) => Targets::Expression(expression.clone()),
        _ => Targets::Names(names(config, field)),
    }
}

/// The folder of the base model that an adapter's configuration names: relative to the working folder or to the adapter, or on the hub.
pub fn base_folder(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(CONFIG);
    let config = read_json(&path)?;
    // AdapterHub calls it the model's name.
    let base = config.get("base_model_name_or_path").or(config.get("model_name"));
    let Some(base) = base.and_then(Value::as_str) else {
        bail!(
            "{}: field \"base_model_name_or_path\" is missing; put the folder of the base model there (a program that has --adapter takes it with --model, and this folder with --adapter)",
            path.display()
        );
    };
    let candidates = [PathBuf::from(base), folder.join(base)];
    if let Some(found) =
        candidates.into_iter().find(|candidate| candidate.is_dir() || is_gguf(candidate) && candidate.is_file())
    {
        return Ok(found);
    }
    let revision = config.get("revision").and_then(Value::as_str).filter(|_| !base.contains('@'));
    let name = revision.map_or(base.to_string(), |revision| format!("{base}@{revision}"));
    let reason = match HubName::parse(&name).map(|_| hub::folder(Path::new(&name))) {
        Some(Ok(folder)) => return Ok(folder),
        Some(Err(error)) => format!(" ({error})"),
        None => String::new(),
    };
    bail!(
        "{}: the base model \"{base}\" is no folder here{reason}; put the folder where it lies into \"base_model_name_or_path\" (a program that has --adapter takes it with --model, and this folder with --adapter)",
        path.display()
    )
}

/// What adapters say of their base model in their configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseShape {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Their width together.
    pub kv_width: usize,
    /// All linears of the blocks.
    linears: Vec<String>,
}

impl BaseShape {
    /// That of a model.
    pub fn of(architecture: &Architecture) -> Self {
        BaseShape {
            d_model: architecture.d_model,
            layers: architecture.layers,
            heads: architecture.heads,
            kv_heads: architecture.kv_heads,
            kv_width: architecture.kv_width(),
            linears: linears(architecture).into_iter().map(|linear| linear.name).collect(),
        }
    }

    /// Adds what PEFT wants to know of the model where there are virtual tokens.
    pub fn describe(&self, config: &mut Value, token_dim: usize, heads: usize) {
        config["token_dim"] = json!(token_dim);
        config["num_attention_heads"] = json!(heads);
        config["num_layers"] = json!(self.layers);
        config["num_transformer_submodules"] = json!(1);
    }

    /// The shortest endings by which PEFT finds exactly these linears: `q_proj`, or `mlp.c_proj`, or whole names.
    pub fn target_modules(&self, chosen: &[&str]) -> Vec<String> {
        let ending =
            |name: &str, parts: usize| name.rsplitn(parts + 1, '.').take(parts).collect::<Vec<_>>().join("\u{0}");
        let written = |reversed: &str| reversed.split('\u{0}').rev().collect::<Vec<_>>().join(".");
        for parts in 1..=2 {
            let endings: std::collections::BTreeSet<String> = chosen.iter().map(|name| ending(name, parts)).collect();
            let others = self.linears.iter().filter(|name| !chosen.contains(&name.as_str()));
            if others.into_iter().all(|name| !endings.contains(&ending(name, parts))) {
                return endings.iter().map(|ending| written(ending)).collect();
            }
        }
        chosen.iter().map(|name| name.to_string()).collect()
    }
}

/// Writes an adapter's folder: its configuration `config`, its tensors by PEFT's keys, and the head.
pub fn write(folder: &Path, mut config: Value, tensors: BTreeMap<String, Tensor>, saving: &Saving) -> Result<()> {
    let has_virtual_tokens = config.get("num_virtual_tokens").is_some();
    config["task_type"] = json!(if saving.head.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" });
    config["base_model_name_or_path"] = json!(saving.base);
    if let Some(revision) = saving.revision {
        config["revision"] = json!(revision);
    }
    config["inference_mode"] = json!(true);
    let path = folder.join(CONFIG);
    std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
    write_base(folder, saving)?;
    let mut tensors = tensors;
    let prefix = if has_virtual_tokens { PROMPT_PREFIX } else { PREFIX };
    for (name, tensor) in saving.head.into_iter().flat_map(|head| head.tensors()) {
        tensors.insert(format!("{prefix}{name}"), tensor);
    }
    if saving.is_text_part {
        let within = |key: String| match key.strip_prefix(PREFIX).and_then(|name| name.strip_prefix(WHOLE)) {
            Some(name) => format!("{PREFIX}{TEXT_PART}{name}"),
            None => key,
        };
        tensors = tensors.into_iter().map(|(key, tensor)| (within(key), tensor)).collect();
    }
    weight_files::write_file(&folder.join(TENSORS), &tensors, DType::F32)
}

/// Writes the encoder of virtual tokens beside them.
pub fn write_encoder(folder: &Path, encoder: &Weights) -> Result<()> {
    let tensors = encoder.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    weight_files::write_file(&folder.join(ENCODER), &tensors, DType::F32)
}
