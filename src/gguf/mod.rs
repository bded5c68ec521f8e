//! GGUF files, llama.cpp's form of a model: one file that holds configuration, tokenizer and weights.
//!
//! A file is presented as the folder that `transformers` would have: [`Gguf::files`] makes `config.json`, `tokenizer.json`,
//! `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja` of its metadata, and [`Gguf::numbers`] reads its tensors as
//! f32, dequantised by candle. So nothing above this module knows the format but the reader of weights.
//!
//! Source: `docs/gguf.md` of ggml; the names and the changes that llama.cpp's converter makes to weights.

mod config;
mod container;
mod tensors;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
pub use container::{Gguf, TensorInfo, Value};
pub use tensors::GgufTensors;

/// Whether a path is that of a GGUF file, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The files of the folder that a GGUF file stands for, by their names, as bytes. Weights are not among them.
///
/// # Errors
/// Where the file is damaged, or holds an architecture, a tokenizer or a setting that is not supported; the error names it.
pub fn files(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    Gguf::open(path)?.files()
}

impl Gguf {
    /// The files of the folder that this file stands for.
    ///
    /// # Errors
    /// As [`files`].
    pub fn files(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut files = tokenizer::files(self)?;
        files.insert("config.json".into(), config::config(self)?.to_string().into_bytes());
        Ok(files)
    }
}
