//! A file that is compressed by gzip or zstd, in all layouts of records.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf_fuzz::{allow_caught_panics, folder, mutate, mutation, read_rows};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::compressed)
});

fuzz_target!(|data: &[u8]| {
    allow_caught_panics();
    read_rows(FOLDER.path(), "rows.jsonl.gz", data);
});
