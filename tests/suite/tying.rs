//! Whether the output matrix is the embedding matrix: by config.json and by what is stored, for every family and either name.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::model::Model;
use rlhf::model::adapter::Pass;
use rlhf::model::weight_files::{read_file, write_file};
use serde_json::{Value, json};

use crate::common::{Shape, write_config};
use crate::oracle::{Tensors, folder as golden, load, logits};

const FILE: &str = "model.safetensors";

/// A saved model of this shape that says whether it is tied, with the names of its two matrices.
fn saved(shape: Shape, tied: bool) -> (tempfile::TempDir, [&'static str; 2]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_config(shape, folder.path());
    set_tied(folder.path(), tied);
    let model = load(folder.path(), Some(&["--method", "full"]), Head::Language).expect("a new model");
    model.save(folder.path()).expect("the folder can be written to");
    let names = match shape {
        Shape::Gpt2 => ["transformer.wte.weight", "lm_head.weight"],
        Shape::GptNeox => ["gpt_neox.embed_in.weight", "embed_out.weight"],
        _ => ["model.embed_tokens.weight", "lm_head.weight"],
    };
    (folder, names)
}

fn set_tied(folder: &Path, tied: bool) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(tied);
    std::fs::write(path, config.to_string()).unwrap();
}

fn edit(folder: &Path, change: impl FnOnce(&mut Tensors) -> Result<()>) -> Result<()> {
    let mut tensors = read_file(&folder.join(FILE), &Device::Cpu)?;
    change(&mut tensors)?;
    write_file(&folder.join(FILE), &tensors, DType::F32)
}

fn rename(tensors: &mut Tensors, from: &str, to: &str) {
    let tensor = tensors.remove(from).expect("the tensor is stored");
    tensors.insert(to.to_string(), tensor);
}

/// The rows of a matrix from the last to the first.
fn reversed(matrix: &Tensor) -> Result<Tensor> {
    let rows: Vec<u32> = (0..matrix.dim(0)? as u32).rev().collect();
    Ok(matrix.index_select(&Tensor::from_slice(&rows, rows.len(), &Device::Cpu)?, 0)?)
}

fn batch() -> Batch {
    let tokens: Vec<u32> = (0..20).map(|token| token * 7 % 61).collect();
    let learned = vec![true; tokens.len()];
    Batch::pack([&TokenTree { prompt: Vec::new(), answers: vec![Continuation { tokens, learned }] }])
}

const SHAPES: [Shape; 6] = [Shape::Llama, Shape::Mistral, Shape::Gpt2, Shape::Qwen3, Shape::GptNeox, Shape::Gemma2];

#[test]
fn one_stored_matrix_serves_as_both_under_either_name_and_two_equal_ones_are_tied() -> Result<()> {
    for shape in SHAPES {
        let (folder, [embedding, output]) = saved(shape, true);
        let model = load(folder.path(), None, Head::Language)?;
        let expected = logits(&model, &batch())?;
        let check = |what: &str| -> Result<()> {
            let model = load(folder.path(), None, Head::Language)?;
            assert!(model.architecture().tied_output, "{shape:?}, {what}");
            assert_eq!(logits(&model, &batch())?, expected, "{shape:?}, {what}");
            Ok(())
        };
        edit(folder.path(), |tensors| {
            assert!(!tensors.contains_key(output));
            rename(tensors, embedding, output);
            Ok(())
        })?;
        check("the output alone")?;
        // The name that the module has in transformers.
        edit(folder.path(), |tensors| {
            rename(tensors, output, "lm_head.weight");
            Ok(())
        })?;
        check("lm_head alone")?;
        edit(folder.path(), |tensors| {
            rename(tensors, "lm_head.weight", output);
            tensors.insert(embedding.to_string(), tensors[output].clone());
            Ok(())
        })?;
        check("both, equal")?;
    }
    Ok(())
}

#[test]
fn two_different_matrices_are_both_used_whatever_the_config_says_and_are_written_as_untied() -> Result<()> {
    for shape in SHAPES {
        let (folder, [embedding, output]) = saved(shape, true);
        edit(folder.path(), |tensors| {
            tensors.insert(output.to_string(), reversed(&tensors[embedding])?);
            Ok(())
        })?;
        let contradicting = load(folder.path(), None, Head::Language)?;
        set_tied(folder.path(), false);
        let untied = load(folder.path(), None, Head::Language)?;
        let expected = logits(&untied, &batch())?;
        assert_eq!(logits(&contradicting, &batch())?, expected, "{shape:?}");
        let copy = tempfile::tempdir().expect("a temporary folder");
        contradicting.save(copy.path())?;
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(copy.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false, "{shape:?}");
        assert_eq!(logits(&load(copy.path(), None, Head::Language)?, &batch())?, expected, "{shape:?}");
    }
    Ok(())
}

#[test]
fn an_untied_model_needs_both_matrices() -> Result<()> {
    for shape in SHAPES {
        let (folder, [embedding, output]) = saved(shape, false);
        for missing in [embedding, output] {
            let whole = read_file(&folder.path().join(FILE), &Device::Cpu)?;
            edit(folder.path(), |tensors| {
                tensors.remove(missing);
                Ok(())
            })?;
            let error = load(folder.path(), None, Head::Language).map(drop).unwrap_err().to_string();
            assert!(error.contains(missing) && error.contains("is missing"), "{shape:?}: {error}");
            write_file(&folder.path().join(FILE), &whole, DType::F32)?;
        }
    }
    Ok(())
}

#[test]
fn an_encoders_embeddings_may_be_stored_as_its_decoder_of_masked_words() -> Result<()> {
    for (name, embedding, decoder) in [
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta", "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for file in ["config.json", FILE] {
            std::fs::copy(golden(name).join(file), folder.path().join(file)).expect("a golden file");
        }
        let hidden = |model: &Model| -> Result<Vec<f32>> {
            Ok(model.hidden(&model.pack(&[tree()]), &Pass::default())?.tensor().flatten_all()?.to_vec1()?)
        };
        let expected = hidden(&load(folder.path(), None, Head::AsFound)?)?;
        edit(folder.path(), |tensors| {
            rename(tensors, embedding, decoder);
            Ok(())
        })?;
        assert_eq!(hidden(&load(folder.path(), None, Head::AsFound)?)?, expected, "{name}");
    }
    Ok(())
}

fn tree() -> TokenTree {
    TokenTree { prompt: vec![5, 6], answers: vec![Continuation { tokens: vec![7, 8, 9], learned: vec![false; 3] }] }
}
