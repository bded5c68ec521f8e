//! Whole files that hostile ones are made of, each by the name of the fuzz target that reads its kind.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float32Array, Int32Array, Int64Array, LargeStringArray, RecordBatch, StringArray,
    StructArray,
};
use arrow::datatypes::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use rlhf::data::schema;
use rlhf::data::tokenize::Tokenizer;
use rlhf::model::{folder, weight_files};

use crate::common::{lists, strings, table};
use crate::forms;
use crate::mutation::{join, split};

/// One file.
pub struct Seed {
    /// The fuzz target.
    pub target: &'static str,
    /// Its name among the target's.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A file of the repository.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A column of conversations of these fields, each of which ends at one of `ends`.
fn conversations(fields: [&str; 2], roles: &[&str], contents: &[&str], ends: &[i32]) -> ArrayRef {
    let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, true));
    let columns = vec![(field(fields[0]), strings(roles)), (field(fields[1]), strings(contents))];
    lists(Arc::new(StructArray::from(columns)), ends)
}

/// A small table of every layout of records.
pub fn tables() -> Vec<(&'static str, RecordBatch)> {
    let prompts = || ("prompt", strings(&["The boat is of the colour", "The lamp is of the colour"]));
    let answers = || lists(Arc::new(LargeStringArray::from(vec![" red.", " green.", " no.", " blue."])), &[2, 4]);
    let turns = |fields: [&str; 2], roles: [&str; 2]| {
        let contents = ["The boat?", "Red.", "The lamp?", "Green."];
        conversations(fields, &[roles[0], roles[1], roles[0], roles[1]], &contents, &[2, 4])
    };
    let messages = || turns(["role", "content"], ["user", "assistant"]);
    let numbers = |values: &[f32]| -> ArrayRef { Arc::new(Float32Array::from(values.to_vec())) };
    let scores = || lists(numbers(&[0.5, -1.0, 2.0, 0.0]), &[2, 4]);
    let ranks = || lists(Arc::new(Int64Array::from(vec![0, 1, 1, 0])), &[2, 4]);
    let labels: ArrayRef = Arc::new(Int32Array::from(vec![0, 1]));
    let truths: ArrayRef = Arc::new(BooleanArray::from(vec![true, false]));
    let nulls: ArrayRef = Arc::new(StringArray::from(vec![None, Some("France")]));
    vec![
        ("completion", table(vec![prompts(), ("completion", strings(&[" red.", " green."]))])),
        ("response", table(vec![prompts(), ("response", strings(&[" red.", " green."]))])),
        ("text", table(vec![("text", strings(&["A text.", "é 😀"]))])),
        ("messages", table(vec![("messages", messages())])),
        ("sharegpt", table(vec![("conversations", turns(["from", "value"], ["human", "gpt"]))])),
        (
            "alpaca",
            table(vec![("instruction", strings(&["a", "b"])), ("input", nulls), ("output", strings(&["c", "d"]))]),
        ),
        ("ranks", table(vec![prompts(), ("responses", answers()), ("ranks", ranks())])),
        ("scores", table(vec![prompts(), ("responses", answers()), ("scores", scores())])),
        (
            "pairs",
            table(vec![
                prompts(),
                ("chosen", strings(&[" red.", " green."])),
                ("rejected", strings(&[" no.", " so."])),
                ("margin", numbers(&[0.5, 1.0])),
                ("weight", numbers(&[1.0, 2.0])),
            ]),
        ),
        ("implicit", table(vec![("chosen", strings(&["a b", "a c"])), ("rejected", strings(&["a d", "a e"]))])),
        ("turns", table(vec![("chosen", messages()), ("rejected", messages())])),
        ("labels", table(vec![("text", strings(&["good", "bad"])), ("label", labels)])),
        (
            "sentences",
            table(vec![("sentence1", strings(&["a", "b"])), ("sentence2", strings(&["c", "d"])), ("label", truths)]),
        ),
    ]
}

/// The table as a Parquet file, the `index`-th of several ways to write it.
pub fn parquet_bytes(rows: &RecordBatch, index: usize) -> Vec<u8> {
    let compressions = [
        Compression::ZSTD(ZstdLevel::default()),
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::LZ4_RAW,
        Compression::BROTLI(BrotliLevel::default()),
    ];
    let version = if index.is_multiple_of(2) { WriterVersion::PARQUET_2_0 } else { WriterVersion::PARQUET_1_0 };
    let properties = WriterProperties::builder()
        .set_compression(compressions[index % compressions.len()])
        .set_writer_version(version)
        .set_dictionary_enabled(index % 3 != 1)
        .set_max_row_group_row_count(Some(1 + index % 2))
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, rows.schema(), Some(properties)).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
    bytes
}

fn parquet_rows() -> Vec<Seed> {
    let tables = tables().into_iter().enumerate();
    let seed = |(index, (name, rows)): (usize, (&str, RecordBatch))| Seed {
        target: "parquet_rows",
        name: format!("{name}.parquet"),
        bytes: parquet_bytes(&rows, index),
    };
    tables.map(seed).collect()
}

/// The tables in the other forms in which rows are read.
fn other_rows() -> Vec<Seed> {
    let targets = [
        ("json_rows", &["jsonl", "json"][..]),
        ("csv_rows", &["csv"]),
        ("arrow_rows", &["arrow", "arrows", "lz4.arrow"]),
        ("compressed_rows", &["jsonl.gz", "jsonl.zst"]),
    ];
    let seeds = |(name, rows): (&'static str, RecordBatch)| {
        let of = |target, ending: &str| Seed {
            target,
            name: format!("{name}.{ending}"),
            bytes: forms::bytes(&rows, ending),
        };
        targets.iter().flat_map(|(target, endings)| endings.iter().map(|ending| of(target, ending))).collect::<Vec<_>>()
    };
    tables().into_iter().flat_map(seeds).collect()
}

const FAMILIES: [&str; 14] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt-neox",
    "classifiers/bert",
    "classifiers/roberta",
    "classifiers/xlm-roberta",
    "classifiers/deberta-v3",
    "classifiers/deberta-v2-convolution",
    "classifiers/deberta-v2-absolute",
];

/// Adapters of the golden Llama.
pub const ADAPTERS: [&str; 12] = [
    "lora-llama",
    "lora-llama-all",
    "lora-dora",
    "lora-embedding",
    "lora-modules-to-save",
    "lora-patterns",
    "ia3-llama",
    "prompt-llama",
    "prefix-llama",
    "p-tuning-mlp",
    "adapter-houlsby-llama",
    "adapter-pfeiffer-llama",
];

fn of_golden(target: &'static str, names: &[&str], bytes: impl Fn(&Path) -> Vec<u8>) -> Vec<Seed> {
    let seed = |name: &&str| Seed { target, name: name.replace('/', "-"), bytes: bytes(&golden(name)) };
    names.iter().map(seed).collect()
}

/// An adapter's configuration and its tensors.
fn adapter(folder: &Path) -> Vec<u8> {
    let tensors = ["adapter_model.safetensors", "adapter.safetensors"].map(|name| folder.join(name));
    let tensors = tensors.iter().find(|path| path.is_file()).expect("an adapter has tensors");
    join(&read(&folder.join("adapter_config.json")), &read(tensors))
}

fn tokenizer(folder: &Path) -> Vec<u8> {
    join(&read(&folder.join("tokenizer.json")), &read(&folder.join("tokenizer_config.json")))
}

/// A file of settings for each program, which the first byte names.
const SETTINGS: [(u8, &str); 7] = [
    (
        b'i',
        "model = \"model\"\ndata = \"a.parquet\"\noutput = \"run\"\nmethod = \"lora\"\nrank = 4\nlearning-rate = 1e-3\n",
    ),
    (b'j', "model = \"model\"\ndata = \"a.parquet\"\noutput = \"run\"\nepochs = 2\nevaluation_share = 0.2\n"),
    (b'k', "model = \"model\"\nreward-model = \"reward\"\ndata = \"a.parquet\"\noutput = \"run\"\ntemperature = 0.7\n"),
    (b'l', "model = \"model\"\ndata = \"a.parquet\"\noutput = \"run\"\nseed = 3\nthreads = 1\n"),
    (b'm', "model = \"model\"\ndata = \"a.parquet\"\noutput = \"run\"\nmax-length = 64\n"),
    (b'n', "models = [\"a=one\", \"b=two\"]\ndata = \"a.parquet\"\noutput = \"run\"\nquiet = true\n"),
    (b'o', "model = \"model\"\noutput = \"run\"\n"),
];

/// Every seed of every target.
pub fn all() -> Vec<Seed> {
    let mut seeds = parquet_rows();
    seeds.extend(other_rows());
    let safetensors = ["llama", "lora-llama", "gpt2", "bert-reward"];
    seeds.extend(of_golden("safetensors", &safetensors, |folder| {
        let names = ["model.safetensors", "adapter_model.safetensors"].map(|name| folder.join(name));
        read(names.iter().find(|path| path.is_file()).expect("there are tensors"))
    }));
    seeds.extend(of_golden("adapter_folder", &ADAPTERS, adapter));
    seeds.extend(of_golden("model_config", &FAMILIES, |folder| read(&folder.join("config.json"))));
    let classifiers: Vec<&str> = FAMILIES.into_iter().filter(|name| name.starts_with("classifiers/")).collect();
    seeds.extend(of_golden("tokenizer", &classifiers, tokenizer));
    seeds.push(Seed { target: "tokenizer", name: "base".into(), bytes: tokenizer(&golden("../../data/base")) });
    let templates: serde_json::Value = serde_json::from_slice(&read(&golden("chat_templates.json"))).unwrap();
    for entry in templates["templates"].as_array().expect("a list of templates") {
        let (name, source) = (entry["name"].as_str().expect("a name"), entry["template"].as_str().expect("a template"));
        seeds.push(Seed { target: "chat_template", name: name.to_string(), bytes: source.as_bytes().to_vec() });
    }
    for (program, text) in SETTINGS {
        let bytes = [&[program], text.as_bytes()].concat();
        seeds.push(Seed { target: "settings", name: char::from(program).to_string(), bytes });
    }
    seeds
}

#[test]
fn seeds_are_whole() {
    let folder_of_one = tempfile::tempdir().unwrap();
    for seed in all() {
        if let Some(corpus) = std::env::var_os("RLHF_FUZZ_CORPUS") {
            let target = Path::new(&corpus).join(seed.target);
            std::fs::create_dir_all(&target).unwrap();
            std::fs::write(target.join(&seed.name), &seed.bytes).unwrap();
        }
        if ["adapter_folder", "tokenizer"].contains(&seed.target) {
            let (json, rest) = split(&seed.bytes);
            assert!(serde_json::from_slice::<serde_json::Value>(json).is_ok() && !rest.is_empty(), "{}", seed.name);
        }
        if seed.target.ends_with("_rows") {
            let path = folder_of_one.path().join(&seed.name);
            std::fs::write(&path, &seed.bytes).unwrap();
            let path = path.display().to_string();
            let demonstrations = || schema::demonstrations(&path)?.collect::<Result<Vec<_>, _>>().map(|all| all.len());
            let rankings = || schema::rankings(&path)?.collect::<Result<Vec<_>, _>>().map(|all| all.len());
            let labelled = || schema::labelled(&path)?.collect::<Result<Vec<_>, _>>().map(|all| all.len());
            let read = demonstrations().or_else(|_: rlhf::Error| rankings()).or_else(|_| labelled());
            assert_eq!(read.unwrap_or_else(|error| panic!("{}: {error}", seed.name)), 2);
        }
    }
    for name in FAMILIES.iter().filter(|name| !name.contains("deberta")) {
        folder::read_architecture(&golden(name)).unwrap();
    }
    for name in ["llama", "gpt2", "bert-reward"] {
        weight_files::TensorFiles::open(&golden(name)).unwrap();
    }
    Tokenizer::load(golden("../../data/base")).unwrap();
}
