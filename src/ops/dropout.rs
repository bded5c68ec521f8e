//! Dropout whose mask is made where it is needed.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::matrix::{elements, fill, has_kernel, update_chunks, with_elements};
use super::simd::{add_to, hash, vectorised};
use crate::error::Result;

/// Inverted dropout (Srivastava et al. 2014): each element is kept with probability `1 - probability` and then divided by it.
/// The mask is a function of `seed` and the element's index alone, so that the backward pass makes it again.
pub fn dropout(x: &Tensor, probability: f32, seed: u64) -> Result<Tensor> {
    if probability == 0.0 {
        return Ok(x.clone());
    }
    let operation = Dropout::new(probability, seed)?;
    if !has_kernel(&[x]) {
        return dropout_reference(x, probability, seed);
    }
    Ok(x.contiguous()?.apply_op1(operation)?)
}

/// [`dropout`] in candle's own operations, with the same mask.
pub fn dropout_reference(x: &Tensor, probability: f32, seed: u64) -> Result<Tensor> {
    let dropout = Dropout::new(probability, seed)?;
    let ones = vec![1.0; x.elem_count()];
    let mask = Tensor::from_vec(dropout.apply(&ones), x.shape(), x.device())?;
    Ok(x.mul(&mask.to_dtype(x.dtype())?)?)
}

vectorised! {
    fn dropout_slice<'a>(mask: Dropout, first: u32, keys: [u32; 2], x: &'a [f32], y: &'a mut [f32]) {
        for (index, (y, &x)) in (0_u32..).zip(y.iter_mut().zip(x)) {
            let random = hash(hash(first.wrapping_add(index) ^ keys[0]).wrapping_add(keys[1]));
            *y = if random >= mask.threshold { x * mask.scale } else { 0.0 };
        }
    }
}

/// A mask that is made where it is needed.
#[derive(Clone, Copy)]
pub(super) struct Dropout {
    seed: u64,
    /// An element is kept if its random number reaches this: `probability * 2³²`.
    threshold: u32,
    /// What a kept element is multiplied with.
    scale: f32,
}

impl Dropout {
    pub(super) fn new(probability: f32, seed: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&probability) {
            crate::bail!("dropout probability {probability}: expected a number from 0 up to, but not including, 1");
        }
        let threshold = (f64::from(probability) * 4_294_967_296.0) as u32;
        Ok(Dropout { seed, threshold, scale: 1.0 / (1.0 - probability) })
    }

    /// The masked and scaled elements of `x`.
    pub(super) fn apply(&self, x: &[f32]) -> Vec<f32> {
        fill(x.len(), |start, y| self.apply_chunk(start, &x[start..][..y.len()], y))
    }

    /// Adds the masked and scaled elements of `x` to `y`.
    pub(super) fn add(&self, x: &[f32], y: &mut [f32]) {
        update_chunks(y, |start, y| {
            let mut masked = vec![0.0; y.len()];
            self.apply_chunk(start, &x[start..][..y.len()], &mut masked);
            add_to(y, &masked);
        });
    }

    fn apply_chunk(&self, start: usize, x: &[f32], y: &mut [f32]) {
        // The low half of the index runs through the loop; the high half and the seed make the two keys of the hash.
        // Chunks are a power of two long, so the low half does not overflow within one.
        let (low, high) = (start as u32, (start as u64 >> 32) as u32);
        let keys = [hash(self.seed as u32 ^ hash(high)), hash((self.seed >> 32) as u32 ^ 0x9e37_79b9)];
        dropout_slice(*self, low, keys, x, y);
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.apply(elements(x, layout)?)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dx = with_elements(gradient, |gradient| Ok(self.apply(gradient)))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_close, compare_with_finite_differences, random, run};
    use candle_core::{DType, Device};

    #[test]
    fn gradient_agrees_with_finite_differences() {
        compare_with_finite_differences(&[Operand::new(&[3, 4])], |t| dropout(&t[0], 0.4, 9));
    }

    #[test]
    fn dropout_keeps_its_share_and_its_mean() -> Result<()> {
        let x = Tensor::ones(1 << 18, DType::F32, &Device::Cpu)?;
        for probability in [0.1_f32, 0.5, 0.9] {
            let y = dropout(&x, probability, 3)?.to_vec1::<f32>()?;
            let dropped = y.iter().filter(|&&y| y == 0.0).count() as f32 / y.len() as f32;
            assert!((dropped - probability).abs() < 0.005, "{dropped} of the elements dropped, expected {probability}");
            assert!(y.iter().all(|&y| y == 0.0 || y == 1.0 / (1.0 - probability)));
        }
        Ok(())
    }

    #[test]
    fn the_mask_differs_by_seed_and_is_the_same_forward_backward_and_in_the_reference() -> Result<()> {
        let x = random(&[70, 300], 1);
        let (value, gradient) = run(std::slice::from_ref(&x), &[true], |t| dropout(&t[0], 0.3, 5));
        let (expected, expected_gradient) =
            run(std::slice::from_ref(&x), &[true], |t| dropout_reference(&t[0], 0.3, 5));
        assert_close("dropout", &value, &expected, 0.0);
        assert_close("gradient", gradient[0].as_ref().unwrap(), expected_gradient[0].as_ref().unwrap(), 0.0);
        let other = dropout(&x, 0.3, 6)?;
        let both: f32 = value
            .ne(0f32)?
            .to_dtype(DType::F32)?
            .mul(&other.ne(0f32)?.to_dtype(DType::F32)?)?
            .mean_all()?
            .to_scalar()?;
        assert!((both - 0.49).abs() < 0.02, "masks of different seeds overlap in {both}, expected 0.49");
        Ok(())
    }

    #[test]
    fn dropout_of_nothing_is_the_input_and_of_everything_an_error() -> Result<()> {
        let x = random(&[3], 1);
        assert_eq!(dropout(&x, 0.0, 1)?.id(), x.id());
        assert!(dropout(&x, 1.0, 1).is_err() && dropout(&x, f32::NAN, 1).is_err());
        Ok(())
    }
}
