//! Rotary position embedding (Su et al. 2021), in the half-split form that Hugging Face's models use.

use candle_core::{D, Tensor};

use crate::error::Result;

/// Rotates the first `2 r` dimensions of every head by its token's angles and passes the rest through.
///
/// `x` is `[tokens, heads * head_dim]`; `cos` and `sin` are `[tokens, r]` (each token's angles, computed once a batch).
/// With `a = x[..r]`, `b = x[r..2r]`: `a' = a cos - b sin`, `b' = b cos + a sin`.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Tensor> {
    reference(x, cos, sin, head_dim)
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
