//! `y = x Wᵀ + b`, skipping what is frozen.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, bail};

use super::matrix::{
    Matrix, MatrixMut, Threads, column_sums, elements, has_kernel, multiply, product, with_contiguous_rows,
    with_matrix, written,
};
use crate::error::Result;

/// `y = x Wᵀ + b`: `x` is `[tokens, d_in]`, `weight` `[d_out, d_in]`, `bias` `[d_out]`, the result `[tokens, d_out]`.
///
/// No gradient is computed for an operand that is frozen (`!track_op()`).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) if has_kernel(&[x, weight, bias]) => {
            Ok(with_contiguous_rows(x)?.apply_op3(weight, &bias.contiguous()?, Linear)?)
        }
        None if has_kernel(&[x, weight]) => Ok(with_contiguous_rows(x)?.apply_op2(weight, Linear)?),
        _ => reference(x, weight, bias),
    }
}

/// The same in candle's own operations.
pub fn reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?; // [tokens, d_out]
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight) = (Matrix::from_storage(x, x_layout)?, Matrix::from_storage(weight, weight_layout)?);
        Ok((CpuStorage::F32(forward(x, weight, None)?), (x.rows, weight.rows).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((gradient_of_input(x, weight, gradient)?, gradient_of_weight(x, weight, gradient)?))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear with bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let bias = elements(bias, bias_layout)?;
        let (x, weight) = (Matrix::from_storage(x, x_layout)?, Matrix::from_storage(weight, weight_layout)?);
        Ok((CpuStorage::F32(forward(x, weight, Some(bias))?), (x.rows, weight.rows).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let bias_gradient = match bias.track_op() {
            true => {
                let sums = with_matrix(gradient, |gradient| Ok(column_sums(gradient)))?;
                Some(Tensor::from_vec(sums, bias.shape(), bias.device())?)
            }
            false => None,
        };
        Ok((gradient_of_input(x, weight, gradient)?, gradient_of_weight(x, weight, gradient)?, bias_gradient))
    }
}

/// `x Wᵀ + b`, `[tokens, d_out]`.
pub(super) fn forward(x: Matrix, weight: Matrix, bias: Option<&[f32]>) -> candle_core::Result<Vec<f32>> {
    let (tokens, d_in, d_out) = (x.rows, x.columns, weight.rows);
    if weight.columns != d_in || bias.is_some_and(|bias| bias.len() != d_out) {
        let bias = bias.map(|bias| bias.len());
        bail!("linear: input [{tokens}, {d_in}], weight [{d_out}, {}] and bias {bias:?} do not fit", weight.columns);
    }
    // SAFETY: the rows are set to the bias before the product is added, or the product sets every element.
    Ok(unsafe {
        written(tokens * d_out, |values| {
            if let Some(bias) = bias {
                super::matrix::update_rows(values, d_out, |_, row| row.copy_from_slice(bias));
            }
            let target = MatrixMut::new(values, tokens, d_out);
            multiply(target, bias.is_some(), 1.0, x, weight.t(), Threads::All);
        })
    })
}

/// `g W`, `[tokens, d_in]`.
fn gradient_of_input(x: &Tensor, weight: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
    if !x.track_op() {
        return Ok(None);
    }
    let values = with_matrix(gradient, |gradient| with_matrix(weight, |weight| Ok(product(1.0, gradient, weight))))?;
    Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
}

/// `gᵀ x`, `[d_out, d_in]`.
fn gradient_of_weight(x: &Tensor, weight: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
    if !weight.track_op() {
        return Ok(None);
    }
    let values = with_matrix(gradient, |gradient| with_matrix(x, |x| Ok(product(1.0, gradient.t(), x))))?;
    Ok(Some(Tensor::from_vec(values, weight.shape(), weight.device())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, random};
    use candle_core::Var;

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for (tokens, d_in, d_out) in [(1, 1, 1), (7, 5, 3), (65, 33, 17), (130, 64, 200), (1, 40, 24), (3, 8, 300)] {
            let operands = [Operand::new(&[tokens, d_in]), Operand::new(&[d_out, d_in]), Operand::new(&[d_out])];
            compare(&operands, |t| linear(&t[0], &t[1], Some(&t[2])), |t| reference(&t[0], &t[1], Some(&t[2])));
            compare(&operands[..2], |t| linear(&t[0], &t[1], None), |t| reference(&t[0], &t[1], None));
        }
    }

    #[test]
    fn a_column_slice_and_a_transposed_weight_are_read_with_their_strides() {
        let operands = [Operand::new(&[9, 20]), Operand::new(&[6, 5])];
        let views = |t: &[Tensor]| Ok::<_, candle_core::Error>((t[0].narrow(1, 4, 6)?, t[1].t()?));
        compare(
            &operands,
            |t| views(t).map_err(Into::into).and_then(|(x, w)| linear(&x, &w, None)),
            |t| views(t).map_err(Into::into).and_then(|(x, w)| reference(&x, &w, None)),
        );
    }

    #[test]
    fn a_trainable_bias_on_a_frozen_weight_gets_its_gradient_and_the_weight_none() -> Result<()> {
        let (x, weight) = (random(&[5, 4], 1), random(&[3, 4], 2));
        let bias = Var::from_tensor(&random(&[3], 3))?;
        let gradients = linear(&x, &weight, Some(&bias))?.sum_all()?.backward()?;
        assert_eq!(gradients.get(&bias).expect("a gradient").to_vec1::<f32>()?, [5.0; 3]);
        assert!(gradients.get(&weight).is_none() && gradients.get(&x).is_none());
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_an_error() {
        assert!(linear(&random(&[5, 4], 1), &random(&[3, 5], 2), None).is_err());
        assert!(linear(&random(&[5, 4], 1), &random(&[3, 4], 2), Some(&random(&[4], 3))).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for (tokens, d_in, d_out) in [(300, 257, 515), (1, 600, 2000), (5, 600, 2000), (2000, 130, 8), (2000, 8, 130)] {
            let operands = [Operand::new(&[tokens, d_in]), Operand::new(&[d_out, d_in]), Operand::new(&[d_out])];
            assert_same_bits_on_any_number_of_threads(&operands, |t| linear(&t[0], &t[1], Some(&t[2])));
        }
    }
}
