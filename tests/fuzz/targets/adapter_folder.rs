//! The folder of an adapter, `adapter_config.json` and its tensors, on a tiny Llama.
#![no_main]

use std::cell::RefCell;
use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::adapt::{Bases, Head, Role, Training, merged};
use rlhf_fuzz::{folder, golden, mutate, mutate_joined, mutation, run, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

thread_local! {
    // The base is read once.
    static BASES: RefCell<Bases> = RefCell::new(Bases::new(Device::Cpu));
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, |input, random| {
        mutate_joined(input, random, mutation::json_text, mutation::safetensors)
    })
});

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    let (config, tensors) = mutation::split(data);
    write(folder, "adapter_config.json", config);
    // PEFT's and AdapterHub's names; which is read, the configuration says.
    write(folder, "adapter_model.safetensors", tensors);
    if config.windows(9).any(|word| word == b"peft_type") {
        let _ = std::fs::remove_file(folder.join("adapter.safetensors"));
    } else {
        write(folder, "adapter.safetensors", tensors);
    }
    let (base, adapters) = (golden("llama"), [folder.to_path_buf()]);
    let role = Role { folder: &base, adapters: &adapters, training: Training::Frozen, head: Head::AsFound, seed: 0 };
    if let Ok(model) = BASES.with_borrow_mut(|bases| bases.load(&role)) {
        run(&model);
        if let Ok(merged) = merged(&model) {
            run(&merged);
        }
    }
    // By itself, with the base that it names.
    let _ = rlhf::adapt::architecture(folder);
});
