//! A safetensors file: alone, and as the weights of a model that asks for other shapes.
#![no_main]

use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::model::{folder as model_folder, weight_files};
use rlhf::ops::BaseForm;
use rlhf_fuzz::{copy, folder, golden, mutate, mutation, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = folder();
    copy(&golden("llama/config.json"), &folder.path().join("config.json"));
    folder
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::safetensors)
});

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    write(folder, "model.safetensors", data);
    let _ = weight_files::read_file(&folder.join("model.safetensors"), &Device::Cpu);
    let _ = model_folder::open(folder, model_folder::WithoutWeights::NewFromSeed(0), BaseForm::Stored, &Device::Cpu);
});
