//! The tile product in plain code.

use super::Strip;
use super::pack::{HALF, SIDE, Tile, widen};

/// Multiplies as the tiles of AMX do: for each step the sums over the even and over the odd `k`, which are
/// added up, and then to the result. Numbers below the smallest normal one count as 0.
///
/// # Safety
/// The strip's rows and columns of the target are the caller's own.
pub(super) unsafe fn multiply(strip: &Strip) {
    for row in 0..strip.rows {
        for first in (0..strip.columns).step_by(HALF) {
            let width = HALF.min(strip.columns - first);
            // SAFETY: within the strip, which is the caller's own.
            let target =
                unsafe { std::slice::from_raw_parts_mut(strip.target.add(row * strip.row_stride + first), width) };
            // A product without a factor is added to what is there step by step.
            let (adds, starts) = (strip.add, strip.add && strip.factor == 1.0);
            let mut sums = [0.0; HALF];
            if starts {
                sums[..width].copy_from_slice(target);
            }
            for step in 0..strip.steps {
                let a = &strip.a[step * 2 + row / HALF].0[row % HALF * SIDE..][..SIDE];
                let b = &strip.b[first / SIDE * strip.panel + step * 2 + first / HALF % 2];
                add_step(&mut sums, a, b);
            }
            for (target, sum) in target.iter_mut().zip(sums) {
                *target = match (adds, starts) {
                    (true, false) => strip.factor.mul_add(sum, *target),
                    _ => strip.factor * sum,
                };
            }
        }
    }
}

fn add_step(sums: &mut [f32; HALF], a: &[u16], b: &Tile) {
    let mut parts = [[0.0_f32; 2]; HALF];
    for (a, b) in a.chunks_exact(2).zip(b.0.chunks_exact(SIDE)) {
        let a = [widen(a[0]), widen(a[1])];
        for (part, b) in parts.iter_mut().zip(b.chunks_exact(2)) {
            // The product of two bf16 is an f32, so that this is rounded once.
            part[0] = flush(a[0] * widen(b[0]) + part[0]);
            part[1] = flush(a[1] * widen(b[1]) + part[1]);
        }
    }
    for (sum, [even, odd]) in sums.iter_mut().zip(parts) {
        *sum = flush(*sum + flush(even + odd));
    }
}

fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { x }
}
