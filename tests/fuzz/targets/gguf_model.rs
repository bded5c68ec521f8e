//! A GGUF file: its metadata as a model's folder, and its tensors.
#![no_main]

use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::data::tokenize::Tokenizer;
use rlhf::model::folder as model_folder;
use rlhf::ops::BaseForm;
use rlhf_fuzz::{folder, mutate, mutation, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::gguf)
});

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    write(folder, "model.gguf", data);
    let model = folder.join("model.gguf");
    let _ = Tokenizer::load(&model);
    let _ = model_folder::open(&model, model_folder::WithoutWeights::Refuse, BaseForm::Stored, &Device::Cpu);
});
