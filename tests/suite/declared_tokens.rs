//! Tokens that are declared next to `tokenizer.json`, in every way that `transformers` reads them.

use std::path::Path;

use rlhf::Result;
use rlhf::data::schema::{Demonstration, Origin, Text};
use rlhf::data::tokenize::Tokenizer;
use rlhf::data::tokenize_records::Truncation;
use serde_json::Value;
use tempfile::TempDir;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/declared_tokens.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn put(folder: &TempDir, name: &str, content: &Value) {
    std::fs::write(folder.path().join(name), content.to_string()).unwrap();
}

/// The folder of one of the golden file's cases.
fn folder_of(golden: &Value, case: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    put(&folder, "tokenizer.json", &golden["tokenizers"][case["tokenizer"].as_str().unwrap()]);
    case["files"].as_object().unwrap().iter().for_each(|(name, content)| put(&folder, name, content));
    folder
}

fn case<'a>(golden: &'a Value, name: &str) -> &'a Value {
    golden["cases"].as_array().unwrap().iter().find(|case| case["name"] == name).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_get_the_ids_that_transformers_gives_them() -> Result<()> {
    let golden = golden();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let mut read = 0;
    for case in golden["cases"].as_array().unwrap().iter().filter(|case| case.get("ids").is_some()) {
        let name = &case["name"];
        let folder = folder_of(&golden, case);
        let tokenizer = Tokenizer::load(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (index, text) in texts.iter().enumerate() {
            let expected = ids(&case["ids"][index]);
            assert_eq!(tokenizer.encode_texts(text, None, 1000)?.tokens, expected, "{name}: {text}");
            if case["tokenizer"] == "bytes" {
                assert_eq!(tokenizer.encode(text)?, expected, "{name}: {text}");
            }
            assert_eq!(tokenizer.decode(&expected, true)?, case["decoded"][index], "{name}: {text}");
        }
        let id = |field: &str| case[field].as_u64().map(|id| id as u32);
        assert_eq!((tokenizer.eos().ok(), tokenizer.bos()), (id("eos"), id("bos")), "{name}");
        if case["class"] != "GPT2Tokenizer" {
            assert_eq!(tokenizer.pad(), id("pad"), "{name}");
        }
        read += 1;
    }
    assert!(read > 20, "{read}");
    Ok(())
}

#[test]
fn an_id_that_cannot_be_given_and_an_end_token_that_is_nowhere_are_refused() {
    let golden = golden();
    let refused: Vec<&Value> =
        golden["cases"].as_array().unwrap().iter().filter(|case| case.get("refused").is_some()).collect();
    assert_eq!(refused.len(), 3);
    for case in refused {
        let folder = folder_of(&golden, case);
        let error = Tokenizer::load(folder.path()).err().unwrap_or_else(|| panic!("{}", case["name"])).to_string();
        assert!(error.contains(case["refused"].as_str().unwrap()), "{}: {error}", case["name"]);
    }
}

#[test]
fn settings_that_change_tokens_and_are_not_supported_are_refused() {
    let golden = golden();
    for (field, value) in [
        ("fix_mistral_regex", Value::from(true)),
        ("fast_tokenizer_files", serde_json::json!(["tokenizer.4.0.json"])),
        ("split_special_tokens", Value::from("yes")),
    ] {
        let folder = folder_of(&golden, case(&golden, "plain"));
        put(&folder, "tokenizer_config.json", &serde_json::json!({ "eos_token": "<|end|>", field: value }));
        let error = Tokenizer::load(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains(field), "{error}");
    }
}

#[test]
fn the_adapters_tokenizer_has_the_end_tokens_of_the_model_unless_it_has_its_own() -> Result<()> {
    let golden = golden();
    let plain = case(&golden, "plain");
    let [base, adapter] = [(); 2].map(|()| folder_of(&golden, plain));
    put(&base, "generation_config.json", &serde_json::json!({ "eos_token_id": [0, 250] }));
    put(&base, "config.json", &serde_json::json!({ "eos_token_id": 0 }));
    let open = || Tokenizer::open(&[adapter.path().to_path_buf(), base.path().to_path_buf()]);
    assert_eq!(open()?.stop_tokens(), [0, 250]);
    // The tokenizer itself is the adapter's.
    let mut config = plain["files"]["tokenizer_config.json"].clone();
    config["eos_token"] = "<s>".into();
    put(&adapter, "tokenizer_config.json", &config);
    assert_eq!((open()?.eos()?, open()?.stop_tokens()), (1, &[1, 0, 250][..]));
    put(&adapter, "generation_config.json", &serde_json::json!({ "eos_token_id": 7 }));
    assert_eq!(open()?.stop_tokens(), [1, 0, 7]);
    // Without a tokenizer of its own the adapter has the model's.
    std::fs::remove_file(adapter.path().join("tokenizer.json")).unwrap();
    assert_eq!(open()?.eos()?, 0);
    Ok(())
}

#[test]
fn a_token_beyond_the_embedding_matters_only_where_a_text_holds_it() -> Result<()> {
    let golden = golden();
    let folder = folder_of(&golden, case(&golden, "additional_special_tokens"));
    let tokenizer = Tokenizer::load(folder.path())?;
    let rows = tokenizer.vocabulary_size() - 1;
    let tokenizer = tokenizer.for_rows(rows);
    let origin = || Origin { file: Path::new("rows.parquet").into(), row: 3 };
    let demonstration = |text: &str| {
        let record = Demonstration {
            prompt: Some(Text::Plain("Who?".into())),
            completion: Text::Plain(text.into()),
            origin: origin(),
        };
        tokenizer.demonstration(&record, 100, &mut Truncation::default())
    };
    demonstration(" the bell <|new|>")?;
    let error = demonstration(" the bell <|other|>").unwrap_err().to_string();
    assert!(error.starts_with("rows.parquet: row 3"), "{error}");
    assert!(error.contains("tokenizer.json") && error.contains(&format!("\"<|other|>\" (id {rows})")), "{error}");
    assert!(tokenizer.encode_texts("<|other|>", None, 10).is_err() && tokenizer.encode_words("<|other|>").is_err());
    Ok(())
}
