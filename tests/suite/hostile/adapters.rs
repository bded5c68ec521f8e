//! Folders of adapters that are hostile on purpose, one of each kind that is known.

use std::path::Path;

use candle_core::Device;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::model::weight_files;
use serde_json::{Value, json};

use super::models::safetensors;
use super::seeds::{ADAPTERS, golden};
use super::{copy, expect, folder, quickly, read_json, sentence};

pub fn load_adapter(folder: &Path) -> rlhf::Result<()> {
    load_on("llama", folder)
}

fn load_on(base: &str, folder: &Path) -> rlhf::Result<()> {
    let (base, adapters) = (golden(base), [folder.to_path_buf()]);
    let role = Role { folder: &base, adapters: &adapters, training: Training::Frozen, head: Head::AsFound, seed: 0 };
    Bases::new(Device::Cpu).load(&role).map(drop)
}

#[test]
fn golden_adapters_load() {
    ADAPTERS.iter().for_each(|name| load_adapter(&golden(name)).unwrap_or_else(|error| panic!("{name}: {error}")));
}

#[test]
fn an_adapter_of_impossible_numbers_is_refused() {
    let cases = [
        ("lora-llama", "r", json!(0)),
        ("lora-llama", "r", json!(1u64 << 40)),
        ("lora-llama", "r", json!(-1)),
        ("lora-llama", "lora_alpha", json!("NaN")),
        ("lora-llama", "lora_dropout", json!(7)),
        ("lora-llama", "peft_type", json!("x".repeat(100_000))),
        ("prompt-llama", "num_virtual_tokens", json!(0)),
        ("prompt-llama", "num_virtual_tokens", json!(1u64 << 40)),
        ("prefix-llama", "num_virtual_tokens", json!(1u64 << 20)),
        ("p-tuning-lstm", "encoder_num_layers", json!(1u64 << 23)),
    ];
    for (name, field, value) in cases {
        let adapter = copy(name);
        let path = adapter.path().join("adapter_config.json");
        let mut config = read_json(&path);
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let what = format!("{name}: {field} {:.80}", config[field].to_string());
        let sentence = quickly(&what, 5, || sentence(load_adapter(adapter.path()), &what));
        expect(&sentence, &[&adapter.path().display().to_string()]);
    }
}

/// A copy of an adapter whose configuration says this too, without the tensors that have `dropped` in their
/// names.
fn changed(name: &str, fields: &Value, dropped: &str) -> tempfile::TempDir {
    let adapter = copy(name);
    let path = adapter.path().join("adapter_config.json");
    let mut config = read_json(&path);
    fields.as_object().unwrap().iter().for_each(|(field, value)| config[field] = value.clone());
    std::fs::write(&path, config.to_string()).unwrap();
    let file = adapter.path().join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    tensors.retain(|key, _| dropped.is_empty() || !key.contains(dropped));
    candle_core::safetensors::save(&tensors, &file).unwrap();
    adapter
}

#[test]
fn an_adapter_that_lacks_a_module_that_it_says_it_saved_is_refused() {
    let saved = |modules: &[&str]| json!({ "modules_to_save": modules });
    for (base, name, fields, dropped, missing) in [
        ("llama", "lora-modules-to-save", json!({}), "lm_head", "lm_head.weight"),
        ("llama", "lora-modules-to-save", json!({}), "embed_tokens", "model.embed_tokens.weight"),
        ("llama3", "lora-saved-tied", json!({}), "embed_tokens", "model.embed_tokens.weight"),
        ("gpt-neox", "lora-saved-head-gpt-neox", json!({}), "lm_head", "lm_head.weight"),
        ("gpt2", "lora-gpt2", saved(&["wpe"]), "", "transformer.wpe.weight"),
        ("llama", "lora-llama", saved(&["norm"]), "", "layers.0.input_layernorm.weight"),
        ("llama", "prompt-llama", saved(&["embed_tokens"]), "", "model.embed_tokens.weight"),
        ("llama", "ia3-llama", saved(&["lm_head"]), "", "lm_head.weight"),
    ] {
        let adapter = changed(name, &fields, dropped);
        let what = format!("{name} with {fields} without {dropped}");
        let sentence = sentence(load_on(base, adapter.path()), &what);
        expect(&sentence, &[missing, "is missing", "modules_to_save", &adapter.path().display().to_string()]);
    }
    // A head is none of the base's modules, and a classifier has no output matrix.
    for (base, name, fields) in [
        ("llama", "lora-llama", saved(&["classifier", "score"])),
        ("llama", "lora-reward", saved(&["lm_head", "score"])),
        ("llama3", "lora-saved-tied", json!({})),
        ("llama", "grown-saved-embedding", json!({})),
    ] {
        let adapter = changed(name, &fields, "");
        load_on(base, adapter.path()).unwrap_or_else(|error| panic!("{name} with {fields}: {error}"));
    }
}

#[test]
fn a_magnitude_is_not_combined_with_other_updates_of_its_linear() {
    let load = |names: &[&str]| {
        let (base, adapters) = (golden("llama"), names.iter().map(|name| golden(name)).collect::<Vec<_>>());
        let role =
            Role { folder: &base, adapters: &adapters, training: Training::Frozen, head: Head::AsFound, seed: 0 };
        Bases::new(Device::Cpu).load(&role).map(drop)
    };
    for names in [["lora-llama", "lora-dora"], ["lora-dora", "lora-llama"], ["lora-dora", "lora-dora"]] {
        let sentence = sentence(load(&names), &names.join(" and "));
        expect(&sentence, &["lora-dora: ", "q_proj", "use_dora", "export"]);
    }
    load(&["ia3-llama", "lora-dora"]).unwrap();
    let adapter = changed("lora-dora", &json!({ "init_lora_weights": "pissa" }), "");
    expect(&sentence(load_adapter(adapter.path()), "PiSSA with magnitudes"), &["use_dora", "pissa"]);
}

#[test]
fn a_number_that_peft_cannot_load_as_null_is_refused() {
    for field in ["lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern", "r"] {
        let adapter = changed("lora-llama", &json!({ field: null }), "");
        expect(&sentence(load_adapter(adapter.path()), field), &["adapter_config.json", &format!("\"{field}\"")]);
    }
}

#[test]
fn a_classifier_without_its_head_is_no_language_model() {
    let adapter = changed("lora-reward", &json!({}), "score");
    expect(
        &sentence(load_adapter(adapter.path()), "an adapter"),
        &["adapter_config.json", "\"score.weight\" is missing"],
    );
    for (name, tensor) in [("llama-reward", "score.weight"), ("roberta", "classifier.out_proj.weight")] {
        let model = copy(name);
        let file = model.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        tensors.remove(tensor).unwrap();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let role =
            Role { folder: model.path(), adapters: &[], training: Training::Frozen, head: Head::AsFound, seed: 0 };
        let loaded = Bases::new(Device::Cpu).load(&role).map(drop);
        expect(&sentence(loaded, name), &["config.json", &format!("\"{tensor}\""), "is missing"]);
    }
}

/// Names of tensors with their shapes.
type Shapes<'a> = Vec<(&'a str, Vec<usize>)>;

/// A file of f32 tensors of these shapes, all zero.
fn tensors(shapes: &[(&str, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.to_string(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
    }
    safetensors(&Value::Object(header).to_string(), end)
}

#[test]
fn adapters_of_shapes_that_no_method_has_are_refused() {
    let prefix = "base_model.model.model.layers.0.self_attn.q_proj";
    let embedding = "base_model.model.model.embed_tokens";
    let (down, up) = (format!("{prefix}.lora_A.weight"), format!("{prefix}.lora_B.weight"));
    let vocabulary = read_json(&golden("llama/config.json"))["vocab_size"].as_u64().unwrap() as usize;
    let (table_down, table_up) = (format!("{embedding}.lora_embedding_A"), format!("{embedding}.lora_embedding_B"));
    let cases: Vec<(&str, Shapes)> = vec![
        ("lora-llama", vec![]),
        ("lora-llama", vec![(&down, vec![0, 32]), (&up, vec![32, 0])]),
        ("lora-llama", vec![(&down, vec![]), (&up, vec![])]),
        ("lora-llama", vec![(&down, vec![4, 32])]),
        ("lora-embedding", vec![(&table_down, vec![]), (&table_up, vec![32, 1])]),
        ("lora-embedding", vec![(&table_down, vec![4, vocabulary + 1]), (&table_up, vec![32, 4])]),
        ("lora-embedding", vec![(&table_down, vec![0, vocabulary]), (&table_up, vec![32, 0])]),
        ("prompt-llama", vec![("prompt_embeddings", vec![])]),
        ("prompt-llama", vec![("prompt_embeddings", vec![5, 31])]),
        ("adapter-houlsby-llama", vec![("a", vec![1])]),
    ];
    for (name, shapes) in cases {
        let adapter = copy(name);
        let file = ["adapter_model.safetensors", "adapter.safetensors"].map(|name| adapter.path().join(name));
        let file = file.iter().find(|path| path.is_file()).unwrap();
        std::fs::write(file, tensors(&shapes)).unwrap();
        let what = format!("{name} with {shapes:?}");
        expect(&sentence(load_adapter(adapter.path()), &what), &[&adapter.path().display().to_string()]);
    }
    // AdapterHub's tensors, each of no dimension.
    let adapter = copy("adapter-houlsby-llama");
    let file = adapter.path().join("adapter.safetensors");
    let names: Vec<String> = weight_files::read_file(&file, &Device::Cpu).unwrap().into_keys().collect();
    let shapes: Vec<(&str, Vec<usize>)> = names.iter().map(|name| (name.as_str(), vec![])).collect();
    std::fs::write(&file, tensors(&shapes)).unwrap();
    expect(&sentence(load_adapter(adapter.path()), "scalars"), &["adapter.safetensors", "shape []"]);
}

#[test]
fn an_encoder_of_virtual_tokens_that_does_not_fit_together_is_refused() {
    for name in ["p-tuning-mlp", "p-tuning-lstm", "prefix-projection"] {
        let encoder = golden(name).join("encoder.safetensors");
        let whole = weight_files::read_file(&encoder, &Device::Cpu).unwrap();
        for broken in whole.keys() {
            for change in [vec![], vec![3], vec![3, 5], vec![0, 0]] {
                let adapter = copy(name);
                let shape = |key: &String| match key == broken {
                    true => change.clone(),
                    false => whole[key].dims().to_vec(),
                };
                let shapes: Vec<(&str, Vec<usize>)> = whole.keys().map(|key| (key.as_str(), shape(key))).collect();
                std::fs::write(adapter.path().join("encoder.safetensors"), tensors(&shapes)).unwrap();
                let what = format!("{name}, {broken} {change:?}");
                expect(&sentence(load_adapter(adapter.path()), &what), &[&adapter.path().display().to_string()]);
            }
        }
    }
}

#[test]
fn an_adapter_that_leads_elsewhere_finds_no_model_there() {
    let outside = folder(&[("secret.json", b"{}")]);
    let absolute = outside.path().display().to_string();
    let link = tempfile::tempdir().unwrap();
    let base = link.path().join("link");
    std::os::unix::fs::symlink("/etc", &base).unwrap();
    for base in ["/", "../../../../../../etc", "/proc/self", "", ".", "\0", &absolute, &base.display().to_string()] {
        let adapter = copy("lora-llama");
        let path = adapter.path().join("adapter_config.json");
        let mut config = read_json(&path);
        config["base_model_name_or_path"] = json!(base);
        std::fs::write(&path, config.to_string()).unwrap();
        let sentence = sentence(rlhf::adapt::architecture(adapter.path()), base);
        assert!(sentence.contains("no config.json there") || sentence.contains("no folder here"), "{sentence}");
    }
    // An adapter whose base is itself, or another adapter.
    let adapter = copy("lora-llama");
    let path = adapter.path().join("adapter_config.json");
    let mut config = read_json(&path);
    config["base_model_name_or_path"] = json!(adapter.path());
    std::fs::write(&path, config.to_string()).unwrap();
    expect(&sentence(rlhf::adapt::architecture(adapter.path()), "itself"), &["no config.json there"]);
}

#[test]
fn a_stack_names_folders_within_its_own() {
    for names in [
        json!(["../x"]),
        json!(["/etc"]),
        json!([".."]),
        json!([""]),
        json!([1]),
        json!([]),
        json!("a"),
        json!(["a\\b"]),
    ] {
        let folder = folder(&[("adapters.json", json!({ "adapters": names }).to_string().as_bytes())]);
        let sentence = sentence(rlhf::adapt::architecture(folder.path()), &names.to_string());
        expect(&sentence, &["adapters.json", "names of folders beside it"]);
    }
    let absent = folder(&[("adapters.json", br#"{"adapters": ["a\u0000b"]}"#)]);
    expect(&sentence(rlhf::adapt::architecture(absent.path()), "NUL"), &[&absent.path().display().to_string()]);
}
