use super::*;
use crate::model::architecture::Config;
use crate::model::family;

fn write_one(values: &[f32], dtype: DType) -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let tensor = Tensor::new(values, &Device::Cpu)?;
    write_file(&folder.path().join(SINGLE_FILE), &BTreeMap::from([("a.weight".to_string(), tensor)]), dtype)
}

#[test]
fn a_weight_beyond_the_range_of_the_element_type_is_an_error_with_its_tensor() {
    // The largest finite numbers: (2 - 2^-10) 2^15 and (2 - 2^-7) 2^127.
    let (f16, bf16) = (65504.0, 3.389_531_4e38);
    for (dtype, largest) in [(DType::F16, f16), (DType::BF16, bf16), (DType::F32, f32::MAX)] {
        write_one(&[largest, -largest, 0.0, 1e-30], dtype).unwrap();
    }
    let fault = |values: &[f32], dtype| write_one(values, dtype).unwrap_err().to_string();
    // Half of the last place further, a number is rounded to infinity.
    let error = fault(&[1.0, 65520.0, -1e6], DType::F16);
    assert!(
        error.contains("\"a.weight\"") && error.contains("2 of its 3 numbers") && error.contains("bf16"),
        "{error}"
    );
    write_one(&[65519.0], DType::F16).unwrap();
    let error = fault(&[3.4e38], DType::BF16);
    assert!(
        error.contains("1 of its 1 numbers are not finite in bf16") && error.ends_with("write it as f32"),
        "{error}"
    );
    // What is not finite itself is no fault of the element type.
    for (broken, dtype) in [(f32::NAN, DType::F32), (f32::INFINITY, DType::BF16), (f32::NEG_INFINITY, DType::F16)] {
        write_one(&[1.0, broken], dtype).unwrap();
    }
    assert!(fault(&[f32::NAN, f32::INFINITY, 1e5], DType::F16).contains("1 of its 3 numbers"));
}

#[test]
fn a_pointer_of_git_lfs_is_named_for_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n").unwrap();
    let error = TensorFile::open(&path).err().unwrap().to_string();
    assert!(error.contains("model.safetensors: a pointer of Git LFS"), "{error}");
}

#[test]
fn shards_without_an_index_hold_each_tensor_once() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let write = |file: &str, tensors: &[&str]| {
        let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let tensors = tensors.iter().map(|name| (name.to_string(), one.clone())).collect();
        write_file(&folder.path().join(file), &tensors, DType::F32).unwrap();
    };
    write(names[0], &["a", "b"]);
    write(names[1], &["c"]);
    let shards = TensorFiles::open(folder.path()).unwrap().shards.unwrap();
    let found: Vec<(&str, &str)> = shards.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str())).collect();
    assert_eq!(found, [("a", names[0]), ("b", names[0]), ("c", names[1])]);
    write(names[1], &["b", "c"]);
    let error = TensorFiles::open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("tensor \"b\" is in model-00001-of-00002.safetensors too"), "{error}");
}

#[test]
fn tensors_without_a_place_are_counted_and_those_of_pretraining_are_not() {
    let encoder = |family: &str| {
        let json = serde_json::json!({"model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 64});
        family::architecture(&Config::new(&json, "config.json")).unwrap()
    };
    let warnings = |family: &str, names: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let tensors = names.iter().map(|name| (name.to_string(), one.clone())).collect();
        write_file(&folder.path().join(SINGLE_FILE), &tensors, DType::F32).unwrap();
        TensorFiles::open(folder.path()).unwrap().unread(&encoder(family))
    };
    // What transformers 5.24 saves of `...ForMaskedLM` beside the encoder, and what older files of the hub hold.
    for (family, names) in [
        (
            "bert",
            "cls.predictions.bias cls.predictions.decoder.weight cls.seq_relationship.weight bert.embeddings.position_ids",
        ),
        ("roberta", "lm_head.bias lm_head.decoder.bias lm_head.decoder.weight roberta.pooler.dense.weight"),
        ("xlm-roberta", "lm_head.dense.weight roberta.pooler.dense.bias roberta.embeddings.position_ids"),
        ("modernbert", "decoder.weight decoder.bias"),
        ("llama", "lm_head.weight model.layers.0.self_attn.rotary_emb.inv_freq"),
    ] {
        assert_eq!(warnings(family, &names.split(' ').collect::<Vec<_>>()), [""; 0], "{family}");
    }
    for (family, name) in [("bert", "bert.encoder.layer.7.output.dense.bias"), ("llama", "decoder.bias")] {
        let found = warnings(family, &[name]);
        assert!(found.len() == 1 && found[0].contains("1 of the stored") && found[0].contains(name), "{found:?}");
    }
    let found = warnings("llama", &["vision_tower.head.probe", "model.multi_modal_projector.weight"]);
    assert!(found.len() == 1 && found[0].contains("not the 2 tensors of its part of images"), "{found:?}");
}
