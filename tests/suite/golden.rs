//! Against oracles that are not ours: values made by PyTorch, transformers, PEFT and TRL with the scripts in `tests/golden/`.

use std::path::Path;

use crate::common::training_settings;
use crate::oracle::{
    Tensors, assert_close, assert_gradient, check_logits_and_loss, documents, expected, floats, folder, integers, load,
    logits, pairs,
};
use candle_core::{DType, Device, Tensor, Var};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::{Batch, Continuation, Target, TokenTree};
use rlhf::data::pairs::pairs as pairs_of;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::{self, Outputs};
use rlhf::reward::RewardSettings;
use rlhf::reward::loss::{LossSettings, RankedAnswers};
use rlhf::settings::{OptimizerSettings, from_arguments};
use rlhf::sft::dpo::{self, DpoSettings, PreferenceLoss, PreferencePairs};
use rlhf::train::optimizer::Optimizer;
use rlhf::train::schedule::Schedule;
use serde_json::Value;

/// The folders of `models.py`.
pub const FAMILIES: [&str; 18] = [
    "llama",
    "llama3",
    "llama-dynamic",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt2-unscaled",
    "gpt-neox",
    "gpt-neox-sequential",
    "gemma2",
    "gemma3",
    "smollm3",
    "olmo2",
    "olmo3",
    "phi3",
    "granite",
];

#[test]
fn logits_and_gradients_equal_transformers_for_each_family() -> Result<()> {
    for name in FAMILIES {
        let tensors = expected(name)?;
        let model = load(&folder(name), Some(&["--method", "full"]), Head::Language)?;
        let variables = model.trainable_parameters();
        let wanted = tensors.keys().filter(|key| key.starts_with("grad.")).count();
        assert_eq!(variables.len(), wanted, "{name}: trainable parameters");
        for has_checkpoints in [false, true] {
            let gradients = check_logits_and_loss(name, &model.clone().with_checkpoints(has_checkpoints), &tensors)?;
            for Parameter { name: parameter, variable, .. } in &variables {
                let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name}: {parameter} has a gradient"));
                let (what, wanted) = (format!("{name}: {parameter}"), &tensors[&format!("grad.{parameter}")]);
                assert_gradient(&what, &gradient.to_tensor()?, wanted)?;
            }
        }
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        let batch = Batch::pack(&documents(&tensors)?);
        let again = load(copy.path(), None, Head::Language)?;
        assert_eq!(logits(&again, &batch)?, logits(&model, &batch)?, "{name}: saved and read again");
    }
    Ok(())
}

/// Rotations that depend on a sequence's length are those of each sequence's own, whatever is in the batch with it.
#[test]
fn short_and_long_sequences_of_a_batch_equal_transformers() -> Result<()> {
    for name in ["llama-dynamic", "phi3"] {
        let tensors = expected(name)?;
        let model = load(&folder(name), None, Head::Language)?;
        let of = |prefix: &str| -> Tensors {
            let named = |key: &str| (key.to_string(), tensors[&format!("{prefix}{key}")].clone());
            ["input_ids", "logits"].into_iter().map(named).collect()
        };
        let trees = [documents(&of("short."))?, documents(&of(""))?].concat();
        let found = logits(&model, &model.pack(&trees))?;
        let wanted = [floats(&tensors, "short.logits")?, floats(&tensors, "logits")?].concat();
        assert_close(name, &found, &wanted, 1e-4);
        // The same sequences as two answers of different lengths to one prompt, which then cannot share its keys.
        let (short, long) = (&trees[0].answers[0].tokens, &trees[2].answers[0].tokens);
        assert_eq!(short[..], long[..short.len()]);
        let answer =
            |tokens: &[u32]| Continuation { tokens: tokens[4..].to_vec(), learned: vec![true; tokens.len() - 4] };
        let tree = TokenTree { prompt: short[..4].to_vec(), answers: vec![answer(short), answer(long)] };
        let found = logits(&model, &model.pack([&tree]))?;
        let row = floats(&tensors, "logits")?.len() / 2;
        let wanted =
            [&floats(&tensors, "short.logits")?[..row / long.len() * short.len()], &wanted_row(&tensors)?].concat();
        assert_close(name, &found, &wanted, 1e-4);
    }
    Ok(())
}

/// The logits of the first row.
fn wanted_row(tensors: &Tensors) -> Result<Vec<f32>> {
    let logits = floats(tensors, "logits")?;
    Ok(logits[..logits.len() / 2].to_vec())
}

/// The text part of a model of text and images is read alone, and saved as the language model that it is.
#[test]
fn the_text_part_of_a_model_of_images_equals_transformers() -> Result<()> {
    let tensors = expected("gemma3-with-images")?;
    let model = load(&folder("gemma3-with-images"), None, Head::Language)?;
    let batch = Batch::pack(&documents(&tensors)?);
    assert_close("logits", &logits(&model, &batch)?, &floats(&tensors, "logits")?, 1e-4);
    let copy = tempfile::tempdir().expect("a temporary folder");
    model.save(copy.path())?;
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(copy.path().join("config.json")).expect("a file")).expect("JSON");
    assert_eq!(
        (&config["model_type"], &config["architectures"][0]),
        (&"gemma3_text".into(), &"Gemma3ForCausalLM".into())
    );
    assert!(config.get("vision_config").is_none());
    assert_eq!(logits(&load(copy.path(), None, Head::Language)?, &batch)?, logits(&model, &batch)?);
    Ok(())
}

/// Hidden states, head and gradients of an encoder.
#[test]
fn encoders_and_their_heads_equal_transformers() -> Result<()> {
    let labels = ["a", "b", "c"].map(String::from);
    for name in ["bert", "roberta", "modernbert", "modernbert-mean"] {
        let tensors = expected(name)?;
        let model = load(&folder(name), Some(&["--method", "full"]), Head::Classes(&labels))?;
        let trees = pairs(&tensors)?;
        let batch = model.pack(&trees);
        let hidden = model.hidden(&batch, &Pass::default())?;
        assert_close(
            &format!("{name}: hidden"),
            &hidden.tensor().flatten_all()?.to_vec1::<f32>()?,
            &floats(&tensors, "hidden")?,
            1e-4,
        );
        let mut outputs = Outputs::default();
        let classes = outputs.tensor(&model.classes(&hidden, &batch)?)?;
        assert_close(name, &classes.flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "logits")?, 1e-4);
        let index = Tensor::new(&[[2u32], [0]], &Device::Cpu)?;
        let loss_of = |classes: &Tensor| candle_nn::ops::log_softmax(classes, 1)?.gather(&index, 1)?.mean_all()?.neg();
        let loss = loss_of(&classes)?;
        assert_close(name, &[loss.to_scalar()?], &floats(&tensors, "loss")?, 1e-5);
        let gradients = outputs.gradients(&loss)?;
        let again = model.clone().with_checkpoints(true);
        let mut outputs = Outputs::default();
        let classes = outputs.tensor(&again.classes(&again.hidden(&batch, &Pass::default())?, &batch)?)?;
        let gradients_again = outputs.gradients(&loss_of(&classes)?)?;
        let parameters = model.trainable_parameters();
        assert_eq!(parameters.len(), tensors.keys().filter(|key| key.starts_with("grad.")).count(), "{name}");
        for Parameter { name, variable, .. } in parameters {
            for gradients in [&gradients, &gradients_again] {
                let gradient = gradients.get(&variable).expect("a gradient").to_tensor()?;
                assert_gradient(&name, &gradient, &tensors[&format!("grad.{name}")])?;
            }
        }
        // A row is what it is alone, whatever its length.
        let mut cut = trees[1].clone();
        let keep = 15 - cut.prompt.len();
        cut.answers[0].tokens.truncate(keep);
        let batch = model.pack([&trees[0], &cut]);
        let classes = model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?;
        let found = classes.narrow_rows(1, 1)?.tensor().flatten_all()?.to_vec1::<f32>()?;
        assert_close(name, &found, &floats(&tensors, "unpadded.logits")?, 1e-4);
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        let again = load(copy.path(), None, Head::Classes(&labels))?;
        let batch = model.pack(&trees);
        let logits = |model: &rlhf::model::Model| -> Result<Vec<f32>> {
            let classes = model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?;
            Ok(classes.tensor().flatten_all()?.to_vec1()?)
        };
        assert_eq!(logits(&again)?, logits(&model)?);
    }
    let tensors = expected("bert-reward")?;
    let model = load(&folder("bert-reward"), None, Head::Scalar)?;
    let batch = model.pack(&pairs(&tensors)?);
    let scores = model.rewards(&model.hidden(&batch, &Pass::default())?, &batch)?;
    assert_close("bert-reward", &scores.to_vec1()?, &floats(&tensors, "logits")?, 1e-4);
    // An encoder by itself, whose tensors' names lack the beginning.
    let tensors = expected("bert-encoder")?;
    let model = load(&folder("bert-encoder"), None, Head::AsFound)?;
    let hidden = model.hidden(&model.pack(&pairs(&tensors)?), &Pass::default())?;
    assert_close("bert-encoder", &hidden.tensor().flatten_all()?.to_vec1::<f32>()?, &floats(&tensors, "hidden")?, 1e-4);
    let error = load(&folder("bert"), None, Head::Language).map(drop).unwrap_err().to_string();
    assert!(error.contains("is an encoder"), "{error}");
    Ok(())
}

#[test]
fn positions_of_a_saved_roberta_are_counted_as_before() -> Result<()> {
    let copy = tempfile::tempdir().expect("a temporary folder");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(folder("roberta").join(name), copy.path().join(name)).expect("the folder can be written to");
    }
    let path = copy.path().join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("pad_token_id").expect("the golden file has one");
    std::fs::write(&path, config.to_string()).unwrap();
    let model = load(copy.path(), None, Head::AsFound)?;
    let saved = tempfile::tempdir().expect("a temporary folder");
    model.save(saved.path())?;
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(saved.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["pad_token_id"], 1);
    let again = load(saved.path(), None, Head::AsFound)?;
    assert_eq!(again.architecture().position_offset, 2);
    assert_eq!(model.architecture().position_offset, 2);
    Ok(())
}

#[test]
fn a_sharded_half_precision_folder_is_read_and_written_in_the_same_form() -> Result<()> {
    let tensors = expected("llama-sharded")?;
    let model = load(&folder("llama-sharded"), None, Head::Language)?;
    let batch = Batch::pack(&documents(&tensors)?);
    let found = logits(&model, &batch)?;
    assert_close("logits", &found, &floats(&tensors, "logits")?, 1e-4);
    let copy = tempfile::tempdir().expect("a temporary folder");
    model.save(copy.path())?;
    let files = |folder: &Path| {
        let names = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().to_string()).collect();
        names.retain(|name| name.starts_with("model"));
        names.sort();
        names
    };
    assert_eq!(files(copy.path()), files(&folder("llama-sharded")));
    assert_eq!(logits(&load(copy.path(), None, Head::Language)?, &batch)?, found);
    Ok(())
}

fn reward_loss(flags: &[&str]) -> LossSettings {
    let needed = ["--model", "m", "--data", "d", "--output", "o"];
    from_arguments::<RewardSettings>(needed.iter().chain(flags)).expect("valid arguments").loss
}

#[test]
fn every_loss_of_a_reward_model_and_its_gradient_equal_openrlhf_trl_and_pytorch() -> Result<()> {
    let tensors = expected("ppo-variants")?;
    let rewards = floats(&tensors, "reward.rewards")?;
    let ranks = integers(&tensors, "reward.ranks")?;
    for (name, flags, margin) in [
        ("pairwise", &[][..], 0.4),
        ("smoothed", &["--label-smoothing", "0.1"], 0.4),
        ("centred", &["--centring-coefficient", "0.01"], 0.4),
        ("plackett_luce", &["--loss", "plackett-luce"], 0.0),
        ("plackett_luce_margin", &["--loss", "plackett-luce"], 0.4),
    ] {
        let scores = Var::from_slice(&rewards, rewards.len(), &Device::Cpu)?;
        let prompt = RankedAnswers { answers: 0..rewards.len(), pairs: &pairs_of(&ranks), margin, weight: 1.0 };
        let loss = reward_loss(flags).loss(scores.as_tensor(), &[prompt])?;
        assert_close(name, &[loss.to_scalar()?], &floats(&tensors, &format!("reward.{name}.loss"))?, 1e-5);
        let gradient: Vec<f32> = loss.backward()?.get(&scores).expect("a gradient").to_vec1()?;
        assert_close(name, &gradient, &floats(&tensors, &format!("reward.{name}.grad.rewards"))?, 1e-5);
    }
    Ok(())
}

#[test]
fn dpo_and_its_gradient_equal_openrlhf() -> Result<()> {
    let tensors = expected("ppo-variants")?;
    let both = |prefix: &str| -> Result<Vec<f32>> {
        Ok([floats(&tensors, &format!("dpo.{prefix}chosen"))?, floats(&tensors, &format!("dpo.{prefix}rejected"))?]
            .concat())
    };
    let (log_probs, reference) = (both("")?, both("ref_")?);
    let half = log_probs.len() as u32 / 2;
    let pairs = PreferencePairs {
        better: (0..half).collect(),
        worse: (half..2 * half).collect(),
        weights: vec![1.0 / half as f32; half as usize],
    };
    for (name, preference_loss, label_smoothing) in [
        ("sigmoid", PreferenceLoss::Sigmoid, 0.0),
        ("smoothed", PreferenceLoss::Sigmoid, 0.1),
        ("ipo", PreferenceLoss::Ipo, 0.0),
    ] {
        let settings = DpoSettings { beta: 0.2, preference_loss, label_smoothing };
        let variable = Var::from_slice(&log_probs, log_probs.len(), &Device::Cpu)?;
        let (loss, rewards) = dpo::loss(&settings, variable.as_tensor(), &reference, &pairs)?;
        assert_close(name, &[loss.to_scalar()?], &floats(&tensors, &format!("dpo.{name}.loss"))?, 1e-5);
        let wanted = [floats(&tensors, "dpo.chosen_rewards")?, floats(&tensors, "dpo.rejected_rewards")?].concat();
        assert_close(name, &rewards, &wanted, 1e-5);
        let gradient: Vec<f32> = loss.backward()?.get(&variable).expect("a gradient").to_vec1()?;
        let wanted = ["chosen", "rejected"].map(|answer| floats(&tensors, &format!("dpo.{name}.grad.{answer}")));
        let [chosen, rejected] = wanted;
        assert_close(name, &gradient, &[chosen?, rejected?].concat(), 1e-5);
    }
    Ok(())
}

#[test]
fn scores_and_the_kwise_loss_equal_pytorch() -> Result<()> {
    let tensors = expected("llama-reward")?;
    let model = load(&folder("llama-reward"), Some(&["--method", "full"]), Head::Scalar)?;
    let tokens =
        |name: &str| -> Result<Vec<u32>> { Ok(integers(&tensors, name)?.iter().map(|&id| id as u32).collect()) };
    let answers = (0..4)
        .map(|index| {
            let tokens = tokens(&format!("answer.{index}"))?;
            Ok(Continuation { learned: vec![true; tokens.len()], tokens })
        })
        .collect::<Result<Vec<_>>>()?;
    let batch = Batch::pack([&TokenTree { prompt: tokens("prompt")?, answers }]);
    let hidden = model.hidden(&batch, &Pass::default())?;
    let mut outputs = Outputs::default();
    let scores = outputs.tensor(&model.rewards(&hidden, &batch)?)?;
    assert_close("scores", &scores.to_vec1::<f32>()?, &floats(&tensors, "scores")?, 1e-4);
    let ranks = integers(&tensors, "ranks")?;
    let prompt = RankedAnswers { answers: 0..4, pairs: &pairs_of(&ranks), margin: 0.0, weight: 1.0 };
    let loss = reward_loss(&[]).loss(&scores, &[prompt])?;
    assert_close("loss", &[loss.to_scalar()?], &floats(&tensors, "loss")?, 1e-5);
    let gradients = outputs.gradients(&loss)?;
    for Parameter { name, variable, .. } in model.trainable_parameters() {
        let gradient = gradients.get(&variable).expect("a gradient").to_tensor()?;
        assert_gradient(&name, &gradient, &tensors[&format!("grad.{name}")])?;
    }
    Ok(())
}

#[test]
fn log_probs_and_entropy_at_a_temperature_equal_pytorch() -> Result<()> {
    let tensors = expected("logprob")?;
    let (hidden, weight) = (Var::from_tensor(&tensors["hidden"])?, Var::from_tensor(&tensors["weight"])?);
    let targets: Vec<u32> = integers(&tensors, "targets")?.iter().map(|&id| id as u32).collect();
    let temperature = f64::from(floats(&tensors, "temperature")?[0]);
    for (name, of) in [("logprob.", [1.0, 0.0]), ("entropy.", [0.0, 1.0]), ("", [1.0, 1.0])] {
        let [hidden_value, weight_value] = [&hidden, &weight].map(|variable| ops::Value::of(variable));
        let found = rlhf::ops::log_probs(&hidden_value, &weight_value, &targets, temperature, None)?;
        assert_close("log_probs", &found.log_probs.to_vec1()?, &floats(&tensors, "logprob")?, 1e-5);
        assert_close("entropy", &found.entropy.to_vec1()?, &floats(&tensors, "entropy")?, 1e-5);
        let mut outputs = Outputs::default();
        let of_log_probs = (outputs.tensor(&found.log_probs)? * &tensors["a"])?.sum_all()?;
        let of_entropy = (outputs.tensor(&found.entropy)? * &tensors["b"])?.sum_all()?;
        let sum = (of_log_probs.affine(of[0], 0.0)? + of_entropy.affine(of[1], 0.0)?)?;
        let gradients = outputs.gradients(&sum)?;
        for (operand, variable) in [("hidden", &hidden), ("weight", &weight)] {
            let key = format!("{name}grad.{operand}");
            assert_gradient(&key, &gradients.get(variable).expect("a gradient").to_tensor()?, &tensors[&key])?;
        }
    }
    Ok(())
}

#[test]
fn the_optimizer_and_its_schedules_equal_pytorch_and_transformers() -> Result<()> {
    let tensors = expected("optimizer")?;
    let variables =
        ["weight", "bias"].map(|name| (name, Var::from_tensor(&tensors[&format!("{name}.0")]).expect("a tensor")));
    let arguments = ["--weight-decay", "0.1", "--beta1", "0.9", "--beta2", "0.95", "--max-gradient-norm", "1"];
    let settings = training_settings(&arguments).optimizer;
    let parameters = variables.iter().map(|(name, variable)| Parameter::new(*name, variable)).collect();
    let mut optimizer = Optimizer::new(parameters, &settings)?;
    for step in 1..=5 {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (name, variable) in &variables {
            loss = (loss + variable.mul(&tensors[&format!("{name}.grad.{step}")])?.sum_all()?)?;
        }
        optimizer.backward(&loss, Outputs::default())?;
        let report = optimizer.step(0.01)?;
        assert_close("norm", &[report.gradient_norm as f32], &floats(&tensors, &format!("norm.{step}"))?, 1e-5);
        for (name, variable) in &variables {
            let found: Vec<f32> = variable.flatten_all()?.to_vec1()?;
            assert_close(name, &found, &floats(&tensors, &format!("{name}.{step}"))?, 1e-6);
        }
    }
    for (schedule, minimum) in [("constant", "0"), ("linear", "0"), ("cosine", "0.1")] {
        let arguments = ["--schedule", schedule, "--warmup-steps", "4", "--minimum-learning-rate-ratio", minimum];
        let settings: OptimizerSettings = training_settings(&arguments).optimizer;
        let course = Schedule::new(&settings, 1.0, 20);
        let found: Vec<f32> = (0..20).map(|step| course.learning_rate(step) as f32).collect();
        assert_close(schedule, &found, &floats(&tensors, &format!("schedule.{schedule}"))?, 1e-6);
    }
    Ok(())
}

/// A target's row and token, for readers of this file: row `i` of a document predicts token `i + 1`.
#[test]
fn documents_are_predicted_from_the_row_before() {
    let tree = TokenTree {
        prompt: Vec::new(),
        answers: vec![Continuation { tokens: vec![5, 6, 7], learned: vec![true, false, true] }],
    };
    assert_eq!(Batch::pack([&tree]).targets, [Target { row: 1, token: 7 }]);
}
