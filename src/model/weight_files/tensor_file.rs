//! One safetensors file, of which tensors are read one by one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::Metadata;

use crate::bail;
use crate::error::{Error, Result};
use crate::files::warn_once;
use crate::model::dtype;
use crate::model::kept::{Kept, NumbersHash, kept_form};
use crate::model::weights::{Stored, TensorSpec};
use crate::ops::{BaseForm, CompactBuilder, CompactForm};

/// The longest header, as in the library that the format comes from.
const LONGEST_HEADER: u64 = 100_000_000;
/// The most numbers that are read at a time of a matrix that is kept in fewer bytes than f32.
const NUMBERS_AT_A_TIME: usize = 1 << 20;
/// What a file begins with that stands for one in Git's storage of large files.
const GIT_LFS: &[u8; 8] = b"version ";
/// A safetensors file of which only the header has been read.
pub struct TensorFile {
    pub(super) path: PathBuf,
    file: File,
    pub(super) header: Metadata,
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

    /// A tensor in f32, in its form in computation, with its element type on disk.
    pub(super) fn read(&mut self, name: &str, spec: &TensorSpec, device: &Device) -> Result<(Tensor, DType)> {
        let on_disk = self.check_shape(name, spec)?;
        let (dtype, _, count) = self.stored(name)?;
        let values = self.piece(name, 0..count)?;
        self.warn_of_broken(name, values.iter().filter(|value| !value.is_finite()).count());
        let tensor = Tensor::from_vec(values, on_disk, device)?;
        let tensor = match spec.stored {
            Stored::AsIs => tensor,
            Stored::Transposed => tensor.t()?.contiguous()?,
            Stored::LessOne => (tensor + 1.0)?,
        };
        Ok((tensor, dtype))
    }

    /// A matrix in the form in which it is to be kept, with its element type on disk. It is read part by
    /// part, so that it is never there in f32 as well.
    pub(super) fn read_kept(&mut self, name: &str, spec: &TensorSpec, base_form: BaseForm) -> Result<(Kept, DType)> {
        self.check_shape(name, spec)?;
        let (dtype, _, _) = self.stored(name)?;
        let stored = self.stored_form(name);
        let (rows, columns) = (spec.shape[0], spec.shape[1]);
        let Some(form) = kept_form(base_form, spec.role, columns, stored) else {
            let (tensor, dtype) = self.read(name, spec, &Device::Cpu)?;
            return Ok((Kept::Plain(tensor), dtype));
        };
        if spec.stored != Stored::AsIs {
            let (tensor, dtype) = self.read(name, spec, &Device::Cpu)?;
            return Ok((Kept::of(tensor, Some(form)).map_err(|error| self.placed(name, error))?, dtype));
        }
        let mut matrix = CompactBuilder::new(form, rows, columns).map_err(|error| self.placed(name, error))?;
        let (mut hash, mut broken) = (NumbersHash::default(), 0);
        let at_once = (NUMBERS_AT_A_TIME / columns.max(1)).max(1);
        for first in (0..rows).step_by(at_once) {
            let bytes = self.bytes(name, first * columns..(first + at_once).min(rows) * columns)?;
            if Some(form) == stored {
                broken += dtype::count_not_finite(&bytes, dtype);
                matrix.push_bytes(&bytes);
                continue;
            }
            let values = dtype::from_bytes(&bytes, dtype);
            broken += values.iter().filter(|value| !value.is_finite()).count();
            hash.update(&values);
            matrix.push(&values);
        }
        let matrix = matrix.build().map_err(|error| self.placed(name, error))?;
        self.warn_of_broken(name, broken);
        let hash = (Some(form) != stored).then(|| hash.digest());
        Ok((Kept::Compact { matrix, hash }, dtype))
    }

    /// An error of a tensor, with its place.
    fn placed(&self, name: &str, error: Error) -> Error {
        Error::input(format!("{}: tensor \"{name}\": {error}", self.path.display()))
    }

    /// The shape on disk of a tensor that has that which is asked for.
    fn check_shape(&self, name: &str, spec: &TensorSpec) -> Result<Vec<usize>> {
        let mut on_disk = spec.shape.clone();
        if spec.stored == Stored::Transposed {
            on_disk.reverse();
        }
        let shape = self.shape(name).unwrap_or_default();
        if shape != on_disk {
            bail!(
                "{}: tensor \"{name}\" has shape {:?}, but config.json asks for {on_disk:?}; check that config.json belongs to these weights",
                self.path.display(),
                shape
            );
        }
        Ok(on_disk)
    }

    fn warn_of_broken(&self, name: &str, broken: usize) {
        if broken > 0 {
            let count: usize = self.shape(name).unwrap_or_default().iter().product();
            warn_once(&format!(
                "warning: {}: {broken} of the {count} numbers of tensor {name:?} are not finite; the file is damaged, or its model was when it was saved",
                self.path.display()
            ));
        }
    }

    /// The form in which a tensor is stored, `None` for f32.
    pub(super) fn stored_form(&self, name: &str) -> Option<CompactForm> {
        match dtype::of_stored(self.header.info(name)?.dtype)? {
            DType::BF16 => Some(CompactForm::BF16),
            DType::F16 => Some(CompactForm::F16),
            _ => None,
        }
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
        let (_, _, count) = self.stored(name)?;
        self.piece(name, 0..count)
    }

    /// Some of a tensor's numbers, by their places in it.
    pub(super) fn piece(&mut self, name: &str, places: Range<usize>) -> Result<Vec<f32>> {
        let (dtype, _, _) = self.stored(name)?;
        Ok(dtype::from_bytes(&self.bytes(name, places)?, dtype))
    }

    /// The bytes of some of a tensor's numbers.
    fn bytes(&mut self, name: &str, places: Range<usize>) -> Result<Vec<u8>> {
        let (dtype, start, _) = self.stored(name)?;
        let size = dtype.size_in_bytes();
        let mut bytes = vec![0u8; places.len() * size];
        self.file.seek(SeekFrom::Start(start + (places.start * size) as u64)).map_err(Error::io(&self.path))?;
        self.file.read_exact(&mut bytes).map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// The element type of a tensor, where it begins in the file, and how many numbers it has.
    fn stored(&self, name: &str) -> Result<(DType, u64, usize)> {
        let Some(info) = self.header.info(name) else {
            bail!("{}: there is no tensor \"{name}\" in it", self.path.display());
        };
        let Some(dtype) = dtype::of_stored(info.dtype) else {
            bail!(
                "{}: tensor \"{name}\" has element type {:?}; expected F32, BF16 or F16",
                self.path.display(),
                info.dtype
            );
        };
        let (start, end) = info.data_offsets;
        Ok((dtype, self.data_start + start as u64, (end - start) / dtype.size_in_bytes()))
    }
}
