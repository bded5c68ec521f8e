//! The forms: bytes of numbers in 16 bits and of blocks, widened to f32 and the other way.
//!
//! The formats of blocks, their rounding included, are candle's, which follow ggml's; what products read most
//! is widened by [`widen`] and [`nibbles`](super::nibbles).

use std::fmt;

use candle_core::quantized::{GgmlDType, GgmlType, k_quants};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::dots::{dots_bf16, dots_q8_0};
use super::nibbles::Blocks;
use super::widen;

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
            GgmlDType::BF16 => widen::bf16(words, values),
            GgmlDType::F16 => blocks::<f16>(words).convert_to_f32_slice(values),
            GgmlDType::Q4_0 => Blocks::<false, false> { words, values }.widen(),
            GgmlDType::Q4_1 => Blocks::<false, true> { words, values }.widen(),
            GgmlDType::Q5_0 => Blocks::<true, false> { words, values }.widen(),
            GgmlDType::Q5_1 => Blocks::<true, true> { words, values }.widen(),
            GgmlDType::Q8_0 => widen::q8_0(words, values),
            GgmlDType::Q4K => widen::q4_k(words, values),
            GgmlDType::Q6K => widen::q6_k(words, values),
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
