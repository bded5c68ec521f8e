//! What a method needs to know of the model that it is made for.

use candle_core::Device;

use crate::data::tokenize::Tokenizer;
use crate::error::Result;
use crate::gguf;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::random::{self, Stream};

/// A frozen model without adapters, and the seed of what is new on it.
pub struct Base<'a> {
    /// The model.
    pub model: &'a Model,
    /// The seed.
    pub seed: u64,
}

impl Base<'_> {
    /// What the model is.
    pub fn architecture(&self) -> &Architecture {
        self.model.architecture()
    }

    /// Where its tensors lie.
    pub fn device(&self) -> &Device {
        self.model.device()
    }

    /// The random numbers that a new tensor starts from.
    pub fn stream(&self, tensor: &str) -> Stream {
        random::stream(self.seed, &format!("initialize {tensor}"), 0)
    }

    /// The model's tokenizer, where its folder holds one.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let folders = &self.model.folder().companions;
        let places = folders.iter().map(|folder| gguf::has_file(folder, "tokenizer.json"));
        if !places.collect::<Result<Vec<_>>>()?.contains(&true) {
            return Ok(None);
        }
        Ok(Some(Tokenizer::open(folders)?.for_rows(self.architecture().vocabulary)))
    }
}
