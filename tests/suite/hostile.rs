//! Hostile input: whatever a file holds, a program ends with a sentence, in time and within bounds of memory.

mod adapters;
mod models;
mod mutants;
mod rows;
pub mod seeds;
mod tables;
mod templates;
mod tokenizers;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use seeds::golden;

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// A golden folder's copy.
pub(crate) fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in golden(name).read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.file_name() != Some("expected.safetensors".as_ref()) {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

/// The sentence of an error that is the user's, in one line.
fn sentence<T>(result: rlhf::Result<T>, what: &str) -> String {
    let error = result.err().unwrap_or_else(|| panic!("{what} is taken"));
    assert_eq!(error.exit_code(), 2, "{what}: {error}");
    let sentence = error.to_string();
    assert!(!sentence.contains('\n') && sentence.len() < 4000, "{what}: {sentence}");
    sentence
}

fn expect(sentence: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(sentence.contains(part), "expected {part:?} in {sentence}"));
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn quickly<T>(what: &str, seconds: u64, step: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = step();
    assert!(start.elapsed() < Duration::from_secs(seconds), "{what} took {:?}", start.elapsed());
    result
}
