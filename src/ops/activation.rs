//! Element-wise non-linearities, plain and gated.

use std::f32::consts::FRAC_1_SQRT_2;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::backward::Gradient;
use super::matrix::{elements, fill, has_kernel, with_elements};
use super::simd::{erf, exp, sigmoid, tanh, vectorised};
use super::value::{Value, through_candle};
use crate::error::Result;

/// A non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Φ(x)` with the exact error function (Hendrycks & Gimpel 2016).
    Gelu,
    /// GELU by its `tanh` approximation, GPT-2's `gelu_new`.
    GeluTanh,
    /// `x σ(x)` (Elfwing et al. 2017), also called swish.
    Silu,
    /// `max(x, 0)`; the derivative at 0 is 0, as in PyTorch.
    Relu,
    /// The hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// The non-linearity that Hugging Face's configurations and AdapterHub's call by this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "gelu" | "gelu_orig" => Some(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Some(Activation::GeluTanh),
            "silu" | "swish" => Some(Activation::Silu),
            "relu" => Some(Activation::Relu),
            "tanh" => Some(Activation::Tanh),
            _ => None,
        }
    }
}

/// The activation of every element of `x`, of any shape.
pub fn activate(x: &Value, activation: Activation) -> Result<Value> {
    if !has_kernel(&[x.tensor()]) {
        return through_candle(&[x], |t| activate_reference(&t[0], activation));
    }
    let operand = x.tensor().contiguous()?;
    let y = with_elements(&operand, |x| {
        Ok::<_, candle_core::Error>(fill(x.len(), |start, y| activate_slice(activation, &x[start..][..y.len()], y)))
    })?;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    let Some(source) = x.source() else { return Ok(Value::constant(y)) };
    Ok(Value::made_keeping(y, &[&operand.clone()], move |gradient, backward| {
        let g = gradient.values()?;
        let dx = with_elements(&operand, |x| {
            Ok::<_, candle_core::Error>(fill(x.len(), |start, dx| {
                let range = start..start + dx.len();
                activate_backward(activation, &x[range.clone()], &g[range], dx);
            }))
        })?;
        backward.add(&source, Gradient::new(dx, gradient.shape()))
    }))
}

/// `activation(gate) * up`, the inner part of a gated feed-forward (Shazeer 2020). Both `[tokens, d_ff]`.
pub fn gated(gate: &Value, up: &Value, activation: Activation) -> Result<Value> {
    if !has_kernel(&[gate.tensor(), up.tensor()]) {
        return through_candle(&[gate, up], |t| gated_reference(&t[0], &t[1], activation));
    }
    if gate.dims() != up.dims() {
        crate::bail!("gated activation: gate {:?} and up {:?} differ", gate.dims(), up.dims());
    }
    let (gates, ups) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    let y = map_pairs(&gates, &ups, |range, gate, up, y| {
        gated_slice(activation, &gate[range.clone()], &up[range], y);
    })?;
    let y = Tensor::from_vec(y, gate.shape(), gate.device())?;
    let (of_gate, of_up) = (gate.source(), up.source());
    if of_gate.is_none() && of_up.is_none() {
        return Ok(Value::constant(y));
    }
    Ok(Value::made_keeping(y, &[&gates.clone(), &ups.clone()], move |gradient, backward| {
        let g = gradient.values()?;
        if let Some(source) = of_gate {
            let dgate = map_pairs(&gates, &ups, |range, gate, up, dgate| {
                gated_backward(activation, &gate[range.clone()], &up[range.clone()], &g[range], dgate);
            })?;
            backward.add(&source, Gradient::new(dgate, gradient.shape()))?;
        }
        let Some(source) = of_up else { return Ok(()) };
        let dup = map_pairs(&gates, &ups, |range, gate, _, dup| {
            gated_slice(activation, &gate[range.clone()], &g[range], dup);
        })?;
        backward.add(&source, Gradient::new(dup, gradient.shape()))
    }))
}

/// A vector made of two of its length, chunk by chunk.
fn map_pairs(
    x: &Tensor,
    y: &Tensor,
    write: impl Fn(std::ops::Range<usize>, &[f32], &[f32], &mut [f32]) + Sync,
) -> Result<Vec<f32>> {
    with_elements(x, |x| {
        with_elements(y, |y| Ok(fill(x.len(), |start, target| write(start..start + target.len(), x, y, target))))
    })
}

/// `log(1 + exp(x))` without overflow; `-log σ(x) = softplus(-x)`. Its derivative is `σ(x)`, also at 0.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    if !has_kernel(&[x]) {
        return softplus_reference(x);
    }
    Ok(x.contiguous()?.apply_op1(Softplus)?)
}

/// [`activate`] in candle's own operations.
pub fn activate_reference(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Silu => x.silu()?,
        // A product with a constant mask: the derivative of candle's own relu at 0 is 1.
        Activation::Relu => x.mul(&x.gt(&x.zeros_like()?)?.to_dtype(x.dtype())?)?,
        Activation::Tanh => x.tanh()?,
    })
}

/// [`gated`] in candle's own operations.
pub fn gated_reference(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(activate_reference(gate, activation)?.mul(up)?)
}

/// [`softplus`] in candle's own operations.
pub fn softplus_reference(x: &Tensor) -> Result<Tensor> {
    // With m = max(x, 0), a constant to the derivative: m + log(exp(x - m) + exp(-m)), whose derivative is exp(x - m) / (...) = σ(x).
    let maximum = x.detach().relu()?;
    let sum = x.sub(&maximum)?.exp()?.add(&maximum.neg()?.exp()?)?;
    Ok(sum.log()?.add(&maximum)?)
}

// sqrt(2 / π) and 0.044715, the constants of GELU's approximation.
const GELU_SLOPE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// The standard normal distribution function.
#[inline(always)]
fn normal_distribution(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * FRAC_1_SQRT_2)
}

/// `(1 + tanh u) / 2 = σ(2u)` with `u = sqrt(2/π) (x + 0.044715 x³)`.
#[inline(always)]
fn gelu_sigmoid(x: f32) -> f32 {
    sigmoid(2.0 * GELU_SLOPE * x * (x * x).mul_add(GELU_CUBIC, 1.0))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * normal_distribution(x)
}

#[inline(always)]
fn gelu_derivative(x: f32) -> f32 {
    const INVERSE_SQRT_2_PI: f32 = 0.398_942_3;
    normal_distribution(x) + x * INVERSE_SQRT_2_PI * exp(-0.5 * x * x)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    x * gelu_sigmoid(x)
}

#[inline(always)]
fn gelu_tanh_derivative(x: f32) -> f32 {
    let s = gelu_sigmoid(x);
    let slope = 2.0 * GELU_SLOPE * (x * x).mul_add(3.0 * GELU_CUBIC, 1.0);
    s + x * s * (1.0 - s) * slope
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
fn silu_derivative(x: f32) -> f32 {
    let s = sigmoid(x);
    s + x * s * (1.0 - s)
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn relu_derivative(x: f32) -> f32 {
    if x > 0.0 { 1.0 } else { 0.0 }
}

#[inline(always)]
fn tanh_derivative(x: f32) -> f32 {
    let y = tanh(x);
    1.0 - y * y
}

/// Runs a loop with the functions of one activation, so that each loop is compiled (and vectorised) by itself.
macro_rules! with_activation {
    ($activation:expr, |$value:ident, $derivative:ident| $loop:expr) => {
        match $activation {
            Activation::Gelu => {
                #[allow(unused)]
                let ($value, $derivative) = (|x| gelu(x), |x| gelu_derivative(x));
                $loop
            }
            Activation::GeluTanh => {
                #[allow(unused)]
                let ($value, $derivative) = (|x| gelu_tanh(x), |x| gelu_tanh_derivative(x));
                $loop
            }
            Activation::Silu => {
                #[allow(unused)]
                let ($value, $derivative) = (|x| silu(x), |x| silu_derivative(x));
                $loop
            }
            Activation::Relu => {
                #[allow(unused)]
                let ($value, $derivative) = (|x| relu(x), |x| relu_derivative(x));
                $loop
            }
            Activation::Tanh => {
                #[allow(unused)]
                let ($value, $derivative) = (|x| tanh(x), |x| tanh_derivative(x));
                $loop
            }
        }
    };
}

vectorised! {
    fn activate_slice<'a>(activation: Activation, x: &'a [f32], y: &'a mut [f32]) {
        with_activation!(activation, |value, derivative| for (y, &x) in y.iter_mut().zip(x) {
            *y = value(x);
        });
    }

    fn activate_backward<'a>(activation: Activation, x: &'a [f32], gradient: &'a [f32], dx: &'a mut [f32]) {
        with_activation!(activation, |value, derivative| for ((dx, &x), &gradient) in dx.iter_mut().zip(x).zip(gradient) {
            *dx = gradient * derivative(x);
        });
    }

    fn gated_slice<'a>(activation: Activation, gate: &'a [f32], up: &'a [f32], y: &'a mut [f32]) {
        with_activation!(activation, |value, derivative| for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = value(gate) * up;
        });
    }

    fn gated_backward<'a>(activation: Activation, gate: &'a [f32], up: &'a [f32], gradient: &'a [f32], dgate: &'a mut [f32]) {
        with_activation!(activation, |value, derivative| {
            for (((dgate, &gate), &up), &gradient) in dgate.iter_mut().zip(gate).zip(up).zip(gradient) {
                *dgate = gradient * up * derivative(gate);
            }
        });
    }
}

struct Softplus;

impl CustomOp1 for Softplus {
    fn name(&self) -> &'static str {
        "softplus"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let y = fill(x.len(), |start, y| {
            for (y, &x) in y.iter_mut().zip(&x[start..]) {
                *y = x.max(0.0) + (-x.abs()).exp().ln_1p();
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dx = with_elements(x, |x| {
            with_elements(gradient, |gradient| {
                Ok::<_, candle_core::Error>(fill(x.len(), |start, dx| {
                    for ((dx, &x), &gradient) in dx.iter_mut().zip(&x[start..]).zip(&gradient[start..]) {
                        *dx = gradient * sigmoid(x);
                    }
                }))
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, compare, compare_with_finite_differences, gradients_of};
    use candle_core::{DType, Device, Var};

    const ALL: [Activation; 5] =
        [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Relu, Activation::Tanh];

    #[test]
    fn values_and_gradients_are_those_of_the_references() {
        for shape in [&[1][..], &[3, 7], &[130, 257], &[0, 4], &[2, 3, 5]] {
            let operands = [Operand::new(shape), Operand::new(shape)];
            for activation in ALL {
                compare(&operands[..1], |t| activate(&t[0], activation), |t| activate_reference(&t[0], activation));
                compare(&operands, |t| gated(&t[0], &t[1], activation), |t| gated_reference(&t[0], &t[1], activation));
            }
            compare(&operands[..1], |t| through_candle(&[&t[0]], |t| softplus(&t[0])), |t| softplus_reference(&t[0]));
        }
    }

    #[test]
    fn column_slices_are_read_with_their_strides() {
        compare(
            &[Operand::new(&[4, 12])],
            |t| gated(&t[0].narrow_columns(0, 6)?, &t[0].narrow_columns(6, 6)?, Activation::Silu),
            |t| gated_reference(&t[0].narrow(1, 0, 6)?, &t[0].narrow(1, 6, 6)?, Activation::Silu),
        );
    }

    #[test]
    fn references_agree_with_finite_differences() {
        let operands = [Operand::new(&[3, 4]), Operand::new(&[3, 4])];
        // candle's derivatives of the two forms of GELU hold six digits of their constants; they are compared at 1e-5 above.
        for activation in [Activation::Silu, Activation::Relu, Activation::Tanh] {
            compare_with_finite_differences(&operands, |t| gated(&t[0], &t[1], activation));
        }
        compare_with_finite_differences(&operands[..1], |t| through_candle(&[&t[0]], |t| softplus(&t[0])));
    }

    #[test]
    fn derivatives_at_zero_are_those_of_pytorch() {
        let slope = |f: &dyn Fn(&Value) -> Result<Value>, dtype| -> f64 {
            let zero = Var::zeros(1, dtype, &Device::Cpu).unwrap();
            let y = f(&Value::of(&zero)).unwrap();
            let gradients = gradients_of(&y, &Tensor::ones(1, dtype, &Device::Cpu).unwrap()).unwrap();
            let gradient = gradients.get(&zero).unwrap().clone().into_tensor().unwrap();
            gradient.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()[0]
        };
        for dtype in [DType::F32, DType::F64] {
            assert_eq!(slope(&|x| activate(x, Activation::Relu), dtype), 0.0);
            assert_eq!(slope(&|x| through_candle(&[x], |t| softplus(&t[0])), dtype), 0.5);
        }
    }

    #[test]
    fn softplus_neither_overflows_nor_vanishes() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let x = Tensor::new(&[-80.0_f64, -500.0, 500.0], &Device::Cpu)?.to_dtype(dtype)?;
            let y = softplus(&x)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert!((y[0] / (-80.0_f64).exp() - 1.0).abs() < 1e-6 || dtype == DType::F64, "{y:?}");
            assert_eq!((y[1], y[2]), (0.0, 500.0));
        }
        Ok(())
    }
}
