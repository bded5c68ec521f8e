//! Texts and their classes: by a head and by a language model's words, with decoders and encoders.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use candle_core::Device;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::classifier::{Classifier, ClassifierInput};
use rlhf::data::batch::{Continuation, TokenTree};
use rlhf::data::parquet;
use rlhf::data::tokenize::{EncodedTexts, Tokenizer};
use rlhf::model::folder::{WithoutWeights, open};
use rlhf::model::weight_files;
use rlhf::ops::BaseForm;
use serde_json::Value;

use crate::common::{strings, table};
use crate::workbench::Workbench;

/// Sentences whose class a word decides, with files of names, of numbers, and of pairs.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.succeed(
        "sft --model model --data mixed.parquet --output base --evaluation-share 0 --epochs 10 --batch-size 12 \
         --learning-rate 3e-3 --quiet",
    );
    let things = ["boat", "lamp", "chair", "coat", "clock", "bag", "ring", "hat", "cup", "door", "tree", "bird"];
    let sentence = |row: usize| format!("The {} is {}.", things[row % 12], ["red", "blue"][row / 12 % 2]);
    let write = |name: &str, rows: std::ops::Range<usize>| {
        let texts: Vec<String> = rows.clone().map(sentence).collect();
        let labels: Vec<&str> = rows.clone().map(|row| ["warm", "cold"][row / 12 % 2]).collect();
        let numbers: Vec<i64> = rows.map(|row| (row / 12 % 2) as i64).collect();
        let text = || ("text", Arc::new(StringArray::from(texts.clone())) as ArrayRef);
        parquet::write(bench.path(&format!("{name}.parquet")), &table(vec![text(), ("label", strings(&labels))]))
            .unwrap();
        let numbers: ArrayRef = Arc::new(Int64Array::from(numbers));
        let pair = ("text_pair", Arc::new(StringArray::from(vec!["A thing."; texts.len()])) as ArrayRef);
        let columns = vec![text(), pair, ("label", numbers)];
        parquet::write(bench.path(&format!("{name}-pairs.parquet")), &table(columns)).unwrap();
    };
    write("train", 0..24);
    write("test", 6..18);
    // An encoder of new weights, whose tokenizer puts tokens around its texts.
    let config = r#"{"model_type": "bert", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.1, "max_position_embeddings": 64}"#;
    bench.put("bert/config.json", config.as_bytes());
    let mut tokenizer: Value = serde_json::from_slice(&bench.bytes("base/tokenizer.json")).unwrap();
    let special = |id: &str| serde_json::json!({ "SpecialToken": { "id": id, "type_id": 0 } });
    let sequence = |id: &str, kind: u32| serde_json::json!({ "Sequence": { "id": id, "type_id": kind } });
    let (begin, end) = ("<s>", "</s>");
    let ids = |token: &str| {
        let tokens = tokenizer["added_tokens"].as_array().unwrap();
        tokens.iter().find(|found| found["content"] == token).expect("a special token")["id"].clone()
    };
    let known = |token: &str| serde_json::json!({ "id": token, "ids": [ids(token)], "tokens": [token] });
    let template = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [special(begin), sequence("A", 0), special(end)],
        "pair": [special(begin), sequence("A", 0), special(end), sequence("B", 1), special(end)],
        "special_tokens": { begin: known(begin), end: known(end) },
    });
    tokenizer["post_processor"] = template;
    bench.put("bert/tokenizer.json", tokenizer.to_string().as_bytes());
    let new = WithoutWeights::NewFromSeed(0);
    let (folder, architecture, weights) = open(&bench.path("bert"), new, BaseForm::F32, &Device::Cpu).unwrap();
    weight_files::write(&bench.path("bert"), &weights, &architecture, &folder.form).unwrap();
    bench
}

#[test]
fn an_encoders_answers_stand_each_behind_a_copy_of_their_prompt() {
    let bench = workbench();
    let folder = bench.path("bert");
    let role = Role { folder: &folder, adapters: &[], training: Training::Frozen, head: Head::ScalarOrNew, seed: 0 };
    let model = Bases::new(Device::Cpu).load(&role).unwrap();
    let answer = |tokens: usize| Continuation { tokens: vec![5; tokens], learned: vec![true; tokens] };
    let tree = |prompt: usize, answers: &[usize]| TokenTree {
        prompt: vec![7; prompt],
        answers: answers.iter().map(|&tokens| answer(tokens)).collect(),
    };
    let trees = [tree(10, &[3, 3, 3]), tree(4, &[1]), tree(0, &[6, 2])];
    let rows = trees.each_ref().map(|tree| model.rows_of(tree));
    assert_eq!(rows, [3 * 13, 5, 8]);
    assert_eq!(rows.iter().sum::<usize>(), model.rows(&model.pack(&trees)));
    assert_eq!(model.rows_of_answers(10, 3, 3), 39);
    assert_eq!(model.passes(&trees, 44), [0..2, 2..3]);
    assert_eq!(model.passes(&trees, 43), [0..1, 1..3]);
}

fn evaluation(bench: &Workbench, run: &str) -> Value {
    serde_json::from_slice(&bench.bytes(&format!("{run}/evaluation.json"))).unwrap()
}

fn classify(bench: &Workbench, run: &str, more: &str) -> Value {
    bench.succeed(&format!(
        "sft --objective classification --data train.parquet --evaluation-data test.parquet --output {run} --epochs 30 --batch-size 8 \
         --quiet {more}"
    ));
    evaluation(bench, run)
}

#[test]
fn classes_are_learned_by_a_head_and_by_words_with_full_weights_and_lightweight_methods() {
    let bench = workbench();
    let lora = "--method lora --target-modules all-linear --learning-rate 1e-2";
    // An adapter names its base by this path, which has to be found from here too.
    let base = bench.path("base").display().to_string();
    for (run, more) in [
        ("full", "--model base --method full --learning-rate 3e-3".to_string()),
        ("lora", format!("--model {base} {lora}")),
        ("mean", format!("--model {base} {lora} --pooling mean --probe-hidden-size 16")),
        ("words", format!("--model base {lora} --label-words cosy,chilly")),
        ("encoder", "--model bert --method full --learning-rate 3e-3".to_string()),
        ("prefix", "--model bert --method p-tuning-v2 --learning-rate 3e-2 --num-virtual-tokens 4".to_string()),
    ] {
        // The words' order is that of the classes, which are sorted: cold, warm.
        let more = more.replace("cosy,chilly", "chilly,cosy");
        let found = classify(&bench, run, &more);
        let accuracy = found["accuracy"].as_f64().unwrap();
        let wanted = if run == "prefix" { 0.5 } else { 0.9 };
        assert!(accuracy >= wanted, "{run}: {found}");
        assert_eq!(
            (&found["labels"][0], &found["labels"][1], found["examples"].as_u64()),
            (&"cold".into(), &"warm".into(), Some(12))
        );
        let counts: u64 = found["confusion"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|row| row.as_array().unwrap())
            .map(|n| n.as_u64().unwrap())
            .sum();
        assert_eq!(counts, 12);
    }
    for run in ["full", "lora", "mean", "encoder"] {
        let classifier = Classifier::load(&bench.path(run)).unwrap();
        assert_eq!(classifier.labels(), ["cold", "warm"], "{run}");
        let input = |colour: &str| ClassifierInput { text: format!("The boat is {colour}."), pair: None };
        let found = classifier.probabilities(&[input("blue"), input("red")], 500).unwrap().probabilities;
        assert!(found[0][0] > 0.5 && found[1][1] > 0.5, "{run}: {found:?}");
    }
    // What was saved goes on with the same head: a step that hardly changes it is as good.
    let small = lora.replace("1e-2", "1e-6");
    let again = classify(&bench, "again", &format!("--model lora {small} --max-steps 1"));
    assert_eq!(again["accuracy"], evaluation(&bench, "lora")["accuracy"]);
    for model in ["lora", "full"] {
        let line = "sft --objective classification --data train.parquet --output out --labels warm,cold --model";
        let error = String::from_utf8(bench.run(&format!("{line} {model}")).stderr).unwrap();
        assert!(
            error.contains("the classes cold, warm apart, in this order") && error.contains("--labels cold,warm"),
            "{error}"
        );
    }
    bench.succeed("sft --objective classification --model bert --data train-pairs.parquet --evaluation-data test-pairs.parquet --output pairs --learning-rate 3e-3 --epochs 30 --batch-size 8 --quiet");
    assert!(evaluation(&bench, "pairs")["accuracy"].as_f64() >= Some(0.9));
}

#[test]
fn a_probe_reports_its_control_task_and_leaves_the_model_alone() {
    let bench = workbench();
    for pooling in ["first", "mean", "last"] {
        let more = format!("--model base --method probing --pooling {pooling} --probe-layer 1 --learning-rate 3e-2");
        let found = classify(&bench, pooling, &more);
        let number = |name: &str| found[name].as_f64().unwrap_or_else(|| panic!("{name}: {found}"));
        assert!((number("selectivity") - (number("accuracy") - number("control_accuracy"))).abs() < 1e-12);
        // The first token of every text is the same, and sees nothing else.
        assert!(
            if pooling == "first" { number("accuracy") == 0.5 } else { number("accuracy") >= 0.9 },
            "{pooling}: {found}"
        );
        assert!(!bench.path(&format!("{pooling}/model.safetensors")).exists());
    }
}

#[test]
fn an_encoder_is_a_reward_model_of_pairs_and_cannot_write() {
    let bench = workbench();
    bench.succeed(
        "reward --model bert --data rankings.parquet --demonstrations demonstrations.parquet --output reward --epochs 60 --batch-size 4 \
         --learning-rate 3e-3 --evaluation-data rankings.parquet --quiet",
    );
    let found = evaluation(&bench, "reward");
    assert!(found["accuracy"].as_f64() > found["accuracy_longer_wins"].as_f64(), "{found}");
    for line in [
        "sft --model bert --data demonstrations.parquet --output out",
        "sample --model bert --data prompts.parquet --output out",
    ] {
        let error = String::from_utf8(bench.run(line).stderr).unwrap();
        assert!(error.contains("bert: this is an encoder"), "{line}: {error}");
    }
}

#[test]
fn unusable_labels_are_one_sentence() {
    let bench = workbench();
    let only = |label: &str| table(vec![("text", strings(&["a", "b"])), ("label", strings(&[label, label]))]);
    parquet::write(bench.path("one.parquet"), &only("x")).unwrap();
    for (more, part) in [
        ("--data demonstrations.parquet", "`text` and `label`"),
        ("--data one.parquet --evaluation-share 0", "`label` has 1 class"),
        ("--data train.parquet --evaluation-data one.parquet", "\"x\" is none of the classes cold, warm"),
        ("--data train.parquet --label-words a,b,c", "--label-words has 3 words"),
        ("--data train.parquet --label-words a,b --label-template x", "there is no {label} in it"),
        ("--data train.parquet --method probing --probe-layer 3", "layers 1 to 2"),
    ] {
        let error = bench.run(&format!("sft --objective classification --model base --output out --quiet {more}"));
        let error = String::from_utf8(error.stderr).unwrap();
        assert!(error.starts_with("error: ") && error.contains(part), "{more}: {error}");
        assert!(!bench.path("out").exists());
    }
}

#[test]
fn texts_and_pairs_have_around_them_what_the_tokenizers_file_says_and_the_longer_is_cut() {
    let bench = workbench();
    let tokenizer = Tokenizer::load(bench.path("bert")).unwrap();
    let [begin, end] = ["<s>", "</s>"].map(|token| tokenizer.vocabulary()[token]);
    let words = |text: &str| tokenizer.encode_words(text).unwrap();
    let (a, b) = (words("The boat"), words("is red, or blue, or so."));
    let texts = |text: &str, pair: Option<&str>, room: usize| {
        let EncodedTexts { tokens, types, second, was_cut } = tokenizer.encode_texts(text, pair, room).unwrap();
        let is_second = |token: &usize| types[*token] == 1;
        (tokens.clone(), second, (0..tokens.len()).filter(is_second).count(), was_cut)
    };
    let (around_one, both) = ([&[begin], &a[..], &[end]].concat(), [&[begin], &a[..], &[end], &b[..], &[end]].concat());
    assert_eq!(texts("The boat", None, 64), (around_one.clone(), around_one.len(), 0, false));
    // The template gives the last token the first type.
    let pair = Some("is red, or blue, or so.");
    assert_eq!(texts("The boat", pair, 64), (both, around_one.len(), b.len(), false));
    let cut = [&around_one, &b[..a.len()], &[end]].concat();
    assert_eq!(texts("The boat", pair, 3 + 2 * a.len()), (cut, around_one.len(), a.len(), true));
}
