//! Weights on disk: safetensors files, read tensor by tensor and written again in the form they were found in.

mod locate;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, View};

use super::architecture::Architecture;
use super::head::head_specs;
use super::tying;
use super::weights::{Role, Stored, TensorSpec, Weights, embedding_name, output_name, tensor_specs};
use crate::bail;
use crate::error::{Error, Result};
use crate::files::warn_once;
use crate::gguf::{self, Gguf, GgufTensors, is_gguf};
pub use locate::{
    INDEX_FILE, Located, NAMED_IN_CONFIG, SINGLE_FILE, Shards, locate, no_weights, refuse_pickles,
    warn_of_weights_below,
};

/// How a model's tensors lie on disk, so that they can be written in the same form.
#[derive(Debug, Clone, PartialEq)]
pub struct StorageForm {
    /// Element type.
    pub dtype: DType,
    /// For models in several files: the file of each tensor.
    pub shards: Option<BTreeMap<String, String>>,
}

impl Default for StorageForm {
    fn default() -> Self {
        StorageForm { dtype: DType::F32, shards: None }
    }
}

/// The longest header, as in the library that the format comes from.
const LONGEST_HEADER: u64 = 100_000_000;
/// What a file begins with that stands for one in Git's storage of large files.
const GIT_LFS: &[u8; 8] = b"version ";
/// What comes before the names of the bare transformer's tensors in models of text and images.
const TEXT_PARTS: [&str; 3] = ["model.language_model.", "language_model.model.", "language_model."];

/// Reads all tensors the architecture needs, and a classification head where there is one; `None` where the
/// folder holds no weights. Whether the output matrix is tied to the embeddings is decided here, by what is
/// stored ([`tying::decide`]).
pub fn read(folder: &Path, architecture: &mut Architecture, device: &Device) -> Result<Option<(Weights, StorageForm)>> {
    let Some(mut files) = TensorFiles::find(folder)? else { return Ok(None) };
    let stored_embedding = tying::decide(&mut files, architecture, device)?;
    let architecture = &*architecture;
    let stored_output = tying::stored_output(&files, architecture);
    let mut weights = Weights::default();
    let mut dtype = None;
    let mut specs = tensor_specs(architecture);
    let head = head_specs(architecture, |name| files.shape(name).map(<[usize]>::to_vec));
    if !head.is_empty() {
        // A classifier's folder holds no output matrix of its own.
        specs.retain(|spec| Some(spec.name.as_str()) != output_name(architecture) || stored_output.is_some());
        specs.extend(head);
    } else if let (Some(name), None, None) = (output_name(architecture), &stored_output, &files.gguf) {
        bail!(
            "{}: tensor \"{name}\" is missing, which config.json asks for, and so is that of a classifier's head, \"{}.weight\"; check that config.json \
             belongs to these weights",
            folder.display(),
            architecture.names.head.out
        );
    }
    let embedding = embedding_name(architecture);
    for mut spec in specs {
        let name = spec.name.clone();
        if name == embedding {
            spec.name = stored_embedding.clone();
        } else if let (true, Some(stored)) = (Some(name.as_str()) == output_name(architecture), &stored_output) {
            spec.name = stored.clone();
        }
        let (tensor, found_dtype) = files.read(&spec, architecture.names.prefix, device)?;
        dtype.get_or_insert(found_dtype);
        weights.set(&name, tensor);
    }
    files.warn_of_unread(architecture);
    Ok(Some((weights, StorageForm { dtype: dtype.unwrap_or(DType::F32), shards: files.shards })))
}

/// Whether a model, which is a folder or a GGUF file, has weights.
///
/// # Errors
/// As [`locate`].
pub fn has_weights(model: &Path) -> Result<bool> {
    Ok(is_gguf(model) || locate(model)?.is_some())
}

/// The weights' files of a model's folder, of which only the headers have been read.
pub struct TensorFiles {
    folder: PathBuf,
    files: Vec<TensorFile>,
    /// The tensors of a GGUF file, which are in place of `files`.
    gguf: Option<GgufTensors>,
    shards: Option<BTreeMap<String, String>>,
    /// The names of the tensors that were read.
    read: BTreeSet<String>,
}

impl TensorFiles {
    /// Opens the files that [`locate`] finds.
    ///
    /// # Errors
    /// Where the folder holds no weights, or files that do not belong together.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::find(folder)?.ok_or_else(|| no_weights(folder))
    }

    /// The same; `None` where the folder holds no weights.
    fn find(folder: &Path) -> Result<Option<Self>> {
        if is_gguf(folder) {
            let gguf = Some(GgufTensors::new(Gguf::open(folder)?)?);
            let folder = folder.to_path_buf();
            return Ok(Some(TensorFiles { folder, files: Vec::new(), gguf, shards: None, read: BTreeSet::new() }));
        }
        locate(folder)?.map(|located| Self::open_located(folder, located)).transpose()
    }

    fn open_located(folder: &Path, located: Located) -> Result<Self> {
        let files = located.paths.iter().map(|path| TensorFile::open(path)).collect::<Result<Vec<_>>>()?;
        let shards = match located.shards {
            Shards::Single => None,
            Shards::Indexed(shards) => Some(shards),
            Shards::ByHeader => Some(shards_by_header(&files)?),
        };
        Ok(TensorFiles { folder: folder.to_path_buf(), files, gguf: None, shards, read: BTreeSet::new() })
    }

    /// Where the files lie.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let of_gguf = self.gguf.iter().map(|gguf| gguf.file().path.as_path());
        self.files.iter().map(|file| file.path.as_path()).chain(of_gguf)
    }

    /// The folder that they are of.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a tensor is stored, under any of the names by which [`TensorFiles::read`] finds it.
    pub fn holds(&self, name: &str, prefix: &str) -> bool {
        names_on_disk(name, prefix).iter().any(|name| self.shape(name).is_some())
    }

    /// The shape of a tensor as it lies on disk, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let in_gguf = || self.gguf.as_ref().and_then(|gguf| gguf.shape(name));
        self.files.iter().find_map(|file| file.header.info(name).map(|info| &info.shape[..])).or_else(in_gguf)
    }

    /// A tensor in f32, with its element type on disk. Its name may lack `prefix`, as in the files of a bare transformer, and norms may have
    /// the names of the first BERT's files (`gamma`, `beta`).
    ///
    /// # Errors
    /// Where it is missing or of another shape.
    pub fn read(&mut self, spec: &TensorSpec, prefix: &str, device: &Device) -> Result<(Tensor, DType)> {
        if let Some(gguf) = &self.gguf {
            self.read.extend(gguf.stored_name(&spec.name));
            return Ok((read_gguf(gguf, spec, device)?, DType::F32));
        }
        let names = names_on_disk(&spec.name, prefix);
        let found = self.files.iter_mut().find_map(|file| {
            let name = names.iter().find(|name| file.header.info(name).is_some())?;
            Some((file, name))
        });
        match found {
            Some((file, name)) => {
                self.read.insert(name.clone());
                file.read(name, spec, device)
            }
            None => bail!(
                "{}: tensor \"{}\" of shape {:?} is missing, which config.json asks for; check that config.json belongs to these weights",
                self.folder.display(),
                spec.name,
                spec.shape
            ),
        }
    }
}

/// Endings of tensors that hold no weights of a model: masks, positions and frequencies that older programs
/// stored.
const NO_WEIGHTS: [&str; 6] =
    [".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".inv_freq", ".position_ids"];
/// Beginnings of the heads with which BERT, RoBERTa and ModernBERT were pretrained; a pooler is read where the family's classifier has it.
const PRETRAINING_HEADS: [&str; 6] = ["cls.", "lm_head.", "pooler.", "bert.pooler.", "roberta.pooler.", "decoder."];
/// What the names of a model's part of images hold.
const OF_IMAGES: [&str; 2] = ["vision_tower.", "multi_modal_projector."];

impl TensorFiles {
    /// Warns of tensors that have no place in the model that `config.json` describes: more layers than it
    /// has, or biases that it does not mention. Says how many are of images, which are not read.
    fn warn_of_unread(&self, architecture: &Architecture) {
        let is_harmless = |name: &str| {
            NO_WEIGHTS.iter().any(|ending| name.ends_with(ending))
                || self.gguf.is_some() && gguf::OF_ROTATIONS.contains(&name)
                || name == architecture.names.output
                || !architecture.causal && PRETRAINING_HEADS.iter().any(|beginning| name.starts_with(beginning))
        };
        let of_gguf = self.gguf.iter().flat_map(|gguf| gguf.file().tensors.keys().cloned());
        let names = self.files.iter().flat_map(|file| file.header.tensors().into_keys()).chain(of_gguf);
        let unread = names.filter(|name| !self.read.contains(name) && !is_harmless(name));
        let is_of_images = |name: &String| OF_IMAGES.iter().any(|part| name.contains(part));
        let (of_images, mut unread): (Vec<String>, Vec<String>) = unread.partition(is_of_images);
        if !of_images.is_empty() {
            warn_once(&format!(
                "warning: {}: only the text part of this model is read, and not the {} tensors of its part of images",
                self.folder.display(),
                of_images.len()
            ));
        }
        unread.sort();
        if let Some(first) = unread.first() {
            warn_once(&format!(
                "warning: {}: {} of the stored tensors have no place in the model that config.json describes and are not read, such as {first:?}; check that \
                 config.json belongs to these weights",
                self.folder.display(),
                unread.len()
            ));
        }
    }
}

/// A tensor of a GGUF file, which is there in its form in computation.
fn read_gguf(gguf: &GgufTensors, spec: &TensorSpec, device: &Device) -> Result<Tensor> {
    let file = gguf.file().path.display();
    match (gguf.shape(&spec.name), gguf.read(&spec.name)?) {
        (Some(shape), Some(numbers)) if shape == spec.shape => Ok(Tensor::from_vec(numbers, shape, device)?),
        (Some(shape), _) => bail!(
            "{file}: tensor \"{}\" has shape {shape:?}, but the metadata ask for {:?}; convert the model again",
            spec.name,
            spec.shape
        ),
        (None, _) => bail!(
            "{file}: tensor \"{}\" of shape {:?} is missing, which the metadata ask for; convert the model again",
            spec.name,
            spec.shape
        ),
    }
}

/// The names that a tensor may have on disk.
fn names_on_disk(name: &str, prefix: &str) -> Vec<String> {
    let bare = name.strip_prefix(prefix).unwrap_or(name);
    let old =
        |name: &str| name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
    let mut names = vec![name.to_string(), bare.to_string(), old(name), old(bare)];
    names.extend(TEXT_PARTS.iter().map(|part| format!("{part}{bare}")));
    names
}

/// Reads every tensor of one safetensors file as f32.
pub fn read_file(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let mut file = TensorFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for (name, shape) in file.shapes() {
        let spec = TensorSpec { name: name.clone(), shape, role: Role::Linear, stored: Stored::AsIs };
        let (tensor, _) = file.read(&name, &spec, device)?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The file of each tensor, from the headers of the files.
fn shards_by_header(files: &[TensorFile]) -> Result<BTreeMap<String, String>> {
    let mut shards: BTreeMap<String, String> = BTreeMap::new();
    for file in files {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy();
        for (tensor, _) in file.header.tensors() {
            if let Some(other) = shards.insert(tensor.clone(), name.to_string()) {
                bail!(
                    "{}: tensor \"{tensor}\" is in {other} too; shards without {INDEX_FILE} hold each tensor once",
                    file.path.display()
                );
            }
        }
    }
    Ok(shards)
}

/// A safetensors file of which only the header has been read.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut size = [0u8; 8];
        if length < 8 {
            bail!("{}: not a safetensors file, or cut short: it is {length} bytes long", path.display());
        }
        file.read_exact(&mut size).map_err(Error::io(path))?;
        if &size == GIT_LFS {
            bail!("{}: a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`", path.display());
        }
        let header_length = u64::from_le_bytes(size);
        if header_length > length - 8 || header_length > LONGEST_HEADER {
            bail!(
                "{}: not a safetensors file, or cut short: its header claims {header_length} bytes of {length}",
                path.display()
            );
        }
        let mut buffer = vec![0; header_length as usize];
        file.read_exact(&mut buffer).map_err(Error::io(path))?;
        // `SafeTensors::read_metadata` would want the whole file.
        let header: Metadata = serde_json::from_slice(&buffer)
            .map_err(|error| Error::input(format!("{}: not a safetensors file: {error}", path.display())))?;
        let data_start = 8 + header_length;
        let expected = data_start.checked_add(header.data_len() as u64);
        if expected != Some(length) {
            bail!(
                "{}: is {length} bytes long, its header asks for {} after the first {data_start}; copy or download the file again",
                path.display(),
                header.data_len()
            );
        }
        Ok(TensorFile { path: path.to_path_buf(), file, header, data_start })
    }

    fn read(&mut self, name: &str, spec: &TensorSpec, device: &Device) -> Result<(Tensor, DType)> {
        let info = self.header.info(name).expect("the caller has looked the name up").clone();
        let mut on_disk = spec.shape.clone();
        if spec.stored == Stored::Transposed {
            on_disk.reverse();
        }
        if info.shape != on_disk {
            bail!(
                "{}: tensor \"{name}\" has shape {:?}, but config.json asks for {on_disk:?}; check that config.json belongs to these weights",
                self.path.display(),
                info.shape
            );
        }
        let (values, dtype) = self.values(name, &info)?;
        let broken = values.iter().filter(|value| !value.is_finite()).count();
        if broken > 0 {
            warn_once(&format!(
                "warning: {}: {broken} of the {} numbers of tensor {name:?} are not finite; the file is damaged, or its model was when it was saved",
                self.path.display(),
                values.len()
            ));
        }
        let tensor = Tensor::from_vec(values, on_disk, device)?;
        let tensor = match spec.stored {
            Stored::AsIs => tensor,
            Stored::Transposed => tensor.t()?.contiguous()?,
            Stored::LessOne => (tensor + 1.0)?,
        };
        Ok((tensor, dtype))
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| &info.shape[..])
    }

    /// The names and shapes of all its tensors.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.header.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect()
    }

    /// A tensor's numbers.
    pub fn numbers(&mut self, name: &str) -> Result<Vec<f32>> {
        match self.header.info(name).cloned() {
            Some(info) => Ok(self.values(name, &info)?.0),
            None => bail!("{}: there is no tensor \"{name}\" in it", self.path.display()),
        }
    }

    fn values(&mut self, name: &str, info: &TensorInfo) -> Result<(Vec<f32>, DType)> {
        if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            bail!(
                "{}: tensor \"{name}\" has element type {:?}; expected F32, BF16 or F16",
                self.path.display(),
                info.dtype
            );
        }
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        self.file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(Error::io(&self.path))?;
        self.file.read_exact(&mut bytes).map_err(Error::io(&self.path))?;
        Ok(match info.dtype {
            Dtype::F32 => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                (values, DType::F32)
            }
            Dtype::BF16 => {
                let values = bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
                (values, DType::BF16)
            }
            _ => {
                let values = bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
                (values, DType::F16)
            }
        })
    }
}

/// Writes the weights into `folder` in the given form, so that `transformers` loads them.
pub fn write(folder: &Path, weights: &Weights, architecture: &Architecture, form: &StorageForm) -> Result<()> {
    let stored: BTreeMap<String, Stored> =
        tensor_specs(architecture).into_iter().map(|spec| (spec.name, spec.stored)).collect();
    let mut by_file: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    let first_shard = form.shards.as_ref().and_then(|shards| shards.values().min().cloned());
    for (name, tensor) in weights.iter() {
        let file = match &form.shards {
            None => SINGLE_FILE.to_string(),
            Some(shards) => {
                let bare = name.strip_prefix(architecture.names.prefix).unwrap_or(name);
                let file = shards.get(name).or_else(|| shards.get(bare)).or(first_shard.as_ref());
                file.cloned().unwrap_or_else(|| SINGLE_FILE.to_string())
            }
        };
        let tensor = match stored.get(name) {
            Some(Stored::Transposed) => tensor.t()?.contiguous()?,
            Some(Stored::LessOne) => (tensor - 1.0)?,
            Some(Stored::AsIs) | None => tensor.clone(),
        };
        by_file.entry(file).or_default().insert(name.clone(), tensor);
    }
    if form.shards.is_some() {
        write_index(folder, &by_file, form.dtype)?;
    }
    for (file, tensors) in &by_file {
        write_file(&folder.join(file), tensors, form.dtype)?;
    }
    Ok(())
}

fn write_index(folder: &Path, by_file: &BTreeMap<String, BTreeMap<String, Tensor>>, dtype: DType) -> Result<()> {
    let mut weight_map = serde_json::Map::new();
    let mut total = 0;
    for (file, tensors) in by_file {
        for (name, tensor) in tensors {
            weight_map.insert(name.clone(), file.clone().into());
            total += tensor.elem_count() * dtype.size_in_bytes();
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
    tensors.par_iter().try_for_each(|(name, tensor)| check_finite(path, name, tensor, dtype))?;
    write_views(path, tensors.iter().map(|(name, tensor)| (name, Rendered { tensor, dtype })))
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
            Numbers::Tensor(tensor) => to_bytes(tensor, DType::F32).expect("weights are f32 tensors").into(),
            Numbers::Slice(_, values) => {
                values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
            }
        }
    }

    fn data_len(&self) -> usize {
        4 * self.shape().iter().product::<usize>()
    }
}

/// A tensor as it will lie on disk; its bytes are made when their turn comes, so that one tensor's are held at a time.
struct Rendered<'a> {
    tensor: &'a Tensor,
    dtype: DType,
}

impl View for Rendered<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        to_bytes(self.tensor, self.dtype).expect("weights are f32 tensors").into()
    }

    fn data_len(&self) -> usize {
        self.tensor.elem_count() * self.dtype.size_in_bytes()
    }
}

/// Refuses a tensor with finite numbers that the element type has not the range for.
fn check_finite(path: &Path, name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let stored = |value: f32| match dtype {
        DType::BF16 => half::bf16::from_f32(value).to_f32(),
        DType::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    };
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    match values.iter().filter(|value| value.is_finite() && !stored(**value).is_finite()).count() {
        0 => Ok(()),
        beyond => {
            let largest =
                values.iter().filter(|value| value.is_finite()).fold(0f32, |largest, value| largest.max(value.abs()));
            let (dtype, limit, other) = match dtype {
                DType::F16 => ("f16", f64::from(half::f16::MAX), "bf16, which has the range of f32"),
                _ => ("bf16", f64::from(half::bf16::MAX), "f32"),
            };
            bail!(
                "{file}: tensor \"{name}\" was not written, as {beyond} of its {} numbers are not finite in {dtype}: the largest is {largest:.4e}, that \
                 type holds up to {limit:.4e}; write it as {other}",
                values.len()
            )
        }
    }
}

fn to_bytes(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(match dtype {
        DType::BF16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

#[cfg(test)]
mod tests;
