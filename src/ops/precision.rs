//! In which precision the products of a model's weights are made: one setting of the process.

use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

pub use super::bf16::Kernel;
use crate::bail;
use crate::error::Result;

/// How products with a model's weights are made. Everything else is f32: attention, low-rank updates, norms,
/// gradients, moments, and the weights that train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Operands and sums in f32.
    #[default]
    F32,
    /// Operands rounded to bf16, sums in f32, by this kernel.
    Bf16(Kernel),
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Arithmetic::F32 => formatter.write_str("f32"),
            Arithmetic::Bf16(kernel) => write!(formatter, "bf16 ({kernel})"),
        }
    }
}

/// The environment variable that names the kernel of bf16 products in place of the fastest, by which tests
/// run every one of them.
const KERNEL: &str = "RLHF_KERNEL";

impl Arithmetic {
    /// bf16 by the fastest kernel of this processor, or by the one that `RLHF_KERNEL` names.
    pub fn bf16() -> Result<Self> {
        let Some(name) = std::env::var_os(KERNEL) else { return Ok(Arithmetic::Bf16(Kernel::fastest())) };
        let Some(kernel) = Kernel::ALL.into_iter().find(|kernel| name == kernel.id()) else {
            let known = Kernel::ALL.map(Kernel::id).join(", ");
            bail!("{KERNEL}: there is no kernel {}; expected one of {known}", name.display());
        };
        if !kernel.is_available() {
            bail!("{KERNEL}: this processor cannot run the kernel {}; leave the variable out", kernel.id());
        }
        Ok(Arithmetic::Bf16(kernel))
    }

    /// That of this process, F32 where none was set.
    pub fn current() -> Self {
        WITHIN.get().unwrap_or_else(|| SET.get().copied().unwrap_or_default())
    }

    /// Whether weights that do not change are kept packed for it, in 2 bytes a number.
    pub fn packs(self) -> bool {
        matches!(self, Arithmetic::Bf16(kernel) if kernel.packs())
    }

    /// Sets that of the process; can be done once, before the first product.
    pub fn set(self) -> Result<()> {
        match SET.get_or_init(|| self) {
            set if *set == self => Ok(()),
            set => bail!("the precision of this process is {set} already and cannot become {self}"),
        }
    }

    /// Runs something in this precision on this thread, for tests: products that it gives to other threads
    /// (generation does, of few rows) are made in that of the process.
    pub fn within<T>(self, run: impl FnOnce() -> T) -> T {
        struct Restored(Option<Arithmetic>);
        impl Drop for Restored {
            fn drop(&mut self) {
                WITHIN.set(self.0);
            }
        }
        let _restored = Restored(WITHIN.replace(Some(self)));
        run()
    }
}

static SET: OnceLock<Arithmetic> = OnceLock::new();

thread_local! {
    static WITHIN: Cell<Option<Arithmetic>> = const { Cell::new(None) };
}
