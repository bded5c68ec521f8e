use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};

use half::{bf16, f16};

use super::widen::half;
use super::*;
use crate::ops::testing::Operand;
use crate::ops::testing::{assert_close, assert_same_bits_on_any_number_of_threads, random, run};
use crate::ops::{Arithmetic, LowRank, PackedWeight, Value, Weight, linear, log_probs, low_rank_linear};

const QUANTISED: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Every form that a matrix may be kept in.
fn forms() -> impl Iterator<Item = CompactForm> {
    QUANTISED.into_iter().chain([GgmlDType::F16, GgmlDType::BF16]).filter_map(CompactForm::of_ggml)
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

#[test]
fn numbers_are_those_of_candles_quantised_tensors_and_of_its_conversions() -> Result<()> {
    // More than one task and one part.
    let x = random(&[37, 512], 1).affine(3.0, 0.1)?;
    for form in forms() {
        let expected = match form.is_quantised() {
            true => QTensor::quantize(&x, form.0)?.dequantize(&Device::Cpu)?,
            false => {
                x.to_dtype(if form == CompactForm::BF16 { DType::BF16 } else { DType::F16 })?.to_dtype(DType::F32)?
            }
        };
        let compact = Compact::of(&x, form)?;
        assert_eq!((compact.dims(), compact.bytes()), ([37, 512], 37 * form.row_bytes(512)), "{form}");
        assert_eq!(bits(&compact.to_tensor()), bits(&expected), "{form}");
        let rows = compact.select_rows(&[36, 0, 0, 5])?;
        assert_eq!(
            bits(&rows),
            bits(&expected.index_select(&Tensor::new(&[36u32, 0, 0, 5], &Device::Cpu)?, 0)?),
            "{form}"
        );
        assert!(compact.select_rows(&[37]).is_err());
        let mut parts = Vec::new();
        compact.for_each_part(|part| parts.extend_from_slice(part));
        assert_eq!(parts, values(&expected), "{form}");
    }
    Ok(())
}

#[test]
fn every_pattern_of_16_bits_is_widened_as_the_library_does() {
    let words: Vec<u16> = (0..=u16::MAX).collect();
    for (form, widened) in [
        (CompactForm::BF16, (|word| bf16::from_bits(word).to_f32()) as fn(u16) -> f32),
        (CompactForm::F16, |word| f16::from_bits(word).to_f32()),
    ] {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut builder = CompactBuilder::new(form, 256, 256).unwrap();
        builder.push_bytes(&bytes);
        let found = values(&builder.build().unwrap().to_tensor());
        for (&word, found) in words.iter().zip(found) {
            let expected = widened(word);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{word}: {found}");
        }
    }
}

#[test]
fn every_half_is_widened() {
    for bits in 0..=u16::MAX {
        let (found, expected) = (half(bits), f16::from_bits(bits).to_f32());
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{bits}: {found}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = |form, rows, columns| CompactBuilder::new(form, rows, columns).err().map(|error| error.to_string());
    assert_eq!(
        error(CompactForm::Q4_K, 2, 576).as_deref(),
        Some("rows of 576 numbers cannot be kept in q4_k, whose blocks hold 256")
    );
    assert_eq!(error(CompactForm::Q8_0, 2, 576), None);
    assert!(error(CompactForm::BF16, 0, 576).is_some() && error(CompactForm::BF16, 2, 0).is_some());
    let mut short = CompactBuilder::new(CompactForm::Q8_0, 2, 32).unwrap();
    short.push_bytes(&[0; 34]);
    assert_eq!(short.build().unwrap_err().to_string(), "a matrix in q8_0 has 34 bytes, expected 68");
    assert_eq!(CompactForm::of_ggml(GgmlDType::F32), None);
    // Among small integers NaN would be a number like any other.
    for value in [f32::NAN, f32::INFINITY] {
        let broken = random(&[4, 32], 1).slice_assign(&[1..2, 3..4], &Tensor::new(&[[value]], &Device::Cpu).unwrap());
        let broken = broken.unwrap();
        let error = Compact::of(&broken, CompactForm::Q8_0).unwrap_err().to_string();
        assert!(error.starts_with("1 of its numbers are not finite"), "{error}");
        let kept = Compact::of(&broken, CompactForm::BF16).unwrap().to_tensor();
        assert_eq!(values(&kept).iter().filter(|value| !value.is_finite()).count(), 1);
    }
}

/// A frozen matrix in a form, and the same numbers in f32.
fn both(shape: &[usize], form: CompactForm) -> (Weight, Weight) {
    let compact = Compact::of(&random(shape, 2).affine(0.2, 0.0).unwrap(), form).unwrap();
    let plain = Weight::new(&compact.to_tensor(), None);
    (Weight::compact(&compact, None), plain)
}

#[test]
fn products_and_gradients_are_those_of_the_same_numbers_in_f32() {
    // Few rows and many; the last matrix is widened in more than one part.
    for (tokens, d_out, d_in) in [(1, 40, 256), (3, 70, 512), (40, 33, 256), (200, 96, 256), (70, 4100, 1024)] {
        for form in [CompactForm::BF16, CompactForm::F16, CompactForm::Q8_0, CompactForm::Q4_K] {
            let (compact, plain) = both(&[d_out, d_in], form);
            let operands =
                [random(&[tokens, d_in], 1), random(&[4, d_in], 3), random(&[d_out, 4], 4), random(&[d_out], 5)];
            let of = |weight: &Weight| {
                let weight = weight.clone();
                run(&operands, &[true; 4], move |t| {
                    let update = LowRank { a: &t[1], b: &t[2], scale: 0.5, dropout: None };
                    linear(&t[0], &weight, Some(&t[3]))?.add(&low_rank_linear(&t[0], &weight, None, &update)?)
                })
            };
            let ((found, found_gradients), (expected, gradients)) = (of(&compact), of(&plain));
            let what = format!("{form} [{tokens}, {d_in}] by {d_out}");
            // One row is multiplied in registers, more than one part in parts.
            if tokens > 1 && d_out * d_in <= SLAB {
                assert_eq!(bits(&found), bits(&expected), "{what}");
            }
            assert_close(&what, &found, &expected, 1e-6);
            for (found, expected) in found_gradients.iter().zip(&gradients) {
                assert_close(&what, found.as_ref().unwrap(), expected.as_ref().unwrap(), 2e-6);
            }
        }
    }
}

#[test]
fn log_probs_are_those_of_the_same_numbers_in_f32() {
    let targets: Vec<u32> = (0..300).map(|index| index * 7919 % 65).collect();
    for form in [CompactForm::BF16, CompactForm::Q8_0] {
        let (compact, plain) = both(&[65, 64], form);
        let of = |weight: &Weight| {
            let (weight, targets) = (weight.clone(), targets.clone());
            run(&[random(&[300, 64], 1)], &[true], move |t| {
                Ok(log_probs(&t[0], &weight, &targets, 0.7, None)?.log_probs)
            })
        };
        let ((found, found_gradients), (expected, gradients)) = (of(&compact), of(&plain));
        assert_eq!(bits(&found), bits(&expected), "{form}");
        assert_close("gradient", found_gradients[0].as_ref().unwrap(), gradients[0].as_ref().unwrap(), 1e-6);
    }
}

#[test]
fn log_probs_in_bf16_are_those_of_the_same_numbers_packed() {
    let targets: Vec<u32> = (0..300).map(|index| index * 7919 % 65).collect();
    for kernel in super::super::bf16::Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        for form in [CompactForm::BF16, CompactForm::Q8_0] {
            let (compact, plain) = both(&[65, 96], form);
            let of = |weight: &Weight| {
                let (weight, targets) = (weight.clone(), targets.clone());
                let log_probs = move |t: &[Value]| Ok(log_probs(&t[0], &weight, &targets, 0.7, None)?.log_probs);
                Arithmetic::Bf16(kernel).within(|| run(&[random(&[300, 96], 1)], &[true], log_probs))
            };
            let ((found, found_gradients), (expected, gradients)) = (of(&compact), of(&plain));
            assert_eq!(bits(&found), bits(&expected), "{form}");
            assert_eq!(bits(found_gradients[0].as_ref().unwrap()), bits(gradients[0].as_ref().unwrap()), "{form}");
        }
    }
}

#[test]
fn products_in_bf16_are_those_of_the_same_numbers_packed_or_not() {
    for kernel in super::super::bf16::Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        for form in [CompactForm::BF16, CompactForm::Q8_0] {
            let compact = Compact::of(&random(&[200, 96], 2), form).unwrap();
            let kept: Arc<PackedWeight> = Arc::default();
            let x = random(&[130, 96], 1);
            let of = |weight: Weight| {
                let run = || run(std::slice::from_ref(&x), &[true], move |t| linear(&t[0], &weight, None));
                Arithmetic::Bf16(kernel).within(run)
            };
            let (expected, gradients) = of(Weight::new(&compact.to_tensor(), None));
            for packed in [None, Some(&kept), Some(&kept)] {
                let (found, found_gradients) = of(Weight::compact(&compact, packed));
                assert_eq!(bits(&found), bits(&expected), "{form}");
                assert_eq!(bits(found_gradients[0].as_ref().unwrap()), bits(gradients[0].as_ref().unwrap()), "{form}");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for form in [CompactForm::BF16, CompactForm::Q4_K] {
        for tokens in [2, 300] {
            let (compact, _) = both(&[2100, 1024], form);
            let operands = [Operand::new(&[tokens, 1024])];
            assert_same_bits_on_any_number_of_threads(&operands, |t: &[Value]| linear(&t[0], &compact, None));
        }
    }
}
