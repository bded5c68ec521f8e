//! Root-mean-square and layer normalisation.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Shape, Tensor, bail};

use super::matrix::{
    Matrix, elements, fill_rows, has_kernel, sum_over_rows, with_contiguous_rows, with_elements, with_matrix,
};
use super::simd::{sum_of, sum_of_pairs, vectorised};
use crate::error::Result;

/// `y = x / sqrt(mean(x²) + epsilon) * weight` over the last dimension (Zhang & Sennrich 2019).
/// `x` is `[tokens, d]`, `weight` `[d]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    if !has_kernel(&[x, weight]) {
        return rms_norm_reference(x, weight, epsilon);
    }
    Ok(with_contiguous_rows(x)?.apply_op2(&weight.contiguous()?, RmsNorm { epsilon: epsilon as f32 })?)
}

/// `y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias` over the last dimension (Ba et al. 2016).
/// `x` is `[tokens, d]`, `weight` and `bias` `[d]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    if !has_kernel(&[x, weight, bias]) {
        return layer_norm_reference(x, weight, bias, epsilon);
    }
    let operation = LayerNorm { epsilon: epsilon as f32 };
    Ok(with_contiguous_rows(x)?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, operation)?)
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

struct RmsNorm {
    epsilon: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight) = (Matrix::from_storage(x, x_layout)?, elements(weight, weight_layout)?);
        check_width(&x, weight)?;
        let y = by_row(x, |x, y, _| rms_norm_row(x, weight, self.epsilon, y));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let epsilon = self.epsilon;
        let dx = gradient_of_input(x, weight, gradient, |x, weight, gradient, dx| {
            rms_norm_row_backward(x, weight, epsilon, gradient, dx);
        })?;
        let dw = match weight.track_op() {
            false => None,
            true => {
                let width = weight.elem_count();
                let sums = sums_over_tokens(x, gradient, width, |x, gradient, dw| {
                    rms_norm_row_weight(x, epsilon, gradient, dw);
                })?;
                Some(Tensor::from_vec(sums, width, weight.device())?)
            }
        };
        Ok((dx, dw))
    }
}

struct LayerNorm {
    epsilon: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer norm"
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
        let x = Matrix::from_storage(x, x_layout)?;
        let (weight, bias) = (elements(weight, weight_layout)?, elements(bias, bias_layout)?);
        check_width(&x, weight)?;
        check_width(&x, bias)?;
        let y = by_row(x, |x, y, _| layer_norm_row(x, weight, bias, self.epsilon, y));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let epsilon = self.epsilon;
        let dx = gradient_of_input(x, weight, gradient, |x, weight, gradient, dx| {
            layer_norm_row_backward(x, weight, epsilon, gradient, dx);
        })?;
        let (mut dw, mut db) = (None, None);
        if weight.track_op() || bias.track_op() {
            let width = weight.elem_count();
            let sums = sums_over_tokens(x, gradient, 2 * width, |x, gradient, sums| {
                let (dw, db) = sums.split_at_mut(width);
                layer_norm_row_weight(x, epsilon, gradient, dw, db);
            })?;
            if weight.track_op() {
                dw = Some(Tensor::from_slice(&sums[..width], width, weight.device())?);
            }
            if bias.track_op() {
                db = Some(Tensor::from_slice(&sums[width..], width, bias.device())?);
            }
        }
        Ok((dx, dw, db))
    }
}

fn check_width(x: &Matrix, parameter: &[f32]) -> candle_core::Result<()> {
    if x.columns != parameter.len() {
        bail!("norm: input [{}, {}] and parameter [{}] do not fit", x.rows, x.columns, parameter.len());
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

fn gradient_of_input(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    row: impl Fn(&[f32], &[f32], &[f32], &mut [f32]) + Sync,
) -> candle_core::Result<Option<Tensor>> {
    if !x.track_op() {
        return Ok(None);
    }
    let values = with_matrix(x, |x| {
        with_matrix(gradient, |gradient| {
            with_elements(weight, |weight| Ok(by_row(x, |x, dx, index| row(x, weight, gradient.row(index), dx))))
        })
    })?;
    Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
}

fn sums_over_tokens(
    x: &Tensor,
    gradient: &Tensor,
    width: usize,
    add: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> candle_core::Result<Vec<f32>> {
    with_matrix(x, |x| {
        with_matrix(gradient, |gradient| {
            Ok(sum_over_rows(x.rows, width, |rows, sums| {
                for row in rows {
                    add(x.row(row), gradient.row(row), sums);
                }
            }))
        })
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
    fn a_column_slice_is_normalised_like_a_copy() {
        let operands = [Operand::new(&[6, 20]), Operand::new(&[8])];
        let slice = |t: &[Tensor]| t[0].narrow(1, 5, 8);
        compare(
            &operands,
            |t| rms_norm(&slice(t)?, &t[1], 1e-6),
            |t| rms_norm_reference(&slice(t)?.contiguous()?, &t[1], 1e-6),
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
