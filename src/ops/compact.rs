//! Matrices that are kept in fewer than four bytes a number: frozen weights as they were stored (bf16, f16),
//! or in blocks of small integers that share a scale (the formats of GGUF).
//!
//! Products are made of f32: a part of the matrix at a time is widened, which costs little beside a product
//! of many rows, and saves reading memory in one of few. The blocks' formats, their rounding included, are
//! candle's, which follow ggml's.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, GgmlType, k_quants};
use candle_core::{Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::dot_products;
use super::matrix::{Matrix, MatrixMut, Threads, multiply};
use super::simd::{LANES, total, vectorised};
use crate::bail;
use crate::error::Result;

/// Numbers of a matrix that are widened at a time: 8 MB of f32. Fixed, as `g W` is a sum over such parts.
const SLAB: usize = 1 << 21;

/// Numbers of a task of widening, or of a product of few rows: 128 KB of f32, which stay in the second cache.
const PANEL: usize = 1 << 15;

/// The form in which a matrix is kept: 16 bits a number, or blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactForm(GgmlDType);

impl CompactForm {
    /// 16 bits a number, eight of the exponent.
    pub const BF16: CompactForm = CompactForm(GgmlDType::BF16);
    /// 16 bits a number, five of the exponent.
    pub const F16: CompactForm = CompactForm(GgmlDType::F16);
    /// Blocks of 32 integers of 8 bits.
    pub const Q8_0: CompactForm = CompactForm(GgmlDType::Q8_0);
    /// Blocks of 32 integers of 5 bits.
    pub const Q5_0: CompactForm = CompactForm(GgmlDType::Q5_0);
    /// Blocks of 256 integers of 4 bits, with scales and minima of 32 each.
    pub const Q4_K: CompactForm = CompactForm(GgmlDType::Q4K);

    /// That of a tensor of a GGUF file, whose form may be kept; `None` of f32 and of what no tensor of a file is in.
    pub fn of_ggml(dtype: GgmlDType) -> Option<Self> {
        let is_kept = !matches!(dtype, GgmlDType::F32 | GgmlDType::Q8_1 | GgmlDType::Q8K);
        is_kept.then_some(CompactForm(dtype))
    }

    /// Whether numbers stand in blocks that share a scale.
    pub fn is_quantised(self) -> bool {
        self.0.block_size() > 1
    }

    /// Whether rows of so many numbers can be kept in it.
    pub fn fits(self, columns: usize) -> bool {
        columns.is_multiple_of(self.0.block_size())
    }

    /// The bytes of a row.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / self.0.block_size() * self.0.type_size()
    }
}

impl fmt::Display for CompactForm {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self.0 {
            GgmlDType::F32 => "f32",
            GgmlDType::F16 => "f16",
            GgmlDType::BF16 => "bf16",
            GgmlDType::Q4_0 => "q4_0",
            GgmlDType::Q4_1 => "q4_1",
            GgmlDType::Q5_0 => "q5_0",
            GgmlDType::Q5_1 => "q5_1",
            GgmlDType::Q8_0 => "q8_0",
            GgmlDType::Q8_1 => "q8_1",
            GgmlDType::Q2K => "q2_k",
            GgmlDType::Q3K => "q3_k",
            GgmlDType::Q4K => "q4_k",
            GgmlDType::Q5K => "q5_k",
            GgmlDType::Q6K => "q6_k",
            GgmlDType::Q8K => "q8_k",
        })
    }
}

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
            bail!("rows of {columns} numbers cannot be kept in {form}, whose blocks hold {}", form.0.block_size());
        }
        let words = Vec::with_capacity(rows * form.row_bytes(columns) / 2);
        Ok(CompactBuilder { form, rows, columns, words })
    }

    /// Adds rows that are in the form already, little-endian.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        self.words.extend(bytes.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair)));
    }

    /// Adds rows of numbers, each as the nearest that the form has.
    pub fn push(&mut self, values: &[f32]) {
        let (start, words) = (self.words.len(), values.len() / self.columns * self.row_words());
        self.words.resize(start + words, 0);
        let per_task = (PANEL / self.columns).max(1);
        let (form, row_words) = (self.form, self.row_words());
        (values.par_chunks(per_task * self.columns))
            .zip(self.words[start..].par_chunks_mut((per_task * row_words).max(1)))
            .for_each(|(values, words)| encode(form, values, words));
    }

    /// The matrix.
    ///
    /// # Errors
    /// Where the rows that were added are not all of it.
    pub fn build(self) -> Result<Compact> {
        let expected = self.rows * self.row_words();
        if self.words.len() != expected {
            bail!("a matrix in {} has {} bytes, expected {}", self.form, 2 * self.words.len(), 2 * expected);
        }
        let CompactBuilder { form, rows, columns, words } = self;
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
        decode(self.form, &self.words[rows.start * words..rows.end * words], values);
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
        if x.column_stride == 1 && dot_products::is_faster(x.rows, self.rows, self.columns) {
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
        (0..self.rows.div_ceil(per_task)).into_par_iter().for_each(|task| {
            let rows = task * per_task..((task + 1) * per_task).min(self.rows);
            if x.rows == 1 && matches!(self.form, CompactForm::BF16 | CompactForm::Q8_0) {
                let words = &self.words[rows.start * words..rows.end * words];
                // SAFETY: the tasks have different columns.
                let dots = unsafe { target.block(0..1, rows).row(0) };
                return match self.form {
                    CompactForm::Q8_0 => dots_q8_0(words, x.row(0), factor, accumulate, dots),
                    _ => dots_bf16(words, x.row(0), factor, accumulate, dots),
                };
            }
            let mut scratch = Scratch::take(&PANEL_OF_TASK, rows.len() * self.columns);
            self.widen_here(rows.clone(), scratch.values());
            let weight = Matrix::new(scratch.values(), rows.len(), self.columns);
            // SAFETY: the tasks have different columns.
            let target = unsafe { target.block(0..x.rows, rows) };
            dot_products::multiply(target, accumulate, factor, x, weight, Threads::One);
        });
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

/// Runs `$run` with `$block` as the type of the blocks of a form.
macro_rules! with_blocks {
    ($form:expr, $block:ident => $run:expr) => {
        match $form.0 {
            GgmlDType::F32 | GgmlDType::Q8_1 | GgmlDType::Q8K => unreachable!("no matrix is kept in {}", $form),
            GgmlDType::F16 => {
                type $block = f16;
                $run
            }
            GgmlDType::BF16 => {
                type $block = bf16;
                $run
            }
            GgmlDType::Q4_0 => {
                type $block = k_quants::BlockQ4_0;
                $run
            }
            GgmlDType::Q4_1 => {
                type $block = k_quants::BlockQ4_1;
                $run
            }
            GgmlDType::Q5_0 => {
                type $block = k_quants::BlockQ5_0;
                $run
            }
            GgmlDType::Q5_1 => {
                type $block = k_quants::BlockQ5_1;
                $run
            }
            GgmlDType::Q8_0 => {
                type $block = k_quants::BlockQ8_0;
                $run
            }
            GgmlDType::Q2K => {
                type $block = k_quants::BlockQ2K;
                $run
            }
            GgmlDType::Q3K => {
                type $block = k_quants::BlockQ3K;
                $run
            }
            GgmlDType::Q4K => {
                type $block = k_quants::BlockQ4K;
                $run
            }
            GgmlDType::Q5K => {
                type $block = k_quants::BlockQ5K;
                $run
            }
            GgmlDType::Q6K => {
                type $block = k_quants::BlockQ6K;
                $run
            }
        }
    };
}

/// Words as blocks.
fn blocks<B: GgmlType>(words: &[u16]) -> &[B] {
    let (count, rest) = (size_of_val(words) / size_of::<B>(), size_of_val(words) % size_of::<B>());
    assert!(rest == 0 && align_of::<B>() <= align_of::<u16>());
    // SAFETY: the blocks of all forms that are kept are plain integers and halves in the order of C, of which
    // every pattern of bits is one; the words are as many, and lie as evenly, as was just checked.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), count) }
}

/// The same, to be written.
fn blocks_mut<B: GgmlType>(words: &mut [u16]) -> &mut [B] {
    let (count, rest) = (size_of_val(words) / size_of::<B>(), size_of_val(words) % size_of::<B>());
    assert!(rest == 0 && align_of::<B>() <= align_of::<u16>());
    // SAFETY: as above, and every block is words again.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), count) }
}

/// Whole blocks in f32.
fn decode(form: CompactForm, words: &[u16], values: &mut [f32]) {
    match form.0 {
        GgmlDType::BF16 => widen_bf16(words, values),
        GgmlDType::F16 => blocks::<f16>(words).convert_to_f32_slice(values),
        GgmlDType::Q8_0 => widen_q8_0(words, values),
        GgmlDType::Q4K => widen_q4_k(words, values),
        _ => with_blocks!(form, Block => Block::to_float(blocks::<Block>(words), values)),
    }
}

/// The other way. What is not finite has no place among small integers, and stays the same in 16 bits.
fn encode(form: CompactForm, values: &[f32], words: &mut [u16]) {
    match form.0 {
        GgmlDType::BF16 => blocks_mut::<bf16>(words).convert_from_f32_slice(values),
        GgmlDType::F16 => blocks_mut::<f16>(words).convert_from_f32_slice(values),
        _ => with_blocks!(form, Block => Block::from_float(values, blocks_mut::<Block>(words))),
    }
}

/// Words of a block of 32 integers of 8 bits: the scale, an f16, and the integers.
const Q8_0_WORDS: usize = 17;

/// Words of a block of 256 integers of 4 bits: a scale and a scale of minima, f16, 12 bytes of scales and
/// minima of 6 bits, and the integers.
const Q4_K_WORDS: usize = 72;

/// A half in f32.
#[inline(always)]
fn half(bits: u16) -> f32 {
    // The exponents of f32 begin 112 lower. Infinities and what is no number have the largest exponent, which stays.
    let magnitude = match bits & 0x7c00 {
        0x7c00 => f16::from_bits(bits & 0x7fff).to_f32_const(),
        _ => f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23),
    };
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// The integers of a block in 8 bits.
#[inline(always)]
fn integers(block: &[u16; Q8_0_WORDS]) -> [i8; 32] {
    let mut integers = [0i8; 32];
    for (pair, word) in integers.as_chunks_mut::<2>().0.iter_mut().zip(&block[1..]) {
        *pair = word.to_le_bytes().map(u8::cast_signed);
    }
    integers
}

vectorised! {
    /// `factor w · x`, or `+= factor w · x`, for each row `w` of a matrix in bf16.
    fn dots_bf16<'a>(words: &'a [u16], x: &'a [f32], factor: f32, accumulate: bool, dots: &'a mut [f32]) {
        for (dot, row) in dots.iter_mut().zip(words.chunks_exact(x.len())) {
            let mut sums = [0.0; LANES];
            let ((words, words_rest), (x, x_rest)) = (row.as_chunks::<LANES>(), x.as_chunks::<LANES>());
            for (words, x) in words.iter().zip(x) {
                for lane in 0..LANES {
                    sums[lane] = x[lane].mul_add(f32::from_bits(u32::from(words[lane]) << 16), sums[lane]);
                }
            }
            for ((sum, &word), &x) in sums.iter_mut().zip(words_rest).zip(x_rest) {
                *sum = x.mul_add(f32::from_bits(u32::from(word) << 16), *sum);
            }
            *dot = factor * total(sums) + if accumulate { *dot } else { 0.0 };
        }
    }

    /// The same of a matrix in blocks of 8 bits.
    fn dots_q8_0<'a>(words: &'a [u16], x: &'a [f32], factor: f32, accumulate: bool, dots: &'a mut [f32]) {
        let x = x.as_chunks::<32>().0;
        for (dot, row) in dots.iter_mut().zip(words.chunks_exact(x.len() * Q8_0_WORDS)) {
            let mut sums = [0.0; LANES];
            for (block, x) in row.as_chunks::<Q8_0_WORDS>().0.iter().zip(x) {
                let (scale, integers) = (half(block[0]), integers(block));
                for lane in 0..LANES {
                    sums[lane] = x[lane].mul_add(f32::from(integers[lane]) * scale, sums[lane]);
                }
            }
            *dot = factor * total(sums) + if accumulate { *dot } else { 0.0 };
        }
    }

    fn widen_bf16<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (value, &word) in values.iter_mut().zip(words) {
            *value = f32::from_bits(u32::from(word) << 16);
        }
    }

    fn widen_q8_0<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<32>().0.iter_mut().zip(words.as_chunks::<Q8_0_WORDS>().0) {
            let scale = half(block[0]);
            for (value, integer) in values.iter_mut().zip(integers(block)) {
                *value = f32::from(integer) * scale;
            }
        }
    }

    fn widen_q4_k<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<256>().0.iter_mut().zip(words.as_chunks::<Q4_K_WORDS>().0) {
            let [scale, minimum] = [block[0], block[1]].map(half);
            let mut bytes = [0u8; 12];
            for (pair, word) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(&block[2..8]) {
                *pair = word.to_le_bytes();
            }
            for (part, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (of_scale, of_minimum) = scale_and_minimum(&bytes, part);
                let (scale, minimum) = (scale * f32::from(of_scale), minimum * f32::from(of_minimum));
                // 32 bytes hold the low halves of one part and the high halves of the next.
                let shift = 4 * (part % 2);
                let mut integers = [0u8; 32];
                for (pair, word) in integers.as_chunks_mut::<2>().0.iter_mut().zip(&block[8 + part / 2 * 16..][..16]) {
                    *pair = word.to_le_bytes();
                }
                for (value, byte) in values.iter_mut().zip(integers) {
                    *value = scale * f32::from(byte >> shift & 15) - minimum;
                }
            }
        }
    }
}

/// The scale and the minimum of one of eight parts of a block, 6 bits each: four of each stand whole, of the
/// others the upper bits are where those have room (ggml's `get_scale_min_k4`).
#[inline(always)]
fn scale_and_minimum(bytes: &[u8; 12], part: usize) -> (u8, u8) {
    match part {
        0..4 => (bytes[part] & 63, bytes[part + 4] & 63),
        _ => {
            let low = bytes[part + 4];
            (low & 15 | bytes[part - 4] >> 6 << 4, low >> 4 | bytes[part] >> 6 << 4)
        }
    }
}

#[cfg(test)]
mod tests;
