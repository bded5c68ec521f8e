//! Operands of bf16 in tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::super::compact::Compact;
use super::super::matrix::{Matrix, fill_rows};
use super::{Kernel, avx512};

/// Rows or columns of a panel, and the `k` of one step: two tiles.
pub(super) const SIDE: usize = 32;

/// Rows or columns of a tile.
pub(super) const HALF: usize = SIDE / 2;

/// 16 rows (of `a`) or columns (of `b`) by 32 of `k`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile(pub [u16; HALF * SIDE]);

impl Tile {
    pub const ZERO: Tile = Tile([0; HALF * SIDE]);
}

/// In which order a tile holds its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `[16 rows][32 of k]`, for `a`.
    Rows,
    /// `[16 pairs of k][16 columns][2]`, for `b`.
    Pairs,
}

/// The second operand `[depth, columns]` of a product, in panels of 32 columns: `[panel][step][2]` tiles.
/// What is outside is 0.
#[derive(Debug)]
pub(in super::super) struct Packed {
    tiles: Vec<Tile>,
    pub(super) columns: usize,
    pub(super) depth: usize,
}

impl Packed {
    /// `b`, `[depth, columns]`, packed.
    pub(in super::super) fn new(kernel: Kernel, b: Matrix) -> Self {
        Packed::within(Vec::new(), kernel, b)
    }

    /// `Wᵀ` of a matrix that is kept in fewer bytes, packed.
    pub(in super::super) fn of_transposed(kernel: Kernel, weight: &Compact) -> Self {
        let [columns, depth] = weight.dims();
        let per_panel = depth.div_ceil(SIDE) * 2;
        let mut tiles = vec![Tile::ZERO; columns.div_ceil(SIDE) * per_panel];
        for rows in weight.slabs() {
            let panels = rows.start / SIDE..rows.end.div_ceil(SIDE);
            let tiles = &mut tiles[panels.start * per_panel..panels.end * per_panel];
            weight.with_slab(rows.clone(), |values| fill(tiles, kernel, Matrix::new(values, rows.len(), depth).t()));
        }
        Packed { tiles, columns, depth }
    }

    /// A matrix that is kept in fewer bytes, packed as it is.
    pub(in super::super) fn of_compact(kernel: Kernel, weight: &Compact) -> Self {
        let [depth, columns] = weight.dims();
        let per_panel = depth.div_ceil(SIDE) * 2;
        let mut tiles = vec![Tile::ZERO; columns.div_ceil(SIDE) * per_panel];
        for rows in weight.slabs() {
            let steps = 2 * (rows.start / SIDE)..2 * rows.end.div_ceil(SIDE);
            weight.with_slab(rows.clone(), |values| {
                let part = Matrix::new(values, rows.len(), columns).t();
                tiles.par_chunks_mut(per_panel).enumerate().for_each(|(panel, tiles)| {
                    let columns = panel * SIDE..((panel + 1) * SIDE).min(columns);
                    pack(part, columns, 0..rows.len(), Form::Pairs, kernel.has_vectors(), &mut tiles[steps.clone()]);
                });
            });
        }
        Packed { tiles, columns, depth }
    }

    /// `b` packed in memory that is there, whose contents do not matter.
    pub(super) fn within(mut tiles: Vec<Tile>, kernel: Kernel, b: Matrix) -> Self {
        let (columns, depth) = (b.columns, b.rows);
        tiles.resize(columns.div_ceil(SIDE) * depth.div_ceil(SIDE) * 2, Tile::ZERO);
        fill(&mut tiles, kernel, b);
        Packed { tiles, columns, depth }
    }

    /// Its memory, to be used again.
    pub(super) fn into_tiles(self) -> Vec<Tile> {
        self.tiles
    }

    pub(super) fn tiles_per_panel(&self) -> usize {
        self.depth.div_ceil(SIDE) * 2
    }

    /// The tiles from a step of a panel on.
    pub(super) fn from(&self, panel: usize, step: usize) -> &[Tile] {
        &self.tiles[panel * self.tiles_per_panel() + step * 2..]
    }
}

/// Packs all of `b`, by all threads.
fn fill(tiles: &mut [Tile], kernel: Kernel, b: Matrix) {
    assert!(b.is_within_its_data() && kernel.is_available());
    let (columns, depth) = (b.columns, b.rows);
    let (panels, steps) = (columns.div_ceil(SIDE), depth.div_ceil(SIDE));
    if tiles.is_empty() {
        return;
    }
    // Some panels at once, so that rows of memory are read on; few enough that all threads have work.
    let group = match b.row_stride {
        1 => (64 / (2 * steps)).max(1),
        _ => panels.div_ceil(2 * rayon::current_num_threads()).min(8),
    };
    let run = |(index, tiles): (usize, &mut [Tile])| {
        let first = index * group * SIDE;
        let columns = first..(first + group * SIDE).min(columns);
        pack(b.t(), columns, 0..depth, Form::Pairs, kernel.has_vectors(), tiles);
    };
    match panels <= group {
        true => run((0, tiles)),
        false => tiles.par_chunks_mut(group * steps * 2).enumerate().for_each(run),
    }
}

/// Packs panels of 32 rows of `x` by a part of its columns, which are `k`: `[panel][step][2]` tiles.
pub(super) fn pack(x: Matrix, rows: Range<usize>, ks: Range<usize>, form: Form, vectors: bool, tiles: &mut [Tile]) {
    let steps = ks.len().div_ceil(SIDE);
    assert!(x.is_within_its_data() && rows.end <= x.rows && ks.end <= x.columns);
    assert_eq!(tiles.len(), rows.len().div_ceil(SIDE) * steps * 2);
    if vectors && (x.row_stride == 1 || x.column_stride == 1) {
        // SAFETY: kernels with vectors run where the processor has them; the operand is within its data.
        return unsafe { avx512::pack(x, rows, ks, form, tiles) };
    }
    for (index, tile) in tiles.iter_mut().enumerate() {
        let (panel, step, half) = (index / (2 * steps), index % (2 * steps) / 2, index % 2);
        let (first, k_first) = (rows.start + panel * SIDE + half * HALF, ks.start + step * SIDE);
        for (at, number) in tile.0.iter_mut().enumerate() {
            let (row, k) = match form {
                Form::Rows => (first + at / SIDE, k_first + at % SIDE),
                Form::Pairs => (first + at % SIDE / 2, k_first + at / SIDE * 2 + at % 2),
            };
            let is_inside = row < rows.end && k < ks.end;
            *number = if is_inside { round(x.data[row * x.row_stride + k * x.column_stride]) } else { 0 };
        }
    }
}

/// The nearest bf16, ties to even; as the processors' instructions do, numbers below the smallest normal one
/// count as 0.
pub(super) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = match x {
        _ if x.is_nan() => bits | 0x0040_0000,
        _ if x.abs() < f32::MIN_POSITIVE => bits & 0x8000_0000,
        _ => bits + 0x7fff + (bits >> 16 & 1),
    };
    (nearest >> 16) as u16
}

/// A bf16 as it is.
pub(super) fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// A matrix rounded to bf16, `[rows, columns]`, contiguous.
pub(in crate::ops) fn rounded(x: Matrix) -> Vec<f32> {
    assert!(x.is_within_its_data());
    fill_rows(x.rows, x.columns, |first, values| {
        for (row, values) in (first..).zip(values.chunks_exact_mut(x.columns)) {
            for (column, value) in values.iter_mut().enumerate() {
                *value = widen(round(x.data[row * x.row_stride + column * x.column_stride]));
            }
        }
    })
}
