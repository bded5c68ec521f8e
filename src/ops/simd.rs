//! Vectorised arithmetic on slices of `f32`.
//!
//! The crate is compiled for the baseline of its platform, so that one binary runs everywhere; [`vectorised!`] compiles a
//! function once more for each instruction set of `pulp` and picks one at run time. Sums run over a fixed number of lanes, so
//! that their result does not depend on the width of the machine's vectors.

/// Defines functions that are compiled for every instruction set and dispatched at run time. Their bodies must be plain loops over
/// functions marked `#[inline(always)]`, which the compiler then turns into vector instructions. References in arguments carry the lifetime `'a`.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $visibility:vis fn $name:ident<'a>($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name<'a>($($argument: $type),*) $(-> $result)? {
            struct Kernel<'a>($($type,)* std::marker::PhantomData<&'a ()>);
            impl<'a> pulp::WithSimd for Kernel<'a> {
                #[allow(unused_parens)]
                type Output = ($($result)?);
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
                    let Kernel($($argument,)* _) = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Kernel($($argument,)* std::marker::PhantomData))
        }
    )*};
}
pub(super) use vectorised;

/// The number of partial sums of every reduction.
pub(super) const LANES: usize = 32;

/// `exp(x)` with a relative error below 1.5e-7; 0 below -87.3 (also at -inf), infinity above 88.37; NaN gives NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer that stands in the lowest bits
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // r = x - n ln 2, with ln 2 in two parts so that the product is exact.
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let value = p.mul_add(r * r, r + 1.0);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000)); // 2^n
    if x < -87.3 { 0.0 } else { value * power }
}

/// The logistic function `σ(x) = 1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent, with a relative error below 3e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let large = 1.0 - 2.0 / (exp(2.0 * magnitude) + 1.0);
    // Near 0 the difference cancels; a polynomial in x² stands in (Cephes, tanhf).
    let square = x * x;
    let mut p = -5.704_988_7e-3_f32;
    p = p.mul_add(square, 2.063_909e-2);
    p = p.mul_add(square, -5.373_971_4e-2);
    p = p.mul_add(square, 1.333_144_2e-1);
    p = p.mul_add(square, -3.333_328e-1);
    let small = (p * square).mul_add(magnitude, magnitude);
    (if magnitude < 0.625 { small } else { large }).copysign(x)
}

/// The error function, with an absolute error below 4e-7: a quotient of polynomials (as in Eigen), saturated beyond 4.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let square = x * x;
    let mut p = -2.726_142_3e-10_f32;
    p = p.mul_add(square, 2.770_681_4e-8);
    p = p.mul_add(square, -2.101_024e-6);
    p = p.mul_add(square, -5.692_506_4e-5);
    p = p.mul_add(square, -7.349_906e-4);
    p = p.mul_add(square, -2.954_6e-3);
    p = p.mul_add(square, -1.609_603_3e-2);
    let mut q = -1.456_607_2e-5_f32;
    q = q.mul_add(square, -2.133_740_6e-4);
    q = q.mul_add(square, -1.682_827e-3);
    q = q.mul_add(square, -7.373_329e-3);
    q = q.mul_add(square, -1.426_474e-2);
    x * p / q
}

/// Adds the lanes of a partial sum, a power of two, in a fixed order.
#[inline(always)]
pub(super) fn total<const N: usize>(lanes: [f32; N]) -> f32 {
    let mut lanes = lanes;
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ term(x[i])` over lanes.
#[inline(always)]
pub(super) fn sum_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += term(chunk[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += term(value);
    }
    total(lanes)
}

/// `Σ term(x[i], y[i])` over lanes.
#[inline(always)]
pub(super) fn sum_of_pairs(x: &[f32], y: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let y = &y[..x.len()];
    let mut lanes = [0.0; LANES];
    let (x_chunks, y_chunks) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_rest, y_rest) = (x_chunks.remainder(), y_chunks.remainder());
    for (x, y) in x_chunks.zip(y_chunks) {
        for lane in 0..LANES {
            lanes[lane] += term(x[lane], y[lane]);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += term(x, y);
    }
    total(lanes)
}

/// The largest element; -inf for none. NaN is passed over.
#[inline(always)]
pub(super) fn maximum_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = if value > *lane { value } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// `Σ x[i] y[i]`.
#[inline(always)]
pub(super) fn dot_of(x: &[f32], y: &[f32]) -> f32 {
    let y = &y[..x.len()];
    let mut lanes = [0.0; LANES];
    let (x_chunks, y_chunks) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_rest, y_rest) = (x_chunks.remainder(), y_chunks.remainder());
    for (x, y) in x_chunks.zip(y_chunks) {
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(y[lane], lanes[lane]);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane = x.mul_add(y, *lane);
    }
    total(lanes)
}

vectorised! {
    /// `y += x`, element by element.
    pub(super) fn add_to<'a>(y: &'a mut [f32], x: &'a [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }

    /// `x *= factor`.
    pub(super) fn scale<'a>(x: &'a mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    /// `Σ x[i] y[i]`.
    pub(super) fn dot<'a>(x: &'a [f32], y: &'a [f32]) -> f32 {
        dot_of(x, y)
    }
}

/// A 32-bit hash whose every output bit depends on every input bit (Wellons' `lowbias32`).
#[inline(always)]
pub(super) fn hash(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    fn grid(low: f32, high: f32) -> Vec<f32> {
        (0..100_001).map(|index| low + (high - low) * index as f32 / 100_000.0).collect()
    }

    /// Checked against the standard library in double precision.
    fn assert_relative(name: &str, x: &[f32], ours: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, tolerance: f64) {
        for &x in x {
            let (found, expected) = (f64::from(ours(x)), exact(f64::from(x)));
            assert!(
                (found - expected).abs() <= tolerance * expected.abs(),
                "{name}({x}): {found}, expected {expected}"
            );
        }
    }

    #[test]
    fn exponential_and_its_kin_are_as_exact_as_single_precision_allows() {
        assert_relative("exp", &grid(-87.2, 88.3), exp, f64::exp, 1.5e-7);
        assert_relative("exp", &grid(-1e-3, 1e-3), exp, f64::exp, 1.2e-7);
        assert_relative("tanh", &grid(-9.5, 9.5), tanh, f64::tanh, 3e-7);
        assert_relative("tanh", &grid(-1e-2, 1e-2), tanh, f64::tanh, 2e-7);
        assert_relative("sigmoid", &grid(-80.0, 80.0), sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 3e-7);
    }

    #[test]
    fn exponential_keeps_its_limits() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
        assert_eq!((tanh(50.0), tanh(-50.0)), (1.0, -1.0));
    }

    #[test]
    fn error_function_agrees_with_the_exact_one() {
        let x = grid(-6.0, 6.0);
        let exact = Tensor::new(x.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().erf().unwrap();
        for (x, exact) in x.into_iter().zip(exact.to_vec1::<f64>().unwrap()) {
            assert!((f64::from(erf(x)) - exact).abs() < 4e-7, "erf({x}): {} {exact}", erf(x));
        }
    }

    #[test]
    fn reductions_do_not_lose_the_tail_of_odd_lengths() {
        for length in [0, 1, 5, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..length).map(|index| index as f32 - 3.0).collect();
            let sum: f32 = x.iter().sum();
            let square: f32 = x.iter().map(|x| x * x).sum();
            assert_eq!(sum_of(&x, |x| x), sum);
            assert_eq!(dot(&x, &x), square);
            assert_eq!(maximum_of(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
