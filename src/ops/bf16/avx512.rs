//! Products of pairs by AVX512-BF16, and the packing of operands that the tiles of AMX share.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{is_available, is_faster_than_f32, multiply, pack};

#[cfg(not(target_arch = "x86_64"))]
pub(super) use elsewhere::{is_available, is_faster_than_f32, multiply, pack};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;
    use std::ops::Range;

    use super::super::super::matrix::Matrix;
    use super::super::Strip;
    use super::super::pack::{Form, HALF, SIDE, Tile};

    /// Whether the processor has the instructions.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16")
    }

    /// Whether its products of pairs are faster than its products in f32: on AMD's processors (Zen 4 and
    /// later) they are twice as fast, on Intel's half as fast.
    pub fn is_faster_than_f32() -> bool {
        let vendor = __cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        name == *b"AuthenticAMD"
    }

    /// Rows whose sums are held at a time: with 32 columns, 16 registers.
    const AT_ONCE: usize = 8;

    /// Multiplies a strip.
    ///
    /// # Safety
    /// The strip's tiles are there, its rows and columns of the target are the caller's own, and the
    /// processor has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn multiply(strip: &Strip) {
        for (panel, first) in (0..strip.columns).step_by(SIDE).enumerate() {
            for row in (0..strip.rows).step_by(AT_ONCE) {
                // SAFETY: within the strip; as the caller promises.
                unsafe {
                    match (strip.rows - row).min(AT_ONCE) {
                        1 => block::<1>(strip, panel, first, row),
                        2 => block::<2>(strip, panel, first, row),
                        3 => block::<3>(strip, panel, first, row),
                        4 => block::<4>(strip, panel, first, row),
                        5 => block::<5>(strip, panel, first, row),
                        6 => block::<6>(strip, panel, first, row),
                        7 => block::<7>(strip, panel, first, row),
                        _ => block::<8>(strip, panel, first, row),
                    }
                }
            }
        }
    }

    /// `R` rows from `row` on, by the columns of one panel. Each sum goes over the pairs of `k` in order, and
    /// is then added to the target.
    ///
    /// # Safety
    /// As for [`multiply`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn block<const R: usize>(strip: &Strip, panel: usize, first: usize, row: usize) {
        // SAFETY: the caller checked that the strip's tiles are there: each step reads two of either side.
        // The target is written within the strip's rows and, by the masks, columns.
        unsafe {
            let mut a = strip.a.as_ptr().add(row / HALF).cast::<i32>().add(row % HALF * (SIDE / 2));
            let mut b = strip.b.as_ptr().add(panel * strip.panel).cast::<__m512i>();
            // The lines to be written are fetched while the sums are made.
            for index in 0..R {
                let line = strip.target.wrapping_add((row + index) * strip.row_stride + first).cast::<i8>();
                _mm_prefetch::<_MM_HINT_ET0>(line);
                _mm_prefetch::<_MM_HINT_ET0>(line.wrapping_add(64));
            }
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            for _ in 0..strip.steps {
                for pair in 0..SIDE / 2 {
                    let columns = [_mm512_load_si512(b.add(pair)), _mm512_load_si512(b.add(HALF + pair))];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let number: __m512bh = core::mem::transmute(_mm512_set1_epi32(*a.add(row * (SIDE / 2) + pair)));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = _mm512_dpbf16_ps(*sum, number, core::mem::transmute::<__m512i, __m512bh>(column));
                        }
                    }
                }
                a = a.add(2 * HALF * SIDE / 2);
                b = b.add(2 * HALF);
            }
            let factor = _mm512_set1_ps(strip.factor);
            for (index, sums) in sums.into_iter().enumerate() {
                for (half, sum) in sums.into_iter().enumerate() {
                    let column = first + half * HALF;
                    if column < strip.columns {
                        let mask = mask16(strip.columns - column);
                        let target = strip.target.add((row + index) * strip.row_stride + column);
                        let sum = match strip.add {
                            true => _mm512_fmadd_ps(factor, sum, _mm512_maskz_loadu_ps(mask, target)),
                            false => _mm512_mul_ps(factor, sum),
                        };
                        _mm512_mask_storeu_ps(target, mask, sum);
                    }
                }
            }
        }
    }

    /// The first `count` of 16.
    fn mask16(count: usize) -> u16 {
        if count >= 16 { u16::MAX } else { (1 << count) - 1 }
    }

    /// For each of 16 numbers of the first half of a register, it and that of the second half.
    static INTERLEAVED: [u16; 32] = {
        let mut order = [0; 32];
        let mut index = 0;
        while index < 16 {
            order[2 * index] = index as u16;
            order[2 * index + 1] = 16 + index as u16;
            index += 1;
        }
        order
    };

    /// As [`pack`](super::super::pack::pack).
    ///
    /// # Safety
    /// `rows` and `ks` are within the matrix, that within its data, and one of its strides is 1; the
    /// processor has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn pack(x: Matrix, rows: Range<usize>, ks: Range<usize>, form: Form, tiles: &mut [Tile]) {
        let (panels, steps) = (rows.len().div_ceil(SIDE), ks.len().div_ceil(SIDE));
        let mut one = |panel: usize, step: usize| {
            for (half, to) in tiles[(panel * steps + step) * 2..][..2].iter_mut().enumerate() {
                let first = rows.start + panel * SIDE + half * HALF;
                let part = (first.min(rows.end)..rows.end, ks.start + step * SIDE..ks.end);
                // SAFETY: as the caller promises.
                unsafe { tile(x, part.0, part.1, form, to) };
            }
        };
        // Memory is read in the order in which it lies.
        match x.column_stride {
            1 => (0..panels).for_each(|panel| (0..steps).for_each(|step| one(panel, step))),
            _ => (0..steps).for_each(|step| (0..panels).for_each(|panel| one(panel, step))),
        }
    }

    /// Two times 16 numbers rounded to bf16, the first `counts` of each, then zeros.
    ///
    /// # Safety
    /// So many numbers are at the pointers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn rounded(first: *const f32, second: *const f32, counts: [usize; 2]) -> __m512i {
        // SAFETY: no more is read than is there.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask16(counts[0]), first);
            let high = _mm512_maskz_loadu_ps(mask16(counts[1]), second);
            core::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    /// One tile of the first 16 of `rows` by the first 32 of `ks`.
    ///
    /// # Safety
    /// As for [`pack`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile(x: Matrix, rows: Range<usize>, ks: Range<usize>, form: Form, to: &mut Tile) {
        let (count, depth) = (rows.len().min(HALF), ks.len().min(SIDE));
        let mut lines = [_mm512_setzero_si512(); HALF];
        // Lines of k for each row where they are contiguous, else of rows for each pair of k.
        let by_rows = x.column_stride == 1;
        // SAFETY: the pointers are within the matrix, or nothing is read from them.
        unsafe {
            if by_rows {
                for (row, line) in lines.iter_mut().enumerate().take(count) {
                    let at = x.data.as_ptr().add((rows.start + row) * x.row_stride + ks.start);
                    *line = rounded(at, at.wrapping_add(16), [depth, depth.saturating_sub(16)]);
                }
            } else if count > 0 {
                let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
                for (pair, line) in lines.iter_mut().enumerate().take(depth.div_ceil(2)) {
                    let at = x.data.as_ptr().add((ks.start + 2 * pair) * x.column_stride + rows.start);
                    let second = if 2 * pair + 1 < depth { count } else { 0 };
                    let pair = rounded(at, at.wrapping_add(x.column_stride), [count, second]);
                    *line = _mm512_permutexvar_epi16(order, pair);
                }
            }
            if by_rows == (form == Form::Pairs) {
                transpose(&mut lines);
            }
            let to = to.0.as_mut_ptr().cast::<__m512i>();
            for (index, line) in lines.into_iter().enumerate() {
                _mm512_store_si512(to.add(index), line);
            }
        }
    }

    /// Transposes 16 by 16 units of 32 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn transpose(r: &mut [__m512i; 16]) {
        let mut t = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        }
        for i in 0..4 {
            r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
            r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
            r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    use std::ops::Range;

    use super::super::super::matrix::Matrix;
    use super::super::Strip;
    use super::super::pack::{Form, Tile};

    pub fn is_available() -> bool {
        false
    }

    pub fn is_faster_than_f32() -> bool {
        false
    }

    pub unsafe fn multiply(_: &Strip) {
        unreachable!("the kernel is not available");
    }

    pub unsafe fn pack(_: Matrix, _: Range<usize>, _: Range<usize>, _: Form, _: &mut [Tile]) {
        unreachable!("no kernel with vectors is available");
    }
}
