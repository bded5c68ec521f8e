//! Rotary position embedding (Su et al. 2021), in the half-split form that Hugging Face's models use.

use candle_core::{D, Tensor};

use super::backward::Gradient;
use super::matrix::{Matrix, fill_rows, has_kernel, with_elements, with_matrix};
use super::simd::vectorised;
use super::value::{Value, through_candle};
use crate::error::Result;

/// Rotates the first `2 r` dimensions of every head by its token's angles and passes the rest through.
///
/// `x` is `[tokens, heads * head_dim]`; `cos` and `sin` are `[tokens, r]` (each token's angles, computed once a batch; constants:
/// no gradient reaches them).
/// With `a = x[..r]`, `b = x[r..2r]`: `a' = a cos - b sin`, `b' = b cos + a sin`.
pub fn rotary(x: &Value, cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Value> {
    let (tokens, width) = x.dims2()?;
    let (angle_tokens, half) = cos.dims2()?;
    if sin.dims() != cos.dims() || angle_tokens != tokens || 2 * half > head_dim || width % head_dim != 0 {
        crate::bail!(
            "rotary: {tokens} tokens of width {width} in heads of {head_dim} do not fit angles of shape {:?} and {:?}",
            cos.dims(),
            sin.dims()
        );
    }
    if !has_kernel(&[x.tensor(), cos, sin]) {
        return through_candle(&[x], |t| reference(&t[0], cos, sin, head_dim));
    }
    let angles = Angles { cos: cos.detach().contiguous()?, sin: sin.detach().contiguous()?, head_dim };
    let y = with_matrix(x.tensor(), |x| angles.rotate(x, 1.0))?;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    let Some(source) = x.source() else { return Ok(Value::constant(y)) };
    // A rotation's transpose is its inverse.
    Ok(Value::made(y, move |gradient, backward| {
        let dx = angles.rotate(gradient.matrix()?, -1.0)?;
        backward.add(&source, Gradient::new(dx, (tokens, width)))
    }))
}

/// The same in candle's own operations.
pub fn reference(x: &Tensor, cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let half = cos.dim(1)?;
    let x = x.reshape((tokens, width / head_dim, head_dim))?; // [tokens, heads, head_dim]
    let a = x.narrow(2, 0, half)?;
    let b = x.narrow(2, half, half)?;
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?); // [tokens, 1, r]
    let rotated_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let rotated_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let mut parts = vec![rotated_a, rotated_b];
    if 2 * half < head_dim {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half)?);
    }
    Ok(Tensor::cat(&parts, D::Minus1)?.reshape((tokens, width))?)
}

struct Angles {
    cos: Tensor,
    sin: Tensor,
    head_dim: usize,
}

vectorised! {
    /// Rotates every head of a row; `sign` is -1 for the inverse rotation.
    fn rotate_row<'a>(x: &'a [f32], cos: &'a [f32], sin: &'a [f32], sign: f32, head_dim: usize, y: &'a mut [f32]) {
        let half = cos.len();
        for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
            let (a, b) = x[..2 * half].split_at(half);
            let (rotated, rest) = y.split_at_mut(2 * half);
            let (rotated_a, rotated_b) = rotated.split_at_mut(half);
            for index in 0..half {
                let (cos, sin) = (cos[index], sign * sin[index]);
                rotated_a[index] = a[index] * cos - b[index] * sin;
                rotated_b[index] = b[index] * cos + a[index] * sin;
            }
            rest.copy_from_slice(&x[2 * half..]);
        }
    }
}

impl Angles {
    fn rotate(&self, x: Matrix, sign: f32) -> Result<Vec<f32>> {
        with_elements(&self.cos, |cos| {
            with_elements(&self.sin, |sin| {
                let half = cos.len().checked_div(x.rows).unwrap_or(0);
                Ok(fill_rows(x.rows, x.columns, |first, chunk| {
                    for (row, y) in (first..).zip(chunk.chunks_exact_mut(x.columns)) {
                        let angles = row * half..(row + 1) * half;
                        rotate_row(x.row(row), &cos[angles.clone()], &sin[angles], sign, self.head_dim, y);
                    }
                }))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, compare, compare_with_finite_differences, random};

    fn angles(tokens: usize, half: usize) -> (Tensor, Tensor) {
        let angle = random(&[tokens, half], 7);
        (angle.cos().unwrap(), angle.sin().unwrap())
    }

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for (tokens, heads, head_dim, half) in
            [(1, 1, 2, 1), (7, 3, 8, 4), (130, 2, 64, 32), (5, 4, 80, 10), (3, 1, 6, 0)]
        {
            let (cos, sin) = angles(tokens, half.max(1));
            let (cos, sin) = (cos.narrow(1, 0, half).unwrap(), sin.narrow(1, 0, half).unwrap());
            let like = |table: &Tensor, x: &Tensor| table.to_dtype(x.dtype());
            if half == 0 {
                let x = random(&[tokens, heads * head_dim], 1);
                let y = rotary(&Value::of(&x), &cos, &sin, head_dim).unwrap();
                assert_eq!(y.tensor().to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
                continue;
            }
            compare(
                &[Operand::new(&[tokens, heads * head_dim])],
                |t| rotary(&t[0], &cos, &sin, head_dim),
                |t| reference(&t[0], &like(&cos, &t[0])?, &like(&sin, &t[0])?, head_dim),
            );
        }
    }

    #[test]
    fn a_column_slice_is_rotated_like_a_copy() {
        let (cos, sin) = angles(6, 4);
        compare(
            &[Operand::new(&[6, 32])],
            |t| rotary(&t[0].narrow_columns(8, 16)?, &cos, &sin, 8),
            |t| reference(&t[0].narrow(1, 8, 16)?, &cos.to_dtype(t[0].dtype())?, &sin.to_dtype(t[0].dtype())?, 8),
        );
    }

    #[test]
    fn reference_agrees_with_finite_differences() {
        let (cos, sin) = angles(3, 2);
        compare_with_finite_differences(&[Operand::new(&[3, 12])], |t| {
            let [cos, sin] = [&cos, &sin].map(|angles| angles.to_dtype(t[0].tensor().dtype()).unwrap());
            rotary(&t[0], &cos, &sin, 6)
        });
    }

    #[test]
    fn angles_that_do_not_fit_are_an_error() {
        let (cos, sin) = angles(3, 4);
        let of = |shape: &[usize]| Value::constant(random(shape, 1));
        assert!(rotary(&of(&[4, 8]), &cos, &sin, 8).is_err());
        assert!(rotary(&of(&[3, 8]), &cos, &sin, 6).is_err());
    }
}
