//! GGUF files against what llama.cpp's Python package, `transformers` and SentencePiece make of them; see `tests/golden/gguf_files.py`.

use std::path::{Path, PathBuf};

use rlhf::data::tokenize::Tokenizer;
use rlhf::gguf::Gguf;

use crate::common::{golden, tensors};

fn file(name: &str) -> PathBuf {
    golden("gguf").join(name)
}

#[test]
fn every_block_type_is_dequantised_as_ggml_does() {
    let gguf = Gguf::open(&file("blocks.gguf")).unwrap();
    let expected = tensors(&file("blocks.safetensors"));
    assert_eq!(gguf.tensors.len(), expected.len());
    for (name, info) in &gguf.tensors {
        let found = gguf.numbers(name, info).unwrap();
        let wanted: Vec<f32> = expected[name].flatten_all().unwrap().to_vec1().unwrap();
        for (found, wanted) in found.iter().zip(&wanted) {
            assert!((found - wanted).abs() <= 1e-6 * wanted.abs().max(1.0), "{name}: {found} and {wanted}");
        }
    }
}
