//! A Parquet file, in all layouts of records.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::data::schema;
use rlhf_fuzz::{allow_caught_panics, folder, mutate, mutation, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::parquet)
});

fuzz_target!(|data: &[u8]| {
    allow_caught_panics();
    write(FOLDER.path(), "rows.parquet", data);
    let path = FOLDER.path().join("rows.parquet").display().to_string();
    let _ = schema::demonstrations(&path).map(Iterator::count);
    let _ = schema::rankings(&path).map(Iterator::count);
    let _ = schema::labelled(&path).map(Iterator::count);
    let _ = schema::prompts(&path).map(Iterator::count);
    let _ = schema::answered(&path).map(Iterator::count);
    let _ = schema::names(&path, "prompt");
});
