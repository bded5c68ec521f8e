//! A `config.json`, alone and with the weights of a tiny model of its family beside it.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use candle_core::Device;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::classifier::{Classifier, ClassifierInput};
use rlhf::model::Model;
use rlhf::model::folder::{WithoutWeights, open, read_architecture};
use rlhf::model::weights::tensor_specs;
use rlhf_fuzz::{copy, folder, golden, mutate, mutation, run, write};
use tempfile::TempDir;

/// The numbers of a new model that is made to see that it runs.
const SMALL: usize = 1 << 18;
/// The golden models by their `model_type`; those with a tokenizer are classifiers.
const MODELS: [(&str, &str); 11] = [
    ("llama", "llama"),
    ("mistral", "mistral"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gpt2", "gpt2"),
    ("gpt_neox", "gpt-neox"),
    ("bert", "classifiers/bert"),
    ("roberta", "classifiers/roberta"),
    ("xlm-roberta", "classifiers/xlm-roberta"),
    ("deberta-v2", "classifiers/deberta-v3"),
];

static BARE: LazyLock<TempDir> = LazyLock::new(folder);
static FOLDERS: LazyLock<BTreeMap<&str, TempDir>> = LazyLock::new(|| {
    let with_weights = |name: &str| {
        let folder = folder();
        for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            let from = golden(name).join(file);
            if from.is_file() {
                copy(&from, &folder.path().join(file));
            }
        }
        folder
    };
    MODELS.iter().map(|(model_type, name)| (*model_type, with_weights(name))).collect()
});

fn load_and_run(folder: &Path) {
    let role = Role { folder, adapters: &[], training: Training::Frozen, head: Head::AsFound, seed: 0 };
    if let Ok(model) = Bases::new(Device::Cpu).load(&role) {
        run(&model);
    }
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::json_text)
});

fuzz_target!(|data: &[u8]| {
    write(BARE.path(), "config.json", data);
    if let Ok((_, architecture)) = read_architecture(BARE.path())
        && architecture.layers < 20
        && tensor_specs(&architecture).iter().map(|spec| spec.shape.iter().product::<usize>()).sum::<usize>() < SMALL
    {
        let new = open(BARE.path(), WithoutWeights::NewFromSeed(0), &Device::Cpu);
        let model = new.and_then(|(folder, architecture, weights)| {
            Model::new(Arc::new(folder), Arc::new(architecture), Arc::new(weights), Vec::new(), None)
        });
        if let Ok(model) = model {
            run(&model);
        }
    }
    let config: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
    let model_type = config.get("model_type").and_then(|name| name.as_str()).unwrap_or_default();
    let Some(folder) = FOLDERS.get(model_type) else { return };
    write(folder.path(), "config.json", data);
    if !folder.path().join("tokenizer.json").is_file() {
        load_and_run(folder.path());
    } else if let Ok(classifier) = Classifier::load(folder.path()) {
        let input = |pair: Option<&str>| ClassifierInput { text: "a bad day".into(), pair: pair.map(str::to_owned) };
        let _ = classifier.probabilities(&[input(None), input(Some("good"))], 64);
    }
});
