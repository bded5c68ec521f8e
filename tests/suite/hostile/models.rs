//! Weights and configurations of models that are hostile on purpose, one of each kind that is known.

use candle_core::Device;
use rlhf::model::folder::{WithoutWeights, open, read_architecture};
use rlhf::model::weight_files;
use rlhf::ops::BaseForm;
use serde_json::{Value, json};

use super::adapters::load_adapter;
use super::seeds::golden;
use super::{copy, expect, folder, quickly, read_json, sentence};

/// A file of this header.
pub fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn a_safetensors_file_that_promises_what_it_does_not_hold_is_refused() {
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        let tensor =
            |name: &str, offsets: &str| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        format!("{{{},{}}}", tensor("a", first), tensor("b", second))
    };
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("a header of 2^64 - 1 bytes", length(u64::MAX)),
        ("a header of 2^63 bytes", length(1 << 63)),
        ("a header of 100 MB in ten bytes", length(100_000_000)),
        ("a header of no bytes", length(0)),
        ("no JSON", safetensors("hello", 0)),
        ("a header that is no UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff\""].concat()),
        ("lists 100,000 deep", safetensors(&"[".repeat(100_000), 0)),
        ("offsets beyond the end", safetensors(&tensor("F32", "[4]", "[0,16]"), 8)),
        ("offsets backwards", safetensors(&tensor("F32", "[2]", "[8,0]"), 8)),
        ("offsets that start late", safetensors(&tensor("F32", "[1]", "[4,8]"), 8)),
        ("negative offsets", safetensors(&tensor("F32", "[2]", "[-8,0]"), 8)),
        ("offsets beyond 64 bits", safetensors(&tensor("U8", "[18446744073709551615]", "[0,18446744073709551615]"), 8)),
        ("a shape that the offsets do not fit", safetensors(&tensor("F32", "[3]", "[0,8]"), 8)),
        ("a shape whose product overflows", safetensors(&tensor("F32", "[4294967296,4294967296,16]", "[0,8]"), 8)),
        ("overlapping tensors", safetensors(&two("[0,8]", "[4,12]"), 12)),
        ("one place for two tensors", safetensors(&two("[0,8]", "[0,8]"), 8)),
        ("a hole between tensors", safetensors(&two("[0,8]", "[12,20]"), 20)),
        ("bytes behind the tensors", safetensors(&tensor("F32", "[2]", "[0,8]"), 9)),
        ("an unknown type", safetensors(&tensor("F99", "[2]", "[0,8]"), 8)),
        ("whole numbers", safetensors(&tensor("I64", "[1]", "[0,8]"), 8)),
        ("numbers of four bits", safetensors(&tensor("F4", "[16]", "[0,8]"), 8)),
    ];
    for (what, bytes) in cases {
        let folder = folder(&[("model.safetensors", &bytes)]);
        let path = folder.path().join("model.safetensors");
        let sentence = sentence(weight_files::read_file(&path, &Device::Cpu), what);
        expect(&sentence, &["model.safetensors"]);
    }
}

#[test]
fn a_tensor_named_twice_or_of_another_shape_is_refused() {
    let twice = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#;
    let folder = folder(&[("model.safetensors", &safetensors(twice, 16))]);
    let path = folder.path().join("model.safetensors");
    expect(&sentence(weight_files::read_file(&path, &Device::Cpu), "a name twice"), &["model.safetensors"]);
    let model = copy("llama");
    let mut config = read_json(&model.path().join("config.json"));
    config["vocab_size"] = json!(1 << 24);
    std::fs::write(model.path().join("config.json"), config.to_string()).unwrap();
    expect(
        &sentence(
            open(model.path(), WithoutWeights::NewFromSeed(0), BaseForm::Stored, &Device::Cpu),
            "another vocabulary",
        ),
        &["embed_tokens.weight", "16777216"],
    );
}

#[test]
fn an_index_leads_to_no_other_folder() {
    for name in ["../secret.safetensors", "/etc/passwd", ".hidden", "a\\b", "", "a\0b"] {
        let model = copy("llama-sharded");
        let path = model.path().join("model.safetensors.index.json");
        let mut index = read_json(&path);
        index["weight_map"]["model.norm.weight"] = json!(name);
        std::fs::write(&path, index.to_string()).unwrap();
        let sentence =
            sentence(open(model.path(), WithoutWeights::NewFromSeed(0), BaseForm::Stored, &Device::Cpu), name);
        expect(&sentence, &["model.safetensors.index.json", "not the name of a file"]);
    }
}

#[test]
fn a_pickle_is_never_read() {
    let config = std::fs::read(golden("llama/config.json")).unwrap();
    for name in ["pytorch_model.bin", "model.pt", "consolidated.00.pth"] {
        let folder = folder(&[("config.json", &config), (name, b"\x80\x04cos\nsystem\n.")]);
        let sentence =
            sentence(open(folder.path(), WithoutWeights::NewFromSeed(0), BaseForm::Stored, &Device::Cpu), name);
        expect(&sentence, &[name, "pickle", "safetensors"]);
    }
    let adapter = copy("lora-llama");
    std::fs::rename(adapter.path().join("adapter_model.safetensors"), adapter.path().join("adapter_model.bin"))
        .unwrap();
    let sentence = sentence(load_adapter(adapter.path()), "adapter_model.bin");
    expect(&sentence, &["adapter_model.bin", "pickle", "safetensors"]);
}

#[test]
fn a_config_that_no_model_can_have_is_refused() {
    let large = json!(1u64 << 60);
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ];
    let mut cases: Vec<(&str, &str, Value)> = Vec::new();
    for field in sizes {
        for value in
            [json!(0), json!(-1), json!(1.5), json!("8"), json!([8]), large.clone(), json!(u64::MAX), json!(1e300)]
        {
            cases.push(("llama", field, value));
        }
    }
    cases.extend([
        ("llama", "num_hidden_layers", json!(4_000_000_000u64)),
        ("llama", "num_attention_heads", json!(3)),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "head_dim", json!(7)),
        ("llama", "head_dim", large.clone()),
        ("llama", "hidden_act", json!("x".repeat(100_000))),
        ("llama", "rms_norm_eps", json!(-1.0)),
        ("llama", "rms_norm_eps", json!(0)),
        ("llama", "rms_norm_eps", json!("NaN")),
        ("llama", "initializer_range", json!(-1.0)),
        ("llama", "rope_parameters", json!({"rope_type": "default", "rope_theta": 0.0})),
        ("llama", "rope_parameters", json!({"rope_type": "default", "rope_theta": -10.0})),
        ("llama", "rope_parameters", json!({"rope_type": "default", "rope_theta": "NaN"})),
        ("llama", "rope_parameters", json!({"rope_type": "linear", "factor": 0})),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 0}),
        ),
        ("llama", "model_type", json!(null)),
        ("llama", "tie_word_embeddings", json!(null)),
        ("bert", "tie_word_embeddings", json!(null)),
        ("mistral", "sliding_window", json!(-1)),
        ("gemma2", "layer_types", json!(vec!["full_attention"; 100_000])),
        ("gemma2", "query_pre_attn_scalar", json!(-4)),
        ("gemma2", "final_logit_softcapping", json!(0)),
        ("gpt2", "n_head", json!(0)),
        ("gpt2", "n_head", json!(5)),
        ("gpt2", "n_positions", large.clone()),
        ("gpt2", "n_inner", large.clone()),
        ("gpt-neox", "num_attention_heads", json!(0)),
        ("bert", "num_attention_heads", json!(0)),
        ("bert", "type_vocab_size", large.clone()),
        ("roberta", "pad_token_id", json!(1e300)),
        ("roberta", "pad_token_id", large.clone()),
    ]);
    for (name, field, value) in cases {
        let mut config = read_json(&golden(name).join("config.json"));
        config[field] = value;
        let folder = folder(&[("config.json", config.to_string().as_bytes())]);
        let what = format!("{name}: {field} {:.80}", config[field].to_string());
        let sentence = quickly(&what, 5, || sentence(read_architecture(folder.path()), &what));
        expect(&sentence, &["config.json"]);
    }
}

#[test]
fn a_model_larger_than_memory_is_not_begun() {
    let mut config = read_json(&golden("llama/config.json"));
    for field in ["vocab_size", "hidden_size", "intermediate_size"] {
        config[field] = json!(1 << 24);
    }
    config["num_hidden_layers"] = json!(4096);
    let folder = folder(&[("config.json", config.to_string().as_bytes())]);
    let sentence = quickly("a large model", 20, || {
        sentence(open(folder.path(), WithoutWeights::NewFromSeed(0), BaseForm::Stored, &Device::Cpu), "a large model")
    });
    expect(&sentence, &["config.json", "parameters, expected at most 4.29e9"]);
}

#[test]
fn json_that_is_deep_or_huge_or_no_text_is_refused() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let objects = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    let huge = vec![b' '; (16 << 20) + 1];
    let cases: [(&str, &[u8]); 7] = [
        ("lists 100,000 deep", deep.as_bytes()),
        ("objects 100,000 deep", objects.as_bytes()),
        ("17 MiB of spaces", &huge),
        ("no UTF-8", b"{\"model_type\": \"\xff\xfe\"}"),
        ("NUL bytes", b"\0\0\0\0"),
        ("nothing", b""),
        ("a number alone", b"1e99999"),
    ];
    for (what, bytes) in cases {
        let folder = folder(&[("config.json", bytes)]);
        let sentence = quickly(what, 5, || sentence(read_architecture(folder.path()), what));
        expect(&sentence, &["config.json"]);
    }
}
