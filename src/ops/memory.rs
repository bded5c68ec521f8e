//! Memory.

use std::ffi::{c_int, c_long};

// The allocator of the programs, linked here too, where its options are set.
use mimalloc as _;

/// `mi_option_purge_delay` of mimalloc's `mi_option_t`: milliseconds after which freed memory goes back to
/// the system; below 0 it never does.
const PURGE_DELAY: c_int = 15;

unsafe extern "C" {
    /// Sets an option that the environment does not set.
    fn mi_option_set_default(option: c_int, value: c_long);
    #[cfg(test)]
    fn mi_option_get(option: c_int) -> c_long;
}

/// Lets mimalloc keep what is freed for the next allocation. To be called first thing in `main`.
///
/// Training and sampling free and take the same memory at every step. Given back to the system meanwhile,
/// each of its pages has to be cleared when it is touched again: some 500 faults a step, and half of the time
/// in the system. `MIMALLOC_PURGE_DELAY` in the environment is left as it is. Where another allocator is the
/// program's, this does nothing.
pub fn keep_freed_memory() {
    // SAFETY: the signature is that of mimalloc.h; the call stores one number.
    unsafe { mi_option_set_default(PURGE_DELAY, -1) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const VARIABLE: &str = "MIMALLOC_PURGE_DELAY";

    fn purge_delay() -> c_long {
        // SAFETY: as above; the call reads one number.
        unsafe { mi_option_get(PURGE_DELAY) }
    }

    /// By the number, as mimalloc's options may change, and by the environment's name: it runs itself again
    /// with the variable.
    #[test]
    fn freed_memory_is_kept_unless_the_environment_says_otherwise() {
        if let Ok(wanted) = std::env::var(VARIABLE) {
            assert_eq!(purge_delay().to_string(), wanted);
            keep_freed_memory();
            assert_eq!(purge_delay().to_string(), wanted);
            return;
        }
        keep_freed_memory();
        assert_eq!(purge_delay(), -1);
        let name = "ops::memory::tests::freed_memory_is_kept_unless_the_environment_says_otherwise";
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        assert!(again.args(["--exact", name]).env(VARIABLE, "4321").output().unwrap().status.success());
    }
}
