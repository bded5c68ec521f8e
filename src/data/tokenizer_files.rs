//! The files of a tokenizer, kept as they were read so that they can be saved again unchanged.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::special_tokens::DeclaredTokens;
use super::template::ADDITIONAL_FOLDER;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::gguf;
use crate::limits;

/// What belongs to a tokenizer in a model's folder; only `tokenizer.json` must be there.
const NAMES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
];
/// Settings of the model that say which ids begin and end a text; they are the model's to save.
const MODEL_NAMES: [&str; 2] = ["config.json", "generation_config.json"];

/// The names of the chat templates that a model's folder holds in a folder of their own, `additional_chat_templates/tool_use.jinja` say, in order.
pub(crate) fn additional_templates(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join(ADDITIONAL_FOLDER);
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(Error::io(&path))? {
        let name = entry.map_err(Error::io(&path))?.file_name();
        names.extend(
            name.to_str().filter(|name| name.ends_with(".jinja") && limits::is_plain_name(name)).map(str::to_owned),
        );
    }
    names.sort();
    Ok(names.into_iter().map(|name| format!("{ADDITIONAL_FOLDER}/{name}")).collect())
}

/// The most bytes of a file.
fn limit(name: &str) -> u64 {
    match name {
        "chat_template.jinja" => limits::TEMPLATE_FILE,
        _ if MODEL_NAMES.contains(&name) => limits::SMALL_FILE,
        _ => limits::TOKENIZER_FILE,
    }
}

/// Files by name, in memory.
#[derive(Debug, Clone, Default)]
pub(super) struct TokenizerFiles {
    /// The folder of the tokenizer's own files, for messages.
    pub(super) folder: String,
    /// The bytes of each file.
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

impl TokenizerFiles {
    /// Reads the files that belong to a model: `folders` are those of its adapters, the one that counts most
    /// first, and its own. The tokenizer's files are those of the first folder with a `tokenizer.json`, as
    /// they belong together. Training tools save them next to an adapter, but not the model's settings: each
    /// of these is that of the first folder that holds it.
    pub(super) fn read(folders: &[PathBuf]) -> Result<Self> {
        let first_with = |name: &str| -> Result<Option<&PathBuf>> {
            for folder in folders {
                if gguf::has_file(folder, name)? {
                    return Ok(Some(folder));
                }
            }
            Ok(None)
        };
        let tokenizer = first_with("tokenizer.json")?.or(folders.last()).cloned().unwrap_or_default();
        let mut files = BTreeMap::new();
        for name in NAMES.into_iter().chain(MODEL_NAMES) {
            let folder = if MODEL_NAMES.contains(&name) { first_with(name)? } else { Some(&tokenizer) };
            let bytes = folder.map(|folder| gguf::read_file(folder, name, limit(name))).transpose()?.flatten();
            files.extend(bytes.map(|bytes| (name.to_owned(), bytes)));
        }
        for name in additional_templates(&tokenizer)? {
            let bytes = limits::read(tokenizer.join(&name), limits::TEMPLATE_FILE)?;
            files.insert(name, bytes);
        }
        Ok(Self { folder: tokenizer.display().to_string(), files })
    }

    /// Writes the tokenizer's own files into `folder`, each whole or not at all.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let is_additional = |name: &str| name.starts_with(ADDITIONAL_FOLDER);
        if self.files.keys().any(|name| is_additional(name)) {
            let path = folder.join(ADDITIONAL_FOLDER);
            std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        }
        let is_own = |name: &str| NAMES.contains(&name) || is_additional(name);
        for (name, bytes) in self.files.iter().filter(|(name, _)| is_own(name)) {
            write_atomically(folder.join(name), |file| file.write_all(bytes))?;
        }
        Ok(())
    }

    /// The chat templates in a folder of their own, as names of files.
    pub(super) fn additional_templates(&self) -> Vec<String> {
        self.files.keys().filter(|name| name.starts_with(ADDITIONAL_FOLDER)).cloned().collect()
    }

    /// A file's path, for messages.
    pub(super) fn path(&self, name: &str) -> String {
        Path::new(&self.folder).join(name).display().to_string()
    }

    /// A file as JSON, if it is there.
    pub(super) fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.files.get(name) else { return Ok(None) };
        let value = serde_json::from_slice(bytes);
        value.map(Some).map_err(|error| Error::input(format!("{}: not valid JSON ({error})", self.path(name))))
    }

    /// A file as text, if it is there.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>> {
        let Some(bytes) = self.files.get(name) else { return Ok(None) };
        let text = std::str::from_utf8(bytes);
        text.map(Some).map_err(|error| Error::input(format!("{}: not UTF-8 text ({error})", self.path(name))))
    }

    /// The special tokens by the names that templates know them by (`bos_token`, `eos_token`, `pad_token` and
    /// so on).
    pub(super) fn special_tokens(&self) -> Result<BTreeMap<String, String>> {
        Ok(DeclaredTokens::of(self)?.by_name())
    }

    /// The ids under `key` in the model's settings: one number or a list of them.
    pub(super) fn model_ids(&self, key: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for name in MODEL_NAMES {
            let found = self.json(name)?.and_then(|config| config.get(key).cloned());
            let items = match found {
                Some(Value::Array(items)) => items,
                Some(item) => vec![item],
                None => Vec::new(),
            };
            ids.extend(items.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
        Ok(ids)
    }
}
