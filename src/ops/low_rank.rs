//! A frozen linear with a trained low-rank update (LoRA, Hu et al. 2021), as one operation.
//!
//! Written as two more linears and a sum, the update would keep two more matrices `[tokens, d_out]` alive until the backward pass and add up
//! gradients of that size; here the update is added in place and only `[tokens, rank]` is kept.

use candle_core::Tensor;

use super::backward::{Backward, Gradient};
use super::dropout::{Dropout, Mask, dropout};
use super::kept;
use super::linear::{self, gradient_of_bias, gradient_of_input, gradient_of_weight, linear};
use super::matrix::{Matrix, MatrixMut, Threads, has_kernel, multiply, product, with_matrix};
use super::value::{Source, Value};
use super::weight::Weight;
use crate::error::Result;

/// The update `scale · dropout(x) Aᵀ Bᵀ` of a linear.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// A, `[rank, d_in]`.
    pub a: &'a Value,
    /// B, `[d_out, rank]`.
    pub b: &'a Value,
    /// What the update is multiplied with: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
    /// Which elements of the update's input are dropped (see [`dropout`]).
    pub dropout: Option<Mask>,
}

/// `y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ`: `x` is `[tokens, d_in]`, the result `[tokens, d_out]`.
pub fn low_rank_linear(x: &Value, weight: impl Into<Weight>, bias: Option<&Value>, update: &LowRank) -> Result<Value> {
    let weight = weight.into();
    let dropout = match &update.dropout {
        Some(mask) if mask.probability != 0.0 => Some(Dropout::new(mask, x.dim(1)?)?),
        _ => None,
    };
    let operands = [Some(x), Some(update.a), Some(update.b), bias];
    let tensors: Vec<&Tensor> = operands.into_iter().flatten().map(Value::tensor).collect();
    if !has_kernel(&tensors) || !weight.has_kernel() {
        return separate(x, &weight, bias, update);
    }
    let [rank, d_in] = [update.a.dim(0)?, x.dim(1)?];
    let [d_out, columns] = weight.dims()?;
    if update.a.dims() != [rank, d_in] || update.b.dims() != [d_out, rank] || columns != d_in {
        let ([x, a, b], weight) = ([x, update.a, update.b].map(Value::dims), [d_out, columns]);
        crate::bail!("low_rank_linear: input {x:?}, weight {weight:?}, A {a:?} and B {b:?} do not fit");
    }
    // The update is of contiguous rows, which dropout needs.
    let (rows, scale) = (x.tensor().contiguous()?, update.scale as f32);
    let mut y = with_matrix(&rows, |x| linear::forward(x, &weight, bias))?; // [tokens, d_out]
    let tokens = rows.dim(0)?;
    let inner = with_matrix(&rows, |x| {
        with_matrix(update.a.tensor(), |a| {
            Ok::<_, candle_core::Error>(with_dropped(dropout, x, |x| product(1.0, x, a.t())))
        })
    })?; // [tokens, rank]
    if !weight.is_unread() {
        with_matrix(update.b.tensor(), |b| {
            let target = MatrixMut::new(&mut y, tokens, d_out);
            multiply(target, true, scale, Matrix::new(&inner, tokens, rank), b.t(), Threads::All);
            Ok::<_, candle_core::Error>(())
        })?;
    }
    let y = Tensor::from_vec(y, (tokens, d_out), x.device())?;
    let sources = Sources {
        x: x.source(),
        weight: weight.source(),
        bias: bias.and_then(Value::source),
        a: update.a.source(),
        b: update.b.source(),
    };
    if !sources.any() {
        return Ok(Value::constant(y));
    }
    let kept = Kept {
        x: (sources.a.is_some() || sources.weight.is_some()).then_some(rows),
        inner: if sources.b.is_some() { Some(Tensor::from_vec(inner, (tokens, rank), x.device())?) } else { None },
        weight,
        a: update.a.tensor().clone(),
        b: update.b.tensor().clone(),
        scale,
        dropout,
    };
    kept::note(&kept.x.iter().chain(&kept.inner).collect::<Vec<_>>());
    Ok(Value::made(y, move |gradient, backward| kept.backward(&sources, &gradient, backward)))
}

/// The same as two more linears and a sum.
fn separate(x: &Value, weight: &Weight, bias: Option<&Value>, update: &LowRank) -> Result<Value> {
    let dropped = match &update.dropout {
        Some(mask) => dropout(x, mask)?,
        None => x.clone(),
    };
    let change = linear(&linear(&dropped, update.a, None)?, update.b, None)?; // [tokens, d_out]
    linear(x, weight, bias)?.add(&change.scale(update.scale)?)
}

/// Where the gradients go.
struct Sources {
    x: Option<Source>,
    weight: Option<Source>,
    bias: Option<Source>,
    a: Option<Source>,
    b: Option<Source>,
}

impl Sources {
    fn any(&self) -> bool {
        [&self.x, &self.weight, &self.bias, &self.a, &self.b].into_iter().any(Option::is_some)
    }
}

/// What the backward pass needs.
struct Kept {
    x: Option<Tensor>,
    /// `dropout(x) Aᵀ`, `[tokens, rank]`, for the gradient of B.
    inner: Option<Tensor>,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scale: f32,
    dropout: Option<Dropout>,
}

impl Kept {
    fn backward(self, sources: &Sources, gradient: &Gradient, backward: &mut Backward) -> Result<()> {
        let g = gradient.matrix()?;
        let (tokens, d_out) = (g.rows, g.columns);
        let (rank, d_in) = self.a.dims2()?;
        if let Some(bias) = &sources.bias {
            gradient_of_bias(bias, gradient, backward)?;
        }
        if let (Some(weight), Some(x)) = (&sources.weight, &self.x) {
            gradient_of_weight(weight, x, gradient, self.weight.products(), backward)?;
        }
        if let (Some(b), Some(inner)) = (&sources.b, &self.inner) {
            with_matrix(inner, |inner| {
                // SAFETY: a product sets every number or adds to it.
                unsafe {
                    backward.write(b, (d_out, rank), |db, accumulate| {
                        multiply(MatrixMut::new(db, d_out, rank), accumulate, self.scale, g.t(), inner, Threads::All);
                    })
                }
            })?;
        }
        let d_inner = with_matrix(&self.b, |b| Ok::<_, candle_core::Error>(product(self.scale, g, b)))?; // [tokens, rank]
        let d_inner = Matrix::new(&d_inner, tokens, rank);
        if let (Some(a), Some(x)) = (&sources.a, &self.x) {
            with_matrix(x, |x| {
                with_dropped(self.dropout, x, |x| {
                    // SAFETY: a product sets every number or adds to it.
                    unsafe {
                        backward.write(a, (rank, d_in), |da, accumulate| {
                            multiply(MatrixMut::new(da, rank, d_in), accumulate, 1.0, d_inner.t(), x, Threads::All);
                        })
                    }
                })
            })?;
        }
        let Some(x) = &sources.x else { return Ok(()) };
        gradient_of_input(x, &self.weight, gradient, d_in, backward)?;
        with_matrix(&self.a, |a| {
            backward.accumulate(x, (tokens, d_in), |dx| match &self.dropout {
                None => multiply(MatrixMut::new(dx, tokens, d_in), true, 1.0, d_inner, a, Threads::All),
                Some(dropout) => dropout.add(&product(1.0, d_inner, a), dx),
            })
        })
    }
}

/// Runs `read` on `dropout(x)`.
fn with_dropped<T>(dropout: Option<Dropout>, x: Matrix, read: impl FnOnce(Matrix) -> T) -> T {
    match dropout {
        Some(dropout) => read(Matrix::new(&dropout.apply(&x.data[..x.rows * x.columns]), x.rows, x.columns)),
        None => read(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, gradients_of, random};
    use crate::ops::{dropout::dropout_reference, linear::reference as linear_reference};
    use candle_core::{DType, Var};

    fn mask(probability: f32, seed: u64) -> Mask {
        Mask { probability, seed, first_row: 7 }
    }

    /// In candle's own operations.
    fn reference(t: &[Tensor], bias: Option<&Tensor>, dropout: Option<Mask>) -> Result<Tensor> {
        let dropped = dropout.map_or_else(|| Ok(t[0].clone()), |mask| dropout_reference(&t[0], &mask))?;
        let change = linear_reference(&linear_reference(&dropped, &t[1], None)?, &t[2], None)?;
        Ok((linear_reference(&t[0], &t[3], bias)? + change.affine(0.7, 0.0)?)?)
    }

    #[test]
    fn values_and_gradients_are_those_of_separate_linears() {
        for (tokens, d_in, d_out, rank) in
            [(1, 1, 1, 1), (7, 5, 3, 2), (130, 64, 200, 8), (1, 40, 24, 4), (70, 33, 17, 64)]
        {
            let operands =
                [[tokens, d_in], [rank, d_in], [d_out, rank], [d_out, d_in]].map(|shape| Operand::new(&shape));
            let with_bias = [&operands[..], &[Operand::new(&[d_out])]].concat();
            for dropout in [None, Some(mask(0.0, 1)), Some(mask(0.3, 5))] {
                let run = |t: &[Value]| {
                    let update = LowRank { a: &t[1], b: &t[2], scale: 0.7, dropout };
                    low_rank_linear(&t[0], &t[3], t.get(4), &update)
                };
                compare(&operands, run, |t| reference(t, None, dropout));
                compare(&with_bias, run, |t| reference(t, Some(&t[4]), dropout));
            }
        }
    }

    #[test]
    fn a_trained_weight_beside_the_update_gets_its_gradient() -> Result<()> {
        let weight = Var::from_tensor(&random(&[3, 4], 1))?;
        let [x, a, b] = [(&[5, 4], 2), (&[2, 4], 3), (&[3, 2], 4)].map(|(shape, seed)| Value::of(&random(shape, seed)));
        let update = LowRank { a: &a, b: &b, scale: 1.0, dropout: None };
        let y = low_rank_linear(&x, &Value::of(&weight), None, &update)?;
        let gradients = gradients_of(&y, &Tensor::ones((5, 3), DType::F32, x.device())?)?;
        assert!(gradients.get(&weight).is_some());
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_and_a_probability_of_one_are_errors() {
        let [x, weight, a, b] = [[5, 4], [3, 4], [2, 4], [3, 2]].map(|shape| Value::of(&random(&shape, 1)));
        let run =
            |a: &Value, b: &Value, dropout| low_rank_linear(&x, &weight, None, &LowRank { a, b, scale: 1.0, dropout });
        assert!(run(&a, &b, None).is_ok());
        assert!(run(&b, &a, None).is_err() && run(&a, &a, None).is_err() && run(&a, &b, Some(mask(1.0, 1))).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let weight = Value::of(&random(&[300, 200], 11));
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
