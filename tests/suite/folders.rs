//! Folders of models as people bring them: which files hold the weights, what a folder without weights is
//! good for, and what is written.

use std::path::Path;

use candle_core::Device;
use rlhf::Result;
use rlhf::adapt::{self, Bases, Head, Role, Training};
use rlhf::data::train_tokenizer::{SpecialTokens, train_bpe};
use rlhf::model::architecture::{BeyondContext, Config};
use rlhf::model::{Model, family};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Shape, training_settings, write_config, write_model};
use crate::hostile::{copy, read_json};

fn load(folder: &Path, training: Training, head: Head, bases: &mut Bases) -> Result<Model> {
    bases.load(&Role { folder, adapters: &[], training, head, seed: 3 })
}

fn frozen(folder: &Path) -> Result<Model> {
    load(folder, Training::Frozen, Head::Language, &mut Bases::new(Device::Cpu))
}

fn put(folder: &Path, name: &str, content: &Value) {
    std::fs::write(folder.join(name), content.to_string()).unwrap();
}

#[test]
fn shards_are_read_without_their_index_and_written_with_one() -> Result<()> {
    let model = copy("llama-sharded");
    let expected = frozen(model.path())?.weights().hash()?;
    std::fs::remove_file(model.path().join("model.safetensors.index.json")).unwrap();
    let read = frozen(model.path())?;
    assert_eq!(read.weights().hash()?, expected);
    let written = tempfile::tempdir().unwrap();
    read.save(written.path())?;
    assert!(written.path().join("model.safetensors.index.json").is_file());
    assert_eq!(frozen(written.path())?.weights().hash()?, expected);
    std::fs::remove_file(model.path().join("model-00002-of-00003.safetensors")).unwrap();
    let error = frozen(model.path()).err().unwrap().to_string();
    assert!(error.contains("model-00002-of-00003.safetensors is missing"), "{error}");
    Ok(())
}

#[test]
fn the_file_that_config_json_names_holds_the_weights_and_is_not_named_in_what_is_written() -> Result<()> {
    let model = copy("llama");
    let expected = frozen(model.path())?.weights().hash()?;
    std::fs::rename(model.path().join("model.safetensors"), model.path().join("other.safetensors")).unwrap();
    assert!(frozen(model.path()).err().unwrap().to_string().contains("found other.safetensors"));
    let mut config = read_json(&model.path().join("config.json"));
    config["transformers_weights"] = "other.safetensors".into();
    put(model.path(), "config.json", &config);
    let written = tempfile::tempdir().unwrap();
    frozen(model.path())?.save(written.path())?;
    assert_eq!(read_json(&written.path().join("config.json")).get("transformers_weights"), None);
    assert_eq!(frozen(written.path())?.weights().hash()?, expected);
    Ok(())
}

#[test]
fn only_a_role_that_trains_starts_from_a_folder_without_weights() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    write_config(Shape::Llama, folder.path());
    let settings = training_settings(&["--method", "full"]);
    let mut bases = Bases::new(Device::Cpu);
    let trained = load(folder.path(), Training::With(&settings), Head::Language, &mut bases)?;
    assert_eq!(trained.folder().new_from_seed, Some(3));
    // A reference on the same base is none.
    let error = load(folder.path(), Training::Frozen, Head::Language, &mut bases).err().unwrap().to_string();
    assert!(error.contains("there are no weights next to config.json"), "{error}");
    for head in [Head::Language, Head::AsFound, Head::Scalar, Head::ScalarOrNew] {
        let found = load(folder.path(), Training::Frozen, head, &mut Bases::new(Device::Cpu));
        assert!(found.err().unwrap().to_string().contains("no weights"), "{head:?}");
    }
    // Nor does an adapter have new weights for its base.
    let lora = training_settings(&["--method", "lora"]);
    let found = load(folder.path(), Training::With(&lora), Head::Language, &mut Bases::new(Device::Cpu));
    assert!(found.err().unwrap().to_string().contains("no weights"));
    assert!(adapt::check_weights(folder.path()).is_err());
    trained.save(folder.path())?;
    adapt::check_weights(folder.path())?;
    assert_eq!(frozen(folder.path())?.folder().new_from_seed, None);
    Ok(())
}

/// A model of the vocabulary of a tokenizer with these special tokens, which get the first ids.
fn with_tokenizer(special: &SpecialTokens, config: &[(&str, Value)]) -> Result<TempDir> {
    let folder = tempfile::tempdir().unwrap();
    write_model(Shape::Llama, folder.path())?;
    let mut json = read_json(&folder.path().join("config.json"));
    json["vocab_size"] = 300.into();
    config.iter().for_each(|(name, value)| json[*name] = value.clone());
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    put(folder.path(), "config.json", &json);
    train_bpe(["a text".to_string()].into_iter(), 300, special)?.save(folder.path())?;
    Ok(folder)
}

#[test]
fn a_written_reward_model_is_not_padded_with_the_token_that_ends_texts() -> Result<()> {
    let settings = training_settings(&["--method", "full"]);
    let tokens = |pad: Option<&str>| SpecialTokens {
        pad: pad.map(String::from),
        bos: Some("<s>".into()),
        eos: "</s>".into(),
        others: vec![],
    };
    // With a token for padding of its own it has id 0, and </s> 2; else </s> 1.
    let cases = [
        (tokens(Some("<pad>")), json!(null), json!(2), json!(0), false),
        (tokens(Some("<pad>")), json!(2), json!(2), json!(0), true),
        (tokens(Some("<pad>")), json!(5), json!(2), json!(5), false),
        (tokens(None), json!(1), json!(1), json!(null), true),
        (tokens(None), json!(null), json!(1), json!(null), false),
        (tokens(Some("</s>")), json!(5), json!([5, 7]), json!(null), true),
    ];
    for (special, pad, eos, expected, warns) in cases {
        let folder = with_tokenizer(&special, &[("pad_token_id", pad.clone()), ("eos_token_id", eos)])?;
        let training = Training::With(&settings);
        let model = load(folder.path(), training, Head::ScalarOrNew, &mut Bases::new(Device::Cpu))?;
        let tokenizer = adapt::tokenizer(folder.path(), &[])?;
        let warning = model.padding_warning(&tokenizer);
        assert_eq!(warning.is_some(), warns, "{warning:?}");
        let written = tempfile::tempdir().unwrap();
        model.save(written.path())?;
        let config = read_json(&written.path().join("config.json"));
        assert_eq!(config["pad_token_id"], expected, "pad {pad}");
    }
    Ok(())
}

#[test]
fn a_classifier_of_transformers_is_read_before_its_padding_and_stays_so_when_it_is_trained() -> Result<()> {
    let folder = with_tokenizer(&SpecialTokens::default(), &[("pad_token_id", json!(2))])?;
    let settings = training_settings(&["--method", "full"]);
    let mut bases = Bases::new(Device::Cpu);
    let start = load(folder.path(), Training::With(&settings), Head::ScalarOrNew, &mut bases)?;
    let folder = tempfile::tempdir().unwrap();
    start.save(folder.path())?;
    std::fs::remove_file(folder.path().join("head.json")).unwrap();
    let mut config = read_json(&folder.path().join("config.json"));
    config["pad_token_id"] = 2.into();
    put(folder.path(), "config.json", &config);
    let training = Training::With(&settings);
    let model = load(folder.path(), training, Head::ScalarOrNew, &mut Bases::new(Device::Cpu))?;
    assert_eq!(model.head().unwrap().form.pad_token_id, Some(2));
    assert_eq!(model.padding_warning(&adapt::tokenizer(folder.path(), &[])?), None);
    let written = tempfile::tempdir().unwrap();
    model.save(written.path())?;
    assert_eq!(read_json(&written.path().join("config.json"))["pad_token_id"], 2);
    let again = load(written.path(), Training::Frozen, Head::Scalar, &mut Bases::new(Device::Cpu))?;
    assert_eq!(again.head().unwrap().form.pad_token_id, Some(2));
    Ok(())
}

#[test]
fn what_is_saved_of_a_model_with_an_adapter_has_the_adapters_tokenizer() -> Result<()> {
    let [base, adapter, written] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    write_model(Shape::Llama, base.path())?;
    let settings = training_settings(&["--method", "lora"]);
    load(base.path(), Training::With(&settings), Head::Language, &mut Bases::new(Device::Cpu))?.save(adapter.path())?;
    for (folder, name) in [(&base, "base"), (&adapter, "adapter")] {
        put(folder.path(), "tokenizer.json", &json!({ "of": name }));
        std::fs::write(folder.path().join("chat_template.jinja"), name).unwrap();
    }
    put(base.path(), "special_tokens_map.json", &json!({}));
    put(base.path(), "generation_config.json", &json!({ "of": "base" }));
    frozen(adapter.path())?.save(written.path())?;
    assert_eq!(read_json(&written.path().join("tokenizer.json"))["of"], "adapter");
    assert_eq!(std::fs::read_to_string(written.path().join("chat_template.jinja")).unwrap(), "adapter");
    assert_eq!(read_json(&written.path().join("generation_config.json"))["of"], "base");
    // A tokenizer's files belong together.
    assert!(!written.path().join("special_tokens_map.json").exists());
    Ok(())
}

#[test]
fn sequences_are_counted_that_no_scaling_of_rotary_positions_covers() -> Result<()> {
    let counted = |model_type: &str, fields: Value| -> Result<Option<String>> {
        let mut json = json!({ "model_type": model_type, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 100 });
        json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let architecture = family::architecture(&Config::new(&json, "config.json"))?;
        Ok(BeyondContext::of(&architecture).with([100, 101, 399, 7]).warning())
    };
    for family in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox"] {
        let warning = counted(family, json!({}))?.unwrap();
        assert!(
            warning.starts_with("2 of 4 sequences are longer than the 100 tokens") && warning.contains("399"),
            "{warning}"
        );
    }
    for scaling in [
        json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }),
        json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50 } }),
    ] {
        assert_eq!(counted("llama", scaling)?, None);
    }
    let twice = json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } });
    assert!(counted("llama", twice)?.unwrap().starts_with("1 of 4 sequences are longer than the 200 tokens"));
    Ok(())
}
