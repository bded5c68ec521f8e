//! Dot products of the rows of a matrix with one row, widened in registers.

use super::widen::{Q8_0_WORDS, half, integers};
use crate::ops::dot_products::{AHEAD, fetch};
use crate::ops::simd::{LANES, total, vectorised};

/// Starts to bring what comes some way after these words into the cache.
#[inline(always)]
fn fetch_after(words: &[u16]) {
    fetch(words.as_ptr().cast::<f32>().wrapping_add(AHEAD));
}

/// Numbers that are multiplied at a time, and sums of a row, of blocks of 32 integers.
const EIGHT: usize = 8;

vectorised! {
    /// [`dots_bf16`] in plain code.
    fn dots_bf16_plain<'a>(words: &'a [u16], x: &'a [f32], factor: f32, accumulate: bool, dots: &'a mut [f32]) {
        for (dot, row) in dots.iter_mut().zip(words.chunks_exact(x.len())) {
            let mut sums = [0.0; LANES];
            let ((words, words_rest), (x, x_rest)) = (row.as_chunks::<LANES>(), x.as_chunks::<LANES>());
            for (words, x) in words.iter().zip(x) {
                fetch_after(words);
                for lane in 0..LANES {
                    sums[lane] = x[lane].mul_add(f32::from_bits(u32::from(words[lane]) << 16), sums[lane]);
                }
            }
            for ((sum, &word), &x) in sums.iter_mut().zip(words_rest).zip(x_rest) {
                *sum = x.mul_add(f32::from_bits(u32::from(word) << 16), *sum);
            }
            *dot = factor * total(sums) + if accumulate { *dot } else { 0.0 };
        }
    }

    /// [`dots_q8_0`] in plain code.
    fn dots_q8_0_plain<'a>(words: &'a [u16], x: &'a [f32], factor: f32, accumulate: bool, dots: &'a mut [f32]) {
        let x = x.as_chunks::<32>().0;
        for (dot, row) in dots.iter_mut().zip(words.chunks_exact(x.len() * Q8_0_WORDS)) {
            let mut sums = [0.0f32; EIGHT];
            for (block, x) in row.as_chunks::<Q8_0_WORDS>().0.iter().zip(x) {
                fetch_after(block);
                let (scale, integers) = (half(block[0]), integers(block));
                for lane in 0..EIGHT {
                    let product = |part: usize| x[part * EIGHT + lane] * f32::from(integers[part * EIGHT + lane]);
                    let plus = |part: usize, sum: f32| {
                        x[part * EIGHT + lane].mul_add(f32::from(integers[part * EIGHT + lane]), sum)
                    };
                    sums[lane] = (plus(1, product(0)) + plus(3, product(2))).mul_add(scale, sums[lane]);
                }
            }
            *dot = factor * total(sums) + if accumulate { *dot } else { 0.0 };
        }
    }
}

/// [`CompactForm::dots`](super::CompactForm::dots) of rows in bf16: with AVX2, which compilers do not find in the
/// plain code, or by that, in the same order.
pub(super) fn dots_bf16(words: &[u16], x: &[f32], factor: f32, accumulate: bool, dots: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(avx2::Dots { simd, words, x, factor, accumulate, dots, form: avx2::Bf16 });
    }
    dots_bf16_plain(words, x, factor, accumulate, dots);
}

/// The same of rows in blocks of 8 bits.
pub(super) fn dots_q8_0(words: &[u16], x: &[f32], factor: f32, accumulate: bool, dots: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(avx2::Dots { simd, words, x, factor, accumulate, dots, form: avx2::Q8 });
    }
    dots_q8_0_plain(words, x, factor, accumulate, dots);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m128i, __m256};

    use pulp::x86::V3;

    use super::{EIGHT, LANES, Q8_0_WORDS, fetch_after, half, integers, total};

    /// Rows of one form, and what they are multiplied with.
    pub(super) struct Dots<'a, F> {
        pub simd: V3,
        pub words: &'a [u16],
        pub x: &'a [f32],
        pub factor: f32,
        pub accumulate: bool,
        pub dots: &'a mut [f32],
        pub form: F,
    }

    /// A form of rows.
    pub(super) trait Row {
        /// The words of a row of so many numbers.
        fn words(&self, columns: usize) -> usize;

        /// The sum of the products of a row with `x`.
        fn dot(&self, simd: V3, row: &[u16], x: &[f32]) -> f32;
    }

    pub(super) struct Bf16;

    pub(super) struct Q8;

    impl<F: Row> pulp::NullaryFnOnce for Dots<'_, F> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let Dots { simd, words, x, factor, accumulate, dots, form } = self;
            for (dot, row) in dots.iter_mut().zip(words.chunks_exact(form.words(x.len()))) {
                *dot = factor * form.dot(simd, row, x) + if accumulate { *dot } else { 0.0 };
            }
        }
    }

    impl Row for Bf16 {
        fn words(&self, columns: usize) -> usize {
            columns
        }

        #[inline(always)]
        fn dot(&self, simd: V3, row: &[u16], x: &[f32]) -> f32 {
            let ((row, rest), (x, x_rest)) = (row.as_chunks::<LANES>(), x.as_chunks::<LANES>());
            let mut sums = [simd.avx._mm256_setzero_ps(); 4];
            for (words, x) in row.iter().zip(x) {
                fetch_after(words);
                let (words, x): ([__m128i; 4], [__m256; 4]) = (pulp::cast(*words), pulp::cast(*x));
                for part in 0..4 {
                    let widened = simd.avx2._mm256_slli_epi32::<16>(simd.avx2._mm256_cvtepu16_epi32(words[part]));
                    sums[part] = simd.fma._mm256_fmadd_ps(x[part], pulp::cast(widened), sums[part]);
                }
            }
            let mut sums: [f32; LANES] = pulp::cast(sums);
            for ((sum, &word), &x) in sums.iter_mut().zip(rest).zip(x_rest) {
                *sum = x.mul_add(f32::from_bits(u32::from(word) << 16), *sum);
            }
            total(sums)
        }
    }

    impl Row for Q8 {
        fn words(&self, columns: usize) -> usize {
            columns / 32 * Q8_0_WORDS
        }

        #[inline(always)]
        fn dot(&self, simd: V3, row: &[u16], x: &[f32]) -> f32 {
            let mut sums = simd.avx._mm256_setzero_ps();
            for (block, x) in row.as_chunks::<Q8_0_WORDS>().0.iter().zip(x.as_chunks::<32>().0) {
                fetch_after(block);
                let scale = simd.avx._mm256_set1_ps(half(block[0]));
                sums = simd.fma._mm256_fmadd_ps(block_sums(simd, &integers(block), x), scale, sums);
            }
            total::<EIGHT>(pulp::cast(sums))
        }
    }

    /// The products of a block without its scale, summed over four eighths.
    #[inline(always)]
    fn block_sums(simd: V3, integers: &[i8; 32], x: &[f32; 32]) -> __m256 {
        let x: [__m256; 4] = pulp::cast(*x);
        let integers: [i64; 4] = pulp::cast(*integers);
        let widened = |part: usize| {
            let eight: __m128i = pulp::cast([integers[part], 0]);
            simd.avx._mm256_cvtepi32_ps(simd.avx2._mm256_cvtepi8_epi32(eight))
        };
        let pair = |part: usize| {
            let first = simd.avx._mm256_mul_ps(x[part], widened(part));
            simd.fma._mm256_fmadd_ps(x[part + 1], widened(part + 1), first)
        };
        simd.avx._mm256_add_ps(pair(0), pair(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::compact::{Compact, CompactForm};
    use crate::ops::testing::random;

    #[test]
    fn what_the_processor_has_gives_the_bits_of_plain_code() {
        type Dots = fn(&[u16], &[f32], f32, bool, &mut [f32]);
        let forms: [(CompactForm, usize, Dots, Dots); 3] = [
            (CompactForm::Q8_0, 576, dots_q8_0, |w, x, f, a, d| dots_q8_0_plain(w, x, f, a, d)),
            (CompactForm::BF16, 576, dots_bf16, |w, x, f, a, d| dots_bf16_plain(w, x, f, a, d)),
            (CompactForm::BF16, 45, dots_bf16, |w, x, f, a, d| dots_bf16_plain(w, x, f, a, d)),
        ];
        for (form, columns, by_processor, plain) in forms {
            let rows = 37;
            let matrix = Compact::of(&random(&[rows, columns], 1), form).unwrap();
            let x: Vec<f32> = random(&[columns], 2).to_vec1().unwrap();
            for accumulate in [false, true] {
                let [mut found, mut expected] = [vec![0.5; rows], vec![0.5; rows]];
                by_processor(&matrix.words, &x, 0.7, accumulate, &mut found);
                plain(&matrix.words, &x, 0.7, accumulate, &mut expected);
                assert_eq!(found, expected);
            }
        }
    }
}
