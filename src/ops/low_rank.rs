//! A frozen linear with a trained low-rank update (LoRA, Hu et al. 2021), as one operation.
//!
//! Written as two more linears and a sum, the update would keep two more matrices `[tokens, d_out]` alive until the backward pass and add up
//! gradients of that size; here the update is added in place and only `[tokens, rank]` is kept.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor, bail};

use super::dropout::{Dropout, Mask, dropout};
use super::linear::{self, linear};
use super::matrix::{
    Matrix, MatrixMut, Threads, has_kernel, multiply, product, with_contiguous_rows, with_elements, with_matrix,
};
use crate::error::Result;

/// The update `scale · dropout(x) Aᵀ Bᵀ` of a linear.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// A, `[rank, d_in]`.
    pub a: &'a Tensor,
    /// B, `[d_out, rank]`.
    pub b: &'a Tensor,
    /// What the update is multiplied with: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
    /// Which elements of the update's input are dropped (see [`dropout`]).
    pub dropout: Option<Mask>,
}

/// `y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ`: `x` is `[tokens, d_in]`, the result `[tokens, d_out]`.
///
/// Fast where `weight` and `bias` are frozen, as they are under LoRA; right in any case.
pub fn low_rank_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, update: &LowRank) -> Result<Tensor> {
    let frozen = !weight.track_op() && bias.is_none_or(|bias| !bias.track_op());
    let on_cpu = has_kernel(&[x, weight, update.a, update.b]) && bias.is_none_or(|bias| has_kernel(&[bias]));
    let dropout = match &update.dropout {
        Some(mask) if mask.probability != 0.0 => Some(Dropout::new(mask, x.dim(1)?)?),
        _ => None,
    };
    if !frozen || !on_cpu {
        return reference(x, weight, bias, update);
    }
    let operation = LowRankLinear {
        weight: with_contiguous_rows(weight)?,
        bias: bias.map(|bias| bias.contiguous()).transpose()?,
        scale: update.scale as f32,
        dropout,
        inner: OnceLock::new(),
    };
    Ok(x.contiguous()?.apply_op3(&with_contiguous_rows(update.a)?, &with_contiguous_rows(update.b)?, operation)?)
}

/// The same from the operations it is made of.
pub fn reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, update: &LowRank) -> Result<Tensor> {
    let dropped = match &update.dropout {
        Some(mask) => dropout(x, mask)?,
        None => x.clone(),
    };
    let change = linear(&linear(&dropped, update.a, None)?, update.b, None)?; // [tokens, d_out]
    Ok((linear(x, weight, bias)? + change.affine(update.scale, 0.0)?)?)
}

struct LowRankLinear {
    weight: Tensor,
    bias: Option<Tensor>,
    scale: f32,
    dropout: Option<Dropout>,
    /// `dropout(x) Aᵀ`, `[tokens, rank]`, kept for the gradient of B.
    inner: OnceLock<Vec<f32>>,
}

impl LowRankLinear {
    /// Runs `read` on `dropout(x)`.
    fn with_dropped<T>(&self, x: Matrix, read: impl FnOnce(Matrix) -> T) -> T {
        match &self.dropout {
            Some(dropout) => read(Matrix::new(&dropout.apply(&x.data[..x.rows * x.columns]), x.rows, x.columns)),
            None => read(x),
        }
    }

    /// The gradients of x, A and B, where `tracked`.
    fn backward(
        &self,
        x: Matrix,
        a: Matrix,
        b: Matrix,
        gradient: Matrix,
        tracked: [bool; 3],
    ) -> candle_core::Result<[Option<Vec<f32>>; 3]> {
        let Some(inner) = self.inner.get() else {
            bail!("low_rank_linear: backward without forward");
        };
        let (tokens, d_in, rank) = (x.rows, x.columns, a.rows);
        let inner = Matrix::new(inner, tokens, rank);
        let d_inner = product(self.scale, gradient, b); // [tokens, rank]
        let d_inner = Matrix::new(&d_inner, tokens, rank);
        let db = tracked[2].then(|| product(self.scale, gradient.t(), inner)); // [d_out, rank]
        let da = tracked[1].then(|| self.with_dropped(x, |x| product(1.0, d_inner.t(), x))); // [rank, d_in]
        let dx = match tracked[0] {
            false => None,
            true => {
                let mut dx = with_matrix(&self.weight, |weight| Ok(product(1.0, gradient, weight)))?; // [tokens, d_in]
                match &self.dropout {
                    None => multiply(MatrixMut::new(&mut dx, tokens, d_in), true, 1.0, d_inner, a, Threads::All),
                    Some(dropout) => dropout.add(&product(1.0, d_inner, a), &mut dx),
                }
                Some(dx)
            }
        };
        Ok([dx, da, db])
    }
}

impl CustomOp3 for LowRankLinear {
    fn name(&self) -> &'static str {
        "linear with a low-rank update"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = Matrix::from_storage(x, x_layout)?;
        let (a, b) = (Matrix::from_storage(a, a_layout)?, Matrix::from_storage(b, b_layout)?);
        let (d_out, d_in) = self.weight.dims2()?;
        if (a.columns, b.rows) != (d_in, d_out) || a.rows != b.columns || x.columns != d_in {
            let [x, a, b] = [x, a, b].map(|matrix| (matrix.rows, matrix.columns));
            bail!("low_rank_linear: input {x:?}, weight ({d_out}, {d_in}), A {a:?} and B {b:?} do not fit");
        }
        let mut y = with_matrix(&self.weight, |weight| match &self.bias {
            Some(bias) => with_elements(bias, |bias| linear::forward(x, weight, Some(bias))),
            None => linear::forward(x, weight, None),
        })?; // [tokens, d_out]
        let inner = self.with_dropped(x, |x| product(1.0, x, a.t())); // [tokens, rank]
        let target = MatrixMut::new(&mut y, x.rows, d_out);
        multiply(target, true, self.scale, Matrix::new(&inner, x.rows, a.rows), b.t(), Threads::All);
        // An operation is run forward once; were it run again, the values would be the same.
        let _ = self.inner.set(inner);
        Ok((CpuStorage::F32(y), (x.rows, d_out).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let tracked = [x, a, b].map(Tensor::track_op);
        let [dx, da, db] = with_matrix(x, |x_matrix| {
            with_matrix(a, |a| {
                with_matrix(b, |b| with_matrix(gradient, |gradient| self.backward(x_matrix, a, b, gradient, tracked)))
            })
        })?;
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok((tensor(dx, x)?, tensor(da, a)?, tensor(db, b)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, random};
    use candle_core::Var;

    fn mask(probability: f32, seed: u64) -> Mask {
        Mask { probability, seed, first_row: 7 }
    }

    #[test]
    fn values_and_gradients_are_those_of_separate_linears() {
        for (tokens, d_in, d_out, rank) in
            [(1, 1, 1, 1), (7, 5, 3, 2), (130, 64, 200, 8), (1, 40, 24, 4), (70, 33, 17, 64)]
        {
            let (weight, bias) = (random(&[d_out, d_in], 11), random(&[d_out], 12));
            let operands = [Operand::new(&[tokens, d_in]), Operand::new(&[rank, d_in]), Operand::new(&[d_out, rank])];
            for dropout in [None, Some(mask(0.0, 1)), Some(mask(0.3, 5))] {
                for bias in [None, Some(&bias)] {
                    let run = |t: &[Tensor], fused: bool| {
                        let update = LowRank { a: &t[1], b: &t[2], scale: 0.7, dropout };
                        let weight = weight.to_dtype(t[0].dtype())?;
                        let bias = bias.map(|bias| bias.to_dtype(t[0].dtype())).transpose()?;
                        let run = if fused { low_rank_linear } else { reference };
                        run(&t[0], &weight, bias.as_ref(), &update)
                    };
                    compare(&operands, |t| run(t, true), |t| run(t, false));
                }
            }
        }
    }

    #[test]
    fn a_trained_weight_beside_the_update_gets_its_gradient() -> Result<()> {
        let weight = Var::from_tensor(&random(&[3, 4], 1))?;
        let (x, a, b) = (random(&[5, 4], 2), random(&[2, 4], 3), random(&[3, 2], 4));
        let update = LowRank { a: &a, b: &b, scale: 1.0, dropout: None };
        let gradients = low_rank_linear(&x, &weight, None, &update)?.sum_all()?.backward()?;
        assert!(gradients.get(&weight).is_some());
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_and_a_probability_of_one_are_errors() {
        let (x, weight, a, b) = (random(&[5, 4], 1), random(&[3, 4], 2), random(&[2, 4], 3), random(&[3, 2], 4));
        let run = |a: &Tensor, b: &Tensor, dropout| {
            low_rank_linear(&x, &weight, None, &LowRank { a, b, scale: 1.0, dropout })
        };
        assert!(run(&a, &b, None).is_ok());
        assert!(run(&b, &a, None).is_err() && run(&a, &a, None).is_err() && run(&a, &b, Some(mask(1.0, 1))).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let weight = random(&[300, 200], 11);
        let operands = [Operand::new(&[400, 200]), Operand::new(&[8, 200]), Operand::new(&[300, 8])];
        assert_same_bits_on_any_number_of_threads(&operands, |t| {
            low_rank_linear(
                &t[0],
                &weight,
                None,
                &LowRank { a: &t[1], b: &t[2], scale: 0.5, dropout: Some(mask(0.1, 3)) },
            )
        });
    }
}
