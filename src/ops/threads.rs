//! Threads.

/// Keeps candle's own thread pool out of the way: all parallelism is rayon's. To be called first thing in `main`.
///
/// candle runs its element-wise operations on a pool of its own whose threads spin while they wait. Beside rayon's threads they took half of
/// the time of a training step of a small model on two cores. candle reads the size of that pool from the environment, once.
pub fn leave_threads_to_rayon() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: `main` calls this before it starts a thread, so nothing reads the environment at the same time.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}
