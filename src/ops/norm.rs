//! Root-mean-square and layer normalisation.

use candle_core::{D, Tensor};

use super::backward::Backward;
use super::matrix::{
    CHUNK, Matrix, fill_rows, has_kernel, sum_over_rows, with_contiguous_rows, with_elements, with_matrix,
};
use super::simd::{add_to, sum_of, sum_of_pairs, vectorised};
use super::value::{Source, Value, through_candle};
use crate::error::Result;

/// `y = x / sqrt(mean(x²) + epsilon) * weight` over the last dimension (Zhang & Sennrich 2019).
/// `x` is `[tokens, d]`, `weight` `[d]`.
pub fn rms_norm(x: &Value, weight: &Value, epsilon: f64) -> Result<Value> {
    if !has_kernel(&[x.tensor(), weight.tensor()]) {
        return through_candle(&[x, weight], |t| rms_norm_reference(&t[0], &t[1], epsilon));
    }
    check_width(x, weight)?;
    let (rows, epsilon) = (with_contiguous_rows(x.tensor())?, epsilon as f32);
    let y = with_matrix(&rows, |x| {
        with_elements(weight.tensor(), |weight| {
            Ok::<_, candle_core::Error>(by_row(x, |x, y, _| rms_norm_row(x, weight, epsilon, y)))
        })
    })?;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    let (of_x, of_weight) = (x.source(), weight.source());
    if of_x.is_none() && of_weight.is_none() {
        return Ok(Value::constant(y));
    }
    let weight = weight.tensor().clone();
    Ok(Value::made_keeping(y, &[&rows.clone()], move |gradient, backward| {
        let gradient = gradient.matrix()?;
        with_matrix(&rows, |x| {
            if let Some(source) = &of_weight {
                let width = x.columns;
                backward.accumulate(source, width, |dw| {
                    let sums = sums_over_tokens(x, gradient, width, |x, gradient, dw| {
                        rms_norm_row_weight(x, epsilon, gradient, dw);
                    });
                    add_to(dw, &sums);
                })?;
            }
            let Some(source) = &of_x else { return Ok(()) };
            with_elements(&weight, |weight| {
                add_gradient_of_input(source, x, gradient, backward, |x, gradient, dx| {
                    rms_norm_row_backward(x, weight, epsilon, gradient, dx);
                })
            })
        })
    }))
}

/// `y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias` over the last dimension (Ba et al. 2016).
/// `x` is `[tokens, d]`, `weight` and `bias` `[d]`.
pub fn layer_norm(x: &Value, weight: &Value, bias: &Value, epsilon: f64) -> Result<Value> {
    if !has_kernel(&[x.tensor(), weight.tensor(), bias.tensor()]) {
        return through_candle(&[x, weight, bias], |t| layer_norm_reference(&t[0], &t[1], &t[2], epsilon));
    }
    check_width(x, weight)?;
    check_width(x, bias)?;
    let (rows, epsilon) = (with_contiguous_rows(x.tensor())?, epsilon as f32);
    let y = with_matrix(&rows, |x| {
        with_elements(weight.tensor(), |weight| {
            with_elements(bias.tensor(), |bias| {
                Ok::<_, candle_core::Error>(by_row(x, |x, y, _| layer_norm_row(x, weight, bias, epsilon, y)))
            })
        })
    })?;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    let (of_x, of_weight, of_bias) = (x.source(), weight.source(), bias.source());
    if of_x.is_none() && of_weight.is_none() && of_bias.is_none() {
        return Ok(Value::constant(y));
    }
    let weight = weight.tensor().clone();
    Ok(Value::made_keeping(y, &[&rows.clone()], move |gradient, backward| {
        let gradient = gradient.matrix()?;
        with_matrix(&rows, |x| {
            if of_weight.is_some() || of_bias.is_some() {
                let width = x.columns;
                let sums = sums_over_tokens(x, gradient, 2 * width, |x, gradient, sums| {
                    let (dw, db) = sums.split_at_mut(width);
                    layer_norm_row_weight(x, epsilon, gradient, dw, db);
                });
                let (dw, db) = sums.split_at(width);
                for (source, part) in [(&of_weight, dw), (&of_bias, db)] {
                    if let Some(source) = source {
                        backward.accumulate(source, width, |sum| add_to(sum, part))?;
                    }
                }
            }
            let Some(source) = &of_x else { return Ok(()) };
            with_elements(&weight, |weight| {
                add_gradient_of_input(source, x, gradient, backward, |x, gradient, dx| {
                    layer_norm_row_backward(x, weight, epsilon, gradient, dx);
                })
            })
        })
    }))
}

/// [`rms_norm`] in candle's own operations.
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?; // [tokens, 1]
    Ok(x.broadcast_div(&(mean_square + epsilon)?.sqrt()?)?.broadcast_mul(weight)?)
}

/// [`layer_norm`] in candle's own operations.
pub fn layer_norm_reference(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?; // [tokens, d]
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?; // [tokens, 1]
    let normalised = centred.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
    Ok(normalised.broadcast_mul(weight)?.broadcast_add(bias)?)
}

vectorised! {
    fn rms_norm_row<'a>(x: &'a [f32], weight: &'a [f32], epsilon: f32, y: &'a mut [f32]) {
        let inverse = inverse_root_mean_square(x, epsilon);
        for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * weight;
        }
    }

    /// With `n = x / rms`: `dx = (g w - n mean(g w n)) / rms`.
    fn rms_norm_row_backward<'a>(x: &'a [f32], weight: &'a [f32], epsilon: f32, gradient: &'a [f32], dx: &'a mut [f32]) {
        let inverse = inverse_root_mean_square(x, epsilon);
        for ((dx, &gradient), &weight) in dx.iter_mut().zip(gradient).zip(weight) {
            *dx = gradient * weight;
        }
        let mean = sum_of_pairs(dx, x, |product, x| product * x) / x.len() as f32 * inverse * inverse;
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - mean * x);
        }
    }

    /// `dw += g n`.
    fn rms_norm_row_weight<'a>(x: &'a [f32], epsilon: f32, gradient: &'a [f32], dw: &'a mut [f32]) {
        let inverse = inverse_root_mean_square(x, epsilon);
        for ((dw, &gradient), &x) in dw.iter_mut().zip(gradient).zip(x) {
            *dw += gradient * x * inverse;
        }
    }

    fn layer_norm_row<'a>(x: &'a [f32], weight: &'a [f32], bias: &'a [f32], epsilon: f32, y: &'a mut [f32]) {
        let (mean, inverse) = mean_and_inverse_deviation(x, epsilon);
        for (((y, &x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
            *y = ((x - mean) * inverse).mul_add(weight, bias);
        }
    }

    /// With `n = (x - mean) / deviation`: `dx = (g w - mean(g w) - n mean(g w n)) / deviation`.
    fn layer_norm_row_backward<'a>(x: &'a [f32], weight: &'a [f32], epsilon: f32, gradient: &'a [f32], dx: &'a mut [f32]) {
        let (mean, inverse) = mean_and_inverse_deviation(x, epsilon);
        for ((dx, &gradient), &weight) in dx.iter_mut().zip(gradient).zip(weight) {
            *dx = gradient * weight;
        }
        let count = x.len() as f32;
        let first = sum_of(dx, |product| product) / count;
        let second = sum_of_pairs(dx, x, |product, x| product * (x - mean)) / count * inverse * inverse;
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - first - second * (x - mean));
        }
    }

    /// `dw += g n` and `db += g`.
    fn layer_norm_row_weight<'a>(x: &'a [f32], epsilon: f32, gradient: &'a [f32], dw: &'a mut [f32], db: &'a mut [f32]) {
        let (mean, inverse) = mean_and_inverse_deviation(x, epsilon);
        for (((dw, db), &gradient), &x) in dw.iter_mut().zip(db).zip(gradient).zip(x) {
            *dw += gradient * (x - mean) * inverse;
            *db += gradient;
        }
    }
}

#[inline(always)]
fn inverse_root_mean_square(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (sum_of(x, |x| x * x) / x.len() as f32 + epsilon).sqrt()
}

#[inline(always)]
fn mean_and_inverse_deviation(x: &[f32], epsilon: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = sum_of(x, |x| x) / count;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

fn check_width(x: &Value, parameter: &Value) -> Result<()> {
    let (rows, columns) = x.dims2()?;
    if parameter.dims() != [columns] {
        crate::bail!("norm: input [{rows}, {columns}] and parameter {:?} do not fit", parameter.dims());
    }
    Ok(())
}

/// A matrix of the shape of `x`, made row by row by `write(row of x, row of y, index of the row)`.
fn by_row(x: Matrix, write: impl Fn(&[f32], &mut [f32], usize) + Sync) -> Vec<f32> {
    fill_rows(x.rows, x.columns, |first, chunk| {
        for (offset, y) in chunk.chunks_exact_mut(x.columns).enumerate() {
            write(x.row(first + offset), y, first + offset);
        }
    })
}

/// Adds the gradient of `x`, made row by row by `row(row of x, row of the gradient, row of dx)`, to what is there.
fn add_gradient_of_input(
    source: &Source,
    x: Matrix,
    gradient: Matrix,
    backward: &mut Backward,
    row: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Result<()> {
    let columns = x.columns;
    let rows_per_chunk = (CHUNK / columns.max(1)).max(1);
    let write = |dx: &mut [f32], accumulate: bool| {
        let chunk = |index: usize, chunk: &mut [f32]| {
            let mut made = vec![0.0; if accumulate { columns } else { 0 }];
            for (number, dx) in (index * rows_per_chunk..).zip(chunk.chunks_exact_mut(columns)) {
                match accumulate {
                    false => row(x.row(number), gradient.row(number), dx),
                    true => {
                        row(x.row(number), gradient.row(number), &mut made);
                        add_to(dx, &made);
                    }
                }
            }
        };
        by_chunk(dx, rows_per_chunk * columns, chunk);
    };
    // SAFETY: every row is set, or added to.
    unsafe { backward.write(source, (x.rows, columns), write) }
}

/// Runs `update` on chunks of so many numbers, in parallel, with their index.
fn by_chunk(values: &mut [f32], length: usize, update: impl Fn(usize, &mut [f32]) + Sync) {
    use rayon::prelude::*;
    match values.len() <= length {
        true if values.is_empty() => (),
        true => update(0, values),
        false => values.par_chunks_mut(length).enumerate().for_each(|(index, chunk)| update(index, chunk)),
    }
}

fn sums_over_tokens(
    x: Matrix,
    gradient: Matrix,
    width: usize,
    add: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    sum_over_rows(x.rows, width, |rows, sums| {
        for row in rows {
            add(x.row(row), gradient.row(row), sums);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        Operand, assert_same_bits_on_any_number_of_threads, compare, compare_with_finite_differences,
    };

    #[test]
    fn values_and_gradients_are_those_of_the_references() {
        for (tokens, width) in [(1, 1), (3, 7), (70, 33), (200, 384), (1, 512), (0, 8)] {
            let operands = [Operand::new(&[tokens, width]), Operand::new(&[width]), Operand::new(&[width])];
            compare(&operands[..2], |t| rms_norm(&t[0], &t[1], 1e-5), |t| rms_norm_reference(&t[0], &t[1], 1e-5));
            if width > 1 {
                compare(
                    &operands,
                    |t| layer_norm(&t[0], &t[1], &t[2], 1e-5),
                    |t| layer_norm_reference(&t[0], &t[1], &t[2], 1e-5),
                );
            }
        }
    }

    #[test]
    fn the_gradient_is_added_to_that_of_a_residual_stream() {
        let operands = [Operand::new(&[70, 33]), Operand::new(&[33])];
        compare(
            &operands,
            |t| t[0].add(&rms_norm(&t[0], &t[1], 1e-5)?),
            |t| Ok((&t[0] + rms_norm_reference(&t[0], &t[1], 1e-5)?)?),
        );
    }

    #[test]
    fn a_column_slice_is_normalised_like_a_copy() {
        let operands = [Operand::new(&[6, 20]), Operand::new(&[8])];
        compare(
            &operands,
            |t| rms_norm(&t[0].narrow_columns(5, 8)?, &t[1], 1e-6),
            |t| rms_norm_reference(&t[0].narrow(1, 5, 8)?.contiguous()?, &t[1], 1e-6),
        );
    }

    #[test]
    fn references_agree_with_finite_differences() {
        let operands = [Operand::new(&[3, 5]), Operand::new(&[5]), Operand::new(&[5])];
        compare_with_finite_differences(&operands[..2], |t| rms_norm(&t[0], &t[1], 1e-5));
        compare_with_finite_differences(&operands, |t| layer_norm(&t[0], &t[1], &t[2], 1e-5));
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let operands = [Operand::new(&[500, 130]), Operand::new(&[130]), Operand::new(&[130])];
        assert_same_bits_on_any_number_of_threads(&operands[..2], |t| rms_norm(&t[0], &t[1], 1e-5));
        assert_same_bits_on_any_number_of_threads(&operands, |t| layer_norm(&t[0], &t[1], &t[2], 1e-5));
    }
}
