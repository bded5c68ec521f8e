//! A model's folder: `config.json`, weights, and the tokenizer's files that travel with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::adapter::{Adapter, Saving};
use super::architecture::{Architecture, Config, Pooling};
use super::dtype;
use super::family;
use super::head::Head;
use super::weight_files::{self, NAMED_IN_CONFIG, StorageForm};
use super::weights::Weights;
use crate::bail;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenizer_files::additional_templates;
use crate::error::{Error, Result};
use crate::gguf;
use crate::limits;
use crate::ops::BaseForm;

/// Files that belong to the tokenizer or to generation and are carried along unchanged.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    GENERATION,
];
const GENERATION: &str = "generation_config.json";

/// What tells the folder of several adapters, each in a folder of its own within it, from that of one.
pub const STACK_FILE: &str = "adapters.json";

/// Writes the folder of an adapter, or, where several stand on top of each other, one folder for each within `folder` and a file that names
/// them in their order. Tables in place of the base's own are stored with the adapter that brought them.
pub fn save_adapters(
    folder: &Path,
    adapters: &[Arc<dyn Adapter>],
    saving: &Saving,
    tables: Option<(usize, Vec<(String, Tensor)>)>,
) -> Result<()> {
    let tables_of = |index: usize| match &tables {
        Some((adapter, tables)) if *adapter == index => &tables[..],
        _ => &[],
    };
    if let [adapter] = adapters {
        return adapter.save(folder, &Saving { tables: tables_of(0), ..*saving });
    }
    let mut names = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let name = format!("{}-{}", index + 1, adapter.method());
        let own = folder.join(&name);
        std::fs::create_dir_all(&own).map_err(Error::io(&own))?;
        // The head is saved once, with the last.
        let head = saving.head.filter(|_| index + 1 == adapters.len());
        adapter.save(&own, &Saving { head, tables: tables_of(index), ..*saving })?;
        names.push(name);
    }
    let path = folder.join(STACK_FILE);
    let json = json!({ "adapters": names });
    std::fs::write(&path, format!("{json:#}\n")).map_err(Error::io(&path))
}

/// A model's folder, as read.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    /// Its path.
    pub path: PathBuf,
    /// Its `config.json`.
    pub config: Value,
    /// How its weights are stored.
    pub form: StorageForm,
    /// The seed of its weights, where the folder held none.
    pub new_from_seed: Option<u64>,
    /// The folders whose tokenizer and generation settings belong to the model, the one that counts most
    /// first: those of adapters, then its own.
    pub companions: Vec<PathBuf>,
}

/// What becomes of a folder without weights. Only a program that trains may make new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WithoutWeights {
    /// It is refused.
    Refuse,
    /// New weights are made from this seed, to train from scratch.
    NewFromSeed(u64),
}

/// Reads `config.json` and the weights, whose matrices are kept in this form.
///
/// # Errors
/// Where a file is missing or damaged; where there are no weights, unless new ones are allowed.
pub fn open(
    path: &Path,
    without_weights: WithoutWeights,
    base_form: BaseForm,
    device: &Device,
) -> Result<(ModelFolder, Architecture, Weights)> {
    let (mut config, mut architecture) = read_architecture(path)?;
    let found = weight_files::read(path, &mut architecture, base_form, device)?;
    let (weights, form, new_from_seed) = match (found, without_weights) {
        (Some((weights, form)), _) => (weights, form, None),
        (None, WithoutWeights::Refuse) => return Err(weight_files::no_weights(path)),
        (None, WithoutWeights::NewFromSeed(seed)) => {
            weight_files::warn_of_weights_below(path);
            // New weights are f32, whatever the configuration was copied from.
            if let Some(fields) = config.as_object_mut() {
                fields.remove("dtype");
                fields.insert("torch_dtype".into(), dtype::name_in_config(DType::F32).into());
            }
            let weights = Weights::random(&architecture, seed, device);
            let weights = weights.map_err(|error| match error {
                Error::Input(reason) => Error::input(format!("{}: {reason}", path.join("config.json").display())),
                other => other,
            })?;
            (weights, StorageForm::default(), Some(seed))
        }
    };
    let (path, companions) = (path.to_path_buf(), vec![path.to_path_buf()]);
    Ok((ModelFolder { path, config, form, new_from_seed, companions }, architecture, weights))
}

/// Reads `config.json`; of a model of text and images what it says of text, as if that were the whole model.
pub fn read_architecture(path: &Path) -> Result<(Value, Architecture)> {
    let Some(bytes) = gguf::read_file(path, "config.json", limits::SMALL_FILE)? else {
        bail!(
            "{}: no config.json there; expected the folder of a Hugging Face model or of a PEFT adapter, or a GGUF file",
            path.display()
        );
    };
    let file = path.join("config.json").display().to_string();
    let config = serde_json::from_slice(&bytes);
    let config = config.map_err(|error| Error::input(format!("{file}: not valid JSON: {error}")))?;
    let config = family::text_part(config, &file)?;
    let architecture = family::architecture(&Config::new(&config, file))?;
    Ok((config, architecture))
}

/// Parses a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = limits::read_text(path, limits::SMALL_FILE)?;
    serde_json::from_str(&text).map_err(|error| Error::input(format!("{}: not valid JSON: {error}", path.display())))
}

impl ModelFolder {
    /// Whether the folder's model is one of text and images, of which the text part is read.
    pub fn is_text_part(&self) -> bool {
        let written = read_json(&self.path.join("config.json"));
        written.is_ok_and(|written| written.get("model_type") != self.config.get("model_type"))
    }

    /// From now on writes weights of this element type.
    pub fn store_as(&mut self, dtype: DType) {
        self.form.dtype = dtype;
        if let Some(fields) = self.config.as_object_mut() {
            // Current files say `dtype`, older ones `torch_dtype`.
            let field = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            fields.insert(field.into(), dtype::name_in_config(dtype).into());
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
            fields.insert("vocab_size".into(), json!(architecture.vocabulary));
            if architecture.causal {
                fields.insert("tie_word_embeddings".into(), json!(architecture.tied_output));
            }
            if let Some(head) = head {
                let label = |index: usize| head.form.labels.get(index).cloned().unwrap_or(format!("LABEL_{index}"));
                let labels: Vec<String> = (0..head.labels()).map(label).collect();
                let ids = labels.iter().enumerate().map(|(id, label)| (label.clone(), json!(id)));
                let names = labels.iter().enumerate().map(|(id, label)| (id.to_string(), json!(label)));
                fields.insert("id2label".into(), Value::Object(names.collect()));
                fields.insert("label2id".into(), Value::Object(ids.collect()));
                let pad = match architecture.positions_follow_padding() {
                    true => self.pad_token_id(),
                    false => self.padding_of(head, self.tokenizer()?.as_ref(), architecture.vocabulary),
                };
                // As null it counts over what transformers has by default.
                fields.insert("pad_token_id".into(), pad.map_or(Value::Null, Value::from));
            }
            fields.shift_remove(NAMED_IN_CONFIG);
        }
        let path = folder.join("config.json");
        std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
        self.copy_companions(folder)
    }

    /// What messages call the model: its folder, and those of the adapters on top of it.
    pub fn name(&self) -> String {
        let adapters = self.companions.iter().rev().filter(|folder| **folder != self.path);
        let on_top: Vec<String> = adapters.map(|folder| folder.display().to_string()).collect();
        match on_top.is_empty() {
            true => self.path.display().to_string(),
            false => format!("{} with {}", self.path.display(), on_top.join(", ")),
        }
    }

    /// The padding token that `transformers` takes for this model.
    pub fn pad_token_id(&self) -> Option<u32> {
        match self.config.get("pad_token_id") {
            Some(id) => id.as_u64().and_then(|id| u32::try_from(id).ok()),
            None => {
                family::default_pad_token_id(self.config.get("model_type").and_then(Value::as_str).unwrap_or_default())
            }
        }
    }

    /// The tokenizer next to the model, where there is one.
    fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let places = self.companions.iter().map(|folder| gguf::has_file(folder, "tokenizer.json"));
        let is_there = places.collect::<Result<Vec<_>>>()?.contains(&true);
        is_there.then(|| Tokenizer::open(&self.companions)).transpose()
    }

    /// The padding token that a classifier is written with: `transformers` reads a decoder's head at the last
    /// token that is not padding, so that it must not be one that ends texts. It is the model's, or else the
    /// tokenizer's, or none.
    fn padding_of(&self, head: &Head, tokenizer: Option<&Tokenizer>, vocabulary: usize) -> Option<u32> {
        if head.form.pad_token_id.is_some() {
            return head.form.pad_token_id;
        }
        let has_row = |pad: &u32| (*pad as usize) < vocabulary;
        let of_model = self.pad_token_id().filter(has_row);
        let of_tokenizer = tokenizer.and_then(Tokenizer::pad).filter(has_row);
        if head.form.pooling != Pooling::Last {
            return of_model.or(of_tokenizer);
        }
        [of_model, of_tokenizer].into_iter().flatten().find(|pad| !self.ends_texts(*pad, tokenizer))
    }

    fn ends_texts(&self, token: u32, tokenizer: Option<&Tokenizer>) -> bool {
        let is_token = |id: &Value| id.as_u64() == Some(u64::from(token));
        let of_model = self.config.get("eos_token_id").is_some_and(|ids| match ids {
            Value::Array(ids) => ids.iter().any(is_token),
            id => is_token(id),
        });
        of_model || tokenizer.is_some_and(|tokenizer| tokenizer.stop_tokens().contains(&token))
    }

    /// A warning where the model's padding token ends texts too, so that `transformers` would read the scores
    /// of this new head before it.
    pub fn padding_warning(
        &self,
        head: &Head,
        is_adapter: bool,
        tokenizer: &Tokenizer,
        vocabulary: usize,
    ) -> Option<String> {
        let pad = self.pad_token_id().filter(|&pad| self.ends_texts(pad, Some(tokenizer)))?;
        if head.form.pooling != Pooling::Last || head.form.pad_token_id.is_some() {
            return None;
        }
        let name = tokenizer.token(pad).unwrap_or_default();
        let config = self.path.join("config.json");
        let what = format!(
            "{}: pad_token_id {pad} ({name:?}) ends texts too, and transformers reads scores at the last token that is not padding",
            config.display()
        );
        Some(match (is_adapter, self.padding_of(head, Some(tokenizer), vocabulary)) {
            (true, _) => format!(
                "{what}: the scores of this adapter will differ there; give the base model another pad_token_id"
            ),
            (false, Some(other)) => format!(
                "{what}; the new model's config.json has pad_token_id {other} ({:?}) in its place",
                tokenizer.token(other).unwrap_or_default()
            ),
            (false, None) => format!(
                "{what}; the new model's config.json has no pad_token_id, without which transformers scores one text at a time"
            ),
        })
    }

    /// Copies the tokenizer's files and the settings of generation.
    pub fn copy_companions(&self, folder: &Path) -> Result<()> {
        let first_with = |name: &str| -> Result<Option<&PathBuf>> {
            for folder in &self.companions {
                if gguf::has_file(folder, name)? {
                    return Ok(Some(folder));
                }
            }
            Ok(None)
        };
        // A tokenizer's files belong together.
        let tokenizer = first_with("tokenizer.json")?.unwrap_or(&self.path);
        for name in COMPANIONS {
            let from = if name == GENERATION { first_with(name)? } else { Some(tokenizer) };
            let limit = if name == GENERATION { limits::SMALL_FILE } else { limits::TOKENIZER_FILE };
            let bytes = from.map(|from| gguf::read_file(from, name, limit)).transpose()?.flatten();
            if let Some(bytes) = bytes {
                let path = folder.join(name);
                std::fs::write(&path, bytes).map_err(Error::io(&path))?;
            }
        }
        for name in additional_templates(tokenizer)? {
            let (from, to) = (tokenizer.join(&name), folder.join(&name));
            std::fs::create_dir_all(to.parent().unwrap_or(folder)).map_err(Error::io(&to))?;
            std::fs::copy(&from, &to).map_err(Error::io(&from))?;
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
