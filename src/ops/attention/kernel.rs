//! The forward and backward pass of attention, block by block.

use std::ops::Range;

use rayon::prelude::*;

use super::plan::{BLOCK_ROWS, Block, Piece, groups_by_shared_keys};
use super::{AttentionPlan, AttentionShape, Query};
use crate::ops::matrix::{Matrix, MatrixMut, Threads, multiply, written};
use crate::ops::simd::{LANES, dot, dot_of, exp, maximum_of, scale, vectorised};

/// Blocks of fewer rows than this are computed by dot products: a general product would spend its time on packing.
const FEWEST_ROWS_FOR_A_PRODUCT: usize = 8;

/// The least number of multiplications that is worth waking other threads for.
const PARALLEL_WORK: usize = 1 << 16;

/// The operands of one call.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub queries: Matrix<'a>,
    pub keys: Matrix<'a>,
    pub values: Matrix<'a>,
    pub shape: &'a AttentionShape,
    pub plan: &'a AttentionPlan,
}

/// Where gradients go; nowhere for what is frozen. Keys' and values' gradients are added to what is there.
#[derive(Clone, Copy)]
pub(super) struct Gradients<'a> {
    pub queries: Option<MatrixMut<'a>>,
    pub keys: Option<MatrixMut<'a>>,
    pub values: Option<MatrixMut<'a>>,
}

impl<'a> Operands<'a> {
    fn head(&self, head: usize) -> Range<usize> {
        head * self.shape.head_dim..(head + 1) * self.shape.head_dim
    }

    /// The query heads that read a head of keys and values.
    fn readers(&self, kv_head: usize) -> Range<usize> {
        let group = self.shape.heads / self.shape.kv_heads;
        kv_head * group..(kv_head + 1) * group
    }
}

/// The result, `[tokens, heads * head_dim]`, and if asked for, each row's `log Σ exp(score)`, `[heads, tokens]`.
pub(super) fn forward(operands: Operands, keep_log_sums: bool) -> (Vec<f32>, Option<Vec<f32>>) {
    let (tokens, shape) = (operands.queries.rows, operands.shape);
    let width = shape.heads * shape.head_dim;
    let mut log_sums = keep_log_sums.then(|| vec![0.0; shape.heads * tokens]);
    let log_sum_matrix = log_sums.as_mut().map(|log_sums| MatrixMut::new(log_sums, shape.heads, tokens));
    let blocks: Vec<Block> = operands.plan.queries.iter().flat_map(Query::blocks).collect();
    let run = |scores: &mut Vec<f32>, target: &MatrixMut, task: usize| {
        let (block, kv_head) = (&blocks[task / shape.kv_heads], task % shape.kv_heads);
        let visible = block.keys(shape);
        let pieces = block.pieces(&visible);
        scores.resize(block.rows * visible.len(), 0.0);
        for head in operands.readers(kv_head) {
            // SAFETY: each task has its own (rows, heads) of the result and of the logarithms.
            let (target, log_sums) = unsafe {
                let log_sums = log_sum_matrix.map(|all| all.block(head..head + 1, block.query_rows()).row(0));
                (target.block(block.query_rows(), operands.head(head)), log_sums)
            };
            forward_block(&operands, block, &visible, &pieces, (head, kv_head), scores, target, log_sums);
        }
    };
    let tasks = blocks.len() * shape.kv_heads;
    let work: usize = blocks.iter().map(|block| block.rows * block.keys(shape).len()).sum::<usize>() * width;
    // SAFETY: a checked plan covers every row, and the tasks every head of it.
    let result = unsafe {
        written(tokens * width, |values| {
            let target = MatrixMut::new(values, tokens, width);
            if work < PARALLEL_WORK {
                let mut scores = Vec::new();
                (0..tasks).for_each(|task| run(&mut scores, &target, task));
            } else {
                (0..tasks).into_par_iter().for_each_init(Vec::new, |scores, task| run(scores, &target, task));
            }
        })
    };
    (result, log_sums)
}

#[allow(clippy::too_many_arguments)]
fn forward_block(
    operands: &Operands,
    block: &Block,
    visible: &Range<usize>,
    pieces: &[Piece],
    (head, kv_head): (usize, usize),
    scores: &mut [f32],
    target: MatrixMut,
    mut log_sums: Option<&mut [f32]>,
) {
    let queries = operands.queries.block(block.query_rows(), operands.head(head)); // [rows, head_dim]
    let small = block.rows < FEWEST_ROWS_FOR_A_PRODUCT;
    score(operands, queries, pieces, kv_head, scores, visible.len(), small);
    let mut inverse_sums = [0.0; BLOCK_ROWS];
    for (row, inverse_sum) in inverse_sums.iter_mut().enumerate().take(block.rows) {
        let seen = block.keys_of_row(operands.shape, row);
        let (start, end) = (seen.start - visible.start, seen.end - visible.start);
        let (log_sum, inverse) = softmax_row(&mut scores[row * visible.len()..][..visible.len()], start, end);
        if let Some(log_sums) = &mut log_sums {
            log_sums[row] = log_sum;
        }
        *inverse_sum = inverse;
    }
    let weights = Matrix::new(scores, block.rows, visible.len());
    for (index, piece) in pieces.iter().enumerate() {
        let values = operands.values.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
        let columns = piece.column..piece.column + piece.keys.len();
        if small {
            for row in 0..block.rows {
                // SAFETY: the target is this task's own, and one row is borrowed at a time.
                let output = unsafe { target.row(row) };
                if index == 0 {
                    output.fill(0.0);
                }
                weighted_sum(&weights.row(row)[columns.clone()], values.data, values.row_stride, output);
            }
        } else {
            multiply(target, index > 0, 1.0, weights.block(0..block.rows, columns), values, Threads::One);
        }
    }
    for (row, &inverse_sum) in inverse_sums.iter().enumerate().take(block.rows) {
        // SAFETY: as above.
        scale(unsafe { target.row(row) }, inverse_sum);
    }
}

/// `scale q kᵀ` of all pieces, `[rows, width]`.
fn score(
    operands: &Operands,
    queries: Matrix,
    pieces: &[Piece],
    kv_head: usize,
    scores: &mut [f32],
    width: usize,
    small: bool,
) {
    let factor = operands.shape.scale as f32;
    let scores = MatrixMut::new(scores, queries.rows, width);
    for piece in pieces {
        let keys = operands.keys.block(piece.keys.clone(), operands.head(kv_head)); // [keys, head_dim]
        // SAFETY: the pieces lie in different columns, and one is written at a time.
        let target = unsafe { scores.block(0..queries.rows, piece.column..piece.column + keys.rows) };
        if small {
            for row in 0..queries.rows {
                // SAFETY: as above.
                dot_products(queries.row(row), keys.data, keys.row_stride, factor, unsafe { target.row(row) });
            }
        } else {
            multiply(target, false, factor, queries, keys.t(), Threads::One);
        }
    }
}

vectorised! {
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
    fn probabilities_row<'a>(scores: &'a mut [f32], start: usize, end: usize, log_sum: f32) {
        scores[..start].fill(0.0);
        scores[end..].fill(0.0);
        for score in &mut scores[start..end] {
            *score = exp(*score - log_sum);
        }
    }

    /// The gradient of the scores, `p (dp - Σ p dp)`, in the place of `dp`.
    fn score_gradients_row<'a>(probabilities: &'a [f32], expected: f32, gradients: &'a mut [f32]) {
        for (gradient, &probability) in gradients.iter_mut().zip(probabilities) {
            *gradient = probability * (*gradient - expected);
        }
    }

    /// `factor q · k` for every key.
    fn dot_products<'a>(query: &'a [f32], keys: &'a [f32], stride: usize, factor: f32, products: &'a mut [f32]) {
        for (index, product) in products.iter_mut().enumerate() {
            *product = factor * dot_of(query, &keys[index * stride..][..query.len()]);
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

/// Adds the gradients of `queries`, `keys` and `values`, given the result, its gradient and the logarithms of the forward pass.
///
/// Segments that share keys (a prompt's, by its answers) are worked on by one task for each head of keys, one after another: so
/// that nothing is added to the same number twice at once, and always in the same order.
pub(super) fn backward(operands: Operands, result: Matrix, gradient: Matrix, log_sums: &[f32], gradients: Gradients) {
    let shape = operands.shape;
    let log_sums = Matrix::new(log_sums, shape.heads, operands.queries.rows);
    let groups = groups_by_shared_keys(operands.plan);
    let pass = Backward { operands, result, gradient, log_sums, gradients };
    (0..groups.len() * shape.kv_heads).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        let (group, kv_head) = (&groups[task / shape.kv_heads], task % shape.kv_heads);
        for block in group.iter().copied().flat_map(Query::blocks) {
            for head in operands.readers(kv_head) {
                pass.block(&block, head, kv_head, scratch);
            }
        }
    });
}

#[derive(Default)]
struct Scratch {
    probabilities: Vec<f32>,
    score_gradients: Vec<f32>,
}

struct Backward<'a> {
    operands: Operands<'a>,
    result: Matrix<'a>,
    gradient: Matrix<'a>,
    log_sums: Matrix<'a>,
    gradients: Gradients<'a>,
}

impl Backward<'_> {
    fn block(&self, block: &Block, head: usize, kv_head: usize, scratch: &mut Scratch) {
        let Backward { operands, gradients, .. } = self;
        let (head_columns, kv_columns) = (operands.head(head), operands.head(kv_head));
        let visible = block.keys(operands.shape);
        let pieces = block.pieces(&visible);
        let (rows, width) = (block.rows, visible.len());
        scratch.probabilities.resize(rows * width, 0.0);
        scratch.score_gradients.resize(rows * width, 0.0);
        let queries = operands.queries.block(block.query_rows(), head_columns.clone()); // [rows, head_dim]
        let gradient = self.gradient.block(block.query_rows(), head_columns.clone()); // [rows, head_dim]
        score(operands, queries, &pieces, kv_head, &mut scratch.probabilities, width, false);
        for (row, scores) in scratch.probabilities.chunks_exact_mut(width).enumerate() {
            let seen = block.keys_of_row(operands.shape, row);
            let log_sum = self.log_sums.row(head)[block.query_rows().start + row];
            probabilities_row(scores, seen.start - visible.start, seen.end - visible.start, log_sum);
        }
        let probabilities = Matrix::new(&scratch.probabilities, rows, width);
        let part = |matrix: Matrix<'_>, piece: &Piece| -> Range<usize> {
            debug_assert!(piece.column + piece.keys.len() <= matrix.columns);
            piece.column..piece.column + piece.keys.len()
        };
        if let Some(d_values) = gradients.values {
            for piece in &pieces {
                let weights = probabilities.block(0..rows, part(probabilities, piece));
                // SAFETY: these rows and columns belong to this task's group of segments and head.
                let target = unsafe { d_values.block(piece.keys.clone(), kv_columns.clone()) };
                multiply(target, true, 1.0, weights.t(), gradient, Threads::One);
            }
        }
        if gradients.queries.is_none() && gradients.keys.is_none() {
            return;
        }
        self.score_gradients(block, head, kv_head, &pieces, probabilities, &mut scratch.score_gradients);
        let score_gradients = Matrix::new(&scratch.score_gradients, rows, width);
        let factor = operands.shape.scale as f32;
        for (index, piece) in pieces.iter().enumerate() {
            let d_scores = score_gradients.block(0..rows, part(score_gradients, piece)); // [rows, keys]
            if let Some(d_keys) = gradients.keys {
                // SAFETY: as for the values.
                let target = unsafe { d_keys.block(piece.keys.clone(), kv_columns.clone()) };
                multiply(target, true, factor, d_scores.t(), queries, Threads::One);
            }
            if let Some(d_queries) = gradients.queries {
                let keys = operands.keys.block(piece.keys.clone(), kv_columns.clone());
                // SAFETY: each block of query rows and each head is visited once, by one task.
                let target = unsafe { d_queries.block(block.query_rows(), head_columns.clone()) };
                multiply(target, index > 0, factor, d_scores, keys, Threads::One);
            }
        }
    }

    /// `p (dp - Σ p dp)` with `dp = dO vᵀ`, where `Σ p dp = dO · O`.
    fn score_gradients(
        &self,
        block: &Block,
        head: usize,
        kv_head: usize,
        pieces: &[Piece],
        probabilities: Matrix,
        score_gradients: &mut [f32],
    ) {
        let operands = &self.operands;
        let (rows, columns) = (block.query_rows(), operands.head(head));
        let gradient = self.gradient.block(rows.clone(), columns.clone());
        let result = self.result.block(rows, columns);
        let (rows, width) = (probabilities.rows, probabilities.columns);
        let all = MatrixMut::new(score_gradients, rows, width);
        for piece in pieces {
            let values = operands.values.block(piece.keys.clone(), operands.head(kv_head));
            // SAFETY: the pieces lie in different columns, and one is written at a time.
            let target = unsafe { all.block(0..rows, piece.column..piece.column + values.rows) };
            multiply(target, false, 1.0, gradient, values.t(), Threads::One);
        }
        for (row, score_gradients) in score_gradients.chunks_exact_mut(width).enumerate() {
            let expected = dot(gradient.row(row), result.row(row));
            score_gradients_row(probabilities.row(row), expected, score_gradients);
        }
    }
}
