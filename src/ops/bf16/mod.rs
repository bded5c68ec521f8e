//! Products whose operands are rounded to bf16 and whose sums are f32.
//!
//! Operands are rounded to nearest, ties to even, while they are packed into tiles of 1 KiB ([`pack`]); one
//! of the kernels multiplies panels of tiles. All kernels read the same tiles, and in each every element of
//! the result is a sum over `k` in an order that depends on `k` alone: not on the number of threads, nor on
//! how many other rows there are. Bits are those of a kernel; between kernels sums are rounded in another
//! order.

mod amx;
mod avx512;
mod pack;
mod scalar;

use std::cell::Cell;
use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use super::matrix::{Matrix, MatrixMut, Threads, multiply as multiply_f32};
use pack::{Form, SIDE, Tile, pack};

pub(super) use pack::{Packed, rounded};

/// What multiplies operands that are rounded to bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The tiles of Intel's AMX.
    Amx,
    /// AVX-512's products of pairs.
    Avx512,
    /// The tile product in plain code: the oracle of the others, too slow for work.
    Scalar,
    /// Products in f32 of rounded operands, where the processor has no instruction for bf16 that is faster
    /// than f32.
    Widened,
}

impl Kernel {
    /// All, the fastest first.
    pub const ALL: [Kernel; 4] = [Kernel::Amx, Kernel::Avx512, Kernel::Widened, Kernel::Scalar];

    /// Whether this processor has its instructions.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Amx => amx::is_available(),
            Kernel::Avx512 => avx512::is_available(),
            Kernel::Scalar | Kernel::Widened => true,
        }
    }

    /// The fastest on this kind of processor. Intel's AVX512-BF16 is slower than its f32 (half of it on
    /// Sapphire Rapids), AMD's twice as fast, so that the instruction alone does not decide.
    pub fn fastest() -> Self {
        match () {
            () if amx::is_available() => Kernel::Amx,
            () if avx512::is_available() && avx512::is_faster_than_f32() => Kernel::Avx512,
            () => Kernel::Widened,
        }
    }

    /// The name by which a setting knows it.
    pub fn id(self) -> &'static str {
        match self {
            Kernel::Amx => "amx",
            Kernel::Avx512 => "avx512",
            Kernel::Scalar => "scalar",
            Kernel::Widened => "widened",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Kernel::Amx => "AMX",
            Kernel::Avx512 => "AVX512-BF16",
            Kernel::Scalar => "tiles in plain code",
            Kernel::Widened => "rounded, multiplied in f32",
        })
    }
}

/// The most of `k` in one block of sums: 32 columns of it stay in the first cache. Fixed, as it is part of
/// the order of a sum.
const DEPTH: usize = 640;

/// The most columns that are multiplied with all rows of a task before the next: their tiles stay in the
/// second cache.
const WIDTH: usize = 512;

/// The most rows of a task.
const ROWS: usize = 256;

/// The least number of multiplications that is worth waking other threads for.
const PARALLEL_WORK: usize = 1 << 18;

/// Some rows of a result by some columns: a panel of `a` times panels of `b`.
struct Strip<'a> {
    /// `[steps][2]` tiles of 16 rows.
    a: &'a [Tile],
    /// The first panel's tiles from the block's first step on, and those of the panels after it.
    b: &'a [Tile],
    /// Tiles from one panel of `b` to the next.
    panel: usize,
    /// Steps of 32 over `k`.
    steps: usize,
    /// At most 32.
    rows: usize,
    columns: usize,
    /// The first element of the result.
    target: *mut f32,
    row_stride: usize,
    factor: f32,
    /// Whether the product is added to what is there.
    add: bool,
}

impl Kernel {
    /// # Safety
    /// The target's rows and columns are the caller's own, and the processor has the kernel's instructions.
    unsafe fn run(self, strip: &Strip) {
        assert!(strip.rows <= SIDE && strip.a.len() >= 2 * strip.steps && strip.columns > 0);
        assert!((strip.columns.div_ceil(SIDE) - 1) * strip.panel + 2 * strip.steps <= strip.b.len());
        // SAFETY: the tiles are there, and the rest is the caller's promise.
        unsafe {
            match self {
                Kernel::Amx => amx::multiply(strip),
                Kernel::Avx512 => avx512::multiply(strip),
                Kernel::Scalar | Kernel::Widened => scalar::multiply(strip),
            }
        }
    }

    /// Whether it multiplies packed operands.
    pub(super) fn packs(self) -> bool {
        self != Kernel::Widened
    }

    /// Whether operands are packed by vector instructions.
    fn has_vectors(self) -> bool {
        matches!(self, Kernel::Amx | Kernel::Avx512)
    }
}

thread_local! {
    // Taken out while in use: a thread that waits for others may be given another product meanwhile.
    static ROWS_OF_A: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
    static PANELS_OF_B: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// `target = factor a b`, or `target += factor a b`, with both operands rounded to bf16.
pub(super) fn multiply(kernel: Kernel, target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: Matrix) {
    if !kernel.packs() {
        let (a_values, b_values) = (rounded(a), rounded(b.t()));
        let (a, b) = (Matrix::new(&a_values, a.rows, a.columns), Matrix::new(&b_values, b.columns, b.rows).t());
        return multiply_f32(target, accumulate, factor, a, b, Threads::All);
    }
    let packed = Packed::within(PANELS_OF_B.take(), kernel, b);
    multiply_packed(kernel, target, accumulate, factor, a, &packed);
    PANELS_OF_B.set(packed.into_tiles());
}

/// The same with `b` packed for this kernel, which is not [`Kernel::Widened`].
pub(super) fn multiply_packed(kernel: Kernel, target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: &Packed) {
    let (rows, columns, depth) = (a.rows, b.columns, a.columns);
    assert!(a.is_within_its_data() && b.depth == depth && target.rows == rows && target.columns == columns);
    assert!(kernel.is_available());
    if rows == 0 || columns == 0 {
        return;
    }
    let product = Product { kernel, target, accumulate, factor, a, b };
    let threads = match rows * columns * depth < PARALLEL_WORK {
        true => 1,
        false => rayon::current_num_threads(),
    };
    // Two tasks for each thread, of rows first.
    let tasks = if threads == 1 { 1 } else { 2 * threads };
    let task_rows = rows.div_ceil(tasks).next_multiple_of(SIDE).min(ROWS);
    let row_tasks = rows.div_ceil(task_rows);
    let task_columns = columns.div_ceil(tasks.div_ceil(row_tasks)).next_multiple_of(SIDE);
    let column_tasks = columns.div_ceil(task_columns);
    let run = |task: usize| {
        let (row, column) = (task / column_tasks * task_rows, task % column_tasks * task_columns);
        // SAFETY: no two tasks have a row and a column in common.
        unsafe { product.block(row..(row + task_rows).min(rows), column..(column + task_columns).min(columns)) }
    };
    match row_tasks * column_tasks {
        tasks if threads == 1 || tasks == 1 => (0..tasks).for_each(run),
        tasks => (0..tasks).into_par_iter().for_each(run),
    }
}

struct Product<'a> {
    kernel: Kernel,
    target: MatrixMut<'a>,
    accumulate: bool,
    factor: f32,
    a: Matrix<'a>,
    b: &'a Packed,
}

impl Product<'_> {
    /// Some rows and columns; the first of each is a multiple of 32.
    ///
    /// # Safety
    /// These rows and columns of the target are used by no one else meanwhile.
    unsafe fn block(&self, rows: Range<usize>, columns: Range<usize>) {
        // SAFETY: as the caller promises.
        let target = unsafe { self.target.block(rows.clone(), columns.clone()) };
        let (pointer, row_stride) = target.as_mut_ptr();
        let depth = self.a.columns;
        if depth == 0 {
            if !self.accumulate {
                // SAFETY: a row of the block at a time.
                (0..target.rows).for_each(|row| unsafe { target.row(row).fill(0.0) });
            }
            return;
        }
        let block = depth.div_ceil(depth.div_ceil(DEPTH)).next_multiple_of(SIDE);
        let panels = rows.len().div_ceil(SIDE);
        let mut scratch = ROWS_OF_A.take();
        let most = panels * block.min(depth).div_ceil(SIDE) * 2;
        if scratch.len() < most {
            scratch.resize(most, Tile::ZERO);
        }
        for start in (0..depth).step_by(block) {
            let part = start..(start + block).min(depth);
            let steps = part.len().div_ceil(SIDE);
            let tiles = &mut scratch[..panels * steps * 2];
            pack(self.a, rows.clone(), part, Form::Rows, self.kernel.has_vectors(), tiles);
            for first in columns.clone().step_by(WIDTH) {
                let width = WIDTH.min(columns.end - first);
                for (panel, a) in tiles.chunks_exact(2 * steps).enumerate() {
                    let row = panel * SIDE;
                    // SAFETY: within the block, which is the caller's own; the kernel is available, which was
                    // checked.
                    unsafe {
                        self.kernel.run(&Strip {
                            a,
                            b: self.b.from(first / SIDE, start / SIDE),
                            panel: self.b.tiles_per_panel(),
                            steps,
                            rows: SIDE.min(rows.len() - row),
                            columns: width,
                            target: pointer.add(row * row_stride + first - columns.start),
                            row_stride,
                            factor: self.factor,
                            add: self.accumulate || start > 0,
                        });
                    }
                }
            }
        }
        ROWS_OF_A.set(scratch);
    }
}

#[cfg(test)]
mod tests;
