//! Weights on disk: safetensors files, read tensor by tensor and written again in the form they were found in.

mod locate;
mod tensor_file;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::architecture::Architecture;
use super::head::head_specs;
use super::kept::{Kept, NumbersHash, kept_form};
use super::tying;
use super::weights::{Role, Stored, TensorSpec, Weights, embedding_name, output_name, tensor_specs};
use crate::bail;
use crate::error::{Error, Result};
use crate::files::warn_once;
use crate::gguf::{self, Gguf, GgufTensors, is_gguf};
use crate::ops::{BaseForm, Compact, CompactBuilder, CompactForm};
pub use locate::{
    INDEX_FILE, Located, NAMED_IN_CONFIG, SINGLE_FILE, Shards, locate, no_weights, refuse_pickles,
    warn_of_weights_below,
};
pub use tensor_file::TensorFile;
pub use write::{Numbers, write, write_file, write_numbers};

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

/// How many numbers of two tensors are compared at a time.
const PIECE: usize = 1 << 20;
/// What comes before the names of the bare transformer's tensors in models of text and images.
const TEXT_PARTS: [&str; 3] = ["model.language_model.", "language_model.model.", "language_model."];

/// Reads all tensors the architecture needs, and a classification head where there is one; `None` where the
/// folder holds no weights. Whether the output matrix is tied to the embeddings is decided here, by what is
/// stored ([`tying::decide`]).
pub fn read(
    folder: &Path,
    architecture: &mut Architecture,
    base_form: BaseForm,
    device: &Device,
) -> Result<Option<(Weights, StorageForm)>> {
    let Some(mut files) = TensorFiles::find(folder)? else { return Ok(None) };
    let stored_embedding = tying::decide(&mut files, architecture)?;
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
        let (kept, found_dtype) = match is_matrix(architecture, &name, &spec) && device.is_cpu() {
            true => files.read_kept(&spec, architecture.names.prefix, base_form)?,
            false => {
                let (tensor, dtype) = files.read(&spec, architecture.names.prefix, device)?;
                (Kept::Plain(tensor), dtype)
            }
        };
        dtype.get_or_insert(found_dtype);
        weights.set_kept(&name, kept);
    }
    files.unread(architecture).iter().for_each(|warning| warn_once(warning));
    Ok(Some((weights.fixed(), StorageForm { dtype: dtype.unwrap_or(DType::F32), shards: files.shards })))
}

/// The bytes that a model's weights will take in memory, and those of what they would be packed to for
/// products in bf16, by the headers of their files; f32 where there are none.
///
/// # Errors
/// As [`TensorFiles::open`].
pub fn kept_bytes(folder: &Path, architecture: &Architecture, base_form: BaseForm) -> Result<(usize, usize)> {
    let files = TensorFiles::find(folder)?;
    let (mut bytes, mut packed) = (0, 0);
    let stored_output = files.as_ref().map(|files| tying::stored_output(files, architecture));
    for spec in tensor_specs(architecture) {
        let is_output = Some(spec.name.as_str()) == output_name(architecture);
        if is_output && stored_output == Some(None) {
            // That of a classifier, which is not read.
            continue;
        }
        let numbers: usize = spec.shape.iter().product();
        let form_of = |name: &str| files.as_ref()?.stored_form(name, architecture.names.prefix);
        // Either of two tied tables may be the one that is stored.
        let other_name = stored_output.clone().flatten().filter(|_| spec.role == Role::Embedding);
        let stored = form_of(&spec.name).or_else(|| form_of(&other_name?));
        let form = match is_matrix(architecture, &spec.name, &spec) {
            true => kept_form(base_form, spec.role, spec.shape[1], stored),
            false => None,
        };
        bytes += form.map_or(4 * numbers, |form| spec.shape[0] * form.row_bytes(spec.shape[1]));
        let is_packed = spec.shape.len() == 2 && !form.is_some_and(CompactForm::is_quantised);
        packed += if is_packed { 2 * numbers } else { 0 };
    }
    Ok((bytes, packed))
}

/// Whether a tensor is one of the matrices that rows are multiplied with: a linear of a block, the embeddings
/// or the output matrix.
fn is_matrix(architecture: &Architecture, name: &str, spec: &TensorSpec) -> bool {
    match spec.role {
        Role::Linear | Role::ResidualLinear => {
            name.starts_with(&format!("{}{}.", architecture.names.prefix, architecture.names.blocks))
        }
        Role::Embedding => name == embedding_name(architecture) || Some(name) == output_name(architecture),
        Role::Bias | Role::NormWeight => false,
    }
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

    /// The numbers of all tensors of their files.
    pub fn numbers(&self) -> usize {
        let shapes = self.files.iter().flat_map(TensorFile::shapes);
        shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum()
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
        let (file, name) = self.needed(spec, prefix)?;
        let read = self.files[file].read(&name, spec, device);
        self.read.insert(name);
        read
    }

    /// A matrix in the form in which it is to be kept, with its element type on disk.
    ///
    /// # Errors
    /// As [`TensorFiles::read`].
    pub fn read_kept(&mut self, spec: &TensorSpec, prefix: &str, base_form: BaseForm) -> Result<(Kept, DType)> {
        if let Some(gguf) = &self.gguf {
            self.read.extend(gguf.stored_name(&spec.name));
            return Ok((read_gguf_matrix(gguf, spec, base_form)?, DType::F32));
        }
        let (file, name) = self.needed(spec, prefix)?;
        let read = self.files[file].read_kept(&name, spec, base_form);
        self.read.insert(name);
        read
    }

    /// The file that holds a tensor which the architecture asks for, and its name there.
    fn needed(&self, spec: &TensorSpec, prefix: &str) -> Result<(usize, String)> {
        match self.find_stored(&spec.name, prefix) {
            Some(found) => Ok(found),
            None => bail!(
                "{}: tensor \"{}\" of shape {:?} is missing, which config.json asks for; check that config.json belongs to these weights",
                self.folder.display(),
                spec.name,
                spec.shape
            ),
        }
    }

    /// The file that holds a tensor, and its name there.
    fn find_stored(&self, name: &str, prefix: &str) -> Option<(usize, String)> {
        let names = names_on_disk(name, prefix);
        let stored = |file: &TensorFile| names.iter().find(|name| file.shape(name).is_some()).cloned();
        self.files.iter().enumerate().find_map(|(index, file)| Some((index, stored(file)?)))
    }

    /// The form in which a matrix is stored, `None` for f32 and where it is not there.
    fn stored_form(&self, name: &str, prefix: &str) -> Option<CompactForm> {
        if let Some(gguf) = &self.gguf {
            return CompactForm::of_ggml(gguf.file().tensors.get(&gguf.stored_name(name)?)?.dtype);
        }
        let (file, name) = self.find_stored(name, prefix)?;
        self.files[file].stored_form(&name)
    }

    /// Whether two tensors that are stored have the same shape and numbers. They are compared in pieces, and
    /// count as read.
    pub fn are_equal(&mut self, one: &str, other: &str, prefix: &str) -> Result<bool> {
        if let Some(gguf) = &self.gguf {
            self.read.extend([one, other].into_iter().filter_map(|name| gguf.stored_name(name)));
            return Ok(gguf.shape(one) == gguf.shape(other) && gguf.read(one)? == gguf.read(other)?);
        }
        let found = [one, other].map(|name| self.find_stored(name, prefix));
        let [Some((file, name)), Some((other_file, other_name))] = found else { return Ok(false) };
        self.read.extend([name.clone(), other_name.clone()]);
        let shape = self.files[file].shape(&name).unwrap_or_default();
        if Some(shape) != self.files[other_file].shape(&other_name) {
            return Ok(false);
        }
        let count: usize = shape.iter().product();
        for start in (0..count).step_by(PIECE) {
            let places = start..count.min(start + PIECE);
            let piece = self.files[file].piece(&name, places.clone())?;
            if piece != self.files[other_file].piece(&other_name, places)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Endings of tensors that hold no weights of a model: masks, positions and frequencies that older programs
/// stored.
const NO_WEIGHTS: [&str; 6] =
    [".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".inv_freq", ".position_ids"];
/// Beginnings of the heads with which BERT, RoBERTa and ModernBERT were pretrained; a pooler is read where
/// the family's classifier has it.
const PRETRAINING_HEADS: [&str; 6] = ["cls.", "lm_head.", "pooler.", "bert.pooler.", "roberta.pooler.", "decoder."];
/// What the names of a model's part of images hold.
const OF_IMAGES: [&str; 2] = ["vision_tower.", "multi_modal_projector."];

impl TensorFiles {
    /// Warnings of tensors that have no place in the model that `config.json` describes, such as more layers
    /// than it has, or biases that it does not mention; and how many are of images, which are not read.
    fn unread(&self, architecture: &Architecture) -> Vec<String> {
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
        let (of_images, mut others): (Vec<String>, Vec<String>) = unread.partition(is_of_images);
        others.sort();
        let (folder, mut warnings) = (self.folder.display(), Vec::new());
        if !of_images.is_empty() {
            warnings.push(format!(
                "warning: {folder}: only the text part of this model is read, and not the {} tensors of its part of images",
                of_images.len()
            ));
        }
        if let Some(first) = others.first() {
            warnings.push(format!(
                "warning: {folder}: {} of the stored tensors have no place in the model that config.json describes and are not read, such as {first:?}; \
                 check that config.json belongs to these weights",
                others.len()
            ));
        }
        warnings
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

/// A matrix of a GGUF file in the form in which it is to be kept.
fn read_gguf_matrix(gguf: &GgufTensors, spec: &TensorSpec, base_form: BaseForm) -> Result<Kept> {
    let stored = match gguf.shape(&spec.name) == Some(&spec.shape[..]) {
        true => gguf.read_compact(&spec.name)?,
        false => None,
    };
    let form = kept_form(base_form, spec.role, spec.shape[1], stored.as_ref().map(Compact::form));
    match (stored, form) {
        (Some(matrix), Some(form)) if matrix.form() == form => Ok(Kept::Compact { matrix, hash: None }),
        (Some(stored), Some(form)) => {
            let mut rows = CompactBuilder::new(form, spec.shape[0], spec.shape[1])?;
            let mut hash = NumbersHash::default();
            stored.for_each_part(|values| {
                hash.update(values);
                rows.push(values);
            });
            let matrix = rows.build().map_err(|error| placed(gguf, spec, error))?;
            Ok(Kept::Compact { matrix, hash: Some(hash.digest()) })
        }
        (Some(stored), None) => Ok(Kept::Plain(stored.to_tensor())),
        (None, form) => {
            let tensor = read_gguf(gguf, spec, &Device::Cpu)?;
            Kept::of(tensor, form).map_err(|error| placed(gguf, spec, error))
        }
    }
}

/// An error of a tensor, with its place.
fn placed(gguf: &GgufTensors, spec: &TensorSpec, error: Error) -> Error {
    Error::input(format!("{}: tensor \"{}\": {error}", gguf.file().path.display(), spec.name))
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

#[cfg(test)]
mod tests;
