//! The container: metadata and the places of tensors, read within the bounds of what the file holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use serde_json::Number;

use crate::bail;
use crate::error::{Error, Result};

/// What a file begins with.
const MAGIC: &[u8; 4] = b"GGUF";
/// The most bytes before the tensors, as for a tokenizer's files.
const LONGEST_HEADER: u64 = 128 << 20;
/// The most items of a list, tensors and fields: each is held in memory with some bytes of its own.
const MOST_ITEMS: u64 = 1 << 22;
/// Where tensors begin unless the file says otherwise.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number.
    Number(Number),
    /// True or false.
    Flag(bool),
    /// A text.
    Text(String),
    /// A list of numbers or of truth values (0 and 1).
    Numbers(Vec<f64>),
    /// A list of texts.
    Texts(Vec<String>),
}

impl Value {
    /// As a message shows it: a long one loses its end.
    fn shown(&self) -> String {
        let value = match self {
            Value::Number(number) => number.clone().into(),
            Value::Flag(flag) => (*flag).into(),
            Value::Text(text) => text.as_str().into(),
            Value::Numbers(numbers) => numbers.as_slice().into(),
            Value::Texts(texts) => texts.as_slice().into(),
        };
        let text = serde_json::Value::to_string(&value);
        text.char_indices().nth(80).map_or(text.clone(), |(end, _)| format!("{}...", &text[..end]))
    }
}

/// A tensor's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its shape as in computation: rows first.
    pub shape: Vec<usize>,
    /// How its numbers are stored.
    pub dtype: GgmlDType,
    /// Its first byte in the file.
    pub start: u64,
    /// Its bytes.
    pub bytes: usize,
}

/// A file of which all but the tensors has been read.
#[derive(Debug)]
pub struct Gguf {
    /// Its path.
    pub path: PathBuf,
    /// Its metadata.
    pub metadata: BTreeMap<String, Value>,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Reads everything but the tensors.
    ///
    /// # Errors
    /// Where the file is not a GGUF file, of another version or cut short, or a part of one that was split.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut header = Header { path, file: BufReader::new(file), read: 0, length };
        header.check_version()?;
        let (tensors, fields) = (header.count("tensors")?, header.count("fields")?);
        let mut metadata = BTreeMap::new();
        for _ in 0..fields {
            let name = header.text()?;
            let kind = header.u32()?;
            let value = header.value(&name, kind)?;
            metadata.insert(name, value);
        }
        let mut gguf = Gguf { path: path.to_path_buf(), metadata, tensors: BTreeMap::new() };
        gguf.refuse_parts()?;
        let alignment = gguf.optional_u64("general.alignment")?.unwrap_or(ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            bail!("{}: field \"general.alignment\" is {alignment}, expected a power of two up to 2^20", path.display());
        }
        let infos = (0..tensors).map(|_| header.tensor()).collect::<Result<Vec<_>>>()?;
        let start = header.read.next_multiple_of(alignment);
        for (name, shape, kind, offset) in infos {
            let info = placed(&gguf, &name, shape, kind, start.checked_add(offset), length)?;
            if gguf.tensors.insert(name.clone(), info).is_some() {
                bail!("{}: tensor \"{name}\" is listed twice", path.display());
            }
        }
        Ok(gguf)
    }

    fn refuse_parts(&self) -> Result<()> {
        match self.optional_u64("split.count")? {
            Some(parts) if parts > 1 => bail!(
                "{}: is one of {parts} parts of a split model; join them first (`llama-gguf-split --merge FIRST OUT`)",
                self.path.display()
            ),
            _ => Ok(()),
        }
    }

    fn field<T>(&self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(name) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => {
                bail!("{}: field \"{name}\" is {}, expected {expected}", self.path.display(), value.shown())
            }
        }
    }

    /// A whole number of at least 0, if the field is there.
    pub fn optional_u64(&self, name: &str) -> Result<Option<u64>> {
        self.field(name, "a whole number, or a list of equal ones", |value| match value {
            Value::Number(number) => number.as_u64(),
            // One number a layer.
            Value::Numbers(numbers) => {
                let first = numbers.first().filter(|first| numbers.iter().all(|number| number == *first))?;
                (first.fract() == 0.0 && (0.0..=u32::MAX.into()).contains(first)).then_some(*first as u64)
            }
            _ => None,
        })
    }

    /// A number, if the field is there.
    pub fn optional_number(&self, name: &str) -> Result<Option<Number>> {
        self.field(name, "a number", |value| match value {
            Value::Number(number) => Some(number.clone()),
            _ => None,
        })
    }

    /// True or false, if the field is there.
    pub fn optional_flag(&self, name: &str) -> Result<Option<bool>> {
        self.field(name, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A text, if the field is there.
    pub fn optional_text(&self, name: &str) -> Result<Option<&str>> {
        match self.metadata.get(name) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => bail!("{}: field \"{name}\" is no text", self.path.display()),
        }
    }

    /// A list of texts, if the field is there.
    pub fn optional_texts(&self, name: &str) -> Result<Option<&[String]>> {
        match self.metadata.get(name) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => bail!("{}: field \"{name}\" is no list of texts", self.path.display()),
        }
    }

    /// A list of numbers, if the field is there.
    pub fn optional_numbers(&self, name: &str) -> Result<Option<&[f64]>> {
        match self.metadata.get(name) {
            None => Ok(None),
            Some(Value::Numbers(numbers)) => Ok(Some(numbers)),
            Some(_) => bail!("{}: field \"{name}\" is no list of numbers", self.path.display()),
        }
    }

    /// The error of a field that must be there.
    pub fn missing(&self, name: &str) -> Error {
        Error::input(format!("{}: field \"{name}\" is missing; convert the model again", self.path.display()))
    }
}

/// A tensor where its header says that it is, if the file holds it.
fn placed(
    gguf: &Gguf,
    name: &str,
    shape: Vec<usize>,
    kind: u32,
    start: Option<u64>,
    length: u64,
) -> Result<TensorInfo> {
    let file = gguf.path.display();
    let Some(dtype) = dtype(kind) else {
        bail!(
            "{file}: tensor \"{name}\" is stored as {}, which is not read; expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K",
            kind_name(kind)
        );
    };
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let row = shape.last().copied().unwrap_or(1);
    let bytes = elements.filter(|_| row.is_multiple_of(dtype.block_size()));
    let bytes = bytes.and_then(|elements| (elements / dtype.block_size()).checked_mul(dtype.type_size()));
    let end = bytes.zip(start).and_then(|(bytes, start)| start.checked_add(bytes as u64));
    match (bytes, start, end) {
        (Some(bytes), Some(start), Some(end)) if end <= length => Ok(TensorInfo { shape, dtype, start, bytes }),
        _ => bail!(
            "{file}: tensor \"{name}\" of shape {shape:?} as {dtype:?} does not fit into the file of {length} bytes; copy or download it again"
        ),
    }
}

/// The types whose blocks candle reads, by ggml's numbers.
fn dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// What ggml calls a type that is not read.
fn kind_name(kind: u32) -> String {
    let name = match kind {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24..=28 => "whole numbers or F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("type {other}"),
    };
    name.to_string()
}

/// What comes before the tensors. Nothing is made room for that the file does not hold.
struct Header<'a> {
    path: &'a Path,
    file: BufReader<File>,
    read: u64,
    length: u64,
}

/// Name, shape, type and offset of a tensor.
type Listed = (String, Vec<usize>, u32, u64);

impl Header<'_> {
    fn cut_short(&self) -> Error {
        Error::input(format!(
            "{}: the GGUF file is cut short or damaged; copy or download it again",
            self.path.display()
        ))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.room_for(bytes.len() as u64)?;
        self.read += bytes.len() as u64;
        self.file.read_exact(bytes).map_err(Error::io(self.path))
    }

    /// Refuses more bytes than are left of the file or of the bound.
    fn room_for(&self, bytes: u64) -> Result<()> {
        match self.read.checked_add(bytes) {
            Some(end) if end > LONGEST_HEADER && end <= self.length => bail!(
                "{}: metadata takes more than {} MiB, which that of no model does",
                self.path.display(),
                LONGEST_HEADER >> 20
            ),
            Some(end) if end <= self.length => Ok(()),
            _ => Err(self.cut_short()),
        }
    }

    fn check_version(&mut self) -> Result<()> {
        let file = self.path.display();
        if self.length < 24 || &self.bytes::<4>()? != MAGIC {
            bail!("{file}: not a GGUF file (it does not begin with GGUF)");
        }
        match self.u32()? {
            2 | 3 => Ok(()),
            version if version.swap_bytes() == 3 => {
                bail!("{file}: a GGUF file for big-endian machines; convert the model for little-endian ones")
            }
            version => bail!("{file}: GGUF version {version}, expected 2 or 3; convert the model again"),
        }
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A number of items, each of which takes at least 8 bytes.
    fn count(&mut self, what: &str) -> Result<u64> {
        match self.u64()? {
            count if count > MOST_ITEMS => {
                bail!("{}: claims {count} {what}, expected at most {MOST_ITEMS}", self.path.display())
            }
            count => Ok(count),
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.room_for(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        // Tokens of some vocabularies are no UTF-8; a text that is compared with others is.
        String::from_utf8(bytes).or_else(|error| Ok(String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, name: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            7 => Value::Flag(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.list(name)?,
            _ => Value::Number(self.number(name, kind)?),
        })
    }

    fn list(&mut self, name: &str) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.count(&format!("items in \"{name}\""))?;
        if kind == 8 {
            let texts = (0..count).map(|_| self.text()).collect::<Result<_>>()?;
            return Ok(Value::Texts(texts));
        }
        let number = |header: &mut Self| match kind {
            7 => Ok(f64::from(header.bytes::<1>()?[0])),
            _ => Ok(header.number(name, kind)?.as_f64().unwrap_or(f64::NAN)),
        };
        Ok(Value::Numbers((0..count).map(|_| number(self)).collect::<Result<_>>()?))
    }

    fn number(&mut self, name: &str, kind: u32) -> Result<Number> {
        let float = |value: f64| match Number::from_f64(value) {
            Some(number) => Ok(number),
            None => bail!("{}: field \"{name}\" is {value}, expected a finite number", self.path.display()),
        };
        match kind {
            0 => Ok(self.bytes::<1>()?[0].into()),
            1 => Ok(i8::from_le_bytes(self.bytes()?).into()),
            2 => Ok(u16::from_le_bytes(self.bytes()?).into()),
            3 => Ok(i16::from_le_bytes(self.bytes()?).into()),
            4 => Ok(self.u32()?.into()),
            5 => Ok(i32::from_le_bytes(self.bytes()?).into()),
            6 => {
                let value = f32::from_le_bytes(self.bytes()?);
                // The shortest decimal of the f32: 1e-5 and not 9.99999974737875e-6.
                float(value.to_string().parse().unwrap_or(f64::NAN))
            }
            10 => Ok(self.u64()?.into()),
            11 => Ok(i64::from_le_bytes(self.bytes()?).into()),
            12 => float(f64::from_le_bytes(self.bytes()?)),
            _ => bail!("{}: field \"{name}\" has the unknown type {kind}", self.path.display()),
        }
    }

    fn tensor(&mut self) -> Result<Listed> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            bail!("{}: tensor \"{name}\" has {dimensions} dimensions, expected 1 to 4", self.path.display());
        }
        let mut shape = (0..dimensions).map(|_| Ok(self.u64()? as usize)).collect::<Result<Vec<_>>>()?;
        // The first number is that of the dimension that lies closest together.
        shape.reverse();
        Ok((name, shape, self.u32()?, self.u64()?))
    }
}

impl Gguf {
    /// The bytes of a tensor.
    pub(super) fn bytes(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        let mut file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let mut bytes = vec![0; info.bytes];
        file.seek(SeekFrom::Start(info.start)).map_err(Error::io(&self.path))?;
        file.read_exact(&mut bytes).map_err(Error::io(&self.path))?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufTensors;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
    }

    /// What reading all of a file says.
    fn read(bytes: &[u8]) -> Result<()> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let gguf = Gguf::open(file.path())?;
        gguf.files()?;
        let names: Vec<String> = gguf.tensors.keys().cloned().collect();
        names.iter().try_for_each(|name| gguf.numbers(name, &gguf.tensors[name]).map(drop))?;
        GgufTensors::new(gguf)?.read("model.layers.0.self_attn.q_proj.weight").map(drop)
    }

    #[test]
    fn a_file_that_is_cut_anywhere_is_refused() {
        let whole = std::fs::read(golden("llama.gguf")).unwrap();
        assert!(read(&whole).is_ok());
        for length in (0..whole.len()).step_by(37) {
            let error = read(&whole[..length]).unwrap_err().to_string();
            assert!(
                error.contains("cut short") || error.contains("not a GGUF file") || error.contains("does not fit"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_changed_byte_is_an_error_or_another_number_and_no_panic() {
        let whole = std::fs::read(golden("llama.gguf")).unwrap();
        // The metadata and the list of tensors lie at the beginning.
        for place in (0..3000).step_by(3) {
            for change in [0xff, 0x80, 0x01] {
                let mut bytes = whole.clone();
                bytes[place] ^= change;
                let _ = read(&bytes);
            }
        }
    }

    #[test]
    fn what_a_header_promises_is_not_made_room_for() {
        let mut bytes = std::fs::read(golden("llama.gguf")).unwrap();
        // The number of fields, and the length of the first field's name.
        for (place, number) in [(16, u64::MAX), (24, 1 << 40), (8, 1 << 62)] {
            let kept = bytes[place..place + 8].to_vec();
            bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
            assert!(read(&bytes).is_err());
            bytes[place..place + 8].copy_from_slice(&kept);
        }
    }
}
