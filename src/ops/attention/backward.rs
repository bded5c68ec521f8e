//! The backward pass of attention.

use std::ops::Range;

use rayon::prelude::*;

use super::Query;
use super::kernel::{Operands, cap_slopes, multiply_by, probabilities_row, score, score_gradients_row};
use super::plan::{Block, Piece, groups_by_shared_keys};
use crate::ops::matrix::{Matrix, MatrixMut, Threads, multiply};
use crate::ops::simd::{add_to, dot};

/// Where gradients go; nowhere for what is frozen. Keys' and values' gradients are added to what is there.
#[derive(Clone, Copy)]
pub(super) struct Gradients<'a> {
    pub queries: Option<MatrixMut<'a>>,
    pub keys: Option<MatrixMut<'a>>,
    pub values: Option<MatrixMut<'a>>,
}

/// With fewer tasks than this, blocks that share keys are divided. Fixed, so that sums do not depend on the
/// number of threads.
const FEW_TASKS: usize = 16;

/// Adds the gradients of `queries`, `keys` and `values`, given the result, its gradient and the logarithms of
/// the forward pass.
///
/// Segments that share keys (a prompt's, by its answers) are worked on by one task for each head of keys, one
/// after another: so that nothing is added to the same number twice at once, and always in the same order.
/// Where that makes few tasks (one long document, a prefix that all segments see), the blocks are divided
/// into parts, each with sums of its own for keys and values, which are then added in order.
pub(super) fn backward(operands: Operands, result: Matrix, gradient: Matrix, log_sums: &[f32], gradients: Gradients) {
    let kv_heads = operands.shape.kv_heads;
    let log_sums = Matrix::new(log_sums, operands.shape.heads, operands.queries.rows);
    let groups = groups_by_shared_keys(operands.plan);
    let pass = Backward { operands, result, gradient, log_sums, gradients };
    let parts = (FEW_TASKS / (groups.len() * kv_heads).max(1)).max(1);
    let groups: Vec<Vec<Vec<Block>>> = (groups.iter())
        .map(|queries| divided(queries.iter().copied().flat_map(Query::blocks).collect(), &pass.operands, parts))
        .collect();
    (0..groups.len() * kv_heads).into_par_iter().for_each(|task| {
        let (parts, kv_head) = (&groups[task / kv_heads], task % kv_heads);
        let sums = pass.sums(kv_head);
        if let [blocks] = &parts[..] {
            return pass.blocks(blocks, kv_head, &sums);
        }
        let own: Vec<Own> = (parts.par_iter())
            .map(|blocks| {
                let mut own = Own::new(blocks, &pass);
                pass.blocks(blocks, kv_head, &own.sums());
                own
            })
            .collect();
        own.iter().for_each(|own| own.add_to(&sums));
    });
}

/// Blocks in at most `parts` runs of about the same work.
fn divided<'a>(blocks: Vec<Block<'a>>, operands: &Operands, parts: usize) -> Vec<Vec<Block<'a>>> {
    let work = |block: &Block| block.rows * block.keys(operands.shape).len();
    let share = blocks.iter().map(work).sum::<usize>().div_ceil(parts).max(1);
    let mut runs: Vec<Vec<Block>> = vec![Vec::new()];
    let (mut done, mut last) = (0, 0);
    for block in blocks {
        if done / share > last {
            last = done / share;
            runs.push(Vec::new());
        }
        done += work(&block);
        runs.last_mut().expect("a run is there from the start").push(block);
    }
    runs
}

/// Rows of keys or values that one task adds to, of one head.
struct Sum<'a> {
    /// `[rows, head_dim]`.
    matrix: MatrixMut<'a>,
    /// The row of all keys that its first one is.
    first: usize,
}

impl<'a> Sum<'a> {
    fn rows(&self, rows: &Range<usize>) -> MatrixMut<'a> {
        // SAFETY: a task has its sums to itself and takes one block of them at a time.
        unsafe { self.matrix.block(rows.start - self.first..rows.end - self.first, 0..self.matrix.columns) }
    }
}

/// Where one task adds.
struct Sums<'a> {
    keys: Option<Sum<'a>>,
    values: Option<Sum<'a>>,
}

/// The sums of one part of the blocks that share keys.
struct Own {
    /// The rows of keys that its blocks see, and those between them.
    rows: Range<usize>,
    columns: usize,
    keys: Option<Vec<f32>>,
    values: Option<Vec<f32>>,
}

impl Own {
    fn new(blocks: &[Block], pass: &Backward) -> Self {
        let shape = pass.operands.shape;
        let pieces: Vec<Piece> = blocks.iter().flat_map(|block| block.pieces(&block.keys(shape))).collect();
        let start = pieces.iter().map(|piece| piece.keys.start).min().unwrap_or(0);
        let end = pieces.iter().map(|piece| piece.keys.end).max().unwrap_or(0);
        let zeros = |of: Option<MatrixMut>| of.map(|_| vec![0.0; (end - start) * shape.head_dim]);
        let (keys, values) = (zeros(pass.gradients.keys), zeros(pass.gradients.values));
        Own { rows: start..end, columns: shape.head_dim, keys, values }
    }

    fn sums(&mut self) -> Sums<'_> {
        let (rows, columns, first) = (self.rows.len(), self.columns, self.rows.start);
        fn sum(numbers: &mut [f32], rows: usize, columns: usize, first: usize) -> Sum<'_> {
            Sum { matrix: MatrixMut::new(numbers, rows, columns), first }
        }
        Sums {
            keys: self.keys.as_mut().map(|numbers| sum(numbers, rows, columns, first)),
            values: self.values.as_mut().map(|numbers| sum(numbers, rows, columns, first)),
        }
    }

    fn add_to(&self, sums: &Sums) {
        for (own, sum) in [(&self.keys, &sums.keys), (&self.values, &sums.values)] {
            let (Some(own), Some(sum)) = (own, sum) else { continue };
            let target = sum.rows(&self.rows);
            for (row, own) in own.chunks_exact(self.columns).enumerate() {
                // SAFETY: the task has its sums to itself, and one row is borrowed at a time.
                add_to(unsafe { target.row(row) }, own);
            }
        }
    }
}

#[derive(Default)]
struct Scratch {
    probabilities: Vec<f32>,
    score_gradients: Vec<f32>,
    /// The soft cap's derivative at each score.
    slopes: Vec<f32>,
}

struct Backward<'a> {
    operands: Operands<'a>,
    result: Matrix<'a>,
    gradient: Matrix<'a>,
    log_sums: Matrix<'a>,
    gradients: Gradients<'a>,
}

impl<'a> Backward<'a> {
    /// The gradients of one head of keys and values themselves.
    fn sums(&self, kv_head: usize) -> Sums<'a> {
        let columns = self.operands.head(kv_head);
        // SAFETY: of these columns a task touches the rows of its own group of segments alone.
        let sum = |all: MatrixMut<'a>| Sum { matrix: unsafe { all.block(0..all.rows, columns.clone()) }, first: 0 };
        Sums { keys: self.gradients.keys.map(sum), values: self.gradients.values.map(sum) }
    }

    fn blocks(&self, blocks: &[Block], kv_head: usize, sums: &Sums) {
        let mut scratch = Scratch::default();
        for block in blocks {
            for head in self.operands.readers(kv_head) {
                self.block(block, head, kv_head, sums, &mut scratch);
            }
        }
    }

    fn block(&self, block: &Block, head: usize, kv_head: usize, sums: &Sums, scratch: &mut Scratch) {
        let Backward { operands, gradients, .. } = self;
        let (head_columns, kv_columns) = (operands.head(head), operands.head(kv_head));
        let visible = block.keys(operands.shape);
        let pieces = block.pieces(&visible);
        let (rows, width) = (block.rows, visible.len());
        scratch.probabilities.resize(rows * width, 0.0);
        scratch.score_gradients.resize(rows * width, 0.0);
        let queries = operands.queries.block(block.query_rows(), head_columns.clone()); // [rows, head_dim]
        let gradient = self.gradient.block(block.query_rows(), head_columns.clone()); // [rows, head_dim]
        score(operands, queries, &pieces, kv_head, &mut scratch.probabilities, width, &mut Vec::new());
        if let Some(cap) = operands.shape.soft_cap {
            scratch.slopes.resize(rows * width, 0.0);
            cap_slopes(&scratch.probabilities, cap as f32, &mut scratch.slopes);
        }
        for (row, scores) in scratch.probabilities.chunks_exact_mut(width).enumerate() {
            let seen = block.keys_of_row(operands.shape, row);
            let log_sum = self.log_sums.row(head)[block.query_rows().start + row];
            probabilities_row(scores, seen.start - visible.start, seen.end - visible.start, log_sum);
        }
        let probabilities = Matrix::new(&scratch.probabilities, rows, width);
        if let Some(d_values) = &sums.values {
            for piece in &pieces {
                let weights = probabilities.block(0..rows, piece.columns());
                multiply(d_values.rows(&piece.keys), true, 1.0, weights.t(), gradient, Threads::One);
            }
        }
        if gradients.queries.is_none() && sums.keys.is_none() {
            return;
        }
        self.score_gradients(block, head, kv_head, &pieces, probabilities, &mut scratch.score_gradients);
        if operands.shape.soft_cap.is_some() {
            multiply_by(&mut scratch.score_gradients, &scratch.slopes);
        }
        let score_gradients = Matrix::new(&scratch.score_gradients, rows, width);
        let factor = operands.shape.scale as f32;
        for (index, piece) in pieces.iter().enumerate() {
            let d_scores = score_gradients.block(0..rows, piece.columns()); // [rows, keys]
            if let Some(d_keys) = &sums.keys {
                multiply(d_keys.rows(&piece.keys), true, factor, d_scores.t(), queries, Threads::One);
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
            let target = unsafe { all.block(0..rows, piece.columns()) };
            multiply(target, false, 1.0, gradient, values.t(), Threads::One);
        }
        for (row, score_gradients) in score_gradients.chunks_exact_mut(width).enumerate() {
            let expected = dot(gradient.row(row), result.row(row));
            score_gradients_row(probabilities.row(row), expected, score_gradients);
        }
    }
}
