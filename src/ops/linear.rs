//! `y = x Wᵀ + b`, skipping what is frozen.

use candle_core::Tensor;

use super::backward::{Backward, Gradient};
use super::kept;
use super::matrix::{
    Matrix, MatrixMut, add_column_sums, has_kernel, with_contiguous_rows, with_elements, with_matrix, written,
};
use super::products::Products;
use super::value::{Source, Value, through_candle};
use super::weight::{Operand, Weight};
use crate::error::Result;

/// `y = x Wᵀ + b`: `x` is `[tokens, d_in]`, `weight` `[d_out, d_in]`, `bias` `[d_out]`, the result `[tokens, d_out]`.
///
/// No gradient is computed for an operand that is frozen, and `x` is kept only where the weight trains.
pub fn linear(x: &Value, weight: impl Into<Weight>, bias: Option<&Value>) -> Result<Value> {
    let weight = weight.into();
    let tensors: Vec<&Tensor> = [Some(x), bias].into_iter().flatten().map(Value::tensor).collect();
    if !has_kernel(&tensors) || !weight.has_kernel() {
        let weight = weight.to_value()?;
        let operands: Vec<&Value> = [Some(x), Some(&weight), bias].into_iter().flatten().collect();
        return through_candle(&operands, |t| reference(&t[0], &t[1], t.get(2)));
    }
    let x_rows = with_contiguous_rows(x.tensor())?;
    let y = with_matrix(&x_rows, |x| forward(x, &weight, bias))?;
    let shape = (x.dim(0)?, weight.dims()?[0]);
    let y = Tensor::from_vec(y, shape, x.device())?;
    let (of_x, of_weight) = (x.source(), weight.source());
    let of_bias = bias.and_then(Value::source);
    if of_x.is_none() && of_weight.is_none() && of_bias.is_none() {
        return Ok(Value::constant(y));
    }
    let x_kept = of_weight.is_some().then_some(x_rows);
    let width = x.dim(1)?;
    kept::note(&x_kept.iter().collect::<Vec<_>>());
    Ok(Value::made(y, move |gradient, backward| {
        if let Some(of_bias) = &of_bias {
            gradient_of_bias(of_bias, &gradient, backward)?;
        }
        if let (Some(of_weight), Some(x)) = (&of_weight, &x_kept) {
            gradient_of_weight(of_weight, x, &gradient, weight.products(), backward)?;
        }
        drop(x_kept);
        match &of_x {
            Some(of_x) => gradient_of_input(of_x, &weight, &gradient, width, backward),
            None => Ok(()),
        }
    }))
}

/// The same in candle's own operations.
pub fn reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?; // [tokens, d_out]
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

/// `x Wᵀ + b`, `[tokens, d_out]`; zeros where nothing reads it.
pub(super) fn forward(x: Matrix, weight: &Weight, bias: Option<&Value>) -> Result<Vec<f32>> {
    if weight.is_unread() {
        return Ok(vec![0.0; x.rows * weight.dims()?[0]]);
    }
    weight.with_operand(|operand| match bias {
        Some(bias) => with_elements(bias.tensor(), |bias| product(x, operand, Some(bias), weight.products())),
        None => product(x, operand, None, weight.products()),
    })
}

fn product(x: Matrix, weight: Operand, bias: Option<&[f32]>, products: &Products) -> Result<Vec<f32>> {
    let (tokens, [d_out, columns]) = (x.rows, weight.dims());
    if columns != x.columns || bias.is_some_and(|bias| bias.len() != d_out) {
        let (d_in, bias) = (x.columns, bias.map(|bias| bias.len()));
        crate::bail!("linear: input [{tokens}, {d_in}], weight [{d_out}, {columns}] and bias {bias:?} do not fit");
    }
    // SAFETY: the rows are set to the bias before the product is added, or the product sets every element.
    Ok(unsafe {
        written(tokens * d_out, |values| {
            if let Some(bias) = bias {
                super::matrix::update_rows(values, d_out, |_, row| row.copy_from_slice(bias));
            }
            let target = MatrixMut::new(values, tokens, d_out);
            products.times_transposed(target, bias.is_some(), 1.0, x, weight);
        })
    })
}

/// Adds `Σ g` over rows, `[d_out]`.
pub(super) fn gradient_of_bias(bias: &Source, gradient: &Gradient, backward: &mut Backward) -> Result<()> {
    let gradient = gradient.matrix()?;
    backward.accumulate(bias, gradient.columns, |sums| add_column_sums(gradient, sums))
}

/// Adds `g W`, `[tokens, d_in]`.
pub(super) fn gradient_of_input(
    x: &Source,
    weight: &Weight,
    gradient: &Gradient,
    width: usize,
    backward: &mut Backward,
) -> Result<()> {
    let gradient = gradient.matrix()?;
    let rows = gradient.rows;
    weight.with_operand(|operand| {
        // SAFETY: a product sets every number or adds to it.
        unsafe {
            backward.write(x, (rows, width), |dx, accumulate| {
                let target = MatrixMut::new(dx, rows, width);
                weight.products().times(target, accumulate, 1.0, gradient, operand);
            })
        }
    })
}

/// Adds `gᵀ x`, `[d_out, d_in]`.
pub(super) fn gradient_of_weight(
    weight: &Source,
    x: &Tensor,
    gradient: &Gradient,
    products: &Products,
    backward: &mut Backward,
) -> Result<()> {
    let gradient = gradient.matrix()?;
    with_matrix(x, |x| {
        let (rows, columns) = (gradient.columns, x.columns);
        // SAFETY: a product sets every number or adds to it.
        unsafe {
            backward.write(weight, (rows, columns), |dw, accumulate| {
                products.of_gradient(MatrixMut::new(dw, rows, columns), accumulate, 1.0, gradient, x);
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, gradients_of, random};
    use candle_core::Var;

    fn with_bias(t: &[Value]) -> Result<Value> {
        linear(&t[0], &t[1], t.get(2))
    }

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for (tokens, d_in, d_out) in [(1, 1, 1), (7, 5, 3), (65, 33, 17), (130, 64, 200), (1, 40, 24), (3, 8, 300)] {
            let operands = [Operand::new(&[tokens, d_in]), Operand::new(&[d_out, d_in]), Operand::new(&[d_out])];
            compare(&operands, with_bias, |t| reference(&t[0], &t[1], Some(&t[2])));
            compare(&operands[..2], with_bias, |t| reference(&t[0], &t[1], None));
        }
    }

    #[test]
    fn a_column_slice_and_a_transposed_weight_are_read_with_their_strides() {
        let weight = random(&[6, 5], 2).t().unwrap();
        compare(
            &[Operand::new(&[9, 20])],
            |t| linear(&t[0].narrow_columns(4, 6)?, &Value::of(&weight), None),
            |t| reference(&t[0].narrow(1, 4, 6)?, &weight.to_dtype(t[0].dtype())?, None),
        );
    }

    #[test]
    fn a_trainable_bias_on_a_frozen_weight_gets_its_gradient_and_the_weight_none() -> Result<()> {
        let (x, weight) = (random(&[5, 4], 1), random(&[3, 4], 2));
        let bias = Var::from_tensor(&random(&[3], 3))?;
        let y = linear(&Value::of(&x), &Value::of(&weight), Some(&Value::of(&bias)))?;
        let gradients = gradients_of(&y, &Tensor::ones((5, 3), candle_core::DType::F32, x.device())?)?;
        assert_eq!(gradients.get(&bias).expect("a gradient").values()?, [5.0; 3]);
        assert!(gradients.get(&weight).is_none() && gradients.get(&x).is_none());
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_an_error() {
        let of = |shape: &[usize]| Value::of(&random(shape, 1));
        assert!(linear(&of(&[5, 4]), &of(&[3, 5]), None).is_err());
        assert!(linear(&of(&[5, 4]), &of(&[3, 4]), Some(&of(&[4]))).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for (tokens, d_in, d_out) in [(300, 257, 515), (1, 600, 2000), (5, 600, 2000), (2000, 130, 8), (2000, 8, 130)] {
            let operands = [Operand::new(&[tokens, d_in]), Operand::new(&[d_out, d_in]), Operand::new(&[d_out])];
            assert_same_bits_on_any_number_of_threads(&operands, with_bias);
        }
    }
}
