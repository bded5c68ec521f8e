//! Products by the tiles of Intel's AMX, in inline assembly: there are no stable intrinsics.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use tiles::{is_available, multiply};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use elsewhere::{is_available, multiply};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles {
    use core::arch::asm;
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::OnceLock;

    use super::super::pack::{SIDE, Tile};
    use super::super::{Strip, avx512};

    /// What `ldtilecfg` reads: all eight tiles have 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Whether the processor has the tiles, and the operating system lets this process use them, which is asked once.
    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let has_tiles = __cpuid(0).eax >= 7 && {
                let features = __cpuid_count(7, 0).edx;
                let (bf16, tile) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
                bf16 && tile
            };
            has_tiles && avx512::is_available() && is_permitted()
        })
    }

    /// Asks the kernel to let the threads of this process use the tiles' state, which it may refuse.
    fn is_permitted() -> bool {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XFEATURE_XTILEDATA: i64 = 18;
        let result: i64;
        // SAFETY: the call reads and writes no memory of this process; registers that it changes are named.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack)
            );
        }
        result == 0
    }

    /// Multiplies a strip. A product without a factor is added to what is there step by step, else its sum is.
    ///
    /// # Safety
    /// The strip's tiles are there, its rows and columns of the target are the caller's own, and the tiles
    /// are available.
    pub unsafe fn multiply(strip: &Strip) {
        let whole = match strip.rows == SIDE && strip.factor == 1.0 {
            true => strip.columns / SIDE,
            false => 0,
        };
        // SAFETY: whole panels of 32 columns by 32 rows, within the strip.
        unsafe {
            let (a, b) = (strip.a.as_ptr(), strip.b.as_ptr());
            panels(a, b, strip.panel, strip.steps, (strip.target, strip.row_stride), whole, strip.add);
        }
        for panel in whole..strip.columns.div_ceil(SIDE) {
            // SAFETY: as the caller promises.
            unsafe { edge(strip, panel) };
        }
    }

    /// A panel of which a part is wanted, or which has a factor, through a buffer.
    ///
    /// # Safety
    /// As for [`multiply`].
    unsafe fn edge(strip: &Strip, panel: usize) {
        let first = panel * SIDE;
        let width = SIDE.min(strip.columns - first);
        let starts = strip.add && strip.factor == 1.0;
        let mut buffer = [0.0_f32; SIDE * SIDE];
        // SAFETY: rows of the strip, one at a time.
        let target = |row: usize| unsafe {
            std::slice::from_raw_parts_mut(strip.target.add(row * strip.row_stride + first), width)
        };
        let rows = || buffer_rows(strip.rows);
        if starts {
            rows().for_each(|(row, at)| buffer[at..at + width].copy_from_slice(target(row)));
        }
        // SAFETY: one panel, whose result is the buffer.
        unsafe {
            let (a, b) = (strip.a.as_ptr(), strip.b.as_ptr().add(panel * strip.panel));
            panels(a, b, strip.panel, strip.steps, (buffer.as_mut_ptr(), SIDE), 1, starts);
        }
        for (row, at) in rows() {
            for (target, sum) in target(row).iter_mut().zip(&buffer[at..]) {
                *target = match strip.add && !starts {
                    true => strip.factor.mul_add(*sum, *target),
                    false => strip.factor * sum,
                };
            }
        }
    }

    /// Rows of a buffer of 32 columns, and where each begins.
    fn buffer_rows(rows: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..rows).map(|row| (row, row * SIDE))
    }

    /// 32 rows by `count` panels of 32 columns: `target = a b`, or `target += a b`. `stride` is the target's
    /// from row to row.
    ///
    /// The tiles hold their state within one block of assembly, as a compiler does not know of it: they are
    /// configured, used and released.
    ///
    /// # Safety
    /// `a` has `2 steps` tiles, each of the panels, which are `panel` tiles apart, has so many, the target
    /// has the rows and columns, and the tiles are available.
    unsafe fn panels(
        a: *const Tile,
        b: *const Tile,
        panel: usize,
        steps: usize,
        (target, stride): (*mut f32, usize),
        count: usize,
        add: bool,
    ) {
        if count == 0 || steps == 0 {
            return;
        }
        macro_rules! run {
            ($($start:literal),*) => {
                // SAFETY: reads and writes what the caller promises is there.
                unsafe {
                    asm!(
                        "ldtilecfg [{t}]",
                        "2:",
                        // The lines to be written are fetched while the sums are made.
                        "mov {t}, {c}",
                        "mov {i:e}, 32",
                        "3:",
                        "prefetchw [{t}]",
                        "prefetchw [{t} + 64]",
                        "add {t}, {stride}",
                        "dec {i}",
                        "jnz 3b",
                        // The last 16 rows.
                        "mov {t}, {stride}",
                        "shl {t}, 4",
                        "add {t}, {c}",
                        $($start,)*
                        "mov {pa}, {a}",
                        "mov {pb}, {b}",
                        "mov {i}, {steps}",
                        "4:",
                        "tileloadd tmm6, [{pb} + {line}*1]",
                        "tileloadd tmm4, [{pa} + {line}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{pb} + {line}*1 + 1024]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{pa} + {line}*1 + 1024]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        "add {pa}, 2048",
                        "add {pb}, 2048",
                        "dec {i}",
                        "jnz 4b",
                        "tilestored [{c} + {stride}*1], tmm0",
                        "tilestored [{c} + {stride}*1 + 64], tmm1",
                        "tilestored [{t} + {stride}*1], tmm2",
                        "tilestored [{t} + {stride}*1 + 64], tmm3",
                        "add {b}, {panel}",
                        "add {c}, 128",
                        "dec {count}",
                        "jnz 2b",
                        "tilerelease",
                        t = inout(reg) &raw const CONFIGURATION => _,
                        a = in(reg) a,
                        b = inout(reg) b => _,
                        c = inout(reg) target => _,
                        stride = in(reg) stride * size_of::<f32>(),
                        steps = in(reg) steps,
                        panel = in(reg) panel * size_of::<Tile>(),
                        count = inout(reg) count => _,
                        line = in(reg) 64_usize,
                        i = out(reg) _,
                        pa = out(reg) _,
                        pb = out(reg) _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack)
                    );
                }
            };
        }
        if add {
            run!(
                "tileloadd tmm0, [{c} + {stride}*1]",
                "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                "tileloadd tmm2, [{t} + {stride}*1]",
                "tileloadd tmm3, [{t} + {stride}*1 + 64]"
            );
        } else {
            run!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3");
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod elsewhere {
    use super::super::Strip;

    pub fn is_available() -> bool {
        false
    }

    pub unsafe fn multiply(_: &Strip) {
        unreachable!("the kernel is not available");
    }
}
