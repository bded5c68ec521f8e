//! GGUF files, llama.cpp's form of a model: one file that holds configuration, tokenizer and weights.
//!
//! A file is presented as the folder that `transformers` would have: [`files`] makes `config.json`,
//! `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja` of its
//! metadata, [`Gguf::numbers`] reads its tensors as f32, dequantised by candle, and
//! [`GgufTensors::read_compact`] its matrices in their blocks. So nothing above this module knows the format
//! but the reader of weights.
//!
//! Source: `docs/gguf.md` of ggml; the names and the changes that llama.cpp's converter makes to weights.

mod config;
mod container;
mod tensors;
mod tokenizer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::limits;
pub use config::OF_ROTATIONS;
pub use container::{Gguf, TensorInfo, Value};
pub use tensors::GgufTensors;

/// Whether a model argument is a GGUF file and not a folder.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && !path.is_dir()
}

/// Files by their names.
type Files = BTreeMap<String, Vec<u8>>;

/// A GGUF file as it was when it was read: its path, length and time of change.
type Version = (PathBuf, u64, Option<SystemTime>);

/// The files that this process has made of GGUF files: several parts of a program read each.
static MADE: Mutex<BTreeMap<Version, Arc<Files>>> = Mutex::new(BTreeMap::new());

/// The files of the folder that a GGUF file stands for, by their names, as bytes. Weights are not among them.
///
/// # Errors
/// Where the file is damaged, or holds an architecture, a tokenizer or a setting that is not supported; the error names it.
pub fn files(path: &Path) -> Result<Arc<Files>> {
    let found = File::open(path).and_then(|file| file.metadata()).map_err(Error::io(path))?;
    let version = (path.to_path_buf(), found.len(), found.modified().ok());
    if let Some(files) = MADE.lock().unwrap_or_else(PoisonError::into_inner).get(&version) {
        return Ok(files.clone());
    }
    let files = Arc::new(Gguf::open(path)?.files()?);
    MADE.lock().unwrap_or_else(PoisonError::into_inner).insert(version, files.clone());
    Ok(files)
}

/// Whether a model, which is a folder or a GGUF file, has a file of this name.
///
/// # Errors
/// As [`files`].
pub fn has_file(model: &Path, name: &str) -> Result<bool> {
    match is_gguf(model) {
        true => Ok(files(model)?.contains_key(name)),
        false => Ok(model.join(name).is_file()),
    }
}

/// A file of a model, which is a folder or a GGUF file, of at most `limit` bytes; `None` where it has no such file.
///
/// # Errors
/// As [`files`], and where the file is larger or cannot be read.
pub fn read_file(model: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    if is_gguf(model) {
        return Ok(files(model)?.get(name).cloned());
    }
    let path = model.join(name);
    path.is_file().then(|| limits::read(&path, limit)).transpose()
}

impl Gguf {
    /// The files of the folder that this file stands for.
    ///
    /// # Errors
    /// As [`files`].
    fn files(&self) -> Result<Files> {
        let mut files = tokenizer::files(self)?;
        files.insert("config.json".into(), config::config(self)?.to_string().into_bytes());
        Ok(files)
    }
}
