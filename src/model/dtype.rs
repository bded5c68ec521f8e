//! The element types that weights are stored in, f32, bf16 and f16, and how numbers are converted to them and
//! back. All computation is in f32.

use candle_core::DType;
use half::{bf16, f16};
use safetensors::Dtype;

/// Its name in settings and messages.
pub fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

/// Its name in a `config.json`.
pub fn name_in_config(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// The element type of a tensor in a safetensors file; `None` for types that no weights are read in.
pub fn of_stored(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

/// The same of safetensors.
pub fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// A number as it reads back from this type: the nearest that the type holds, of two equally near the even
/// one.
pub fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The largest number of this type.
pub fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::MAX.to_f32(),
        DType::F16 => f16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// How many numbers are finite, and not in this type.
pub fn count_beyond(values: &[f32], dtype: DType) -> usize {
    values.iter().filter(|value| value.is_finite() && !rounded(**value, dtype).is_finite()).count()
}

/// The numbers that bytes of this type hold, little-endian.
pub fn from_bytes(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::BF16 => halves().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        DType::F16 => halves().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
    }
}

/// How many numbers among bytes of this type are not finite: every bit of their exponent is set.
pub fn count_not_finite(bytes: &[u8], dtype: DType) -> usize {
    let count = |exponent: u16| {
        bytes.as_chunks::<2>().0.iter().filter(|&&half| u16::from_le_bytes(half) & exponent == exponent).count()
    };
    match dtype {
        DType::BF16 => count(0x7f80),
        DType::F16 => count(0x7c00),
        _ => from_bytes(bytes, dtype).iter().filter(|value| !value.is_finite()).count(),
    }
}

/// The bytes of numbers in this type, little-endian.
pub fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_reads_back_rounded_and_once_rounded_stays(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let back = from_bytes(&to_bytes(&[value], dtype), dtype);
                prop_assert_eq!(back[0].to_bits(), rounded(value, dtype).to_bits());
                prop_assert_eq!(rounded(back[0], dtype).to_bits(), back[0].to_bits());
                // Rounded by at most half of the last place: 8 and 11 bits are held.
                let (share, least) = match dtype {
                    DType::BF16 => (2f64.powi(-9), f64::from(f32::MIN_POSITIVE)),
                    DType::F16 => (2f64.powi(-12), 2f64.powi(-14)),
                    _ => (0.0, 0.0),
                };
                if value.is_finite() && back[0].is_finite() {
                    let (error, size) = ((f64::from(back[0]) - f64::from(value)).abs(), f64::from(value.abs()));
                    prop_assert!(error <= 2.0 * share * size.max(least), "{value} as {dtype:?} is {}", back[0]);
                }
                prop_assert_eq!(count_beyond(&[value], dtype), usize::from(value.is_finite() && back[0].is_infinite()));
                prop_assert_eq!(of_stored(stored(dtype)), Some(dtype));
                prop_assert_eq!(count_not_finite(&to_bytes(&[value], dtype), dtype), usize::from(!back[0].is_finite()));
            }
        }
    }

    #[test]
    fn numbers_between_two_go_to_the_even_one_and_those_beyond_the_largest_to_infinity() {
        // Between 1 and 1 + 2^-7, between 1 + 2^-7 and 1 + 2^-6.
        assert_eq!(rounded(1.0 + 2f32.powi(-8), DType::BF16), 1.0);
        assert_eq!(rounded(1.0 + 3.0 * 2f32.powi(-8), DType::BF16), 1.0 + 2f32.powi(-6));
        assert_eq!(rounded(1.0 + 2f32.powi(-11), DType::F16), 1.0);
        assert_eq!(rounded(1.0 + 3.0 * 2f32.powi(-11), DType::F16), 1.0 + 2f32.powi(-9));
        assert_eq!((rounded(65519.0, DType::F16), rounded(65520.0, DType::F16)), (65504.0, f32::INFINITY));
        assert_eq!((largest(DType::F16), largest(DType::BF16)), (65504.0, 3.389_531_4e38));
    }
}
