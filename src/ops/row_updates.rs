//! Low-rank updates of single rows: a batch in which rows run with LoRA adapters of different users.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor, bail};
use rayon::prelude::*;

use super::Span;
use super::matrix::{Matrix, MatrixMut, Threads, has_kernel, multiply, with_matrix};
use super::simd::{dot, vectorised};
use crate::error::Result;

/// The update `scale · x Aᵀ Bᵀ` of some rows.
#[derive(Debug, Clone, Copy)]
pub struct RowUpdate<'a> {
    /// The rows.
    pub rows: Span,
    /// A, `[rank, d_in]`.
    pub a: &'a Tensor,
    /// B, `[d_out, rank]`.
    pub b: &'a Tensor,
    /// What the update is multiplied with.
    pub scale: f64,
}

/// Rows of an update that are worked on by one task.
const ROWS_PER_TASK: usize = 32;

/// Adds to `y[rows]` the update of `x[rows]`, for each of the updates, in place: `x` is `[tokens, d_in]`, `y` `[tokens, d_out]`. Neither may be part of
/// a graph.
///
/// # Errors
/// Where shapes do not fit, or rows of two updates overlap.
pub fn add_low_rank_to_rows(y: &Tensor, x: &Tensor, updates: &[RowUpdate]) -> Result<()> {
    if updates.is_empty() {
        return Ok(());
    }
    let mut spans: Vec<Span> = updates.iter().map(|update| update.rows).collect();
    spans.sort_by_key(|span| span.start);
    if let Some(pair) = spans.windows(2).find(|pair| pair[0].start + pair[0].len > pair[1].start) {
        // More than one update of the same rows: one after the other.
        let shared = |update: &&RowUpdate| update.rows == pair[0] || update.rows == pair[1];
        if pair[0] != pair[1] {
            crate::bail!("updates of rows {:?} and {:?} overlap", pair[0], pair[1]);
        }
        let (alone, mut stacked): (Vec<RowUpdate>, Vec<RowUpdate>) = updates.iter().partition(|update| !shared(update));
        let last = stacked.pop();
        add_low_rank_to_rows(y, x, &alone.into_iter().chain(stacked).collect::<Vec<_>>())?;
        return add_low_rank_to_rows(y, x, &last.into_iter().collect::<Vec<_>>());
    }
    if !has_kernel(&[y, x]) || updates.iter().any(|update| !has_kernel(&[update.a, update.b])) {
        return reference(y, x, updates);
    }
    Ok(y.inplace_op2(&x.contiguous()?, &AddLowRank { updates })?)
}

/// The same in candle's own operations.
pub fn reference(y: &Tensor, x: &Tensor, updates: &[RowUpdate]) -> Result<()> {
    for RowUpdate { rows: Span { start, len }, a, b, scale } in updates {
        let change = x.narrow(0, *start, *len)?.matmul(&a.t()?)?.matmul(&b.t()?)?.affine(*scale, 0.0)?;
        y.slice_set(&(y.narrow(0, *start, *len)? + change)?.contiguous()?, 0, *start)?;
    }
    Ok(())
}

struct AddLowRank<'a> {
    updates: &'a [RowUpdate<'a>],
}

vectorised! {
    /// `y += scale B inner`, where `B` is `[d_out, rank]`.
    fn add_product<'a>(b: &'a [f32], inner: &'a [f32], scale: f32, y: &'a mut [f32]) {
        for (y, row) in y.iter_mut().zip(b.chunks_exact(inner.len())) {
            let mut sum = 0.0;
            for (b, inner) in row.iter().zip(inner) {
                sum += b * inner;
            }
            *y += scale * sum;
        }
    }
}

/// One task's rows: `y += scale (x Aᵀ) Bᵀ`.
fn add(a: Matrix, b: Matrix, scale: f32, x: Matrix, y: MatrixMut) {
    let rank = a.rows;
    let mut inner = vec![0.0; x.rows * rank]; // [rows, rank]
    if x.rows < 8 && b.row_stride == rank {
        for row in 0..x.rows {
            let inner = &mut inner[row * rank..][..rank];
            inner.iter_mut().enumerate().for_each(|(index, inner)| *inner = dot(a.row(index), x.row(row)));
            // SAFETY: one row at a time, of a block that is this task's alone.
            add_product(&b.data[..b.rows * rank], inner, scale, unsafe { y.row(row) });
        }
        return;
    }
    multiply(MatrixMut::new(&mut inner, x.rows, rank), false, 1.0, x, a.t(), Threads::One);
    multiply(y, true, scale, Matrix::new(&inner, x.rows, rank), b.t(), Threads::One);
}

impl InplaceOp2 for AddLowRank<'_> {
    fn name(&self) -> &'static str {
        "add low-rank updates to rows"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        let x = Matrix::from_storage(x, x_layout)?;
        let (rows, d_out) = y_layout.shape().dims2()?;
        let (Some((start, end)), CpuStorage::F32(y)) = (y_layout.contiguous_offsets(), y) else {
            bail!("add low-rank updates to rows: expected a contiguous matrix of f32");
        };
        let y = MatrixMut::new(&mut y[start..end], rows, d_out);
        let mut tasks = Vec::new();
        for (index, RowUpdate { rows: span, a, b, .. }) in self.updates.iter().enumerate() {
            let (rank, b_shape) = (a.dim(0)?, b.dims());
            if span.start + span.len > rows.min(x.rows) || a.dims() != [rank, x.columns] || b_shape != [d_out, rank] {
                bail!(
                    "add low-rank updates to rows: A {:?} and B {b_shape:?} for rows {span:?} of [{}, {}] and [{rows}, {d_out}] do not fit",
                    a.dims(),
                    x.rows,
                    x.columns
                );
            }
            let starts = (span.start..span.start + span.len).step_by(ROWS_PER_TASK);
            tasks.extend(starts.map(|first| (index, first..(first + ROWS_PER_TASK).min(span.start + span.len))));
        }
        tasks.into_par_iter().try_for_each(|(index, rows)| {
            let RowUpdate { a, b, scale, .. } = self.updates[index];
            with_matrix(a, |a| {
                with_matrix(b, |b| {
                    // SAFETY: rows of different updates do not overlap, and an update's tasks have rows of their own.
                    let target = unsafe { y.block(rows.clone(), 0..d_out) };
                    add(a, b, scale as f32, x.rows(rows.clone()), target);
                    Ok(())
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    fn span(start: usize, len: usize) -> Span {
        Span { start, len }
    }

    #[test]
    fn every_update_changes_its_rows_alone_as_the_reference_does() -> Result<()> {
        for (d_in, d_out) in [(5, 7), (64, 200), (130, 33)] {
            let x = random(&[90, d_in], 1);
            let tensors: Vec<(Tensor, Tensor)> = (0..4)
                .map(|seed| (random(&[2 + seed, d_in], 10 + seed as u64), random(&[d_out, 2 + seed], 20 + seed as u64)))
                .collect();
            let rows = [span(0, 1), span(3, 70), span(80, 3), span(80, 3)];
            let updates: Vec<RowUpdate> =
                (rows.into_iter().zip(&tensors)).map(|(rows, (a, b))| RowUpdate { rows, a, b, scale: 0.5 }).collect();
            let (y, expected) = (random(&[90, d_out], 2), random(&[90, d_out], 2));
            add_low_rank_to_rows(&y, &x, &updates)?;
            reference(&expected, &x, &updates)?;
            assert_close(&format!("{d_in} to {d_out}"), &y, &expected, 1e-5);
            let (untouched, as_before) = (y.narrow(0, 1, 2)?, random(&[90, d_out], 2).narrow(0, 1, 2)?);
            assert_eq!(untouched.to_vec2::<f32>()?, as_before.to_vec2::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn updates_that_overlap_or_do_not_fit_are_errors() {
        let (x, y, a, b) = (random(&[9, 4], 1), random(&[9, 6], 2), random(&[2, 4], 3), random(&[6, 2], 4));
        let update = |start, len| RowUpdate { rows: span(start, len), a: &a, b: &b, scale: 1.0 };
        assert!(add_low_rank_to_rows(&y, &x, &[update(0, 3), update(2, 2)]).is_err());
        assert!(add_low_rank_to_rows(&y, &x, &[update(8, 2)]).is_err());
        assert!(add_low_rank_to_rows(&y, &x, &[RowUpdate { a: &b, ..update(0, 1) }]).is_err());
        assert!(add_low_rank_to_rows(&y, &x, &[update(0, 3), update(3, 2)]).is_ok());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (x, a, b) = (random(&[300, 64], 1), random(&[8, 64], 3), random(&[200, 8], 4));
        let run = |threads: usize| -> Vec<f32> {
            let y = random(&[300, 200], 2);
            let updates = [span(0, 1), span(1, 299)].map(|rows| RowUpdate { rows, a: &a, b: &b, scale: 0.7 });
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| add_low_rank_to_rows(&y, &x, &updates)).unwrap();
            y.flatten_all().unwrap().to_vec1().unwrap()
        };
        assert!(run(1) == run(2) && run(1) == run(3));
    }
}
