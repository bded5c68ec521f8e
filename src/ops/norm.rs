//! Root-mean-square and layer normalisation.

use candle_core::{D, Tensor};

use crate::error::Result;

/// `y = x / sqrt(mean(x²) + epsilon) * weight` over the last dimension (Zhang & Sennrich 2019).
/// `x` is `[tokens, d]`, `weight` `[d]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    rms_norm_reference(x, weight, epsilon)
}

/// `y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias` over the last dimension (Ba et al. 2016).
/// `x` is `[tokens, d]`, `weight` and `bias` `[d]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    layer_norm_reference(x, weight, bias, epsilon)
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
