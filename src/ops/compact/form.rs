//! The forms: bytes of numbers in 16 bits and of blocks, widened to f32 and the other way.
//!
//! The formats of blocks, their rounding included, are candle's, which follow ggml's; what products read most
//! is widened here.

use std::fmt;

use candle_core::quantized::{GgmlDType, GgmlType, k_quants};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::dots::{dots_bf16, dots_q8_0};
use crate::ops::simd::vectorised;

/// The form in which a matrix is kept: 16 bits a number, or blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactForm(pub(super) GgmlDType);

impl CompactForm {
    /// 16 bits a number, eight of the exponent.
    pub const BF16: CompactForm = CompactForm(GgmlDType::BF16);
    /// 16 bits a number, five of the exponent.
    pub const F16: CompactForm = CompactForm(GgmlDType::F16);
    /// Blocks of 32 integers of 8 bits.
    pub const Q8_0: CompactForm = CompactForm(GgmlDType::Q8_0);
    /// Blocks of 32 integers of 5 bits.
    pub const Q5_0: CompactForm = CompactForm(GgmlDType::Q5_0);
    /// Blocks of 256 integers of 4 bits, with scales and minima of 32 each.
    pub const Q4_K: CompactForm = CompactForm(GgmlDType::Q4K);

    /// That of a tensor of a GGUF file, whose form may be kept; `None` of f32 and of what no tensor of a file is in.
    pub fn of_ggml(dtype: GgmlDType) -> Option<Self> {
        let is_kept = !matches!(dtype, GgmlDType::F32 | GgmlDType::Q8_1 | GgmlDType::Q8K);
        is_kept.then_some(CompactForm(dtype))
    }

    /// Whether numbers stand in blocks that share a scale.
    pub fn is_quantised(self) -> bool {
        self.0.block_size() > 1
    }

    /// Whether rows of so many numbers can be kept in it.
    pub fn fits(self, columns: usize) -> bool {
        columns.is_multiple_of(self.0.block_size())
    }

    /// How many numbers share a scale, or 1.
    pub(super) fn block_size(self) -> usize {
        self.0.block_size()
    }

    /// The bytes of a row.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / self.0.block_size() * self.0.type_size()
    }
}

impl fmt::Display for CompactForm {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self.0 {
            GgmlDType::F32 => "f32",
            GgmlDType::F16 => "f16",
            GgmlDType::BF16 => "bf16",
            GgmlDType::Q4_0 => "q4_0",
            GgmlDType::Q4_1 => "q4_1",
            GgmlDType::Q5_0 => "q5_0",
            GgmlDType::Q5_1 => "q5_1",
            GgmlDType::Q8_0 => "q8_0",
            GgmlDType::Q8_1 => "q8_1",
            GgmlDType::Q2K => "q2_k",
            GgmlDType::Q3K => "q3_k",
            GgmlDType::Q4K => "q4_k",
            GgmlDType::Q5K => "q5_k",
            GgmlDType::Q6K => "q6_k",
            GgmlDType::Q8K => "q8_k",
        })
    }
}

/// Runs `$run` with `$block` as the type of the blocks of a form.
macro_rules! with_blocks {
    ($form:expr, $block:ident => $run:expr) => {
        match $form.0 {
            GgmlDType::F32 | GgmlDType::Q8_1 | GgmlDType::Q8K => unreachable!("no matrix is kept in {}", $form),
            GgmlDType::F16 => {
                type $block = f16;
                $run
            }
            GgmlDType::BF16 => {
                type $block = bf16;
                $run
            }
            GgmlDType::Q4_0 => {
                type $block = k_quants::BlockQ4_0;
                $run
            }
            GgmlDType::Q4_1 => {
                type $block = k_quants::BlockQ4_1;
                $run
            }
            GgmlDType::Q5_0 => {
                type $block = k_quants::BlockQ5_0;
                $run
            }
            GgmlDType::Q5_1 => {
                type $block = k_quants::BlockQ5_1;
                $run
            }
            GgmlDType::Q8_0 => {
                type $block = k_quants::BlockQ8_0;
                $run
            }
            GgmlDType::Q2K => {
                type $block = k_quants::BlockQ2K;
                $run
            }
            GgmlDType::Q3K => {
                type $block = k_quants::BlockQ3K;
                $run
            }
            GgmlDType::Q4K => {
                type $block = k_quants::BlockQ4K;
                $run
            }
            GgmlDType::Q5K => {
                type $block = k_quants::BlockQ5K;
                $run
            }
            GgmlDType::Q6K => {
                type $block = k_quants::BlockQ6K;
                $run
            }
        }
    };
}

/// Words as blocks.
fn blocks<B: GgmlType>(words: &[u16]) -> &[B] {
    let (count, rest) = (size_of_val(words) / size_of::<B>(), size_of_val(words) % size_of::<B>());
    assert!(rest == 0 && align_of::<B>() <= align_of::<u16>());
    // SAFETY: the blocks of all forms that are kept are plain integers and halves in the order of C, of which
    // every pattern of bits is one; the words are as many, and lie as evenly, as was just checked.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), count) }
}

/// The same, to be written.
fn blocks_mut<B: GgmlType>(words: &mut [u16]) -> &mut [B] {
    let (count, rest) = (size_of_val(words) / size_of::<B>(), size_of_val(words) % size_of::<B>());
    assert!(rest == 0 && align_of::<B>() <= align_of::<u16>());
    // SAFETY: as above, and every block is words again.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), count) }
}

impl CompactForm {
    /// Whole blocks in f32.
    pub(super) fn widen(self, words: &[u16], values: &mut [f32]) {
        match self.0 {
            GgmlDType::BF16 => widen_bf16(words, values),
            GgmlDType::F16 => blocks::<f16>(words).convert_to_f32_slice(values),
            GgmlDType::Q8_0 => widen_q8_0(words, values),
            GgmlDType::Q4K => widen_q4_k(words, values),
            _ => with_blocks!(self, Block => Block::to_float(blocks::<Block>(words), values)),
        }
    }

    /// The other way. What is not finite has no place among small integers, and stays the same in 16 bits.
    pub(super) fn round(self, values: &[f32], words: &mut [u16]) {
        match self.0 {
            GgmlDType::BF16 => blocks_mut::<bf16>(words).convert_from_f32_slice(values),
            GgmlDType::F16 => blocks_mut::<f16>(words).convert_from_f32_slice(values),
            _ => with_blocks!(self, Block => Block::from_float(values, blocks_mut::<Block>(words))),
        }
    }

    /// Whether rows in this form are multiplied with [`CompactForm::dots`].
    pub(super) fn has_dots(self) -> bool {
        matches!(self, CompactForm::BF16 | CompactForm::Q8_0)
    }

    /// `factor w · x`, or `+= factor w · x`, for each row `w`, widened in registers.
    pub(super) fn dots(self, words: &[u16], x: &[f32], factor: f32, accumulate: bool, dots: &mut [f32]) {
        match self {
            CompactForm::BF16 => dots_bf16(words, x, factor, accumulate, dots),
            CompactForm::Q8_0 => dots_q8_0(words, x, factor, accumulate, dots),
            _ => unreachable!("{self} has no such product"),
        }
    }
}

/// Words of a block of 32 integers of 8 bits: the scale, an f16, and the integers.
pub(super) const Q8_0_WORDS: usize = 17;

/// Words of a block of 256 integers of 4 bits: a scale and a scale of minima, f16, 12 bytes of scales and
/// minima of 6 bits, and the integers.
const Q4_K_WORDS: usize = 72;

/// A half in f32.
#[inline(always)]
pub(super) fn half(bits: u16) -> f32 {
    // The exponents of f32 begin 112 lower. Infinities and what is no number have the largest exponent, which stays.
    let magnitude = match bits & 0x7c00 {
        0x7c00 => f16::from_bits(bits & 0x7fff).to_f32_const(),
        _ => f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23),
    };
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// The integers of a block in 8 bits.
#[inline(always)]
pub(super) fn integers(block: &[u16; Q8_0_WORDS]) -> [i8; 32] {
    let mut integers = [0i8; 32];
    for (pair, word) in integers.as_chunks_mut::<2>().0.iter_mut().zip(&block[1..]) {
        *pair = word.to_le_bytes().map(u8::cast_signed);
    }
    integers
}

vectorised! {
    fn widen_bf16<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (value, &word) in values.iter_mut().zip(words) {
            *value = f32::from_bits(u32::from(word) << 16);
        }
    }

    fn widen_q8_0<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<32>().0.iter_mut().zip(words.as_chunks::<Q8_0_WORDS>().0) {
            let scale = half(block[0]);
            for (value, integer) in values.iter_mut().zip(integers(block)) {
                *value = f32::from(integer) * scale;
            }
        }
    }

    fn widen_q4_k<'a>(words: &'a [u16], values: &'a mut [f32]) {
        for (values, block) in values.as_chunks_mut::<256>().0.iter_mut().zip(words.as_chunks::<Q4_K_WORDS>().0) {
            let [scale, minimum] = [block[0], block[1]].map(half);
            let mut bytes = [0u8; 12];
            for (pair, word) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(&block[2..8]) {
                *pair = word.to_le_bytes();
            }
            for (part, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (of_scale, of_minimum) = scale_and_minimum(&bytes, part);
                let (scale, minimum) = (scale * f32::from(of_scale), minimum * f32::from(of_minimum));
                // 32 bytes hold the low halves of one part and the high halves of the next.
                let shift = 4 * (part % 2);
                let mut integers = [0u8; 32];
                for (pair, word) in integers.as_chunks_mut::<2>().0.iter_mut().zip(&block[8 + part / 2 * 16..][..16]) {
                    *pair = word.to_le_bytes();
                }
                for (value, byte) in values.iter_mut().zip(integers) {
                    *value = scale * f32::from(byte >> shift & 15) - minimum;
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
