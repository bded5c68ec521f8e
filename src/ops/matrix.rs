//! Matrices in memory: views, products, and parallel loops over them.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use gemm::Parallelism;
use rayon::prelude::*;

use super::dot_products;

/// Elements of one task of a parallel element-wise loop. Fixed, so that results do not depend on the number of threads.
pub(super) const CHUNK: usize = 16 * 1024;

/// Rows of one partial sum over rows. Fixed for the same reason.
const ROWS_PER_SUM: usize = 64;

/// Whether the kernels of this module apply: single precision in main memory.
pub(super) fn has_kernel(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// A matrix whose rows lie anywhere but are each contiguous, copied only if it is not so already.
pub(super) fn with_contiguous_rows(x: &Tensor) -> Result<Tensor> {
    match (x.dims(), x.stride()) {
        (&[_, columns], &[row_stride, 1]) if row_stride >= columns => Ok(x.clone()),
        _ => x.contiguous(),
    }
}

/// A view of a matrix with any strides, of f32 unless it says otherwise.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, N = f32> {
    /// From the first element on.
    pub data: &'a [N],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a, N: WithDType> Matrix<'a, N> {
    /// A contiguous matrix.
    pub fn new(data: &'a [N], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        Matrix { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The matrix that a tensor of two dimensions describes.
    pub fn from_storage(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (&[rows, columns], &[row_stride, column_stride]) = (layout.dims(), layout.stride()) else {
            bail!("expected a matrix, found a tensor of shape {:?}", layout.shape());
        };
        let data = &storage.as_slice::<N>()?[layout.start_offset()..];
        Ok(Matrix { data, rows, columns, row_stride, column_stride })
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// A block of rows and columns.
    pub fn block(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        if rows.is_empty() || columns.is_empty() {
            return Matrix { rows: rows.len(), columns: columns.len(), ..self };
        }
        let data = &self.data[rows.start * self.row_stride + columns.start * self.column_stride..];
        Matrix { data, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// A block of rows.
    pub fn rows(self, rows: Range<usize>) -> Self {
        let columns = self.columns;
        self.block(rows, 0..columns)
    }

    /// One row of a matrix with contiguous rows.
    pub fn row(self, row: usize) -> &'a [N] {
        debug_assert!(self.column_stride == 1 && row < self.rows);
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// Whether every element is one of its data.
    pub fn is_within_its_data(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.data.len()
    }
}

/// A matrix to be written, with contiguous rows. Tasks that run at the same time take blocks of it that do not overlap.
#[derive(Clone, Copy)]
pub(super) struct MatrixMut<'a> {
    pointer: *mut f32,
    pub rows: usize,
    pub columns: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer stands for an exclusive borrow of plain numbers; those who share it promise, in the `unsafe` methods, to
// touch disjoint blocks only.
unsafe impl Send for MatrixMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// A contiguous matrix.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        MatrixMut { pointer: data.as_mut_ptr(), rows, columns, row_stride: columns, lifetime: PhantomData }
    }

    /// A block of rows and columns.
    ///
    /// # Safety
    /// No other block with an element of this one is in use until this one is dropped.
    pub unsafe fn block(&self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'a> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        // SAFETY: the first element of a block within the bounds just checked.
        let pointer = unsafe { self.pointer.add(rows.start * self.row_stride + columns.start) };
        MatrixMut { pointer, rows: rows.len(), columns: columns.len(), ..*self }
    }

    /// The first element, and how far it is from one row to the next.
    pub fn as_mut_ptr(&self) -> (*mut f32, usize) {
        (self.pointer, self.row_stride)
    }

    /// One row.
    ///
    /// # Safety
    /// No other block with an element of this row is in use until this one is dropped.
    pub unsafe fn row(&self, row: usize) -> &'a mut [f32] {
        assert!(row < self.rows);
        // SAFETY: within the bounds just checked, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(row * self.row_stride), self.columns) }
    }
}

/// Whether a product uses all threads or only its own (inside a loop that is parallel already).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    One,
    All,
}

/// `target = factor a b`, or `target += factor a b`.
///
/// Every element is a sum over `k` in an order that does not depend on the number of threads.
pub(super) fn multiply(target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: Matrix, threads: Threads) {
    assert!(a.columns == b.rows && target.rows == a.rows && target.columns == b.columns);
    assert!(a.is_within_its_data() && b.is_within_its_data());
    if a.column_stride == 1 && b.row_stride == 1 && dot_products::is_faster(a.rows, b.columns, a.columns) {
        return dot_products::multiply(target, accumulate, factor, a, b.t(), threads);
    }
    if threads == Threads::All && is_narrow(&target, a.columns) {
        return multiply_narrow(target, accumulate, factor, a, b);
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the operands lie within their slices (checked above) and the target within an exclusive borrow (by construction of
    // `MatrixMut`), which therefore does not overlap them.
    unsafe {
        gemm::gemm(
            target.rows,
            target.columns,
            a.columns,
            target.pointer,
            1,
            target.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Rows or columns up to which a product counts as narrow.
const NARROW: usize = 64;

/// Columns, or rows, of one task of a narrow product. Fixed, so that sums do not depend on the number of threads.
const NARROW_PART: usize = 128;

/// Whether a product is worth dividing that gemm would leave to one thread: it divides the rows of large ones.
fn is_narrow(target: &MatrixMut, terms: usize) -> bool {
    let (short, long) = (target.rows.min(target.columns), target.rows.max(target.columns));
    short <= NARROW && long >= 2 * NARROW_PART && short * long * terms >= 1 << 17
}

/// A narrow product, such as those of low-rank updates, its longer side divided.
fn multiply_narrow(target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: Matrix) {
    let by_columns = target.columns >= target.rows;
    let length = if by_columns { target.columns } else { target.rows };
    (0..length.div_ceil(NARROW_PART)).into_par_iter().for_each(|part| {
        let range = part * NARROW_PART..((part + 1) * NARROW_PART).min(length);
        let (rows, columns) = if by_columns { (0..a.rows, range) } else { (range, 0..b.columns) };
        let (a, b) = (a.rows(rows.clone()), b.block(0..b.rows, columns.clone()));
        // SAFETY: the parts do not overlap.
        multiply(unsafe { target.block(rows, columns) }, accumulate, factor, a, b, Threads::One);
    });
}

/// A new contiguous matrix `factor a b`.
pub(super) fn product(factor: f32, a: Matrix, b: Matrix) -> Vec<f32> {
    let (rows, columns) = (a.rows, b.columns);
    // SAFETY: `multiply` writes every element.
    unsafe {
        written(rows * columns, |values| {
            multiply(MatrixMut::new(values, rows, columns), false, factor, a, b, Threads::All)
        })
    }
}

/// A vector whose elements `write` sets. It saves clearing memory that is written at once.
///
/// # Safety
/// `write` sets every element and reads none before.
pub(super) unsafe fn written(length: usize, write: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    // SAFETY: the capacity is `length`; the elements are numbers, for which every bit pattern is valid memory, and the caller
    // promises that none is read before it is set.
    unsafe {
        write(std::slice::from_raw_parts_mut(values.as_mut_ptr(), length));
        values.set_len(length);
    }
    values
}

/// A vector made chunk by chunk, in parallel. `write` is given the index of the first element and the chunk, must set
/// every element of it and read none before.
pub(super) fn fill(length: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    fill_rows(length, 1, write)
}

/// As [`fill`], for a matrix: chunks are whole rows, and `write` is given the index of the first one.
pub(super) fn fill_rows(rows: usize, columns: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let rows_per_chunk = (CHUNK / columns.max(1)).max(1);
    let per_chunk = rows_per_chunk * columns;
    // SAFETY: the chunks cover the vector, and `write` sets every element of its chunk.
    unsafe {
        written(rows * columns, |values| match values.len() {
            0 => (),
            length if length <= per_chunk => write(0, values),
            _ => values
                .par_chunks_mut(per_chunk)
                .enumerate()
                .for_each(|(index, chunk)| write(index * rows_per_chunk, chunk)),
        })
    }
}

/// The sum of `width` quantities over all rows, where `add` adds those of some rows to a partial sum.
/// Rows are summed in fixed groups and the groups in order, so that the result does not depend on the number of threads.
pub(super) fn sum_over_rows(rows: usize, width: usize, add: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Vec<f32> {
    let groups = rows.div_ceil(ROWS_PER_SUM);
    let group = |index: usize| {
        let mut partial = vec![0.0; width];
        add(index * ROWS_PER_SUM..((index + 1) * ROWS_PER_SUM).min(rows), &mut partial);
        partial
    };
    let partials: Vec<Vec<f32>> = match groups {
        0 | 1 => (0..groups).map(group).collect(),
        _ => (0..groups).into_par_iter().map(group).collect(),
    };
    let mut sum = vec![0.0; width];
    for partial in partials {
        super::simd::add_to(&mut sum, &partial);
    }
    sum
}

/// Adds the sums of the columns of a matrix with contiguous rows.
pub(super) fn add_column_sums(x: Matrix, sums: &mut [f32]) {
    let of_rows = sum_over_rows(x.rows, x.columns, |rows, partial| {
        for row in rows {
            super::simd::add_to(partial, x.row(row));
        }
    });
    super::simd::add_to(sums, &of_rows);
}

/// The storage of a tensor in main memory.
pub(super) fn cpu_storage<'a>(storage: &'a Storage, what: &'static str) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{what}: expected a tensor in main memory"),
    }
}

/// The elements of a contiguous tensor.
pub(super) fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}

/// Runs `read` on the elements of `x`, copied first if they are not contiguous.
pub(super) fn with_elements<T, E: From<candle_core::Error>>(
    x: &Tensor,
    read: impl FnOnce(&[f32]) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    read(elements(cpu_storage(&storage, "elements")?, layout)?)
}

/// Runs `read` on the matrix `x`, copied first if its rows are not contiguous.
pub(super) fn with_matrix<T, E: From<candle_core::Error>>(
    x: &Tensor,
    read: impl FnOnce(Matrix) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    with_strided(&with_contiguous_rows(x)?, read)
}

/// Runs `read` on the matrix `x` as it lies.
pub(super) fn with_strided<T, E: From<candle_core::Error>>(
    x: &Tensor,
    read: impl FnOnce(Matrix) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    with_strided_of(x, read)
}

/// The same of a matrix of another element type.
pub(super) fn with_strided_of<N: WithDType, T, E: From<candle_core::Error>>(
    x: &Tensor,
    read: impl FnOnce(Matrix<N>) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let (storage, layout) = x.storage_and_layout();
    read(Matrix::from_storage(cpu_storage(&storage, "matrix")?, layout)?)
}

/// Applies `update` to chunks of an existing slice, in parallel, with the index of their first element.
pub(super) fn update_chunks(values: &mut [f32], update: impl Fn(usize, &mut [f32]) + Sync) {
    if values.len() <= CHUNK {
        update(0, values);
    } else {
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| update(index * CHUNK, chunk));
    }
}

/// Applies `update` to every row of `columns` numbers, in parallel.
pub(super) fn update_rows(values: &mut [f32], columns: usize, update: impl Fn(usize, &mut [f32]) + Sync) {
    if values.len() <= CHUNK {
        values.chunks_exact_mut(columns).enumerate().for_each(|(index, row)| update(index, row));
    } else {
        let at_once = (CHUNK / columns).max(1);
        values
            .par_chunks_exact_mut(columns)
            .with_min_len(at_once)
            .enumerate()
            .for_each(|(index, row)| update(index, row));
    }
}
