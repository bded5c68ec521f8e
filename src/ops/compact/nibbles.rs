//! Blocks of 32 integers of 4 or 5 bits widened to f32, with the bits of candle's: with AVX2, which compilers do
//! not find in the plain code, or by that.
//!
//! A block is its scale, an f16; its minimum, an f16, where it has one; 32 upper bits, where integers have 5; and
//! 16 bytes of two integers each, the first half of the block in their low halves.

use pulp::{Simd, WithSimd};

use super::widen::{bytes, half};

/// Blocks of integers of 4 bits, or 5 with `FIVE`, which stand for `scale (integer - middle)`, or with `MINIMUM` for
/// `scale integer + minimum`.
pub(super) struct Blocks<'a, const FIVE: bool, const MINIMUM: bool> {
    pub words: &'a [u16],
    pub values: &'a mut [f32],
}

/// What stands before the integers of a block.
#[derive(Clone, Copy)]
struct Head {
    scale: f32,
    /// What is added after scaling.
    minimum: f32,
    /// Upper bits, the first integer's lowest.
    upper: u32,
}

impl<const FIVE: bool, const MINIMUM: bool> Blocks<'_, FIVE, MINIMUM> {
    /// Words before the integers.
    const HEAD: usize = 1 + MINIMUM as usize + 2 * FIVE as usize;

    /// What is taken from an integer.
    const MIDDLE: i32 = match (MINIMUM, FIVE) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };

    pub fn widen(self) {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return simd.vectorize(avx2::Widen { simd, blocks: self });
        }
        pulp::Arch::new().dispatch(self);
    }

    #[inline(always)]
    fn head(block: &[u16]) -> Head {
        let (scale, minimum) = (half(block[0]), if MINIMUM { half(block[1]) } else { 0.0 });
        let upper = if FIVE { &block[Self::HEAD - 2..Self::HEAD] } else { &[0, 0] };
        Head { scale, minimum, upper: u32::from(upper[0]) | u32::from(upper[1]) << 16 }
    }
}

impl<const FIVE: bool, const MINIMUM: bool> WithSimd for Blocks<'_, FIVE, MINIMUM> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Blocks { words, values } = self;
        for (values, block) in values.as_chunks_mut::<32>().0.iter_mut().zip(words.chunks_exact(Self::HEAD + 8)) {
            let Head { scale, minimum, upper } = Self::head(block);
            let pairs: [u8; 16] = bytes(&block[Self::HEAD..]);
            for (place, value) in values.iter_mut().enumerate() {
                let low = u32::from(pairs[place % 16] >> (place / 16 * 4) & 15);
                let integer = (low | (upper >> place & 1) << 4).cast_signed() - Self::MIDDLE;
                *value = integer as f32 * scale;
                if MINIMUM {
                    *value += minimum;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m128i, __m256};

    use pulp::x86::V3;

    use super::{Blocks, Head, bytes};

    /// The places in a block of its quarters.
    const PLACES: [[i32; 8]; 4] = [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, 12, 13, 14, 15],
        [16, 17, 18, 19, 20, 21, 22, 23],
        [24, 25, 26, 27, 28, 29, 30, 31],
    ];

    pub(super) struct Widen<'a, const FIVE: bool, const MINIMUM: bool> {
        pub simd: V3,
        pub blocks: Blocks<'a, FIVE, MINIMUM>,
    }

    impl<const FIVE: bool, const MINIMUM: bool> pulp::NullaryFnOnce for Widen<'_, FIVE, MINIMUM> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let Widen { simd, blocks: Blocks { words, values } } = self;
            let head = Blocks::<FIVE, MINIMUM>::HEAD;
            for (values, block) in values.as_chunks_mut::<32>().0.iter_mut().zip(words.chunks_exact(head + 8)) {
                let pairs: __m128i = pulp::cast(bytes::<16>(&block[head..]));
                let quarters: [__m256; 4] =
                    quarters::<FIVE, MINIMUM>(simd, pairs, Blocks::<FIVE, MINIMUM>::head(block));
                *values = pulp::cast(quarters);
            }
        }
    }

    /// The numbers of a block, a quarter at a time.
    #[inline(always)]
    fn quarters<const FIVE: bool, const MINIMUM: bool>(simd: V3, pairs: __m128i, head: Head) -> [__m256; 4] {
        let fifteen = simd.sse2._mm_set1_epi8(15);
        let low = simd.sse2._mm_and_si128(pairs, fifteen);
        let high = simd.sse2._mm_and_si128(simd.sse2._mm_srli_epi16::<4>(pairs), fifteen);
        let [low_second, high_second] =
            [simd.sse2._mm_unpackhi_epi64(low, low), simd.sse2._mm_unpackhi_epi64(high, high)];
        [
            quarter::<FIVE, MINIMUM>(simd, low, head, PLACES[0]),
            quarter::<FIVE, MINIMUM>(simd, low_second, head, PLACES[1]),
            quarter::<FIVE, MINIMUM>(simd, high, head, PLACES[2]),
            quarter::<FIVE, MINIMUM>(simd, high_second, head, PLACES[3]),
        ]
    }

    /// Those of the first eight integers, at these places of their block.
    #[inline(always)]
    fn quarter<const FIVE: bool, const MINIMUM: bool>(
        simd: V3,
        integers: __m128i,
        head: Head,
        places: [i32; 8],
    ) -> __m256 {
        let mut integers = simd.avx2._mm256_cvtepu8_epi32(integers);
        if FIVE {
            // The bit of each integer comes to the fifth place from below.
            let upper = simd.avx._mm256_set1_epi32(head.upper.cast_signed());
            let bits = simd.avx2._mm256_srlv_epi32(upper, pulp::cast(places));
            let bit = simd.avx2._mm256_and_si256(bits, simd.avx._mm256_set1_epi32(1));
            integers = simd.avx2._mm256_or_si256(integers, simd.avx2._mm256_slli_epi32::<4>(bit));
        }
        let middle = simd.avx._mm256_set1_epi32(Blocks::<FIVE, MINIMUM>::MIDDLE);
        let numbers = simd.avx._mm256_cvtepi32_ps(simd.avx2._mm256_sub_epi32(integers, middle));
        let scaled = simd.avx._mm256_mul_ps(numbers, simd.avx._mm256_set1_ps(head.scale));
        match MINIMUM {
            true => simd.avx._mm256_add_ps(scaled, simd.avx._mm256_set1_ps(head.minimum)),
            false => scaled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_equal_bits<const FIVE: bool, const MINIMUM: bool>() {
        let words = Blocks::<'_, FIVE, MINIMUM>::HEAD + 8;
        // Finite scales and minima of any size and sign, and every integer at every place.
        let is_number = |index: u32| index as usize % words < 1 + usize::from(MINIMUM);
        let word = |index: u32| {
            let word = (index.wrapping_mul(0x9e37_79b1) >> 13) as u16;
            if is_number(index) && word & 0x7c00 == 0x7c00 { word ^ 0x4000 } else { word }
        };
        let blocks: Vec<u16> = (0..words as u32 * 500).map(word).collect();
        let [mut found, mut expected] = [vec![f32::NAN; 32 * 500], vec![f32::NAN; 32 * 500]];
        Blocks::<FIVE, MINIMUM> { words: &blocks, values: &mut found }.widen();
        pulp::Arch::new().dispatch(Blocks::<FIVE, MINIMUM> { words: &blocks, values: &mut expected });
        assert!(found.iter().zip(&expected).all(|(found, expected)| found.to_bits() == expected.to_bits()));
        assert!(expected.iter().all(|number| number.is_finite()));
    }

    #[test]
    fn what_the_processor_has_gives_the_bits_of_plain_code() {
        assert_equal_bits::<false, false>();
        assert_equal_bits::<false, true>();
        assert_equal_bits::<true, false>();
        assert_equal_bits::<true, true>();
    }
}
