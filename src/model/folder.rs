//! A model's folder: `config.json`, weights, and the tokenizer's files that travel with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::adapter::{Adapter, Saving};
use super::architecture::{Architecture, Config};
use super::family;
use super::head::Head;
use super::weight_files::{self, StorageForm};
use super::weights::Weights;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// Files that belong to the tokenizer or to generation and are carried along unchanged.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
];

/// What tells the folder of several adapters, each in a folder of its own within it, from that of one.
pub const STACK_FILE: &str = "adapters.json";

/// Writes the folder of an adapter, or, where several stand on top of each other, one folder for each within `folder` and a file that names
/// them in their order.
pub fn save_adapters(folder: &Path, adapters: &[Arc<dyn Adapter>], saving: &Saving) -> Result<()> {
    if let [adapter] = adapters {
        return adapter.save(folder, saving);
    }
    let mut names = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let name = format!("{}-{}", index + 1, adapter.method());
        let own = folder.join(&name);
        std::fs::create_dir_all(&own).map_err(Error::io(&own))?;
        // The head is saved once, with the last.
        let head = saving.head.filter(|_| index + 1 == adapters.len());
        adapter.save(&own, &Saving { head, ..*saving })?;
        names.push(name);
    }
    let path = folder.join(STACK_FILE);
    let json = json!({ "adapters": names });
    std::fs::write(&path, format!("{json:#}\n")).map_err(Error::io(&path))
}

/// A model's folder, as read.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    /// Where it lies.
    pub path: PathBuf,
    /// Its `config.json`.
    pub config: Value,
    /// How its weights are stored.
    pub form: StorageForm,
}

/// Reads `config.json` and the weights; where there are none, makes them from `seed`, to train from scratch.
pub fn open(path: &Path, seed: u64, device: &Device) -> Result<(ModelFolder, Architecture, Weights)> {
    let (mut config, architecture) = read_architecture(path)?;
    let (weights, form) = if weight_files::has_weights(path) {
        weight_files::read(path, &architecture, device)?
    } else {
        weight_files::refuse_pickles(path)?;
        // New weights are f32, whatever the configuration was copied from.
        if let Some(fields) = config.as_object_mut() {
            fields.remove("dtype");
            fields.insert("torch_dtype".into(), "float32".into());
        }
        let weights = Weights::random(&architecture, seed, device);
        let weights = weights.map_err(|error| match error {
            Error::Input(reason) => Error::input(format!("{}: {reason}", path.join("config.json").display())),
            other => other,
        })?;
        (weights, StorageForm::default())
    };
    Ok((ModelFolder { path: path.to_path_buf(), config, form }, architecture, weights))
}

/// Reads `config.json`.
pub fn read_architecture(path: &Path) -> Result<(Value, Architecture)> {
    let config_path = path.join("config.json");
    if !config_path.is_file() {
        bail!(
            "{}: no config.json there; expected the folder of a Hugging Face model or of a PEFT adapter",
            path.display()
        );
    }
    let config = read_json(&config_path)?;
    let file = config_path.display().to_string();
    let architecture = family::architecture(&Config { json: &config, file: &file })?;
    Ok((config, architecture))
}

/// Parses a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = limits::read_text(path, limits::SMALL_FILE)?;
    serde_json::from_str(&text).map_err(|error| Error::input(format!("{}: not valid JSON: {error}", path.display())))
}

impl ModelFolder {
    /// From now on writes weights of this element type.
    pub fn store_as(&mut self, dtype: DType) {
        self.form.dtype = dtype;
        let name = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        if let Some(fields) = self.config.as_object_mut() {
            // Current files say `dtype`, older ones `torch_dtype`.
            let field = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            fields.insert(field.into(), name.into());
        }
    }

    /// Writes `config.json` for a language model, or a classifier with this head, and the tokenizer's files.
    pub fn write_config(&self, folder: &Path, architecture: &Architecture, head: Option<&Head>) -> Result<()> {
        let mut config = self.config.clone();
        let class = match head {
            Some(head) if head.is_of_the_family(architecture) => architecture.classifier_class,
            _ => architecture.language_model_class,
        };
        if let Some(fields) = config.as_object_mut() {
            fields.insert("architectures".into(), json!([class]));
            if let Some(head) = head {
                let label = |index: usize| head.form.labels.get(index).cloned().unwrap_or(format!("LABEL_{index}"));
                let labels: Vec<String> = (0..head.labels()).map(label).collect();
                let ids = labels.iter().enumerate().map(|(id, label)| (label.clone(), json!(id)));
                let names = labels.iter().enumerate().map(|(id, label)| (id.to_string(), json!(label)));
                fields.insert("id2label".into(), Value::Object(names.collect()));
                fields.insert("label2id".into(), Value::Object(ids.collect()));
                // Without one, transformers' classifiers refuse batches of several sequences.
                if fields.get("pad_token_id").is_none_or(Value::is_null)
                    && let Some(end) = fields.get("eos_token_id").filter(|end| end.is_u64()).cloned()
                {
                    fields.insert("pad_token_id".into(), end);
                }
            }
        }
        let path = folder.join("config.json");
        std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
        self.copy_companions(folder)
    }

    /// Copies the tokenizer's files.
    pub fn copy_companions(&self, folder: &Path) -> Result<()> {
        for name in COMPANIONS {
            let from = self.path.join(name);
            if from.is_file() {
                std::fs::copy(&from, folder.join(name)).map_err(Error::io(&from))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_travels_with_a_model_comes_from_the_hub_with_it() {
        assert_eq!(super::COMPANIONS.iter().find(|name| !crate::remote::hub::is_fetched(name)), None);
    }
}
