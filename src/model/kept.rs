//! One tensor of a model in the form that it is kept in: f32, or a frozen matrix in fewer bytes.

use candle_core::Tensor;
use xxhash_rust::xxh3::Xxh3;

use super::weights::Role;
use crate::error::Result;
use crate::ops::{self, BaseForm, Compact, CompactForm};

/// The form of a matrix whose rows have so many numbers and are stored so (`None` for f32); `None` again for f32.
pub fn kept_form(base_form: BaseForm, role: Role, columns: usize, stored: Option<CompactForm>) -> Option<CompactForm> {
    let fitting: &[CompactForm] = match (base_form, role) {
        (BaseForm::F32, _) => return None,
        (BaseForm::Stored, _) => return stored,
        (BaseForm::Quantised(_), Role::Embedding) => &[CompactForm::Q8_0],
        // As llama.cpp does where rows do not divide into blocks of 256.
        (BaseForm::Quantised(CompactForm::Q4_K), _) => &[CompactForm::Q4_K, CompactForm::Q5_0],
        (BaseForm::Quantised(form), _) => &[form],
    };
    let wanted = fitting.iter().copied().find(|form| form.fits(columns));
    let bytes = |form: Option<CompactForm>| form.map_or(4 * columns, |form| form.row_bytes(columns));
    if bytes(wanted) < bytes(stored) { wanted } else { stored }
}

/// A tensor in computation form (linears `[d_out, d_in]`), in the form that it is kept in.
#[derive(Debug, Clone)]
pub enum Kept {
    /// f32, which may be a variable's storage.
    Plain(Tensor),
    /// A frozen matrix in fewer bytes.
    Compact {
        /// The matrix.
        matrix: Compact,
        /// The hash of its numbers as they were stored, where they were quantised when they were read.
        hash: Option<u128>,
    },
}

impl Kept {
    /// A tensor in this form, a matrix if there is one.
    pub fn of(tensor: Tensor, form: Option<CompactForm>) -> Result<Self> {
        let plain = Kept::Plain(tensor);
        let (Some(form), Kept::Plain(tensor)) = (form, &plain) else { return Ok(plain) };
        let hash = if form.is_quantised() { Some(plain.hash()?) } else { None };
        Ok(Kept::Compact { matrix: Compact::of(tensor, form)?, hash })
    }

    /// Its numbers in f32; a copy of those that are kept in fewer bytes.
    pub fn to_tensor(&self) -> Tensor {
        match self {
            Kept::Plain(tensor) => tensor.clone(),
            Kept::Compact { matrix, .. } => matrix.to_tensor(),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> Vec<usize> {
        match self {
            Kept::Plain(tensor) => tensor.dims().to_vec(),
            Kept::Compact { matrix, .. } => matrix.dims().to_vec(),
        }
    }

    /// Number of scalars.
    pub fn count(&self) -> usize {
        self.dims().iter().product()
    }

    /// The bytes that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Kept::Plain(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Kept::Compact { matrix, .. } => matrix.bytes(),
        }
    }

    /// The hash of its numbers as they were stored, in f32, little-endian.
    pub(super) fn hash(&self) -> Result<u128> {
        if let Kept::Compact { hash: Some(hash), .. } = self {
            return Ok(*hash);
        }
        let mut hash = NumbersHash::default();
        self.for_each_part(|values| hash.update(values))?;
        Ok(hash.digest())
    }

    /// Runs `read` on all numbers in f32, in order, a part at a time: those that are kept in fewer bytes are
    /// never all there in f32.
    pub fn for_each_part(&self, mut read: impl FnMut(&[f32])) -> Result<()> {
        match self {
            Kept::Plain(tensor) => ops::with_numbers(&tensor.detach(), |values| {
                read(values);
                Ok(())
            }),
            Kept::Compact { matrix, .. } => {
                matrix.for_each_part(read);
                Ok(())
            }
        }
    }

    pub(super) fn detach(&self) -> Self {
        match self {
            Kept::Plain(tensor) => Kept::Plain(tensor.detach()),
            compact @ Kept::Compact { .. } => compact.clone(),
        }
    }
}

/// The hash of numbers that come part by part (XXH3, 128 bits, of f32, little-endian).
#[derive(Default)]
pub struct NumbersHash(Xxh3);

impl NumbersHash {
    /// Adds numbers.
    pub fn update(&mut self, values: &[f32]) {
        const NUMBERS_AT_A_TIME: usize = 16 * 1024;
        let mut bytes = Vec::with_capacity(4 * NUMBERS_AT_A_TIME.min(values.len()));
        for chunk in values.chunks(NUMBERS_AT_A_TIME) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
            self.0.update(&bytes);
        }
    }

    /// The hash of all of them.
    pub fn digest(&self) -> u128 {
        self.0.digest128()
    }
}
