//! Every lightweight method against PEFT and AdapterHub: what it wrote is read, gives its logits and gradients, and is written as it wrote it.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::Batch;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::Outputs;
use serde_json::Value;

use crate::oracle::{
    Tensors, assert_close, assert_gradient, check_logits_and_loss, documents, expected, floats, folder, load, logits,
    pairs,
};

/// Folders with the method that goes on training them.
pub const ADAPTERS: [(&str, &str); 53] = [
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
    ("lora-head", "lora"),
    ("lora-head-dora", "lora"),
    ("lora-head-gpt2", "lora"),
    ("lora-saved-head-gpt2", "lora"),
    ("lora-saved-head-gpt-neox", "lora"),
    ("lora-head-gpt-neox", "lora"),
    ("lora-whole-qwen3", "lora"),
    ("lora-whole-gpt2", "lora"),
    ("lora-whole-gemma2", "lora"),
    ("lora-embedding-gemma2", "lora"),
    ("lora-tied", "lora"),
    ("lora-saved-tied", "lora"),
    ("lora-tokens", "lora"),
    ("lora-tokens-gpt2", "lora"),
    ("lora-tokens-of-both", "lora"),
    ("ia3-head", "ia3"),
    ("ia3-scaled-head", "ia3"),
    ("grown-saved", "lora"),
    ("grown-saved-embedding", "lora"),
    ("grown-plain-gpt2", "lora"),
    ("grown-updated-tied", "lora"),
    ("grown-tokens", "lora"),
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
            let same = wanted.rank() == gradient.shape().rank();
            let wanted = if same { wanted } else { &wanted.reshape(gradient.shape())? };
            assert_gradient(&format!("{name}: {key}"), &gradient.to_tensor()?, wanted)?;
        }
    }
    Ok(())
}

#[test]
fn trainable_tokens_alone_give_pefts_logits_and_are_written_as_it_writes_them() -> Result<()> {
    for name in ["tokens", "tokens-gpt2", "grown-tokens-alone"] {
        let tensors = expected(name)?;
        let batch = Batch::pack(&documents(&tensors)?);
        let model = load(&folder(name), None, Head::Language)?;
        let found = logits(&model, &batch)?;
        assert_close(name, &found, &floats(&tensors, "logits")?, 1e-4);
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        assert_same_files(name, copy.path())?;
        assert_eq!(logits(&load(copy.path(), None, Head::Language)?, &batch)?, found, "{name}");
        let merged = load(&folder(name), Some(&["--method", "full"]), Head::Language)?;
        assert_close(name, &logits(&merged, &batch)?, &found, 1e-5);
        // A tied output matrix has the same rows, so that the two stay one.
        assert_eq!(merged.architecture().tied_output, model.architecture().tied_output, "{name}");
        // Another method on top leaves them as they are.
        let stack = load(&folder(name), Some(&["--method", "lora"]), Head::Language)?;
        assert_eq!(logits(&stack, &batch)?, found, "{name} under LoRA");
    }
    Ok(())
}

/// What is written of a merged model is what it is in memory: two matrices where an adapter changed one of two that were tied, of as many rows
/// as the adapter's vocabulary has tokens.
#[test]
fn a_merged_model_is_untied_where_the_adapter_changed_one_of_two_tied_tables() -> Result<()> {
    for (name, tied) in [
        ("lora-head-gpt2", false),
        ("lora-saved-head-gpt2", false),
        ("lora-embedding-gemma2", false),
        ("lora-tokens-of-both", false),
        ("grown-updated-tied", false),
        ("grown-plain-gpt2", true),
        ("lora-tied", true),
        ("lora-saved-tied", true),
        ("lora-tokens-gpt2", true),
        ("lora-whole-gpt2", true),
    ] {
        let batch = Batch::pack(&documents(&expected(name)?)?);
        let model = load(&folder(name), None, Head::Language)?;
        let merged = load(&folder(name), Some(&["--method", "full"]), Head::Language)?;
        let copy = tempfile::tempdir().expect("a temporary folder");
        merged.save(copy.path())?;
        let text = std::fs::read_to_string(copy.path().join("config.json")).expect("a configuration");
        let config: Value = serde_json::from_str(&text).expect("valid JSON");
        assert_eq!(config["tie_word_embeddings"], tied, "{name}");
        assert_eq!(config["vocab_size"], model.architecture().vocabulary, "{name}");
        let again = load(copy.path(), None, Head::Language)?;
        assert_eq!([&merged, &again].map(|model| model.architecture().tied_output), [tied; 2], "{name}");
        assert_close(name, &logits(&again, &batch)?, &logits(&model, &batch)?, 1e-5);
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
        assert_close(name, &scores.tensor().flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "scores")?, 1e-4);
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
        assert_close("scores", &scores.tensor().flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "scores")?, 1e-4);
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
        let mut outputs = Outputs::default();
        let classes = outputs.tensor(&model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?)?;
        assert_close(&name, &classes.flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "logits")?, 1e-4);
        let index = Tensor::new(&[[2u32], [0]], &candle_core::Device::Cpu)?;
        let loss = candle_nn::ops::log_softmax(&classes, 1)?.gather(&index, 1)?.mean_all()?.neg()?;
        assert_close(&name, &[loss.to_scalar()?], &floats(&tensors, "loss")?, 1e-5);
        let gradients = outputs.gradients(&loss)?;
        // The head trains too, which AdapterHub's did not.
        let parameters =
            model.trainable_parameters().into_iter().filter(|parameter| parameter.name.contains("adapters"));
        let mut count = 0;
        for Parameter { name: key, variable, .. } in parameters {
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name}: {key} has no gradient"));
            assert_gradient(&format!("{name}: {key}"), &gradient.to_tensor()?, &tensors[&format!("grad.{key}")])?;
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

/// The tensors of a golden adapter without those that only repeat others, which we do not write: PEFT stores the tables of the base that an update
/// is added to and, of tables that it stores whole, the base's table and a second copy. A base's table of more rows than the base's file has is
/// no copy.
fn without_copies(name: &str, tensors: Tensors) -> Result<Tensors> {
    let values = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(tensor.flatten_all()?.to_vec1()?) };
    let is_grown = name.starts_with("grown");
    let mut base = None;
    let mut is_of_base = |key: &str, tensor: &Tensor| -> Result<()> {
        if base.is_none() {
            base = Some(candle_core::safetensors::load(base_of(name).join("model.safetensors"), &Device::Cpu)?);
        }
        let found = values(tensor)?;
        for table in base.iter().flatten().map(|(_, table)| table).filter(|table| table.rank() == 2) {
            // A table that has grown begins with the base's rows.
            if values(table)?.iter().zip(&found).all(|(a, b)| a == b) && table.dim(0)? <= tensor.dim(0)? {
                return Ok(());
            }
        }
        panic!("{name}: {key} is none of the base's tables");
    };
    let mut rest = Tensors::new();
    for (key, tensor) in &tensors {
        if let Some((module, _)) = key.split_once(".modules_to_save.") {
            assert_eq!(values(tensor)?, values(&tensors[&format!("{module}.weight")])?, "{name}: {key}");
        } else if key.contains(".original_module.") || key.ends_with(".base_layer.weight") && !is_grown {
            is_of_base(key, tensor)?;
        } else {
            rest.insert(key.clone(), tensor.clone());
        }
    }
    Ok(rest)
}

/// The folder of the base that a golden adapter names.
fn base_of(name: &str) -> PathBuf {
    let text = std::fs::read_to_string(folder(name).join("adapter_config.json")).expect("a configuration");
    let config: Value = serde_json::from_str(&text).expect("valid JSON");
    let base = config["base_model_name_or_path"].as_str().expect("a base");
    folder(name).join(base)
}

/// The folder `copy` holds the tensors of a golden folder, bit for bit, and says the same of them in all fields that PEFT reads.
fn assert_same_files(name: &str, copy: &Path) -> Result<()> {
    let read = |folder: &Path, file: &str| candle_core::safetensors::load(folder.join(file), &Device::Cpu);
    for file in ["adapter_model.safetensors", "encoder.safetensors", "adapter.safetensors"] {
        if !folder(name).join(file).is_file() {
            continue;
        }
        let theirs: Tensors = read(&folder(name), file)?.into_iter().collect();
        let ours: Tensors = read(copy, file)?.into_iter().collect();
        let theirs = without_copies(name, theirs)?;
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
        "ensure_weight_tying",
        "token_indices",
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
        // PEFT says true of all modules of a GPT-2 and corrects it where a linear is no Conv1D; of the output matrix alone we say what is so.
        let is_of_last = field == "fan_in_fan_out" && name == "lora-head-gpt2";
        let same = theirs == ours || is_of_last || theirs.as_f64().is_some_and(|number| Some(number) == ours.as_f64());
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
