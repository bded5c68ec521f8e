//! The state of a run in numbers: what a checkpoint holds beside the best model.
//!
//! Two files: `state.safetensors` with the tensors, all `f32` as they stand in memory, and `state.toml` with everything else. TOML gives
//! every number back as it was, those that are not finite too.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Table;

use crate::bail;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::model::weight_files::{Numbers, TensorFile, write_numbers};

/// The tensors of a checkpoint.
pub const TENSORS: &str = "state.safetensors";
/// Everything else.
pub const VALUES: &str = "state.toml";

/// A state that is being put together; it borrows what is large.
#[derive(Debug, Default)]
pub struct StateWriter<'a> {
    tensors: Vec<(String, Numbers<'a>)>,
    values: Table,
}

impl<'a> StateWriter<'a> {
    /// Adds a value under a name of its own.
    ///
    /// # Errors
    /// Where TOML has no form for it.
    pub fn value(&mut self, name: &str, value: &impl Serialize) -> Result<()> {
        let value = toml::Value::try_from(value)
            .map_err(|error| Error::input(format!("the state \"{name}\" cannot be written: {error}")))?;
        self.values.insert(name.to_string(), value);
        Ok(())
    }

    /// Adds a tensor.
    pub fn tensor(&mut self, name: String, tensor: &Tensor) {
        self.tensors.push((name, Numbers::Tensor(tensor.detach())));
    }

    /// Adds numbers of this shape.
    pub fn numbers(&mut self, name: String, shape: &[usize], values: &'a [f32]) {
        self.tensors.push((name, Numbers::Slice(shape.to_vec(), values)));
    }

    /// Writes both files into a folder.
    pub fn write(self, folder: &Path) -> Result<()> {
        write_numbers(&folder.join(TENSORS), self.tensors)?;
        let path = folder.join(VALUES);
        let text = toml::to_string(&self.values)
            .map_err(|error| Error::input(format!("{}: could not be written: {error}", path.display())))?;
        write_atomically(path, |file| std::io::Write::write_all(file, text.as_bytes()))
    }
}

/// A state that was written; tensors are read one at a time.
pub struct StateReader {
    path: PathBuf,
    tensors: TensorFile,
    values: Table,
}

impl StateReader {
    /// Opens both files of a folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(VALUES);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let values = text.parse().map_err(|error| Error::input(format!("{}: {error}", path.display())))?;
        Ok(StateReader { tensors: TensorFile::open(&folder.join(TENSORS))?, path, values })
    }

    /// The value of this name.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let Some(value) = self.values.get(name) else {
            bail!("{}: there is no `{name}`; the checkpoint is of another kind of run", self.path.display());
        };
        let fault = |error| Error::input(format!("{}: `{name}`: {error}", self.path.display()));
        value.clone().try_into().map_err(fault)
    }

    /// Whether there is a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.shape(name).is_some()
    }

    /// The tensor of this name, which is expected to have this shape.
    pub fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.tensors.shape(name) {
            Some(found) if found == shape => self.tensors.numbers(name),
            found => bail!(
                "{}: of the tensor \"{name}\" of shape {shape:?} it holds {}; the checkpoint is of another model",
                self.path.with_file_name(TENSORS).display(),
                found.map_or("nothing".to_string(), |found| format!("one of shape {found:?}"))
            ),
        }
    }
}
