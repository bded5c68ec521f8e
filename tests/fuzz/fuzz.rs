//! What the fuzz targets share.

use std::path::{Path, PathBuf};
use std::sync::Once;

use libfuzzer_sys::fuzzer_mutate;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rlhf::data::batch::{Continuation, TokenTree};
use rlhf::data::schema;
use rlhf::model::Model;
use rlhf::model::adapter::Pass;
use tempfile::TempDir;

#[path = "../suite/mutation.rs"]
pub mod mutation;

/// A folder of this process, in memory where there is such a place.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.expect("a temporary folder")
}

/// The folder of a golden model.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name)
}

/// Writes a file of a folder.
pub fn write(folder: &Path, name: &str, content: &[u8]) {
    std::fs::write(folder.join(name), content).expect("a temporary folder can be written to");
}

/// Copies a file.
pub fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

/// libFuzzer's binding ends the process at any panic, also at those of the Parquet reader, which are caught and become errors. From here on a panic ends it
/// where nothing catches it.
pub fn allow_caught_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| {})));
}

/// Changes an input by `change`, or now and then as libFuzzer does by itself.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    change: impl FnOnce(&mut Vec<u8>, &mut ChaCha8Rng),
) -> usize {
    let mut random = ChaCha8Rng::seed_from_u64(u64::from(seed));
    if random.random_bool(0.2) {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut input = data[..size].to_vec();
    change(&mut input, &mut random);
    let length = input.len().min(max_size);
    data[..length].copy_from_slice(&input[..length]);
    length
}

/// Changes one of two files that are one input.
pub fn mutate_joined(
    input: &mut Vec<u8>,
    random: &mut ChaCha8Rng,
    first: impl FnOnce(&mut Vec<u8>, &mut ChaCha8Rng),
    second: impl FnOnce(&mut Vec<u8>, &mut ChaCha8Rng),
) {
    let (left, right) = mutation::split(input);
    let (mut left, mut right) = (left.to_vec(), right.to_vec());
    if random.random_bool(0.5) {
        first(&mut left, random)
    } else {
        second(&mut right, random)
    }
    *input = mutation::join(&left, &right);
}

/// Writes a file of rows and reads it in all layouts of records.
pub fn read_rows(folder: &Path, name: &str, content: &[u8]) {
    write(folder, name, content);
    let path = folder.join(name).display().to_string();
    let _ = schema::demonstrations(&path).map(Iterator::count);
    let _ = schema::rankings(&path).map(Iterator::count);
    let _ = schema::labelled(&path).map(Iterator::count);
    let _ = schema::prompts(&path).map(Iterator::count);
    let _ = schema::answered(&path).map(Iterator::count);
    let _ = schema::names(&path, "prompt");
}

/// Runs a model that was read over three tokens.
pub fn run(model: &Model) {
    let vocabulary = model.architecture().vocabulary as u32;
    let answer = Continuation { tokens: vec![1 % vocabulary, vocabulary - 1], learned: vec![true; 2] };
    let tree = TokenTree { prompt: vec![0], answers: vec![answer] };
    let batch = model.pack([&tree]);
    let Ok(hidden) = model.hidden(&batch, &Pass::default()) else { return };
    if model.head().is_some() {
        drop(model.classes(&hidden, &batch));
    } else if model.has_output_matrix() {
        drop(model.log_probs(&hidden, &batch, 1.0));
    }
}
