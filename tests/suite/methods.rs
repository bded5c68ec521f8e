//! Every lightweight method against PEFT and AdapterHub: what it wrote is read, gives its logits and gradients, and is written as it wrote it.

use std::path::Path;

use candle_core::Tensor;
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::Batch;
use rlhf::model::adapter::{Parameter, Pass};
use serde_json::Value;

use crate::oracle::{
    Tensors, assert_close, assert_gradient, check_logits_and_loss, documents, expected, floats, folder, load, logits,
    pairs,
};

/// Folders with the method that goes on training them.
const ADAPTERS: [(&str, &str); 31] = [
    ("lora-gemma3", "lora"),
    ("lora-smollm3", "lora"),
    ("lora-olmo2", "lora"),
    ("lora-olmo3", "lora"),
    ("lora-phi3", "lora"),
    ("lora-granite", "lora"),
    ("lora-llama", "lora"),
    ("lora-llama-all", "lora"),
    ("lora-gpt2", "lora"),
    ("lora-bias", "lora"),
    ("lora-bias-only", "lora"),
    ("lora-embedding", "lora"),
    ("lora-modules-to-save", "lora"),
    ("lora-dora", "lora"),
    ("lora-dora-gpt2", "lora"),
    ("lora-patterns", "lora"),
    ("ia3-llama", "ia3"),
    ("ia3-gpt2", "ia3"),
    ("prompt-llama", "prompt-tuning"),
    ("prompt-gpt2", "prompt-tuning"),
    ("p-tuning-mlp", "p-tuning"),
    ("p-tuning-lstm", "p-tuning"),
    ("prefix-llama", "prefix-tuning"),
    ("prefix-gpt2", "prefix-tuning"),
    ("prefix-projection", "prefix-tuning"),
    ("adapter-houlsby-llama", "adapters"),
    ("adapter-houlsby-gpt2", "adapters"),
    ("adapter-pfeiffer-llama", "adapters"),
    ("adapter-pfeiffer-gpt2", "adapters"),
    ("adapter-parallel-llama", "adapters"),
    ("adapter-parallel-gpt2", "adapters"),
];

#[test]
fn adapters_written_by_peft_give_its_logits_and_gradients() -> Result<()> {
    for (name, method) in ADAPTERS {
        let tensors = expected(name)?;
        let model = load(&folder(name), Some(&["--method", method]), Head::Language)?;
        let gradients = check_logits_and_loss(name, &model, &tensors)?;
        let parameters = model.trainable_parameters();
        let wanted = tensors.keys().filter(|key| key.starts_with("grad.")).count();
        assert_eq!(parameters.len(), wanted, "{name}: trained tensors");
        for Parameter { name: parameter, variable, .. } in parameters {
            let key = parameter.trim_start_matches("prompt_encoder.");
            let wanted = tensors.get(&format!("grad.{key}")).unwrap_or_else(|| panic!("{name}: {key} is not trained"));
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name}: {key} has no gradient"));
            // PEFT keeps vectors of IA3 as matrices.
            assert_gradient(&format!("{name}: {key}"), gradient, &wanted.reshape(gradient.shape())?)?;
        }
    }
    Ok(())
}

#[test]
fn rewards_and_classes_of_adapters_written_by_peft_are_its_own() -> Result<()> {
    for name in ["lora-reward", "prompt-reward", "prefix-reward", "ia3-reward", "lora-classifier"] {
        let tensors = expected(name)?;
        let model = load(&folder(name), None, Head::AsFound)?;
        let batch = Batch::pack(&documents(&tensors)?);
        let scores = model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?;
        assert_close(name, &scores.flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "scores")?, 1e-4);
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        assert_same_files(name, copy.path())?;
    }
    Ok(())
}

/// An adapter of the text part of a model of text and images has that model's names.
#[test]
fn an_adapter_of_a_text_part_is_read_and_written_with_the_names_of_the_whole() -> Result<()> {
    let tensors = expected("lora-gemma3-with-images")?;
    let model = load(&folder("lora-gemma3-with-images"), None, Head::Language)?;
    let batch = Batch::pack(&documents(&tensors)?);
    assert_close("logits", &logits(&model, &batch)?, &floats(&tensors, "logits")?, 1e-4);
    let copy = tempfile::tempdir().expect("a temporary folder");
    model.save(copy.path())?;
    let names = |folder: &Path| -> Result<Vec<String>> {
        let tensors =
            candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &candle_core::Device::Cpu)?;
        let mut names: Vec<String> = tensors.into_keys().collect();
        names.sort();
        Ok(names)
    };
    assert_eq!(names(copy.path())?, names(&folder("lora-gemma3-with-images"))?);
    assert_eq!(logits(&load(copy.path(), None, Head::Language)?, &batch)?, logits(&model, &batch)?);
    Ok(())
}

/// PEFT stores the last layer of ModernBERT's classifier and leaves what that reads with the base; we store both.
#[test]
fn the_classifier_of_an_adapter_reads_modernberts_prediction_head() -> Result<()> {
    let tensors = expected("lora-modernbert")?;
    let model = load(&folder("lora-modernbert"), None, Head::AsFound)?;
    let copy = tempfile::tempdir().expect("a temporary folder");
    model.save(copy.path())?;
    for model in [model, load(copy.path(), None, Head::AsFound)?] {
        let batch = model.pack(&documents(&tensors)?);
        let scores = model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?;
        assert_close("scores", &scores.flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "scores")?, 1e-4);
    }
    Ok(())
}

#[test]
fn adapters_are_written_as_peft_writes_them_and_read_again() -> Result<()> {
    for (name, method) in ADAPTERS {
        let batch = Batch::pack(&documents(&expected(name)?)?);
        let model = load(&folder(name), Some(&["--method", method]), Head::Language)?;
        let found = logits(&model, &batch)?;
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        assert_same_files(name, copy.path())?;
        let again = load(copy.path(), Some(&["--method", method]), Head::Language)?;
        assert_eq!(logits(&again, &batch)?, found, "{name}");
        let names = |model: &rlhf::model::Model| -> Vec<String> {
            model.trainable_parameters().into_iter().map(|parameter| parameter.name).collect()
        };
        assert_eq!(names(&again), names(&model), "{name}: what trains on");
    }
    Ok(())
}

#[test]
fn bottleneck_adapters_of_an_encoder_give_adapterhubs_classes_and_gradients() -> Result<()> {
    let labels = ["a", "b", "c"].map(String::from);
    for placement in ["houlsby", "pfeiffer", "parallel"] {
        let name = format!("adapter-{placement}-bert");
        let tensors = expected(&name)?;
        let model = load(&folder(&name), Some(&["--method", "adapters"]), Head::Classes(&labels))?;
        let batch = model.pack(&pairs(&tensors)?);
        let classes = model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?;
        assert_close(&name, &classes.flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "logits")?, 1e-4);
        let index = Tensor::new(&[[2u32], [0]], &candle_core::Device::Cpu)?;
        let loss = candle_nn::ops::log_softmax(&classes, 1)?.gather(&index, 1)?.mean_all()?.neg()?;
        assert_close(&name, &[loss.to_scalar()?], &floats(&tensors, "loss")?, 1e-5);
        let gradients = loss.backward()?;
        // The head trains too, which AdapterHub's did not.
        let parameters =
            model.trainable_parameters().into_iter().filter(|parameter| parameter.name.contains("adapters"));
        let mut count = 0;
        for Parameter { name: key, variable, .. } in parameters {
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name}: {key} has no gradient"));
            assert_gradient(&format!("{name}: {key}"), gradient, &tensors[&format!("grad.{key}")])?;
            count += 1;
        }
        assert_eq!(count, tensors.keys().filter(|key| key.starts_with("grad.")).count());
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        assert_same_files(&name, copy.path())?;
    }
    Ok(())
}

#[test]
fn a_merged_model_is_the_unmerged_one_where_the_method_can_be_merged() -> Result<()> {
    for (name, method) in ADAPTERS {
        let batch = Batch::pack(&documents(&expected(name)?)?);
        let found = logits(&load(&folder(name), None, Head::Language)?, &batch)?;
        let cannot = method.starts_with('p') || method == "adapters";
        match load(&folder(name), Some(&["--method", "full"]), Head::Language) {
            Ok(merged) => {
                assert!(merged.adapters().is_empty() && !cannot);
                assert_close(name, &logits(&merged, &batch)?, &found, 1e-5);
            }
            Err(error) => {
                assert!(cannot && error.to_string().contains("cannot be folded"), "{name}: {error}")
            }
        }
    }
    Ok(())
}

/// The folder `copy` holds the tensors of a golden folder, bit for bit, and says the same of them in all fields that PEFT reads.
fn assert_same_files(name: &str, copy: &Path) -> Result<()> {
    let read = |folder: &Path, file: &str| -> Result<Tensors> {
        let path = folder.join(file);
        let tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu)?;
        // The table that an update of the embeddings stands beside is the base's, which PEFT writes too.
        Ok(tensors.into_iter().filter(|(key, _)| !key.ends_with("embed_tokens.base_layer.weight")).collect())
    };
    for file in ["adapter_model.safetensors", "encoder.safetensors", "adapter.safetensors"] {
        if !folder(name).join(file).is_file() {
            continue;
        }
        let (theirs, ours) = (read(&folder(name), file)?, read(copy, file)?);
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}: {file}");
        for (key, tensor) in theirs {
            let values = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(tensor.flatten_all()?.to_vec1()?) };
            assert_eq!(ours[&key].dims(), tensor.dims(), "{name}: {key}");
            // What an encoder says is computed anew.
            assert_close(&format!("{name}: {key}"), &values(&ours[&key])?, &values(&tensor)?, 1e-6);
        }
    }
    let config = |folder: &Path| -> Value {
        let text = std::fs::read_to_string(folder.join("adapter_config.json")).expect("a configuration");
        serde_json::from_str(&text).expect("valid JSON")
    };
    let (mut theirs, mut ours) = (config(&folder(name)), config(copy));
    if theirs.get("model_name").is_some() {
        // AdapterHub's; the rest of it is the base's path.
        for config in [&mut theirs, &mut ours] {
            config["model_name"] = Value::Null;
            config["config"]["reduction_factor"] = config["config"]["reduction_factor"].as_f64().into();
        }
        assert_eq!(ours, theirs, "{name}");
        return Ok(());
    }
    let fields = [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "fan_in_fan_out",
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "prefix_projection",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
    ];
    for field in fields {
        // PEFT writes whole alphas without a point.
        let (theirs, ours) = (&theirs[field], &ours[field]);
        let same = theirs == ours || theirs.as_f64().is_some_and(|number| Some(number) == ours.as_f64());
        assert!(same || theirs.is_null() || is_same_map(theirs, ours), "{name}: {field} is {ours}, PEFT has {theirs}");
    }
    Ok(())
}

fn is_same_map(a: &Value, b: &Value) -> bool {
    match (a.as_object(), b.as_object()) {
        (Some(a), Some(b)) => a.len() == b.len() && a.iter().all(|(key, value)| value.as_f64() == b[key].as_f64()),
        _ => false,
    }
}
