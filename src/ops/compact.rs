//! Matrices that are kept in fewer than four bytes a number: frozen weights as they were stored (bf16, f16),
//! or in blocks of small integers that share a scale (the formats of GGUF).
//!
//! Products are made of f32: a part of the matrix at a time is widened, which costs little beside a product
//! of many rows, and saves reading memory in one of few. The blocks' formats, their rounding included, are
//! candle's, which follow ggml's.

mod dots;
mod form;
mod nibbles;
mod widen;

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::dot_products;
use super::matrix::{Matrix, MatrixMut, Threads, multiply};
use crate::bail;
use crate::error::Result;
pub use form::CompactForm;

/// Numbers of a matrix that are widened at a time: 8 MB of f32. Fixed, as `g W` is a sum over such parts.
const SLAB: usize = 1 << 21;

/// Numbers of a task of widening, or of a product of few rows: 128 KB of f32, which stay in the second cache.
const PANEL: usize = 1 << 15;

/// Rows that are widened at a time for a product of one row.
const ROWS_AT_ONCE: usize = 4;

/// In which form the matrices of a frozen base model are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BaseForm {
    /// As they are stored.
    #[default]
    Stored,
    /// In f32.
    F32,
    /// Linears in blocks of this form, embeddings and output matrix in blocks of 8 bits; as they are stored
    /// where their rows do not divide into blocks, or take no more bytes so.
    Quantised(CompactForm),
}

/// A matrix `[rows, columns]` that is kept in some form. Clones share it.
#[derive(Clone)]
pub struct Compact {
    form: CompactForm,
    rows: usize,
    columns: usize,
    /// Row after row. Every form takes an even number of bytes a block, and is read at even places.
    words: Arc<Vec<u16>>,
}

impl fmt::Debug for Compact {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "[{}, {}] in {}", self.rows, self.columns, self.form)
    }
}

/// Makes a [`Compact`] of rows that come part by part.
pub struct CompactBuilder {
    form: CompactForm,
    rows: usize,
    columns: usize,
    words: Vec<u16>,
    /// Numbers that were to be put into blocks and are not finite, which nothing in a block would tell.
    lost: usize,
}

impl CompactBuilder {
    /// For a matrix of this shape.
    ///
    /// # Errors
    /// Where there are none, or rows of so many numbers cannot be kept in the form.
    pub fn new(form: CompactForm, rows: usize, columns: usize) -> Result<Self> {
        if rows == 0 || columns == 0 {
            bail!("a matrix [{rows}, {columns}] has no numbers to be kept in {form}");
        }
        if !form.fits(columns) {
            bail!("rows of {columns} numbers cannot be kept in {form}, whose blocks hold {}", form.block_size());
        }
        let words = Vec::with_capacity(rows * form.row_bytes(columns) / 2);
        Ok(CompactBuilder { form, rows, columns, words, lost: 0 })
    }

    /// Adds rows that are in the form already, little-endian.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        self.words.extend(bytes.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair)));
    }

    /// Adds rows of numbers, each as the nearest that the form has.
    pub fn push(&mut self, values: &[f32]) {
        if self.form.is_quantised() {
            self.lost += values.iter().filter(|value| !value.is_finite()).count();
        }
        let (start, words) = (self.words.len(), values.len() / self.columns * self.row_words());
        self.words.resize(start + words, 0);
        let per_task = (PANEL / self.columns).max(1);
        let (form, row_words) = (self.form, self.row_words());
        (values.par_chunks(per_task * self.columns))
            .zip(self.words[start..].par_chunks_mut((per_task * row_words).max(1)))
            .for_each(|(values, words)| form.round(values, words));
    }

    /// The matrix.
    ///
    /// # Errors
    /// Where the rows that were added are not all of it, or were quantised and are not all finite.
    pub fn build(self) -> Result<Compact> {
        if self.lost > 0 {
            bail!(
                "{} of its numbers are not finite (NaN or infinite), so that it cannot be quantised to {}; restore its file",
                self.lost,
                self.form
            );
        }
        let expected = self.rows * self.row_words();
        if self.words.len() != expected {
            bail!("a matrix in {} has {} bytes, expected {}", self.form, 2 * self.words.len(), 2 * expected);
        }
        let CompactBuilder { form, rows, columns, words, .. } = self;
        Ok(Compact { form, rows, columns, words: Arc::new(words) })
    }

    fn row_words(&self) -> usize {
        self.form.row_bytes(self.columns) / 2
    }
}

impl Compact {
    /// A matrix of f32 in some form, each number as the nearest that the form has.
    pub fn of(tensor: &Tensor, form: CompactForm) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let mut builder = CompactBuilder::new(form, rows, columns)?;
        super::matrix::with_elements(tensor, |values| {
            builder.push(values);
            Ok::<_, candle_core::Error>(())
        })?;
        builder.build()
    }

    /// The form.
    pub fn form(&self) -> CompactForm {
        self.form
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The bytes that it takes.
    pub fn bytes(&self) -> usize {
        2 * self.words.len()
    }

    /// All numbers in f32, `[rows, columns]`.
    pub fn to_tensor(&self) -> Tensor {
        let mut values = vec![0.0; self.rows * self.columns];
        self.widen(0..self.rows, &mut values);
        Tensor::from_vec(values, (self.rows, self.columns), &Device::Cpu).expect("as many numbers as it has")
    }

    /// Rows of these indices in f32, `[ids, columns]`.
    pub fn select_rows(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            bail!("select_rows: row {id} is outside a matrix of {} rows", self.rows);
        }
        let mut values = vec![0.0; ids.len() * self.columns];
        values
            .par_chunks_exact_mut(self.columns)
            .with_min_len((PANEL / self.columns).max(1))
            .zip(ids)
            .for_each(|(row, &id)| self.widen_here(id as usize..id as usize + 1, row));
        Ok(Tensor::from_vec(values, (ids.len(), self.columns), &Device::Cpu)?)
    }

    /// Runs `read` on all numbers in f32, in order, a part at a time.
    pub fn for_each_part(&self, mut read: impl FnMut(&[f32])) {
        for rows in self.slabs() {
            self.with_slab(rows, |values| read(values));
        }
    }

    /// Some rows in f32, by all threads.
    fn widen(&self, rows: Range<usize>, values: &mut [f32]) {
        let per_task = self.rows_per_panel();
        if rows.len() <= per_task {
            return self.widen_here(rows, values);
        }
        values.par_chunks_mut(per_task * self.columns).enumerate().for_each(|(task, values)| {
            let first = rows.start + task * per_task;
            self.widen_here(first..first + values.len() / self.columns, values);
        });
    }

    /// Some rows in f32, by this thread.
    fn widen_here(&self, rows: Range<usize>, values: &mut [f32]) {
        let words = self.form.row_bytes(self.columns) / 2;
        self.form.widen(&self.words[rows.start * words..rows.end * words], values);
    }

    fn rows_per_panel(&self) -> usize {
        (PANEL / self.columns).max(1)
    }

    /// The parts, whole rows, that are widened at a time.
    pub(super) fn slabs(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        // A multiple of the rows of a panel of packed operands.
        let (rows, at_once) = (self.rows, (SLAB / self.columns).next_multiple_of(32).max(32));
        (0..rows).step_by(at_once).map(move |start| start..(start + at_once).min(rows))
    }

    /// Runs `read` on some rows in f32, in memory that this thread keeps.
    pub(super) fn with_slab<T>(&self, rows: Range<usize>, read: impl FnOnce(&[f32]) -> T) -> T {
        let mut scratch = Scratch::take(&WIDENED, rows.len() * self.columns);
        self.widen(rows, scratch.values());
        read(scratch.values())
    }

    /// `target = factor x Wᵀ`, or `target += factor x Wᵀ`, of f32.
    pub(super) fn times_transposed(&self, target: MatrixMut, accumulate: bool, factor: f32, x: Matrix) {
        assert!(x.columns == self.columns && target.rows == x.rows && target.columns == self.rows);
        if x.rows == 0 {
            return;
        }
        let is_few = x.rows <= self.rows && dot_products::is_faster(x.rows, self.rows, self.columns);
        if x.column_stride == 1 && is_few {
            return self.times_few(target, accumulate, factor, x);
        }
        for rows in self.slabs() {
            // SAFETY: one block at a time.
            let target = unsafe { target.block(0..x.rows, rows.clone()) };
            self.with_slab(rows.clone(), |values| {
                let weight = Matrix::new(values, rows.len(), self.columns);
                multiply(target, accumulate, factor, x, weight.t(), Threads::All);
            });
        }
    }

    /// The same for few rows of `x`, where reading the matrix is most of the work: each task widens what it
    /// multiplies, in registers where there is but one row.
    fn times_few(&self, target: MatrixMut, accumulate: bool, factor: f32, x: Matrix) {
        let per_task = self.rows_per_panel().next_multiple_of(4);
        let words = self.form.row_bytes(self.columns) / 2;
        let run = |task: usize| {
            let rows = task * per_task..((task + 1) * per_task).min(self.rows);
            if x.rows == 1 && self.form.has_dots() {
                // SAFETY: the tasks have different columns.
                let dots = unsafe { target.block(0..1, rows.clone()).row(0) };
                let words = &self.words[rows.start * words..rows.end * words];
                return self.form.dots(words, x.row(0), factor, accumulate, dots);
            }
            // What is read but once stays in the first cache until then.
            let at_once = if x.rows == 1 { ROWS_AT_ONCE } else { per_task };
            for start in rows.clone().step_by(at_once) {
                let rows = start..(start + at_once).min(rows.end);
                let mut scratch = Scratch::take(&PANEL_OF_TASK, rows.len() * self.columns);
                self.widen_here(rows.clone(), scratch.values());
                let weight = Matrix::new(scratch.values(), rows.len(), self.columns);
                // SAFETY: the tasks have different columns, and of those one block at a time.
                let target = unsafe { target.block(0..x.rows, rows) };
                dot_products::multiply(target, accumulate, factor, x, weight, Threads::One);
            }
        };
        let tasks = 0..self.rows.div_ceil(per_task);
        match x.rows * self.rows * self.columns < dot_products::PARALLEL_WORK {
            true => tasks.for_each(run),
            false => tasks.into_par_iter().for_each(run),
        }
    }
}

thread_local! {
    // Taken out while in use: a thread that waits for others may be given another product meanwhile.
    static WIDENED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PANEL_OF_TASK: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Memory that a thread keeps from one product to the next.
struct Scratch {
    memory: Vec<f32>,
    length: usize,
    home: &'static std::thread::LocalKey<Cell<Vec<f32>>>,
}

impl Scratch {
    fn take(home: &'static std::thread::LocalKey<Cell<Vec<f32>>>, length: usize) -> Self {
        let mut memory = home.take();
        if memory.len() < length {
            memory.resize(length, 0.0);
        }
        Scratch { memory, length, home }
    }

    fn values(&mut self) -> &mut [f32] {
        &mut self.memory[..self.length]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.home.set(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests;
