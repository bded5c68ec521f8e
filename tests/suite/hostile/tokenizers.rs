//! Tokenizers that are hostile on purpose, one of each kind that is known.

use rlhf::data::tokenize::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::seeds::golden;
use super::{expect, folder, quickly, read_json, sentence};

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
