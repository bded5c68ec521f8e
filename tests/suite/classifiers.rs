//! Classifiers of others: the whole way from texts to probabilities, against `transformers`.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::classifier::{Classifier, ClassifierInput, Outputs};
use rlhf::data::tokenize::{EncodedTexts, Tokenizer};
use rlhf::evaluate::EvaluateSettings;
use rlhf::model::adapter::Pass;
use rlhf::settings::from_arguments;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::shared;
use crate::oracle::{Tensors, folder, load};

const KINDS: [&str; 8] = [
    "bert",
    "roberta",
    "xlm-roberta",
    "deberta-v3",
    "deberta-v2-convolution",
    "deberta-v2-positions",
    "deberta-v2-groups",
    "deberta-v2-absolute",
];

/// What `transformers` made of texts.
#[derive(Deserialize)]
struct Expected {
    longest: usize,
    texts: Vec<ExpectedText>,
}

#[derive(Deserialize)]
struct ExpectedText {
    text: String,
    pair: Option<String>,
    ids: Vec<u32>,
    types: Vec<u32>,
    cut: bool,
    probabilities: Vec<f32>,
    /// The mean of the hidden states, for some texts of MiniLM.
    mean: Option<Vec<f32>>,
}

impl ExpectedText {
    fn input(&self) -> ClassifierInput {
        ClassifierInput { text: self.text.clone(), pair: self.pair.clone() }
    }
}

fn golden(name: &str) -> PathBuf {
    folder("classifiers").join(name)
}

fn expected(name: &str) -> Expected {
    let text = std::fs::read_to_string(golden(name).join("expected.json")).expect("a golden file");
    serde_json::from_str(&text).expect("what the golden script writes")
}

fn inputs(expected: &Expected) -> Vec<ClassifierInput> {
    expected.texts.iter().map(ExpectedText::input).collect()
}

fn largest_difference(found: &[Vec<f32>], expected: &Expected) -> f32 {
    assert_eq!(found.len(), expected.texts.len());
    let of_text = |(found, text): (&Vec<f32>, &ExpectedText)| {
        assert_eq!(found.len(), text.probabilities.len(), "labels");
        found.iter().zip(&text.probabilities).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max)
    };
    found.iter().zip(&expected.texts).map(of_text).fold(0.0, f32::max)
}

/// Tokens with their types, cut as `transformers` cuts, and the probabilities: all texts in one batch, and each by itself.
fn equals_transformers(folder: &Path, name: &str) -> Result<()> {
    let (classifier, expected) = (Classifier::load(folder)?, expected(name));
    assert_eq!(classifier.max_length(), expected.longest, "{name}");
    for text in &expected.texts {
        let EncodedTexts { tokens, types, was_cut, .. } = classifier.encode(&text.input())?;
        let found = (&tokens, &types, was_cut);
        assert_eq!(found, (&text.ids, &text.types, text.cut), "{name}: {:?} {:?}", text.text, text.pair);
    }
    let together = classifier.probabilities(&inputs(&expected), 10_000)?;
    assert_eq!(together.truncated, expected.texts.iter().filter(|text| text.cut).count(), "{name}");
    let alone = classifier.probabilities(&inputs(&expected), 1)?;
    for (how, found) in [("together", together), ("alone", alone)] {
        let difference = largest_difference(&found.probabilities, &expected);
        eprintln!("{name}, {how}: {difference:e}");
        assert!(difference < 1e-5, "{name}, {how}: {difference}");
    }
    assert!(classifier.probabilities(&[], 100)?.probabilities.is_empty());
    Ok(())
}

#[test]
fn probabilities_of_texts_and_pairs_equal_transformers_for_every_kind() -> Result<()> {
    KINDS.iter().try_for_each(|name| equals_transformers(&golden(name), name))
}

#[test]
fn a_text_that_occurs_again_is_read_once_and_counted_each_time() -> Result<()> {
    let (classifier, expected) = (Classifier::load(&golden("bert"))?, expected("bert"));
    let once = inputs(&expected);
    let twice: Vec<ClassifierInput> = once.iter().rev().chain(&once).cloned().collect();
    let (found, again) = (classifier.probabilities(&once, 300)?, classifier.probabilities(&twice, 300)?);
    assert_eq!(again.probabilities[once.len()..], found.probabilities);
    assert!(again.probabilities[..once.len()].iter().eq(found.probabilities.iter().rev()));
    assert_eq!(again.truncated, 2 * found.truncated);
    assert!(found.truncated > 0);
    Ok(())
}

/// The classifier of toxicity in `data/`.
fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(rlhf::evaluate::SHIPPED_CLASSIFIER)
}

#[test]
fn the_shipped_classifier_gives_the_probabilities_of_transformers() -> Result<()> {
    equals_transformers(&shipped(), "shipped")
}

/// The area under the curve of the shipped classifier, and the rank correlation of its means with those of the labels by all groups.
fn agreement(file: &str, flags: &[&str]) -> Result<Option<(f64, f64)>> {
    let Some(file) = shared(file) else { return Ok(None) };
    let output = tempfile::tempdir().expect("a temporary folder");
    let folder = output.path().join("report");
    let scorer = format!("classifier={}", shipped().display());
    let fixed = ["--quiet", "--resamples", "10", "--toxicity-scorer", &scorer, "--labelled", &file];
    let fixed = fixed.into_iter().chain(["--output", folder.to_str().expect("a path")]);
    let settings: EvaluateSettings = from_arguments(fixed.chain(flags.iter().copied()))?;
    rlhf::evaluate::evaluate(&settings)?;
    let found = std::fs::read(folder.join("evaluation.json")).expect("what was found");
    let found: Value = serde_json::from_slice(&found).expect("JSON");
    let found = &found["agreement"]["toxicity"];
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    Ok(Some((number(&found["all"]["auc"]["value"]), number(&found["rank_correlation_of_group_means"]))))
}

#[test]
fn the_shipped_classifier_finds_what_perspective_calls_toxic() -> Result<()> {
    let answers = ["--label-column", "scores", "--positive", "<=-0.5", "--group-columns", "models", "prompt_type"];
    if let Some((auc, correlation)) = agreement("instructgpt-toxicity.parquet", &answers)? {
        eprintln!("InstructGPT's answers: AUC {auc:.3}, rank correlation of means {correlation:.3}");
        assert!(auc > 0.85 && correlation > 0.6, "{auc} {correlation}");
    }
    let continuations =
        ["--label-column", "continuation_toxicity", "--positive", ">=0.5", "--text-column", "continuation"];
    if let Some((auc, _)) = agreement("real-toxicity-prompts-flat.parquet", &continuations)? {
        eprintln!("RealToxicityPrompts' continuations: AUC {auc:.3}");
        assert!(auc > 0.85, "{auc}");
    }
    Ok(())
}

#[test]
fn a_classifier_says_its_labels_and_which_weights_it_is() -> Result<()> {
    let classifier = Classifier::load(&golden("roberta"))?;
    let labels = ["toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack"];
    assert_eq!((classifier.labels(), classifier.outputs()), (&labels.map(String::from)[..], Outputs::Sigmoid));
    assert_eq!(classifier.label_index(&["toxic", "Identity_Attack", "threat"])?, 5);
    let error = classifier.label_index(&["toxic", "LABEL_1"]).unwrap_err().to_string();
    assert!(error.contains("no label called toxic or LABEL_1; its labels are toxicity, severe_toxicity"), "{error}");
    let identity = classifier.identity();
    assert_eq!((&identity.name[..], &identity.architecture[..]), ("roberta", "RobertaForSequenceClassification"));
    let bytes = std::fs::read(golden("roberta").join("model.safetensors")).expect("weights");
    assert_eq!(identity.weights, format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes)));
    // Without names, and with one label.
    assert_eq!(Classifier::load(&golden("xlm-roberta"))?.labels(), ["LABEL_0"]);
    assert_eq!(Classifier::load(&golden("deberta-v3"))?.label_index(&["ENTAILMENT"])?, 1);
    Ok(())
}

/// A copy of a golden classifier that can be spoilt.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let copy = Copy(tempfile::tempdir().expect("a temporary folder"));
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(golden(name).join(file), copy.0.path().join(file)).expect("a file that can be copied");
        }
        copy
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn configured(self, field: &str, value: Value) -> Self {
        let path = self.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        self
    }

    fn without_tensors(self, part: &str) -> Self {
        let path = self.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        tensors.retain(|name, _| !name.contains(part));
        candle_core::safetensors::save(&tensors, &path).unwrap();
        self
    }

    fn with_pickle(self) -> Self {
        let (from, to) = (self.path().join("model.safetensors"), self.path().join("pytorch_model.bin"));
        std::fs::rename(from, to).unwrap();
        self
    }
}

#[test]
fn what_is_no_whole_classifier_is_refused_in_one_sentence() {
    let bert = || Copy::of("bert");
    let deberta = || Copy::of("deberta-v3");
    let two = json!({ "0": "a", "1": "b" });
    for (copy, part) in [
        (
            bert().configured("architectures", json!(["BertModel"])),
            "\"architectures\" is \"BertModel\", expected \"BertForSequence",
        ),
        (bert().configured("architectures", json!(["BertForMaskedLM"])), "expected \"BertForSequenceClassification\""),
        (bert().configured("model_type", json!("electra")), "model_type is \"electra\""),
        (bert().configured("id2label", two.clone()), "says 2 labels, but tensor \"classifier.weight\" has 3"),
        (bert().configured("problem_type", json!("regression")), "\"problem_type\" is \"regression\""),
        (bert().without_tensors("classifier"), "tensor \"classifier.weight\" is missing"),
        (bert().without_tensors("pooler"), "tensor \"bert.pooler.dense.weight\" is missing"),
        (Copy::of("roberta").without_tensors("classifier.dense"), "tensor \"classifier.dense.weight\" is missing"),
        (bert().with_pickle(), "pytorch_model.bin: a pickle"),
        (
            deberta().configured("architectures", json!(["DebertaV2ForTokenClassification"])),
            "expected \"DebertaV2ForSequence",
        ),
        (deberta().configured("id2label", two), "says 2 labels, but tensor \"classifier.weight\" has 3"),
        (
            deberta().configured("pos_att_type", json!(["p2p"])),
            "\"pos_att_type\" is [\"p2p\"], expected c2p, p2c or both",
        ),
        (deberta().configured("position_buckets", json!(94)), "94 position_buckets for 48 relative positions"),
        (deberta().configured("hidden_size", json!(18)), "do not fit hidden_size 18"),
        (deberta().configured("conv_kernel_size", json!(2)), "expected an odd size"),
        (
            deberta().configured("conv_kernel_size", json!(3)),
            "tensor \"deberta.encoder.conv.conv.weight\" of shape [16, 16, 3] is missing",
        ),
        (
            deberta().without_tensors("classifier"),
            "tensor \"classifier.weight\" is missing, so there is no classification head",
        ),
        (deberta().without_tensors("pooler"), "tensor \"pooler.dense.weight\" of shape [16, 16] is missing"),
        (deberta().with_pickle(), "pytorch_model.bin: a pickle"),
    ] {
        let error = Classifier::load(copy.path()).map(drop).unwrap_err();
        let file = copy.path().display().to_string();
        let sentence = error.to_string();
        assert!(sentence.starts_with(&file) && sentence.contains(part), "expected {part}: {sentence}");
        assert_eq!(error.exit_code(), 2, "{sentence}");
    }
    assert!(Classifier::load(&folder("bert-encoder")).map(drop).unwrap_err().to_string().contains("BertModel"));
}

#[test]
fn names_with_bars_and_a_limit_of_the_tokenizer_are_read() -> Result<()> {
    let wanted = expected("deberta-v3");
    let copy = Copy::of("deberta-v3").configured("pos_att_type", json!("C2P | p2c"));
    let found = Classifier::load(copy.path())?.probabilities(&inputs(&wanted), 500)?;
    assert!(largest_difference(&found.probabilities, &wanted) < 1e-5);
    let path = copy.path().join("tokenizer_config.json");
    std::fs::write(&path, r#"{"model_max_length": 6, "truncation_side": "left"}"#).unwrap();
    let cut = Classifier::load(copy.path())?;
    let input = &wanted.texts[0];
    let tokens = cut.encode(&input.input())?.tokens;
    assert_eq!(tokens, [&input.ids[..1], &input.ids[input.ids.len() - 5..]].concat());
    Ok(())
}

#[test]
fn what_training_writes_of_a_classifier_gives_the_same_probabilities() -> Result<()> {
    for name in ["bert", "roberta", "xlm-roberta"] {
        let wanted = expected(name);
        let model = load(&golden(name), Some(&["--method", "full"]), Head::AsFound)?;
        let copy = tempfile::tempdir().expect("a temporary folder");
        model.save(copy.path())?;
        Tokenizer::load(golden(name))?.save(copy.path())?;
        let classifier = Classifier::load(copy.path())?;
        let found = classifier.probabilities(&inputs(&wanted), 300)?;
        // Whether several labels hold at once stays in the configuration.
        assert!(largest_difference(&found.probabilities, &wanted) < 1e-5, "{name}");
        assert_eq!(classifier.labels(), Classifier::load(&golden(name))?.labels());
    }
    Ok(())
}

/// PEFT stores the last layer of BERT's head with the adapter and leaves the pooler under it with the base.
#[test]
fn the_head_of_an_adapter_reads_the_pooler_of_its_base() -> Result<()> {
    let wanted = expected("bert");
    let tensors: Tensors =
        candle_core::safetensors::load(golden("bert").join("model.safetensors"), &Device::Cpu)?.into_iter().collect();
    let mut adapter = std::collections::HashMap::new();
    for layer in 0..2 {
        let module = format!("base_model.model.bert.encoder.layer.{layer}.attention.self.query");
        adapter
            .insert(format!("{module}.lora_A.weight"), Tensor::ones((1, 16), candle_core::DType::F32, &Device::Cpu)?);
        adapter
            .insert(format!("{module}.lora_B.weight"), Tensor::zeros((16, 1), candle_core::DType::F32, &Device::Cpu)?);
    }
    for part in ["weight", "bias"] {
        adapter.insert(format!("base_model.model.classifier.{part}"), tensors[&format!("classifier.{part}")].clone());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    candle_core::safetensors::save(&adapter, folder.path().join("adapter_model.safetensors"))?;
    let config = json!({ "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 1, "lora_alpha": 1, "target_modules": ["query"],
        "modules_to_save": ["classifier", "score"], "base_model_name_or_path": golden("bert") });
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    let classifier = Classifier::load(folder.path())?;
    let found = classifier.probabilities(&inputs(&wanted), 300)?;
    assert!(largest_difference(&found.probabilities, &wanted) < 1e-5);
    assert_eq!(classifier.labels(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
    assert_ne!(classifier.identity().weights, Classifier::load(&golden("bert"))?.identity().weights);
    Ok(())
}

/// The folder of the real all-MiniLM-L6-v2, which is too large to stand in the repository.
fn minilm() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/all-MiniLM-L6-v2");
    let path = std::env::var_os("RLHF_MINILM").map_or_else(beside, PathBuf::from);
    if path.join("model.safetensors").is_file() {
        return Some(path);
    }
    eprintln!("skipped: there is no model.safetensors in {}; RLHF_MINILM names the folder", path.display());
    None
}

#[test]
fn real_weights_give_the_hidden_states_and_probabilities_of_transformers() -> Result<()> {
    let Some(source) = minilm() else { return Ok(()) };
    let wanted = expected("minilm");
    let (model, tokenizer) = (load(&source, None, Head::AsFound)?, Tokenizer::load(&source)?);
    for text in &wanted.texts {
        let Some(mean) = &text.mean else { continue };
        let encoded = tokenizer.encode_texts(&text.text, text.pair.as_deref(), 512)?;
        assert_eq!((&encoded.tokens, &encoded.types), (&text.ids, &text.types), "{}", text.text);
        let batch = model.pack_texts([(&encoded.tree(), &encoded.types[..])]);
        let found: Vec<f32> = model.hidden(&batch, &Pass::default())?.tensor().mean(0)?.to_vec1()?;
        let difference = found.iter().zip(mean).map(|(found, mean)| (found - mean).abs()).fold(0.0, f32::max);
        eprintln!("mean of hidden states: {difference:e}");
        assert!(difference < 1e-5, "{}: {difference}", text.text);
    }
    let classifier = Classifier::load(with_head(&source)?.path())?;
    let found = classifier.probabilities(&inputs(&wanted), 300)?;
    let difference = largest_difference(&found.probabilities, &wanted);
    eprintln!("probabilities: {difference:e}");
    assert!(difference < 1e-5, "{difference}");
    // By itself it is no classifier.
    let error = Classifier::load(&source).map(drop).unwrap_err().to_string();
    assert!(error.contains("\"BertModel\", expected \"BertForSequenceClassification\""), "{error}");
    Ok(())
}

/// MiniLM with the golden head on top of it.
fn with_head(source: &Path) -> Result<TempDir> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut tensors = candle_core::safetensors::load(source.join("model.safetensors"), &Device::Cpu)?;
    tensors.extend(candle_core::safetensors::load(golden("minilm").join("head.safetensors"), &Device::Cpu)?);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["architectures"] = json!(["BertForSequenceClassification"]);
    config["id2label"] = json!({ "0": "contradiction", "1": "entailment", "2": "neutral" });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    Ok(folder)
}

/// A file without a post-processor, or with one that knows no types, tells the texts of a pair apart all the same: by the types that `tokenizers`, and `transformers` with it, gives.
#[test]
fn the_second_text_of_a_pair_has_the_second_type_whatever_stands_around_it() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = golden("bert").join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    // The limit in the golden file is there to be overlooked.
    (json["truncation"], json["padding"]) = (Value::Null, Value::Null);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let template = json["post_processor"].clone();
    for around in [Value::Null, byte_level, template] {
        json["post_processor"] = around.clone();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        let oracle = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::load(folder.path())?;
        for (text, pair) in [("two dogs run", "across the grass"), ("", "a man"), ("a man", "")] {
            let wanted = oracle.encode((text, pair), true).unwrap();
            let found = tokenizer.encode_texts(text, Some(pair), 512)?;
            assert_eq!(found.tokens, wanted.get_ids(), "{around}: {text}, {pair}");
            assert_eq!(found.types, wanted.get_type_ids(), "{around}: {text}, {pair}");
            let second = wanted.get_type_ids().iter().filter(|&&kind| kind == 1).count();
            assert!(pair.is_empty() || second > 0, "{around}: {text}, {pair}");
        }
    }
    Ok(())
}

/// A scorer names one folder: the sentence says what can be done with it.
#[test]
fn an_adapter_whose_base_is_not_here_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = json!({"peft_type": "LORA", "base_model_name_or_path": "somewhere/else/entirely", "r": 2, "target_modules": ["query"]});
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    let error = Classifier::load(folder.path()).map(drop).unwrap_err().to_string();
    assert!(
        error.contains("adapter_config.json") && error.contains("\"somewhere/else/entirely\" is no folder here"),
        "{error}"
    );
    assert!(error.contains("put the folder where it lies into \"base_model_name_or_path\""), "{error}");
}
