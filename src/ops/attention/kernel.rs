//! The forward pass of attention, block by block.

use std::ops::Range;

use rayon::prelude::*;

use super::plan::{BLOCK_ROWS, Block, Piece};
use super::stored::Stored;
use super::{AttentionPlan, AttentionShape, Query};
use crate::ops::dot_products;
use crate::ops::matrix::{Matrix, MatrixMut, Threads, multiply, written};
use crate::ops::simd::{LANES, exp, maximum_of, scale, tanh, vectorised};

/// Blocks of fewer rows than this are computed row by row: a general product would spend its time on packing.
const FEWEST_ROWS_FOR_A_PRODUCT: usize = 8;

/// The least number of multiplications that is worth waking other threads for.
const PARALLEL_WORK: usize = 1 << 16;

/// Rows of keys or values that are widened at a time where one query reads them: 16 KiB of a head of 64, which stay
/// in the first cache. A multiple of the values that are summed at a time.
const WIDENED_ROWS: usize = 64;

/// A general product reads all keys of a segment and a head at once: in which order it sums depends on how many
/// there are. Widened, they take the memory of the scores of `head_dim` rows.
const ALL_ROWS: usize = usize::MAX;

/// The operands of one call, with keys and values of this element type.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a, N = f32> {
    pub queries: Matrix<'a>,
    pub keys: Matrix<'a, N>,
    pub values: Matrix<'a, N>,
    pub shape: &'a AttentionShape,
    pub plan: &'a AttentionPlan,
}

impl<N> Operands<'_, N> {
    pub(super) fn head(&self, head: usize) -> Range<usize> {
        head * self.shape.head_dim..(head + 1) * self.shape.head_dim
    }

    /// The query heads that read a head of keys and values.
    pub(super) fn readers(&self, kv_head: usize) -> Range<usize> {
        let group = self.shape.heads / self.shape.kv_heads;
        kv_head * group..(kv_head + 1) * group
    }
}

/// The result, `[tokens, heads * head_dim]`, and if asked for, each row's `log Σ exp(score)`, `[heads, tokens]`.
pub(super) fn forward<N: Stored>(operands: Operands<N>, keep_log_sums: bool) -> (Vec<f32>, Option<Vec<f32>>) {
    let (tokens, shape) = (operands.queries.rows, operands.shape);
    let width = shape.heads * shape.head_dim;
    let mut log_sums = keep_log_sums.then(|| vec![0.0; shape.heads * tokens]);
    let log_sums_target = log_sums.as_mut().map(|log_sums| MatrixMut::new(log_sums, shape.heads, tokens));
    let blocks: Vec<Block> = operands.plan.queries.iter().flat_map(Query::blocks).collect();
    let tasks = blocks.len() * shape.kv_heads;
    let work: usize = blocks.iter().map(|block| block.rows * block.keys(shape).len()).sum::<usize>() * width;
    // SAFETY: a checked plan covers every row, and the tasks every head of it.
    let result = unsafe {
        written(tokens * width, |values| {
            let result = MatrixMut::new(values, tokens, width);
            let pass = Forward { operands, result, log_sums: log_sums_target };
            let run = |scratch: &mut Scratch, task: usize| {
                let (block, kv_head) = (&blocks[task / shape.kv_heads], task % shape.kv_heads);
                if block.rows < FEWEST_ROWS_FOR_A_PRODUCT {
                    (0..block.rows).for_each(|row| pass.row(block, row, kv_head, scratch));
                } else {
                    operands.readers(kv_head).for_each(|head| pass.block(block, head, kv_head, scratch));
                }
            };
            if work < PARALLEL_WORK {
                let mut scratch = Scratch::default();
                (0..tasks).for_each(|task| run(&mut scratch, task));
            } else {
                (0..tasks).into_par_iter().for_each_init(Scratch::default, run);
            }
        })
    };
    (result, log_sums)
}

/// What a task works with.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    /// Keys or values of one head that are kept in another type.
    widened: Vec<f32>,
    /// For each of the heads that read one head of keys and values.
    inverse_sums: Vec<f32>,
}

struct Forward<'a, N> {
    operands: Operands<'a, N>,
    result: MatrixMut<'a>,
    log_sums: Option<MatrixMut<'a>>,
}

impl<N: Stored> Forward<'_, N> {
    /// All rows of a block, one head.
    fn block(&self, block: &Block, head: usize, kv_head: usize, scratch: &mut Scratch) {
        let Scratch { scores, widened, .. } = scratch;
        let operands = &self.operands;
        let visible = block.keys(operands.shape);
        let pieces = block.pieces(&visible);
        let (rows, width) = (block.rows, visible.len());
        scores.resize(rows * width, 0.0);
        let queries = operands.queries.block(block.query_rows(), operands.head(head)); // [rows, head_dim]
        score(operands, queries, &pieces, kv_head, scores, width, widened);
        let mut inverse_sums = [0.0; BLOCK_ROWS];
        for (row, inverse_sum) in inverse_sums.iter_mut().enumerate().take(rows) {
            let seen = block.keys_of_row(operands.shape, row);
            let (start, end) = (seen.start - visible.start, seen.end - visible.start);
            let log_sum;
            (log_sum, *inverse_sum) = softmax_row(&mut scores[row * width..][..width], start, end);
            self.keep_log_sum(head, block.query_rows().start + row, log_sum);
        }
        let weights = Matrix::new(scores, rows, width);
        // SAFETY: each task has its own rows and heads of the result.
        let target = unsafe { self.result.block(block.query_rows(), operands.head(head)) };
        for (index, piece) in pieces.iter().enumerate() {
            let values = operands.values.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
            let weights = weights.block(0..rows, piece.columns());
            N::read(values, ALL_ROWS, widened, |_, values| {
                multiply(target, index > 0, 1.0, weights, values, Threads::One);
            });
        }
        for (row, &inverse_sum) in inverse_sums.iter().enumerate().take(rows) {
            // SAFETY: as above, and one row is borrowed at a time.
            scale(unsafe { target.row(row) }, inverse_sum);
        }
    }

    /// One row, all heads that read one head of keys and values.
    fn row(&self, block: &Block, row: usize, kv_head: usize, scratch: &mut Scratch) {
        let Scratch { scores, widened, inverse_sums } = scratch;
        let operands = &self.operands;
        let visible = block.keys_of_row(operands.shape, row);
        let pieces = block.pieces(&visible);
        let readers = operands.readers(kv_head);
        let (group, width, head_dim) = (readers.len(), visible.len(), operands.shape.head_dim);
        scores.resize(group * width, 0.0);
        let query_row = block.query_rows().start + row;
        let columns = operands.head(readers.start).start..operands.head(readers.end - 1).end;
        let queries = Matrix::new(&operands.queries.row(query_row)[columns.clone()], group, head_dim);
        let scores_target = MatrixMut::new(scores, group, width);
        for piece in &pieces {
            let keys = operands.keys.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
            N::read(keys, WIDENED_ROWS, widened, |first, keys| {
                // SAFETY: the pieces lie in different columns, and one is written at a time.
                let target = unsafe { scores_target.block(0..group, piece.columns_of(first, keys.rows)) };
                dot_products::multiply(target, false, operands.shape.scale as f32, queries, keys, Threads::One);
            });
        }
        if let Some(cap) = operands.shape.soft_cap {
            cap_scores(scores, cap as f32);
        }
        inverse_sums.clear();
        for (head, scores) in readers.zip(scores.chunks_exact_mut(width)) {
            let (log_sum, inverse_sum) = softmax_row(scores, 0, width);
            self.keep_log_sum(head, query_row, log_sum);
            inverse_sums.push(inverse_sum);
        }
        // SAFETY: each task has its own rows and heads of the result.
        let outputs = unsafe { self.result.block(query_row..query_row + 1, columns).row(0) };
        outputs.fill(0.0);
        for piece in &pieces {
            let values = operands.values.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
            N::read(values, WIDENED_ROWS, widened, |first, values| {
                let columns = piece.columns_of(first, values.rows);
                for (weights, output) in scores.chunks_exact(width).zip(outputs.chunks_exact_mut(head_dim)) {
                    weighted_sum(&weights[columns.clone()], values.data, values.row_stride, output);
                }
            });
        }
        for (output, &inverse_sum) in outputs.chunks_exact_mut(head_dim).zip(&*inverse_sums) {
            scale(output, inverse_sum);
        }
    }

    fn keep_log_sum(&self, head: usize, row: usize, log_sum: f32) {
        if let Some(log_sums) = &self.log_sums {
            // SAFETY: each task has its own rows and heads.
            unsafe { log_sums.block(head..head + 1, row..row + 1).row(0)[0] = log_sum };
        }
    }
}

/// `scale q kᵀ` of all pieces, with the soft cap, `[rows, width]`.
pub(super) fn score<N: Stored>(
    operands: &Operands<N>,
    queries: Matrix,
    pieces: &[Piece],
    kv_head: usize,
    values: &mut [f32],
    width: usize,
    widened: &mut Vec<f32>,
) {
    let scores = MatrixMut::new(values, queries.rows, width);
    for piece in pieces {
        let keys = operands.keys.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
        // SAFETY: the pieces lie in different columns, and one is written at a time.
        let target = unsafe { scores.block(0..queries.rows, piece.columns()) };
        N::read(keys, ALL_ROWS, widened, |_, keys| {
            multiply(target, false, operands.shape.scale as f32, queries, keys.t(), Threads::One);
        });
    }
    if let Some(cap) = operands.shape.soft_cap {
        cap_scores(values, cap as f32);
    }
}

vectorised! {
    /// `cap tanh(score / cap)` in place of every score.
    fn cap_scores<'a>(scores: &'a mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for score in scores {
            *score = cap * tanh(*score * inverse);
        }
    }

    /// The derivative of capped scores by the scores, `1 - (score / cap)²`.
    pub(super) fn cap_slopes<'a>(scores: &'a [f32], cap: f32, slopes: &'a mut [f32]) {
        let inverse = 1.0 / cap;
        for (slope, &score) in slopes.iter_mut().zip(scores) {
            let ratio = score * inverse;
            *slope = 1.0 - ratio * ratio;
        }
    }

    /// Multiplies by the derivative.
    pub(super) fn multiply_by<'a>(gradients: &'a mut [f32], slopes: &'a [f32]) {
        for (gradient, &slope) in gradients.iter_mut().zip(slopes) {
            *gradient *= slope;
        }
    }

    /// Replaces the scores `start..end` by `exp(score - max)` and the others, which are not seen, by 0.
    /// Gives `log Σ exp(score)` and `1 / Σ exp(score - max)`.
    fn softmax_row<'a>(scores: &'a mut [f32], start: usize, end: usize) -> (f32, f32) {
        scores[..start].fill(0.0);
        scores[end..].fill(0.0);
        let seen = &mut scores[start..end];
        let maximum = maximum_of(seen);
        let mut sums = [0.0; LANES];
        for chunk in seen.chunks_mut(LANES) {
            for (sum, score) in sums.iter_mut().zip(chunk) {
                *score = exp(*score - maximum);
                *sum += *score;
            }
        }
        let sum: f32 = sums.iter().sum();
        (maximum + sum.ln(), 1.0 / sum)
    }

    /// Replaces the scores `start..end` by the probabilities `exp(score - log_sum)` and the others by 0.
    pub(super) fn probabilities_row<'a>(scores: &'a mut [f32], start: usize, end: usize, log_sum: f32) {
        scores[..start].fill(0.0);
        scores[end..].fill(0.0);
        for score in &mut scores[start..end] {
            *score = exp(*score - log_sum);
        }
    }

    /// The gradient of the scores, `p (dp - Σ p dp)`, in the place of `dp`.
    pub(super) fn score_gradients_row<'a>(probabilities: &'a [f32], expected: f32, gradients: &'a mut [f32]) {
        for (gradient, &probability) in gradients.iter_mut().zip(probabilities) {
            *gradient = probability * (*gradient - expected);
        }
    }

    /// `output += Σ weight value`, four values at a time.
    fn weighted_sum<'a>(weights: &'a [f32], values: &'a [f32], stride: usize, output: &'a mut [f32]) {
        let width = output.len();
        let value = |index: usize| &values[index * stride..][..width];
        let fours = weights.len() / 4 * 4;
        for first in (0..fours).step_by(4) {
            let w = &weights[first..first + 4];
            let (a, b, c, d) = (value(first), value(first + 1), value(first + 2), value(first + 3));
            for index in 0..width {
                let sum = a[index].mul_add(w[0], output[index]);
                let sum = b[index].mul_add(w[1], sum);
                let sum = c[index].mul_add(w[2], sum);
                output[index] = d[index].mul_add(w[3], sum);
            }
        }
        for (index, &weight) in weights.iter().enumerate().skip(fours) {
            for (output, &value) in output.iter_mut().zip(value(index)) {
                *output = value.mul_add(weight, *output);
            }
        }
    }
}
