//! Keys and values in the element type in which they are kept. The kernels compute in f32: numbers of another type
//! are widened as they are read, some rows of one head at a time.

use candle_core::WithDType;
use half::bf16;

use crate::ops::matrix::Matrix;
use crate::ops::simd::vectorised;

/// An element type of keys and values.
pub(super) trait Stored: WithDType {
    /// Gives `read` the rows of `block` in order, as f32, with the index of the first of them: at most `rows_at_once`
    /// at a time where they have to be widened, into `widened`.
    fn read(block: Matrix<Self>, rows_at_once: usize, widened: &mut Vec<f32>, read: impl FnMut(usize, Matrix));
}

impl Stored for f32 {
    fn read(block: Matrix, _rows_at_once: usize, _widened: &mut Vec<f32>, mut read: impl FnMut(usize, Matrix)) {
        read(0, block);
    }
}

impl Stored for bf16 {
    fn read(block: Matrix<Self>, rows_at_once: usize, widened: &mut Vec<f32>, mut read: impl FnMut(usize, Matrix)) {
        let columns = block.columns;
        for first in (0..block.rows).step_by(rows_at_once) {
            let rows = rows_at_once.min(block.rows - first);
            let part = block.rows(first..first + rows);
            widened.resize(rows * columns, 0.0);
            widen(part.data, part.row_stride, columns, widened);
            read(first, Matrix::new(widened, rows, columns));
        }
    }
}

vectorised! {
    /// Rows of `columns` numbers, `stride` from one to the next, widened into contiguous rows.
    fn widen<'a>(rows: &'a [bf16], stride: usize, columns: usize, widened: &'a mut [f32]) {
        for (row, widened) in widened.chunks_exact_mut(columns).enumerate() {
            for (widened, number) in widened.iter_mut().zip(&rows[row * stride..][..columns]) {
                // The upper half of the bits of an f32.
                *widened = f32::from_bits(u32::from(number.to_bits()) << 16);
            }
        }
    }
}
