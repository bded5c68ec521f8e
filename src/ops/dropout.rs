//! Dropout whose mask is made where it is needed.
//!
//! A mask is a function of its seed and of the row and column of each element, rows being counted from a given first one. So rows that are
//! divided into several inputs, each of which says where its rows begin, have the masks that they have in one input.

use candle_core::Tensor;

use super::backward::Gradient;
use super::matrix::{fill, has_kernel, update_chunks, with_elements};
use super::simd::{add_to, hash, vectorised};
use super::value::{Value, through_candle};
use crate::error::Result;

/// Which elements are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mask {
    /// The probability with which an element is dropped.
    pub probability: f32,
    /// The seed of the random numbers.
    pub seed: u64,
    /// The number of the input's first row among those of the same seed.
    pub first_row: usize,
}

/// Inverted dropout (Srivastava et al. 2014): each element of the rows `x`, `[.., width]`, is kept with probability `1 - probability` and then
/// divided by it. The mask is a function of the seed and the element's row and column alone, so that the backward pass makes it again.
pub fn dropout(x: &Value, mask: &Mask) -> Result<Value> {
    if mask.probability == 0.0 {
        return Ok(x.clone());
    }
    let operation = Dropout::new(mask, width(x.tensor()))?;
    if !has_kernel(&[x.tensor()]) {
        return through_candle(&[x], |t| dropout_reference(&t[0], mask));
    }
    let y = with_elements(x.tensor(), |x| Ok::<_, candle_core::Error>(operation.apply(x)))?;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    let Some(source) = x.source() else { return Ok(Value::constant(y)) };
    Ok(Value::made(y, move |gradient, backward| {
        let dx = operation.apply(gradient.values()?);
        backward.add(&source, Gradient::new(dx, gradient.shape()))
    }))
}

/// The elements of a row.
fn width(x: &Tensor) -> usize {
    x.dims().last().copied().unwrap_or(1)
}

/// [`dropout`] in candle's own operations, with the same mask.
pub fn dropout_reference(x: &Tensor, mask: &Mask) -> Result<Tensor> {
    let dropout = Dropout::new(mask, width(x))?;
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
    /// The number of the first element among those of the same seed.
    first: u64,
    /// An element is kept if its random number reaches this: `probability * 2³²`.
    threshold: u32,
    /// What a kept element is multiplied with.
    scale: f32,
}

impl Dropout {
    /// Of rows of this width.
    pub(super) fn new(mask: &Mask, width: usize) -> Result<Self> {
        let Mask { probability, seed, first_row } = *mask;
        if !(0.0..1.0).contains(&probability) {
            crate::bail!("dropout probability {probability}: expected a number from 0 up to, but not including, 1");
        }
        let threshold = (f64::from(probability) * 4_294_967_296.0) as u32;
        let first = (first_row as u64).wrapping_mul(width as u64);
        Ok(Dropout { seed, first, threshold, scale: 1.0 / (1.0 - probability) })
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
        let mut done = 0;
        while done < y.len() {
            // The low half of the index runs through the loop; the high half and the seed make the two keys of the hash.
            let index = self.first.wrapping_add((start + done) as u64);
            let (low, high) = (index as u32, (index >> 32) as u32);
            let until_overflow = (1u64 << 32) - u64::from(low);
            let end = y.len().min(done.saturating_add(until_overflow as usize));
            let keys = [hash(self.seed as u32 ^ hash(high)), hash((self.seed >> 32) as u32 ^ 0x9e37_79b9)];
            dropout_slice(*self, low, keys, &x[done..end], &mut y[done..end]);
            done = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_close, compare_with_finite_differences, random, run, run_reference};
    use candle_core::{DType, Device};

    fn mask(probability: f32, seed: u64) -> Mask {
        Mask { probability, seed, first_row: 0 }
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        compare_with_finite_differences(&[Operand::new(&[3, 4])], |t| dropout(&t[0], &mask(0.4, 9)));
    }

    #[test]
    fn dropout_keeps_its_share_and_its_mean() -> Result<()> {
        let x = Value::of(&Tensor::ones(1 << 18, DType::F32, &Device::Cpu)?);
        for probability in [0.1_f32, 0.5, 0.9] {
            let y = dropout(&x, &mask(probability, 3))?.tensor().to_vec1::<f32>()?;
            let dropped = y.iter().filter(|&&y| y == 0.0).count() as f32 / y.len() as f32;
            assert!((dropped - probability).abs() < 0.005, "{dropped} of the elements dropped, expected {probability}");
            assert!(y.iter().all(|&y| y == 0.0 || y == 1.0 / (1.0 - probability)));
        }
        Ok(())
    }

    #[test]
    fn the_mask_differs_by_seed_and_is_the_same_forward_backward_and_in_the_reference() -> Result<()> {
        let x = random(&[70, 300], 1);
        let (value, gradient) = run(std::slice::from_ref(&x), &[true], |t| dropout(&t[0], &mask(0.3, 5)));
        let (expected, expected_gradient) =
            run_reference(std::slice::from_ref(&x), &[true], |t| dropout_reference(&t[0], &mask(0.3, 5)));
        assert_close("dropout", &value, &expected, 0.0);
        assert_close("gradient", gradient[0].as_ref().unwrap(), expected_gradient[0].as_ref().unwrap(), 0.0);
        let other = dropout(&Value::of(&x), &mask(0.3, 6))?.tensor().clone();
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
    fn rows_have_one_mask_however_they_are_divided() -> Result<()> {
        let x = random(&[70, 300], 1);
        for first_row in [0, 5, (1usize << 32) / 300 - 20] {
            let masked = |start: usize, len: usize| -> Result<Tensor> {
                let mask = Mask { first_row: first_row + start, ..mask(0.3, 5) };
                Ok(dropout(&Value::of(&x.narrow(0, start, len)?), &mask)?.tensor().clone())
            };
            let parts = [(0, 1), (1, 32), (33, 37)].map(|(start, len)| masked(start, len));
            let parts = Tensor::cat(&parts.into_iter().collect::<Result<Vec<_>>>()?, 0)?;
            assert_close("rows in parts", &parts, &masked(0, 70)?, 0.0);
        }
        Ok(())
    }

    #[test]
    fn dropout_of_nothing_is_the_input_and_of_everything_an_error() -> Result<()> {
        let x = Value::of(&random(&[3], 1));
        assert_eq!(dropout(&x, &mask(0.0, 1))?.tensor().id(), x.tensor().id());
        assert!(dropout(&x, &mask(1.0, 1)).is_err() && dropout(&x, &mask(f32::NAN, 1)).is_err());
        Ok(())
    }
}
