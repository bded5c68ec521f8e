//! Adapter folders in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What PEFT does not keep and training on needs lies beside them: the encoder of virtual tokens (`encoder.safetensors`) and the hash of the base's weights
//! (`base_model.json`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::fields;
use super::targets::{ALL_LINEAR, Output, Selection, Targets, embedding, is_saved, is_whole, linears};
use crate::bail;
use crate::error::{Error, Result};
use crate::files::warn_once;
use crate::gguf::is_gguf;
use crate::model::Model;
use crate::model::adapter::Saving;
use crate::model::architecture::{Architecture, Config};
use crate::model::folder::read_json;
use crate::model::tying::are_equal;
use crate::model::weight_files;
use crate::model::weights::{Stored, Weights, output_name, tensor_specs};
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
/// `task_type` of a language model, which an adapter without one is taken for.
const LANGUAGE_MODEL: &str = "CAUSAL_LM";

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
    /// Whether the output matrix was trained with the changes of the embeddings.
    pub ties_output: bool,
}

impl AdapterFiles {
    /// Reads the files, whose configuration must say nothing that is not understood.
    pub fn read(folder: &Path, architecture: &Architecture, device: &Device) -> Result<Self> {
        let config_path = folder.join(CONFIG);
        let json = read_json(&config_path)?;
        fields::check_peft(&Config::new(&json, config_path.display().to_string()))?;
        let path = folder.join(TENSORS);
        if !path.is_file() {
            weight_files::refuse_pickles(folder)?;
            bail!("{}: there is no such file; expected the tensors of the adapter", path.display());
        }
        let prefixes = if has_virtual_tokens(&json) { [PROMPT_PREFIX; 2] } else { [PREFIX, PROMPT_PREFIX] };
        let output = Output::of(architecture);
        let stored_output = format!("{}.", output.tensor.trim_end_matches(".weight"));
        let name = |key: String| {
            let bare = prefixes.iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(&key);
            let of_text = bare.strip_prefix(TEXT_PART).map(|name| format!("{WHOLE}{name}"));
            let bare = of_text.as_deref().unwrap_or(bare);
            // Older versions of `transformers` call GPT-NeoX's module as its tensor.
            bare.strip_prefix(&stored_output).map_or(bare.to_string(), |part| format!("{}.{part}", output.module))
        };
        let tensors = weight_files::read_file(&path, device)?;
        let tensors = tensors.into_iter().map(|(key, tensor)| (name(key), tensor)).collect();
        let config_path = config_path.display().to_string();
        let mut files =
            AdapterFiles { folder: folder.to_path_buf(), config_path, json, path, tensors, ties_output: false };
        files.ties_output = files.ties_output(architecture)?;
        files.check_saved_modules(architecture)?;
        Ok(files)
    }

    /// Refuses an adapter without a tensor of a module that `modules_to_save` names, as PEFT does: the file
    /// was cut short, and the base's numbers would take the place of trained ones. Heads are not the base's,
    /// and only a language model has an output matrix.
    fn check_saved_modules(&self, architecture: &Architecture) -> Result<()> {
        let config = self.config();
        let saved = names(&config, "modules_to_save");
        let output = Output::of(architecture);
        let has_output = architecture.causal && self.is_of_language_model()?;
        let of_base = tensor_specs(architecture).into_iter().map(|spec| spec.name);
        let of_base = of_base.filter(|name| Some(name.as_str()) != output_name(architecture));
        let is_stored = |name: &String| {
            // A linear with an update keeps its own tensors under `base_layer`.
            let updated = name.rsplit_once('.').map(|(module, part)| format!("{module}.base_layer.{part}"));
            std::iter::once(name).chain(&updated).any(|name| self.tensors.contains_key(name))
        };
        let missing = of_base
            .chain(has_output.then_some(output.module_weight))
            .find(|name| saved.iter().any(|saved| is_saved(architecture, name, saved)) && !is_stored(name));
        match missing {
            Some(name) => bail!(
                "{}: tensor \"{name}\" is missing, which modules_to_save in adapter_config.json says is stored; copy or download the adapter again",
                self.path.display()
            ),
            None => Ok(()),
        }
    }

    /// `ensure_weight_tying` has an effect where the base ties its tables, and not for every name of them: what is stored a second time was tied.
    fn ties_output(&self, architecture: &Architecture) -> Result<bool> {
        let ensured = self.config().flag("ensure_weight_tying", false)?;
        if !ensured || !architecture.causal || !architecture.tied_output {
            return Ok(false);
        }
        let (embedding, output) = (embedding(architecture), architecture.names.output_module);
        let find = |module: &str, part: &str| self.tensors.get(&format!("{module}.{part}"));
        let updated = find(&embedding, "lora_embedding_A").is_some() && find(output, "lora_A.weight").is_some();
        Ok(match (find(&embedding, "weight"), find(output, "weight")) {
            (Some(table), Some(copy)) if !updated => are_equal(table, copy)?,
            _ => updated,
        })
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Drops the second copies that PEFT stores of whole modules, which it does not read.
    pub fn pass_over_copies(&mut self) {
        self.tensors.retain(|name, _| !name.contains(".original_module.") && !name.contains(".modules_to_save."));
    }

    /// `adapter_config.json`.
    pub fn config(&self) -> Config<'_> {
        Config::new(&self.json, self.config_path.as_str())
    }

    /// Whether the adapted model has an output matrix.
    pub fn is_of_language_model(&self) -> Result<bool> {
        Ok(self.config().text("task_type", LANGUAGE_MODEL)? == LANGUAGE_MODEL)
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

    /// Refuses tensors that nothing has taken: by what they are, where the base model has their module.
    pub fn finish(self, base: &Model) -> Result<()> {
        let Some(name) = self.tensors.keys().next() else { return Ok(()) };
        let path = self.path.display();
        let mut modules = name.match_indices('.').map(|(end, _)| &name[..end]);
        let of_base = |module: &&str| {
            let tensors = ["weight", "bias"].map(|part| format!("{module}.{part}"));
            base.weights().names().any(|name| tensors.contains(name))
                || *module == base.architecture().names.output_module
        };
        let Some(module) = modules.find(of_base) else {
            bail!(
                "{path}: tensor \"{name}\" has no place in the base model; this adapter belongs to another base model or is of an unknown form"
            );
        };
        let part = name[module.len()..].trim_start_matches('.');
        let what = match part {
            "weight" | "bias" => "a whole copy",
            part if part.starts_with("base_layer.") => "another base",
            part if part.contains("trainable_tokens") => "trainable tokens (that the configuration does not list)",
            _ => "this change",
        };
        bail!(
            "{path}: {what} of \"{module}\" is not supported with this configuration (tensor \"{name}\"); train the adapter without it"
        );
    }
}

fn has_virtual_tokens(config: &Value) -> bool {
    config.get("num_virtual_tokens").is_some_and(|count| !count.is_null())
}

/// Refuses a base model whose weights are not those that an adapter was trained on, where its folder says which they were.
pub fn check_base(folder: &Path, base: &Model) -> Result<()> {
    let path = folder.join(BASE);
    if !path.is_file() {
        return Ok(());
    }
    let json = read_json(&path)?;
    let Some(expected) = json.get("weights_xxh3").and_then(Value::as_str) else { return Ok(()) };
    let found = base.weights_as_read().hash()?;
    if found != expected {
        bail!(
            "{}: this adapter was trained on other weights (hash {expected}) than those of {} (hash {found}); give the base model that it belongs to, or delete {BASE} if you are sure",
            folder.display(),
            base.folder().path.display()
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

/// Refuses an update of a layer that the configuration does not select: PEFT would leave it out without a
/// word. Warns, as PEFT does, of layers that it selects and that have no update, of the blocks' linears and
/// of `others` (tables that may be updated): the file was cut short, or belongs to a smaller model.
pub fn check_selected(
    files: &AdapterFiles,
    updated: &BTreeSet<&String>,
    others: impl Iterator<Item = String>,
    architecture: &Architecture,
) -> Result<()> {
    let config = files.config();
    let selection = Selection::read(&config)?;
    let output = Output::of(architecture);
    let is_selected = |layer: &str| -> Result<bool> {
        // It may be named by its module or by its tensor.
        if layer == output.module && names(&config, "target_modules").iter().any(|name| output.is_target(name)) {
            return Ok(true);
        }
        // In a model of text and images the layer has a longer name.
        let in_whole = layer.strip_prefix(WHOLE).map(|name| format!("{TEXT_PART}{name}"));
        let names = std::iter::once(layer).chain(in_whole.as_deref());
        names.map(|name| selection.selects(name)).try_fold(false, |any, selected| Ok(any || selected?))
    };
    for layer in updated {
        // An expression of Python's that is none here says nothing against what the file holds.
        if !is_selected(layer).unwrap_or(true) {
            bail!(
                "{}: there is an update of \"{layer}\" beside it, which target_modules, exclude_modules and layers_to_transform do not select; correct them, or take the update out of the file",
                config.file
            );
        }
    }
    if selection.targets.is_none() {
        return Ok(());
    }
    let saved = names(&config, "modules_to_save");
    let is_absent = |layer: &String| {
        !updated.contains(layer) && !is_whole(architecture, layer, &saved) && is_selected(layer).unwrap_or(false)
    };
    let of_blocks = linears(architecture).into_iter().map(|linear| linear.name);
    let is_all = matches!(&selection.targets, Some(Targets::Expression(name)) if name == ALL_LINEAR);
    let others = others.filter(|_| !is_all);
    let absent: Vec<String> = of_blocks.chain(others).filter(is_absent).collect();
    if let Some(first) = absent.first() {
        warn_once(&format!(
            "warning: {}: {} of the layers that target_modules in adapter_config.json selects have no update in it and stay as the base's, the first is \"{first}\"; \
             copy or download the adapter again if it was cut short",
            files.path.display(),
            absent.len()
        ));
    }
    Ok(())
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
    /// How the base's tensors are on disk, those apart that are as in computation.
    stored: BTreeMap<String, Stored>,
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
            stored: (tensor_specs(architecture).into_iter())
                .filter(|spec| spec.stored != Stored::AsIs)
                .map(|spec| (spec.name, spec.stored))
                .collect(),
        }
    }

    /// A whole tensor of this name in its form on disk.
    pub fn on_disk(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        Ok(match self.stored.get(name) {
            Some(Stored::Transposed) => tensor.t()?.contiguous()?,
            Some(Stored::LessOne) => (tensor - 1.0)?,
            Some(Stored::AsIs) | None => tensor.clone(),
        })
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

/// The field `modules_to_save`: an adapter's own whole modules and those of the head, each once.
pub fn modules_to_save(own: impl Iterator<Item = String>, saving: &Saving) -> Value {
    let of_head = saving.head.into_iter().flat_map(|head| head.modules()).map(String::from);
    let mut modules: Vec<String> = Vec::new();
    for module in own.chain(of_head) {
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
    if modules.is_empty() { Value::Null } else { json!(modules) }
}

/// Writes an adapter's folder: its configuration `config`, its tensors by PEFT's keys, and the head.
pub fn write(folder: &Path, mut config: Value, tensors: BTreeMap<String, Tensor>, saving: &Saving) -> Result<()> {
    let prefix = if has_virtual_tokens(&config) { PROMPT_PREFIX } else { PREFIX };
    config["task_type"] = json!(if saving.head.is_some() { "SEQ_CLS" } else { LANGUAGE_MODEL });
    config["base_model_name_or_path"] = json!(saving.base);
    if let Some(revision) = saving.revision {
        config["revision"] = json!(revision);
    }
    config["inference_mode"] = json!(true);
    let path = folder.join(CONFIG);
    std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
    write_base(folder, saving)?;
    let mut tensors = tensors;
    let part_of = |module: &str, tensors: &BTreeMap<String, Tensor>| {
        let has = |part: &str| tensors.contains_key(&format!("{prefix}{module}.{part}"));
        match () {
            _ if has("lora_A.weight") || has("lora_embedding_A") || has("trainable_tokens_delta") => {
                "base_layer.weight"
            }
            _ if has("token_adapter.trainable_tokens_delta") => "token_adapter.base_layer.weight",
            _ => "weight",
        }
    };
    for (module, table) in saving.tables {
        let part = part_of(module, &tensors);
        // Of two that are tied, that beside an update is enough.
        let is_updated = |(other, same): &(String, Tensor)| {
            same.id() == table.id() && part_of(other, &tensors) == "base_layer.weight"
        };
        if part == "weight" && saving.tables.iter().any(is_updated) {
            continue;
        }
        // A whole copy is the adapter's own, and has the rows of all tokens.
        tensors.entry(format!("{prefix}{module}.{part}")).or_insert_with(|| table.clone());
    }
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
    weight_files::write_file(&folder.join(TENSORS), &tensors, saving.dtype)
}

/// Writes the encoder of virtual tokens beside them.
pub fn write_encoder(folder: &Path, encoder: &Weights) -> Result<()> {
    let tensors = encoder.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    weight_files::write_file(&folder.join(ENCODER), &tensors, DType::F32)
}
