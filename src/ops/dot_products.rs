//! Products of a matrix with the transpose of another, where one of them has few rows.
//!
//! A general product packs its operands first, which costs more than the product when one side has few rows,
//! as in generation (a row for each sequence) and in low-rank updates. Here rows are read in place and
//! multiplied four by four, so that each number that is loaded is used four times; three by four where the
//! processor has 16 registers (AVX2), which hold the sums of no larger tile. The rows of `b`, in
//! generation the weights, come from main memory: while one tile is computed, the next is fetched, as the
//! rows of a tile are too short for the processor to see by itself where it goes on.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::matrix::{Matrix, MatrixMut, Threads};

/// Rows of one tile, on either side: 16 sums at a time fit 32 registers.
const TILE: usize = 4;

/// Rows of `a` of a tile where there are 16 registers: with four, sums are moved to memory and back, and a
/// product takes half as long again.
const SMALL_TILE: usize = 3;

/// Rows of the longer side in one parallel task.
const ROWS_PER_TASK: usize = 64;

/// How many numbers ahead one row after the other is brought into the cache: 4 KiB, which memory needs about
/// as long for as it takes to answer.
pub(super) const AHEAD: usize = 1024;

/// The least number of multiplications that is worth waking other threads for.
pub(super) const PARALLEL_WORK: usize = 1 << 18;

/// Whether this is faster than a general product of `[rows, k]` and `[k, columns]`: the sums at the end of each
/// row of `k` numbers weigh less the longer it is (measured against `gemm`, with AVX-512; with AVX2 it is so of
/// somewhat more rows).
pub(super) fn is_faster(rows: usize, columns: usize, k: usize) -> bool {
    let has_few_rows = rows < columns && pulp::Arch::new().dispatch(TileRows) == SMALL_TILE;
    rows.min(columns) <= (k / if has_few_rows { 8 } else { 12 }).min(64)
}

/// The rows of `a` of a tile.
struct TileRows;

impl WithSimd for TileRows {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        if S::REGISTER_COUNT < 32 { SMALL_TILE } else { TILE }
    }
}

/// `target = factor a bᵀ`, or `target += factor a bᵀ`, where the rows of `a` and `b` are contiguous.
pub(super) fn multiply(target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: Matrix, threads: Threads) {
    let run = |a_rows: Range<usize>, b_rows: Range<usize>| {
        // SAFETY: the tasks below have different rows or different columns of the target.
        let target = unsafe { target.block(a_rows.clone(), b_rows.clone()) };
        let (a, b) = (a.rows(a_rows), b.rows(b_rows));
        pulp::Arch::new().dispatch(Kernel { target, accumulate, factor, a, b });
    };
    let longer = a.rows.max(b.rows);
    if threads == Threads::One || a.rows * b.rows * a.columns < PARALLEL_WORK {
        return run(0..a.rows, 0..b.rows);
    }
    (0..longer.div_ceil(ROWS_PER_TASK)).into_par_iter().for_each(|task| {
        let part = task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(longer);
        if a.rows > b.rows { run(part, 0..b.rows) } else { run(0..a.rows, part) }
    });
}

struct Kernel<'a> {
    target: MatrixMut<'a>,
    accumulate: bool,
    factor: f32,
    a: Matrix<'a>,
    b: Matrix<'a>,
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (a_rows, b_rows) = (self.a.rows, self.b.rows);
        if a_rows == 1 {
            // Rows one after the other are a single stream, which is read fastest.
            (0..b_rows).for_each(|b_row| self.tile::<S, 1, 1, true>(simd, 0, b_row));
            return;
        }
        let tile_rows = TileRows.with_simd(simd);
        for b_first in (0..b_rows).step_by(TILE) {
            self.tiles::<S, true>(simd, tile_rows, 0, b_first);
            for a_first in (tile_rows..a_rows).step_by(tile_rows) {
                self.tiles::<S, false>(simd, tile_rows, a_first, b_first);
            }
        }
    }
}

impl Kernel<'_> {
    /// The dot products of up to `tile_rows` rows of `a` with up to `TILE` of `b`. With `FETCH` the rows of `b` that
    /// come next are brought into the cache meanwhile.
    #[inline(always)]
    fn tiles<S: Simd, const FETCH: bool>(&self, simd: S, tile_rows: usize, a_first: usize, b_first: usize) {
        match ((self.a.rows - a_first).min(tile_rows), (self.b.rows - b_first).min(TILE)) {
            (0, _) => (),
            (4, 4) => self.tile::<S, 4, 4, FETCH>(simd, a_first, b_first),
            (3, 4) => self.tile::<S, 3, 4, FETCH>(simd, a_first, b_first),
            (2, 4) => self.tile::<S, 2, 4, FETCH>(simd, a_first, b_first),
            (1, 4) => self.tile::<S, 1, 4, FETCH>(simd, a_first, b_first),
            (4, 3) => self.tile::<S, 4, 3, FETCH>(simd, a_first, b_first),
            (3, 3) => self.tile::<S, 3, 3, FETCH>(simd, a_first, b_first),
            (4, 2) => self.tile::<S, 4, 2, FETCH>(simd, a_first, b_first),
            (3, 2) => self.tile::<S, 3, 2, FETCH>(simd, a_first, b_first),
            (4, 1) => self.tile::<S, 4, 1, FETCH>(simd, a_first, b_first),
            (3, 1) => self.tile::<S, 3, 1, FETCH>(simd, a_first, b_first),
            (rows, columns) => (0..rows * columns).for_each(|index| {
                self.tile::<S, 1, 1, false>(simd, a_first + index / columns, b_first + index % columns);
            }),
        }
    }

    /// The dot products of `A` rows with `B` rows. Each is summed in the same order in whatever tile it falls.
    #[inline(always)]
    fn tile<S: Simd, const A: usize, const B: usize, const FETCH: bool>(
        &self,
        simd: S,
        a_first: usize,
        b_first: usize,
    ) {
        let mut sums = [[simd.splat_f32s(0.0); B]; A];
        let a: [(&[S::f32s], &[f32]); A] = std::array::from_fn(|row| S::as_simd_f32s(self.a.row(a_first + row)));
        let b: [(&[S::f32s], &[f32]); B] = std::array::from_fn(|row| S::as_simd_f32s(self.b.row(b_first + row)));
        let vectors = b[0].0.len();
        let ahead = if B == 1 { AHEAD } else { B * self.b.row_stride };
        // Slices of one length, so that the loop needs no bounds checks.
        let a_heads: [&[S::f32s]; A] = std::array::from_fn(|row| &a[row].0[..vectors]);
        let b_heads: [&[S::f32s]; B] = std::array::from_fn(|row| &b[row].0[..vectors]);
        for index in 0..vectors {
            let x: [S::f32s; A] = std::array::from_fn(|row| a_heads[row][index]);
            for column in 0..B {
                let y = &b_heads[column][index];
                if FETCH {
                    fetch(std::ptr::from_ref(y).cast::<f32>().wrapping_add(ahead));
                }
                for row in 0..A {
                    sums[row][column] = simd.mul_add_e_f32s(x[row], *y, sums[row][column]);
                }
            }
        }
        for row in 0..A {
            // SAFETY: the target is this task's own, and one row is borrowed at a time.
            let target = unsafe { self.target.row(a_first + row) };
            for column in 0..B {
                let mut sum = simd.reduce_sum_f32s(sums[row][column]);
                for (x, y) in a[row].1.iter().zip(b[column].1) {
                    sum += x * y;
                }
                let target = &mut target[b_first + column];
                *target = self.factor * sum + if self.accumulate { *target } else { 0.0 };
            }
        }
    }
}

/// Starts to bring the cache line of an address into the cache. Where the processor has no such instruction,
/// nothing happens.
#[inline(always)]
pub(super) fn fetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it reads nothing: no address is wrong.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn products_of_all_small_shapes_are_those_of_double_precision() {
        for (rows, columns, k) in [
            (1, 1, 1),
            (1, 9, 100),
            (2, 7, 33),
            (3, 6, 64),
            (5, 5, 5),
            (7, 3, 48),
            (9, 1, 17),
            (6, 200, 40),
            (300, 5, 40),
        ] {
            let (a, b) = (random(&[rows, k], 1), random(&[columns, k], 2));
            let [a64, b64] = [&a, &b].map(|x| x.to_dtype(DType::F64).unwrap());
            let expected = a64.matmul(&b64.t().unwrap()).unwrap();
            let values = [&a, &b].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let (a, b) = (Matrix::new(&values[0], rows, k), Matrix::new(&values[1], columns, k));
            let mut result = vec![f32::NAN; rows * columns];
            multiply(MatrixMut::new(&mut result, rows, columns), false, 1.0, a, b, Threads::All);
            multiply(MatrixMut::new(&mut result, rows, columns), true, 2.0, a, b, Threads::One);
            let result = Tensor::from_vec(result, (rows, columns), &Device::Cpu).unwrap();
            assert_close("product", &result, &expected.affine(3.0, 0.0).unwrap(), 1e-5);
        }
    }
}
