//! Writing weights: tensors of f32 as safetensors files of any element type.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use safetensors::{Dtype, View};

use super::{INDEX_FILE, SINGLE_FILE, StorageForm};
use crate::bail;
use crate::error::{Error, Result};
use crate::model::architecture::Architecture;
use crate::model::dtype;
use crate::model::kept::Kept;
use crate::model::weights::{Stored, Weights, tensor_specs};

/// Writes the weights into `folder` in the given form, so that `transformers` loads them.
pub fn write(folder: &Path, weights: &Weights, architecture: &Architecture, form: &StorageForm) -> Result<()> {
    let stored: BTreeMap<String, Stored> =
        tensor_specs(architecture).into_iter().map(|spec| (spec.name, spec.stored)).collect();
    let mut by_file: BTreeMap<String, BTreeMap<String, OnDisk>> = BTreeMap::new();
    let first_shard = form.shards.as_ref().and_then(|shards| shards.values().min().cloned());
    for (name, kept) in weights.kept() {
        let file = match &form.shards {
            None => SINGLE_FILE.to_string(),
            Some(shards) => {
                let bare = name.strip_prefix(architecture.names.prefix).unwrap_or(name);
                let file = shards.get(name).or_else(|| shards.get(bare)).or(first_shard.as_ref());
                file.cloned().unwrap_or_else(|| SINGLE_FILE.to_string())
            }
        };
        let stored = stored.get(name).copied().unwrap_or(Stored::AsIs);
        by_file.entry(file).or_default().insert(name.clone(), OnDisk { kept: kept.clone(), stored });
    }
    if form.shards.is_some() {
        write_index(folder, &by_file, form.dtype)?;
    }
    for (file, tensors) in &by_file {
        write_tensors(&folder.join(file), tensors, form.dtype)?;
    }
    Ok(())
}

/// A tensor, and how it lies on disk.
struct OnDisk {
    kept: Kept,
    stored: Stored,
}

impl OnDisk {
    /// Its shape on disk.
    fn shape(&self) -> Vec<usize> {
        let mut shape = self.kept.dims();
        if self.stored == Stored::Transposed {
            shape.reverse();
        }
        shape
    }

    /// Its numbers on disk, in f32.
    fn numbers(&self) -> Result<Vec<f32>> {
        let tensor = self.kept.to_tensor();
        numbers(&match self.stored {
            Stored::Transposed => tensor.t()?.contiguous()?,
            Stored::LessOne => (tensor - 1.0)?,
            Stored::AsIs => tensor,
        })
    }
}

fn write_index(folder: &Path, by_file: &BTreeMap<String, BTreeMap<String, OnDisk>>, dtype: DType) -> Result<()> {
    let mut weight_map = serde_json::Map::new();
    let mut total = 0;
    for (file, tensors) in by_file {
        for (name, tensor) in tensors {
            weight_map.insert(name.clone(), file.clone().into());
            total += tensor.kept.count() * dtype.size_in_bytes();
        }
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let path = folder.join(INDEX_FILE);
    std::fs::write(&path, format!("{index:#}\n")).map_err(Error::io(&path))
}

/// Writes one safetensors file with the metadata `transformers` asks for.
///
/// # Errors
/// Where a finite number would not be finite in this element type.
pub fn write_file(path: &Path, tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Result<()> {
    let on_disk = |tensor: &Tensor| OnDisk { kept: Kept::Plain(tensor.clone()), stored: Stored::AsIs };
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), on_disk(tensor))).collect();
    write_tensors(path, &tensors, dtype)
}

fn write_tensors(path: &Path, tensors: &BTreeMap<String, OnDisk>, dtype: DType) -> Result<()> {
    tensors.par_iter().try_for_each(|(name, tensor)| check_finite(path, name, tensor, dtype))?;
    let rendered = |tensor| Rendered { shape: OnDisk::shape(tensor), tensor, dtype };
    write_views(path, tensors.iter().map(|(name, tensor)| (name, rendered(tensor))))
}

/// Writes numbers as they stand in memory, as f32.
pub fn write_numbers(path: &Path, numbers: Vec<(String, Numbers)>) -> Result<()> {
    write_views(path, numbers)
}

fn write_views<N: AsRef<str> + Ord + std::fmt::Display, V: View>(
    path: &Path,
    views: impl IntoIterator<Item = (N, V)>,
) -> Result<()> {
    // `serialize_to_file` gives its file a private mode; what is written is to have that of any new file.
    let permissions =
        File::create(path).and_then(|file| Ok(file.metadata()?.permissions())).map_err(Error::io(path))?;
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| Error::input(format!("{}: could not be written: {error}", path.display())))?;
    std::fs::set_permissions(path, permissions).map_err(Error::io(path))
}

/// Numbers to be written, or a tensor of them.
#[derive(Debug)]
pub enum Numbers<'a> {
    /// All of a tensor's.
    Tensor(Tensor),
    /// These, with their shape.
    Slice(Vec<usize>, &'a [f32]),
}

impl View for Numbers<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        match self {
            Numbers::Tensor(tensor) => tensor.dims(),
            Numbers::Slice(shape, _) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Numbers::Tensor(tensor) => {
                dtype::to_bytes(&numbers(tensor).expect("weights are f32 tensors"), DType::F32).into()
            }
            Numbers::Slice(_, values) => dtype::to_bytes(values, DType::F32).into(),
        }
    }

    fn data_len(&self) -> usize {
        4 * self.shape().iter().product::<usize>()
    }
}

/// A tensor as it will lie on disk; its bytes are made when their turn comes, so that one tensor's are held
/// at a time.
struct Rendered<'a> {
    shape: Vec<usize>,
    tensor: &'a OnDisk,
    dtype: DType,
}

impl View for Rendered<'_> {
    fn dtype(&self) -> Dtype {
        dtype::stored(self.dtype)
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        dtype::to_bytes(&self.tensor.numbers().expect("weights are tensors of numbers"), self.dtype).into()
    }

    fn data_len(&self) -> usize {
        self.tensor.kept.count() * self.dtype.size_in_bytes()
    }
}

/// Refuses a tensor with finite numbers that the element type has not the range for.
fn check_finite(path: &Path, name: &str, tensor: &OnDisk, dtype: DType) -> Result<()> {
    let values = tensor.numbers()?;
    let beyond = dtype::count_beyond(&values, dtype);
    if beyond > 0 {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let sizes = values.iter().filter(|value| value.is_finite()).map(|value| value.abs());
        bail!(
            "{file}: tensor \"{name}\" was not written, as {beyond} of its {} numbers are not finite in {}: the largest is {:.4e}, that type holds up to \
             {:.4e}; write it as {}",
            values.len(),
            dtype::name(dtype),
            sizes.fold(0f32, f32::max),
            dtype::largest(dtype),
            if dtype == DType::F16 { "bf16, which has the range of f32" } else { "f32" }
        );
    }
    Ok(())
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
