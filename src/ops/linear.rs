//! `y = x Wᵀ + b`, skipping what is frozen.

use candle_core::Tensor;

use crate::error::Result;

/// `y = x Wᵀ + b`: `x` is `[tokens, d_in]`, `weight` `[d_out, d_in]`, `bias` `[d_out]`, the result `[tokens, d_out]`.
///
/// No gradient is computed for an operand that is frozen (`!track_op()`).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    reference(x, weight, bias)
}

/// The same in candle's own operations.
pub fn reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?; // [tokens, d_out]
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}
