//! Matrices that rows are multiplied with.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::compact::Compact;
use super::matrix::{Matrix, has_kernel, with_matrix, with_strided};
use super::products::{PackedWeight, Products};
use super::simd::{sum_of, vectorised};
use super::value::{Source, Value};
use crate::error::Result;

/// A matrix `[d_out, d_in]` that rows are multiplied with: f32, which may train, or frozen in fewer bytes.
#[derive(Debug, Clone)]
pub struct Weight {
    numbers: Numbers,
    products: Products,
    /// Whether nothing reads what `x Wᵀ` gives.
    is_unread: bool,
}

#[derive(Debug, Clone)]
enum Numbers {
    Plain(Value),
    Compact(Compact),
}

/// The matrix of a product, as it is kept.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    Plain(Matrix<'a>),
    Compact(&'a Compact),
}

impl Operand<'_> {
    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Operand::Plain(matrix) => [matrix.rows, matrix.columns],
            Operand::Compact(matrix) => matrix.dims(),
        }
    }
}

impl Weight {
    /// A weight of the model, which trains where it is a variable or was computed from variables by candle:
    /// products with it are made in the precision that is set. `packed` is what it is packed to for them,
    /// kept where its numbers never change.
    pub fn new(tensor: &Tensor, packed: Option<&Arc<PackedWeight>>) -> Self {
        let value = Value::of(tensor);
        let packed = packed.filter(|_| !value.is_tracked()).cloned();
        Weight { numbers: Numbers::Plain(value), products: Products::of_weight(packed), is_unread: false }
    }

    /// The same of a frozen matrix in fewer bytes.
    pub fn compact(compact: &Compact, packed: Option<&Arc<PackedWeight>>) -> Self {
        // In 2 bytes a number, blocks would be larger than they are.
        let packed = packed.filter(|_| !compact.form().is_quantised()).cloned();
        let numbers = Numbers::Compact(compact.clone());
        Weight { numbers, products: Products::of_weight(packed), is_unread: false }
    }

    /// Its shape, `[d_out, d_in]`.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match &self.numbers {
            Numbers::Plain(value) => Ok(value.dims2()?.into()),
            Numbers::Compact(compact) => Ok(compact.dims()),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        match &self.numbers {
            Numbers::Plain(value) => value.device(),
            Numbers::Compact(_) => &Device::Cpu,
        }
    }

    /// Whether something that trains is part of it.
    pub fn is_tracked(&self) -> bool {
        self.source().is_some()
    }

    /// The same numbers, frozen.
    pub fn detach(&self) -> Self {
        let numbers = match &self.numbers {
            Numbers::Plain(value) => Numbers::Plain(value.detach()),
            Numbers::Compact(compact) => Numbers::Compact(compact.clone()),
        };
        Weight { numbers, products: self.products.clone(), is_unread: false }
    }

    /// The same numbers, with which products are made in f32, whatever is set.
    pub fn exact(&self) -> Self {
        Weight { numbers: self.numbers.clone(), products: Products::Exact, is_unread: false }
    }

    /// The same numbers, for a linear that is run again for its gradients alone ([`checkpoint`](super::checkpoint)):
    /// the rows that it gives are not computed, and must not be read; gradients are as ever.
    pub fn unread(&self) -> Self {
        Weight { is_unread: true, ..self.clone() }
    }

    /// Its numbers in f32, as a constant; a copy of those that are kept in fewer bytes.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(self.to_value()?.tensor().clone())
    }

    /// The same, as a tensor that trains where the weight does, for candle's operations.
    pub fn in_candle(&self) -> Result<Tensor> {
        Ok(self.to_value()?.in_candle())
    }

    /// Some of its rows, `[ids, d_in]`.
    pub fn select_rows(&self, ids: &[u32]) -> Result<Value> {
        match &self.numbers {
            Numbers::Plain(value) => value.select_rows(ids),
            Numbers::Compact(compact) => Ok(Value::constant(compact.select_rows(ids)?)),
        }
    }

    /// `Σ w²` of each row, `[d_out]`, as a constant.
    pub fn row_squares(&self) -> Result<Tensor> {
        if !self.has_kernel() {
            return Ok(self.to_tensor()?.sqr()?.sum(1)?);
        }
        let [d_out, d_in] = self.dims()?;
        let squares = |row: &[f32]| sum_of_squares(row);
        let sums: Vec<f32> = match &self.numbers {
            Numbers::Plain(value) => with_matrix(value.tensor(), |matrix| {
                let sums = (0..d_out).into_par_iter().map(|row| squares(matrix.row(row))).collect();
                Ok::<_, candle_core::Error>(sums)
            })?,
            Numbers::Compact(compact) => {
                let mut sums = Vec::with_capacity(d_out);
                compact.for_each_part(|part| sums.par_extend(part.par_chunks_exact(d_in).map(squares)));
                sums
            }
        };
        Ok(Tensor::from_vec(sums, d_out, self.device())?)
    }

    /// Whether the kernels of this module apply.
    pub(super) fn has_kernel(&self) -> bool {
        match &self.numbers {
            Numbers::Plain(value) => has_kernel(&[value.tensor()]),
            Numbers::Compact(_) => true,
        }
    }

    /// Its numbers in f32, with what the backward pass needs to know.
    pub(super) fn to_value(&self) -> Result<Value> {
        match &self.numbers {
            Numbers::Plain(value) => Ok(value.clone()),
            Numbers::Compact(compact) => Ok(Value::constant(compact.to_tensor())),
        }
    }

    /// Where its gradient goes.
    pub(super) fn source(&self) -> Option<Source> {
        match &self.numbers {
            Numbers::Plain(value) => value.source(),
            Numbers::Compact(_) => None,
        }
    }

    /// Whether nothing reads the rows that a linear with it gives.
    pub(super) fn is_unread(&self) -> bool {
        self.is_unread
    }

    /// How products with it are made.
    pub(super) fn products(&self) -> &Products {
        &self.products
    }

    /// Runs `read` on the matrix as it is kept.
    pub(super) fn with_operand<T, E: From<candle_core::Error>>(
        &self,
        read: impl FnOnce(Operand) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match &self.numbers {
            Numbers::Plain(value) => with_strided(value.tensor(), |matrix| read(Operand::Plain(matrix))),
            Numbers::Compact(compact) => read(Operand::Compact(compact)),
        }
    }
}

vectorised! {
    fn sum_of_squares<'a>(row: &'a [f32]) -> f32 {
        sum_of(row, |x| x * x)
    }
}

/// A matrix that is no weight of the model: products with it are made in f32, whatever is set.
impl From<&Value> for Weight {
    fn from(value: &Value) -> Self {
        Weight { numbers: Numbers::Plain(value.clone()), products: Products::Exact, is_unread: false }
    }
}

impl From<&Weight> for Weight {
    fn from(weight: &Weight) -> Self {
        weight.clone()
    }
}
