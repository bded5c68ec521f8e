//! Files that are hostile on purpose, one of each kind that is known.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BinaryArray, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use candle_core::Device;
use parquet::arrow::ArrowWriter;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::data::schema;
use rlhf::data::tokenize::Tokenizer;
use rlhf::model::folder::{open, read_architecture};
use rlhf::model::weight_files;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::seeds::{ADAPTERS, golden, parquet_bytes};
use super::tables::nested_lists;
use crate::common::{strings, table};

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// A golden folder's copy.
fn copy(name: &str) -> TempDir {
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

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn quickly<T>(what: &str, seconds: u64, step: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = step();
    assert!(start.elapsed() < Duration::from_secs(seconds), "{what} took {:?}", start.elapsed());
    result
}

// ---- safetensors ---------------------------------------------------------------------------------------------------

fn safetensors(header: &str, data: usize) -> Vec<u8> {
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
    expect(&sentence(open(model.path(), 0, &Device::Cpu), "another vocabulary"), &["embed_tokens.weight", "16777216"]);
}

#[test]
fn an_index_leads_to_no_other_folder() {
    for name in ["../secret.safetensors", "/etc/passwd", ".hidden", "a\\b", "", "a\0b"] {
        let model = copy("llama-sharded");
        let path = model.path().join("model.safetensors.index.json");
        let mut index = read_json(&path);
        index["weight_map"]["model.norm.weight"] = json!(name);
        std::fs::write(&path, index.to_string()).unwrap();
        let sentence = sentence(open(model.path(), 0, &Device::Cpu), name);
        expect(&sentence, &["model.safetensors.index.json", "not the name of a file"]);
    }
}

#[test]
fn a_pickle_is_never_read() {
    let config = std::fs::read(golden("llama/config.json")).unwrap();
    for name in ["pytorch_model.bin", "model.pt", "consolidated.00.pth"] {
        let folder = folder(&[("config.json", &config), (name, b"\x80\x04cos\nsystem\n.")]);
        let sentence = sentence(open(folder.path(), 0, &Device::Cpu), name);
        expect(&sentence, &[name, "pickle", "safetensors"]);
    }
    let adapter = copy("lora-llama");
    std::fs::rename(adapter.path().join("adapter_model.safetensors"), adapter.path().join("adapter_model.bin"))
        .unwrap();
    let sentence = sentence(load_adapter(adapter.path()), "adapter_model.bin");
    expect(&sentence, &["adapter_model.bin", "pickle", "safetensors"]);
}

// ---- config.json ---------------------------------------------------------------------------------------------------

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
    let sentence = quickly("a large model", 20, || sentence(open(folder.path(), 0, &Device::Cpu), "a large model"));
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

// ---- adapters ------------------------------------------------------------------------------------------------------

fn load_adapter(folder: &Path) -> rlhf::Result<()> {
    let (base, adapters) = (golden("llama"), [folder.to_path_buf()]);
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
    let cases: Vec<(&str, Vec<(&str, Vec<usize>)>)> = vec![
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

// ---- Parquet -------------------------------------------------------------------------------------------------------

fn parquet_of(columns: Vec<(&str, ArrayRef)>) -> TempDir {
    folder(&[("rows.parquet", &parquet_bytes(&table(columns), 1))])
}

fn demonstrations(folder: &TempDir) -> rlhf::Result<usize> {
    let path = folder.path().join("rows.parquet").display().to_string();
    schema::demonstrations(&path)?.try_fold(0, |count, record| record.map(|_| count + 1))
}

#[test]
fn lists_fifty_deep_are_no_texts() {
    let deep = parquet_of(vec![("prompt", nested_lists(50, 2)), ("completion", strings(&["a", "b"]))]);
    expect(&sentence(demonstrations(&deep), "lists"), &["rows.parquet", "`prompt`", "expected strings"]);
}

#[test]
fn strings_that_are_no_text_are_refused() {
    // Bytes that the schema calls strings.
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"good"[..], &b"\xff\xfe\x80"[..]]));
    let rows = table(vec![("text", bytes)]);
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    let folder = folder(&[("rows.parquet", &file)]);
    expect(&sentence(demonstrations(&folder), "binary"), &["rows.parquet", "`text`"]);
    // The same with the letters of a string replaced.
    let text = "A text that is seen in the file.";
    let rows = table(vec![("text", strings(&[text]))]);
    let mut file = parquet_bytes(&rows, 1);
    let found: Vec<usize> =
        (0..file.len() - text.len()).filter(|&at| &file[at..at + text.len()] == text.as_bytes()).collect();
    assert!(!found.is_empty());
    found.iter().for_each(|&at| file[at + 3] = 0xff);
    std::fs::write(folder.path().join("rows.parquet"), &file).unwrap();
    expect(&sentence(demonstrations(&folder), "no UTF-8"), &["rows.parquet", "UTF-8"]);
}

#[test]
fn numbers_in_a_footer_that_do_not_fit_the_file_are_refused() {
    let rows = table(vec![("text", strings(&["one", "two"]))]);
    let whole = parquet_bytes(&rows, 1);
    let length = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize;
    let footer = whole.len() - 8 - length;
    let mut refused = 0;
    // Every byte of the footer in turn, as large as it can be and as small: statistics, counts, sizes, offsets, types.
    for at in footer..whole.len() - 8 {
        for value in [0x00, 0x7f, 0xff] {
            let mut file = whole.clone();
            file[at] = value;
            let folder = folder(&[("rows.parquet", &file)]);
            match quickly("a footer", 10, || demonstrations(&folder)) {
                Ok(count) => assert!(count <= 2, "{count} rows"),
                Err(error) => {
                    assert!(error.to_string().contains("rows.parquet"), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > length, "{refused} of {}", 3 * length);
}

#[test]
fn huge_texts_and_nul_bytes_are_texts() {
    let (huge, nul) = ("x".repeat(10 << 20), "a\0b");
    let columns = || {
        let column = |texts: Vec<&str>| -> ArrayRef { Arc::new(StringArray::from(texts)) };
        vec![("prompt", column(vec![&huge, nul])), ("completion", column(vec![nul, &huge]))]
    };
    let folder = parquet_of(columns());
    assert_eq!(quickly("10 MB", 10, || demonstrations(&folder)).unwrap(), 2);
}

#[test]
fn a_schema_of_a_thousand_columns_is_read_for_those_that_are_wanted() {
    let names: Vec<String> = (0..1000).map(|column| format!("column\0{column}")).collect();
    let mut columns: Vec<(&str, ArrayRef)> = names.iter().map(|name| (name.as_str(), strings(&["x"]))).collect();
    columns.push(("text", strings(&["a"])));
    assert_eq!(demonstrations(&parquet_of(columns)).unwrap(), 1);
    let fields = vec![Field::new("text", DataType::Utf8, true), Field::new("text", DataType::Utf8, true)];
    let both =
        arrow::array::RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![strings(&["a"]), strings(&["b"])]);
    let folder = folder(&[("rows.parquet", &parquet_bytes(&both.unwrap(), 1))]);
    assert!(demonstrations(&folder).is_ok_and(|count| count == 1) || demonstrations(&folder).is_err());
}

// ---- tokenizers ----------------------------------------------------------------------------------------------------

fn tokenizer_of(json: &Value) -> TempDir {
    folder(&[("tokenizer.json", json.to_string().as_bytes())])
}

fn base_tokenizer() -> Value {
    read_json(&golden("../../data/base/tokenizer.json"))
}

#[test]
fn ten_megabytes_of_prompt_are_split_in_time() {
    let tokenizer = Tokenizer::load(golden("../../data/base")).unwrap();
    for text in ["x".repeat(10 << 20), "a word ".repeat(10 << 17)] {
        quickly(&format!("{text:.8}"), 120, || tokenizer.encode(&text).unwrap());
    }
}

#[test]
fn a_million_merges_are_read_in_time() {
    let mut json = base_tokenizer();
    let letters: Vec<char> = (0..1000).map(|letter| char::from_u32(0x4e00 + letter).unwrap()).collect();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    let first = vocabulary.len();
    for (index, letter) in letters.iter().enumerate() {
        vocabulary.insert(letter.to_string(), json!(first + index));
    }
    let pairs: Vec<[char; 2]> =
        letters.iter().flat_map(|&left| letters.iter().map(move |&right| [left, right])).collect();
    for (index, [left, right]) in pairs.iter().enumerate() {
        vocabulary.insert(format!("{left}{right}"), json!(first + 1000 + index));
    }
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.extend(pairs.iter().map(|[left, right]| json!([left.to_string(), right.to_string()])));
    let folder = tokenizer_of(&json);
    let tokenizer = quickly("a million merges", 60, || Tokenizer::load(folder.path()).unwrap());
    assert_eq!(tokenizer.vocabulary_size(), first + 1000 + 1_000_000);
    tokenizer.encode("a text").unwrap();
}

#[test]
fn tokenizers_that_are_deep_or_contradict_themselves_are_refused() {
    let nested = |field: &str, part: &str, depth: usize, inner: &str| {
        let mut json = base_tokenizer();
        json[field] = json!("DEEP");
        let deep =
            format!("{}{inner}{}", format!(r#"{{"type":"Sequence","{part}":["#).repeat(depth), "]}".repeat(depth));
        json.to_string().replace("\"DEEP\"", &deep)
    };
    let changed = |path: &str, value: Value| {
        let mut json = base_tokenizer();
        *json.pointer_mut(path).unwrap() = value;
        json.to_string()
    };
    let unigram = |id: Value, vocabulary: Value| {
        let mut json = base_tokenizer();
        json["model"] = json!({ "type": "Unigram", "unk_id": id, "vocab": vocabulary });
        json.to_string()
    };
    let charsmap = || {
        let mut json = base_tokenizer();
        json["normalizer"] = json!({ "type": "Precompiled", "precompiled_charsmap": "AAAAgP////8AAAAA" });
        json.to_string()
    };
    let cases = [
        ("normalizers 10,000 deep", nested("normalizer", "normalizers", 10_000, r#"{"type":"NFC"}"#)),
        ("pre-tokenizers 10,000 deep", nested("pre_tokenizer", "pretokenizers", 10_000, r#"{"type":"Whitespace"}"#)),
        ("decoders 10,000 deep", nested("decoder", "decoders", 10_000, r#"{"type":"Fuse"}"#)),
        ("merges of unknown tokens", changed("/model/merges", json!([["q\u{4e00}", "z"]]))),
        ("no vocabulary", changed("/model/vocab", json!([]))),
        ("an empty unigram", unigram(json!(0), json!([]))),
        ("an unknown token beyond the vocabulary", unigram(json!(7), json!([["a", 0.0]]))),
        ("an unknown token of no number", unigram(json!(-1), json!([["a", 0.0]]))),
        ("a map of characters that is none", charsmap()),
        ("no JSON", "\0".to_string()),
    ];
    for (what, text) in cases {
        let folder = folder(&[("tokenizer.json", text.as_bytes())]);
        let sentence = quickly(what, 10, || sentence(Tokenizer::load(folder.path()), what));
        expect(&sentence, &["tokenizer.json"]);
    }
}

#[test]
fn what_a_tokenizer_says_of_itself_is_a_sentence_when_it_cannot_be() {
    let prefixes = json!({ "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]], "continuing_subword_prefix": "long prefix" });
    let backtracking =
        json!({ "type": "Split", "pattern": { "Regex": "(a|a)*(?=b)c" }, "behavior": "Isolated", "invert": false });
    let empty_pattern = json!({ "type": "Replace", "pattern": { "String": "" }, "content": "x".repeat(1000) });
    let empty_token = json!([{ "id": 0, "content": "", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }]);
    let truncation = json!({ "direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9 });
    let padding = json!({ "strategy": { "Fixed": 1u64 << 40 }, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "" });
    let around = json!({ "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } }], "pair": [], "special_tokens": {} });
    let cases = [
        ("model", prefixes),
        ("pre_tokenizer", backtracking),
        ("normalizer", empty_pattern),
        ("added_tokens", empty_token),
        ("truncation", truncation),
        ("padding", padding),
        ("post_processor", around),
    ];
    for (field, value) in cases {
        let mut json = base_tokenizer();
        json[field] = value;
        let folder = tokenizer_of(&json);
        let texts = ["", "ab ab", &"a".repeat(60), &"a".repeat(100_000), "é \0 x"];
        let outcome = quickly(field, 60, || {
            let tokenizer = Tokenizer::load(folder.path())?;
            texts.iter().try_for_each(|text| tokenizer.encode(text).map(drop))
        });
        if let Err(error) = outcome {
            expect(&sentence::<()>(Err(error), field), &[&folder.path().display().to_string()]);
        }
    }
}
