//! Blocks of small integers widened to f32, as candle does it number by number, here by vectors.
//!
//! A block begins with its scale, an f16, except in `q6_k`, where it is last. Blocks of 32 integers of 4 or 5
//! bits are in [`nibbles`](super::nibbles).

use crate::ops::simd::vectorised;

/// Words of a block of 32 integers of 8 bits: the scale and the integers.
pub(super) const Q8_0_WORDS: usize = 17;

/// Words of a block of 256 integers of 4 bits: a scale and a scale of minima, f16, 12 bytes of scales and
/// minima of 6 bits, and the integers.
const Q4_K_WORDS: usize = 72;

/// Words of a block of 256 integers of 6 bits: 128 bytes of lower halves, 64 of upper quarters, 16 scales of 8
/// bits, and their scale, f16.
const Q6_K_WORDS: usize = 105;

/// A half in f32.
#[inline(always)]
pub(super) fn half(bits: u16) -> f32 {
    // The exponents of f32 begin 112 lower.
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    // Infinities and what is no number have the largest exponent, which stays.
    let largest = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | largest | u32::from(bits & 0x8000) << 16)
}

/// The integers of a block of 8 bits.
#[inline(always)]
pub(super) fn integers(block: &[u16; Q8_0_WORDS]) -> [i8; 32] {
    signed(bytes(&block[1..]))
}

/// Bytes as integers with a sign: an array's `map` would be a call in the middle of a loop over blocks.
#[inline(always)]
fn signed<const N: usize>(bytes: [u8; N]) -> [i8; N] {
    let mut integers = [0; N];
    for (integer, byte) in integers.iter_mut().zip(bytes) {
        *integer = byte.cast_signed();
    }
    integers
}

/// Words as bytes.
#[inline(always)]
pub(super) fn bytes<const N: usize>(words: &[u16]) -> [u8; N] {
    let mut bytes = [0u8; N];
    for (pair, word) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(words) {
        *pair = word.to_le_bytes();
    }
    bytes
}

vectorised! {
    pub(super) fn bf16<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (value, &word) in values.iter_mut().zip(words) {
            *value = f32::from_bits(u32::from(word) << 16);
        }
    }

    pub(super) fn q8_0<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<32>().0.iter_mut().zip(words.as_chunks::<Q8_0_WORDS>().0) {
            let scale = half(block[0]);
            for (value, integer) in values.iter_mut().zip(integers(block)) {
                *value = f32::from(integer) * scale;
            }
        }
    }

    pub(super) fn q4_k<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<256>().0.iter_mut().zip(words.as_chunks::<Q4_K_WORDS>().0) {
            let (scale, minimum) = (half(block[0]), half(block[1]));
            let scales: [u8; 12] = bytes(&block[2..8]);
            for (part, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (of_scale, of_minimum) = scale_and_minimum(&scales, part);
                let (scale, minimum) = (scale * f32::from(of_scale), minimum * f32::from(of_minimum));
                // 32 bytes hold the low halves of one part and the high halves of the next.
                let shift = 4 * (part % 2);
                let integers: [u8; 32] = bytes(&block[8 + part / 2 * 16..][..16]);
                for (value, byte) in values.iter_mut().zip(integers) {
                    *value = scale * f32::from(byte >> shift & 15) - minimum;
                }
            }
        }
    }

    pub(super) fn q6_k<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<256>().0.iter_mut().zip(words.as_chunks::<Q6_K_WORDS>().0) {
            let scale = half(block[Q6_K_WORDS - 1]);
            let scales: [i8; 16] = signed(bytes(&block[96..104]));
            for (side, values) in values.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let lower: [u8; 64] = bytes(&block[32 * side..][..32]);
                let upper: [u8; 32] = bytes(&block[64 + 16 * side..][..16]);
                for (part, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let lower = &lower[part % 2 * 32..][..32];
                    for (sixteen, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                        let scale = scale * f32::from(scales[8 * side + 2 * part + sixteen]);
                        let bytes = lower[16 * sixteen..][..16].iter().zip(&upper[16 * sixteen..][..16]);
                        for (value, (lower, upper)) in values.iter_mut().zip(bytes) {
                            let integer = lower >> (part / 2 * 4) & 15 | (upper >> (2 * part) & 3) << 4;
                            *value = scale * f32::from(integer.cast_signed() - 32);
                        }
                    }
                }
            }
        }
    }
}

/// The scale and the minimum of one of eight parts of a block, 6 bits each: four of each stand whole, of the
/// others the upper bits are where those have room (ggml's `get_scale_min_k4`).
#[inline(always)]
fn scale_and_minimum(bytes: &[u8; 12], part: usize) -> (u8, u8) {
    match part {
        0..4 => (bytes[part] & 63, bytes[part + 4] & 63),
        _ => {
            let low = bytes[part + 4];
            (low & 15 | bytes[part - 4] >> 6 << 4, low >> 4 | bytes[part] >> 6 << 4)
        }
    }
}
