//! What a training program says of what it learns: that nothing was learned, which model is kept and that its reports and losses are that
//! model's, what is left out, and that the division of a step into micro-batches does not matter.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
use arrow::datatypes::{Float64Type, Int64Type};
use candle_core::{DType, Device};
use rlhf::data::parquet;
use rlhf::data::table::TableRows;
use rlhf::model::weight_files;
use serde_json::Value;

use crate::common::{lists, table};
use crate::workbench::{Workbench, number};

/// With a model that has weights and a tokenizer, in `base`, and labelled texts.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.sft("base", "model", "--max-steps 4 --quiet");
    let texts = (0..8).map(|row| format!("The thing number {row} is here."));
    let labels = (0..8).map(|row| ["even", "odd"][row % 2]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("text", Arc::new(StringArray::from_iter_values(texts))),
        ("label", Arc::new(StringArray::from_iter_values(labels))),
    ];
    parquet::write(bench.path("labelled.parquet"), &table(columns)).unwrap();
    bench
}

/// Copies the model `base` to `to`, with one tensor changed and all of this element type.
fn edited(bench: &Workbench, to: &str, dtype: DType, name: &str, factor: f64) {
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        bench.put(&format!("{to}/{file}"), &bench.bytes(&format!("base/{file}")));
    }
    let mut tensors = weight_files::read_file(&bench.path("base/model.safetensors"), &Device::Cpu).unwrap();
    let tensor = tensors.get_mut(name).unwrap();
    *tensor = tensor.affine(factor, 0.0).unwrap();
    weight_files::write_file(&bench.path(&format!("{to}/model.safetensors")), &tensors, dtype).unwrap();
}

fn json(bench: &Workbench, file: &str) -> Value {
    serde_json::from_slice(&bench.bytes(file)).unwrap()
}

/// The error with which a line ends, and its exit code.
fn fault(bench: &Workbench, line: &str) -> (Option<i32>, String) {
    let output = bench.run(line);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

const STAGES: [&str; 4] = [
    "sft --data demonstrations.parquet",
    "sft --objective dpo --data rankings.parquet",
    "sft --objective classification --data labelled.parquet",
    "reward --data rankings.parquet",
];

#[test]
fn a_run_whose_every_step_was_skipped_is_no_success_and_publishes_no_model() {
    let bench = workbench();
    // Finite, but not what it gives.
    edited(&bench, "huge", DType::F32, "model.norm.weight", 3e38);
    edited(&bench, "broken", DType::F32, "model.layers.1.mlp.up_proj.weight", f64::NAN);
    for (index, stage) in STAGES.iter().enumerate() {
        let line = format!("{stage} --max-steps 2 --batch-size 4 --evaluation-share 0 --quiet --output out-{index}");
        let (code, error) = fault(&bench, &format!("{line} --model huge"));
        assert!(code == Some(4) && error.contains("finite"), "{stage}: {code:?} {error}");
        assert!(!bench.path(&format!("out-{index}/config.json")).exists(), "{stage}");
        assert!(!bench.path(&format!("out-{index}/finished.json")).exists(), "{stage}");
        // Weights that are no numbers are found before anything is written.
        let (code, error) = fault(&bench, &format!("{line}-broken --model broken"));
        assert_eq!(code, Some(2), "{stage}: {error}");
        assert!(
            error.contains("tensor \"model.layers.1.mlp.up_proj.weight\" has 1536 of 1536 values"),
            "{stage}: {error}"
        );
        assert!(!bench.path(&format!("out-{index}-broken")).exists(), "{stage}");
    }
}

#[test]
fn a_run_of_one_step_learns_by_default_and_one_that_could_not_is_refused() {
    let bench = workbench();
    for (index, stage) in STAGES.iter().enumerate() {
        let line = format!("{stage} --model base --evaluation-share 0 --output out-{index}");
        let (code, error) = fault(&bench, &format!("{line} --warmup-steps 1"));
        assert!(code == Some(2) && error.contains("--warmup-steps"), "{stage}: {error}");
        assert!(!bench.path(&format!("out-{index}")).exists(), "{stage}");
        bench.succeed(&line);
        let steps = bench.metrics(&format!("out-{index}"));
        assert!(steps.len() == 1 && number(&steps[0], "learning_rate") > 0.0, "{stage}: {steps:?}");
    }
    let before = weight_files::read_file(&bench.path("base/model.safetensors"), &Device::Cpu).unwrap();
    let after = weight_files::read_file(&bench.path("out-0/model.safetensors"), &Device::Cpu).unwrap();
    let values = |tensors: &BTreeMap<String, candle_core::Tensor>| -> Vec<f32> {
        tensors["model.embed_tokens.weight"].flatten_all().unwrap().to_vec1().unwrap()
    };
    assert_ne!(values(&before), values(&after));
}

/// A ranking of two answers a prompt: the `chosen` of each row and the `rejected`.
fn pairs(bench: &Workbench, file: &str, rows: &[(String, String, String)]) {
    let column = |of: fn(&(String, String, String)) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
    };
    let columns =
        vec![("prompt", column(|row| &row.0)), ("chosen", column(|row| &row.1)), ("rejected", column(|row| &row.2))];
    parquet::write(bench.path(file), &table(columns)).unwrap();
}

fn pair(row: usize, chosen: &str, rejected: &str) -> (String, String, String) {
    (format!("The thing number {row} is of the colour"), chosen.to_string(), rejected.to_string())
}

/// A column of numbers of a scored file, lists flattened.
fn scored(bench: &Workbench, file: &str, column: &str) -> Vec<f64> {
    let rows = TableRows::open(bench.path(file).to_str().unwrap()).unwrap();
    let batch = rows.map(|rows| rows.unwrap().batch).next().unwrap();
    let column = batch.column_by_name(column).unwrap();
    match column.as_primitive_opt::<Float64Type>() {
        Some(column) => column.values().to_vec(),
        None => column.as_primitive::<Int64Type>().values().iter().map(|&number| number as f64).collect(),
    }
}

#[test]
fn reward_keeps_the_best_model_by_its_loss_normalised_by_itself_and_reports_on_it() {
    let bench = workbench();
    let rows: Vec<_> = (0..8).map(|row| pair(row, " red.", " green, or so.")).collect();
    // Labelled the other way round: the more is learned, the worse it is.
    let reversed: Vec<_> = (0..8).map(|row| pair(row, " green, or so.", " red.")).collect();
    pairs(&bench, "train.parquet", &rows);
    pairs(&bench, "test.parquet", &reversed);
    for (run, more) in [("full", "--normalize mean-and-variance"), ("lora", "--method lora --learning-rate 3e-2")] {
        let rate = if more.contains("rate") { "" } else { "--learning-rate 3e-3" };
        bench.succeed(&format!(
            "reward --model base --data train.parquet --evaluation-data test.parquet --demonstrations demonstrations.parquet --output {run} \
             --epochs 5 --batch-size 4 --warmup-ratio 0 --quiet {rate} {more}"
        ));
        let losses: Vec<(f64, f64)> = (bench.metrics(run).iter().filter(|line| line.contains_key("evaluation_loss")))
            .map(|line| (number(line, "evaluation_loss"), number(line, "step")))
            .collect();
        let (loss, step) = losses.iter().copied().reduce(|best, now| if now.0 < best.0 { now } else { best }).unwrap();
        assert!(losses.len() == 5 && losses[4].0 > loss, "{losses:?}");
        let report = json(&bench, &format!("{run}/evaluation.json"));
        assert_eq!(json(&bench, &format!("{run}/finished.json"))["model_of_step"].as_f64(), Some(step));
        assert_eq!(report["step"].as_f64(), Some(step));
        assert_eq!(json(&bench, &format!("{run}/last/checkpoint.json"))["step"], 10);
        let figure = String::from_utf8(bench.bytes(&format!("{run}/calibration.svg"))).unwrap();
        assert!(figure.contains(&format!("the model of step {step}")), "{run}");
        // The numbers of the report are those of the model at the top of the folder.
        for model in [run.to_string(), format!("{run}/last")] {
            bench.succeed(&format!(
                "score --model {model} --data demonstrations.parquet --add-eos --output scored.parquet --quiet"
            ));
            let scores = scored(&bench, "scored.parquet", "reward");
            let mean = scores.iter().sum::<f64>() / scores.len() as f64;
            assert!(mean.abs() < 1e-4, "{model}: {mean}");
        }
        bench.succeed(&format!("score --model {run} --data test.parquet --add-eos --output scored.parquet --quiet"));
        let [chosen, rejected] =
            ["chosen_reward", "rejected_reward"].map(|column| scored(&bench, "scored.parquet", column));
        let of_pair = |(chosen, rejected): (&f64, &f64)| (1.0 + (rejected - chosen).exp()).ln();
        let expected = chosen.iter().zip(&rejected).map(of_pair).sum::<f64>() / chosen.len() as f64;
        assert!((report["loss"].as_f64().unwrap() - expected).abs() < 1e-4, "{run}: {report:#} is not {expected}");
    }
}

/// The mean loss a token of a saved model, by the program `score`.
fn saved_loss(bench: &Workbench, run: &str) -> f64 {
    bench.succeed(&format!(
        "score --model {run} --data demonstrations.parquet --add-eos --output scored.parquet --quiet"
    ));
    let [log_probs, tokens] = ["log_prob", "tokens"].map(|column| scored(bench, "scored.parquet", column));
    -log_probs.iter().sum::<f64>() / tokens.iter().sum::<f64>()
}

#[test]
fn the_loss_of_a_model_is_that_of_the_weights_that_are_saved() {
    let bench = workbench();
    edited(&bench, "half", DType::BF16, "model.embed_tokens.weight", 1.0);
    let line = "--data demonstrations.parquet --evaluation-data demonstrations.parquet --epochs 3 --batch-size 4 --schedule constant";
    let kept = |run: &str| json(&bench, &format!("{run}/checkpoint.json"))["evaluation_loss"].as_f64().unwrap();
    let warnings = |run: &str| std::fs::read_to_string(bench.path(run).join("warnings.txt")).unwrap_or_default();
    let run = |run: &str, more: &str| {
        bench.succeed(&format!("sft {line} --output {run} {more}"));
        let (reported, saved) = (kept(run), saved_loss(&bench, run));
        assert!((reported - saved).abs() < 2e-5, "{run}: {reported} was reported, {saved} is saved");
        saved
    };
    // Steps that are smaller than the distance of two numbers of bfloat16.
    let rounded = run("rounded", "--model half --learning-rate 1e-5");
    assert!(warnings("rounded").contains("round back to what they were when saved as bf16"), "{}", warnings("rounded"));
    let whole = run("whole", "--model half --learning-rate 1e-5 --save-dtype f32");
    assert!(whole < rounded - 1e-4, "{whole}, {rounded}");
    assert!(warnings("whole").is_empty() && !warnings("rounded").is_empty());
    run("large", "--model half --learning-rate 3e-3");
    assert!(warnings("large").is_empty(), "{}", warnings("large"));
    let types =
        |run: &str, file: &str| String::from_utf8_lossy(&bench.bytes(&format!("{run}/{file}"))[..400]).into_owned();
    assert!(types("whole", "model.safetensors").contains("\"F32\""));
    assert_eq!(json(&bench, "whole/config.json")["torch_dtype"], "float32");
    assert!(types("rounded", "model.safetensors").contains("\"BF16\""));
    // An adapter is f32 unless another type is asked for.
    let adapter = "--model half --method lora --learning-rate 1e-2";
    run("adapter", adapter);
    run("small", &format!("{adapter} --save-dtype f16"));
    assert!(types("adapter", "adapter_model.safetensors").contains("\"F32\""));
    assert!(types("small", "adapter_model.safetensors").contains("\"F16\""));
    // What 16 bits cannot hold is an error that names the tensor.
    edited(&bench, "wide", DType::F32, "model.embed_tokens.weight", 1e6);
    let (code, error) =
        fault(&bench, &format!("sft {line} --model wide --output wide-16 --learning-rate 1e-5 --save-dtype f16"));
    assert!(
        code == Some(2) && error.contains("tensor \"model.embed_tokens.weight\"") && error.contains("bf16"),
        "{error}"
    );
}

#[test]
fn pairs_whose_answers_are_the_same_are_left_out_and_counted() {
    let bench = workbench();
    let good: Vec<_> = (0..6).map(|row| pair(row, " red.", " green, or so.")).collect();
    let long = " and so on".repeat(20);
    let same = [pair(6, " blue.", " blue."), pair(7, &format!(" blue{long} one"), &format!(" blue{long} two"))];
    pairs(&bench, "good.parquet", &good);
    pairs(&bench, "all.parquet", &[&good[..], &same].concat());
    for (stage, accuracy) in [("reward", "evaluation_accuracy"), ("sft --objective dpo", "evaluation_accuracy")] {
        let run = |run: &str, data: &str| {
            let line = format!(
                "{stage} --model base --data {data} --evaluation-data {data} --output {run} --max-length 48 --epochs 3 --batch-size 8 \
                 --learning-rate 1e-3"
            );
            let said = String::from_utf8(bench.run(&line).stderr).unwrap();
            (bench.metrics(run), said)
        };
        let (whole, said) = run("all", "all.parquet");
        let (expected, silent) = run("good", "good.parquet");
        let line = "2 pairs whose answers are the same, 1 of them by --max-length 48; 2 prompts have no other pair";
        assert_eq!(said.matches(line).count(), 2, "{stage}: {said}");
        assert!(said.contains("of those to evaluate on 2 pairs") && !silent.contains("the same"), "{stage}: {said}");
        for (line, expected) in whole.iter().zip(&expected) {
            for name in ["loss", "evaluation_loss", accuracy].into_iter().filter(|name| expected.contains_key(*name)) {
                let (found, expected) = (number(line, name), number(expected, name));
                assert!((found - expected).abs() < 1e-4, "{stage}, {name}: {found} is not {expected}");
            }
        }
    }
    pairs(&bench, "same.parquet", &same);
    let (code, error) = fault(&bench, "reward --model base --data same.parquet --output none --max-length 48");
    assert!(code == Some(2) && error.contains("no ranking is left"), "{error}");
    // Of three answers two are the same: two pairs are left.
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", Arc::new(StringArray::from(vec!["The boat is"]))),
        ("responses", lists(Arc::new(StringArray::from(vec![" red.", " red.", " green."])), &[3])),
        ("ranks", lists(Arc::new(Int64Array::from(vec![0, 1, 2])), &[3])),
    ];
    parquet::write(bench.path("three.parquet"), &table(columns)).unwrap();
    let line = "reward --model base --data three.parquet --evaluation-data three.parquet --output three";
    let said = String::from_utf8(bench.run(line).stderr).unwrap();
    assert!(said.contains("1 pairs whose answers are the same\n"), "{said}");
    assert_eq!(json(&bench, "three/evaluation.json")["pairs"], 2);
}

#[test]
fn how_a_step_is_divided_changes_neither_masks_of_dropout_nor_whether_a_run_goes_on() {
    let bench = workbench();
    let lora = "--target-modules all-linear --learning-rate 1e-2";
    for (index, (stage, method)) in [
        ("sft --data demonstrations.parquet", "--method lora"),
        ("sft --data demonstrations.parquet", "--method lora --use-dora"),
        // Virtual tokens are rows too.
        ("sft --data demonstrations.parquet", "--method lora+prompt-tuning --num-virtual-tokens 3"),
        ("sft --objective dpo --data rankings.parquet", "--method lora"),
        ("sft --objective classification --data labelled.parquet", "--method lora"),
        ("reward --data rankings.parquet", "--method lora"),
    ]
    .into_iter()
    .enumerate()
    {
        let losses = |tokens: usize, dropout: &str| -> Vec<f64> {
            let run = format!("run-{index}-{tokens}-{dropout}");
            bench.succeed(&format!(
                "{stage} --model base {method} {lora} --lora-dropout {dropout} --output {run} --epochs 3 --max-steps 3 --batch-size 6 --evaluation-share 0 \
                 --quiet --tokens-per-batch {tokens}"
            ));
            bench.metrics(&run).iter().map(|line| number(line, "loss")).collect()
        };
        let (whole, divided) = (losses(4096, "0.3"), losses(24, "0.3"));
        for (whole, divided) in whole.iter().zip(&divided) {
            assert!((whole - divided).abs() < 1e-4, "{stage} {method}: {whole} is not {divided}");
        }
        let without = losses(4096, "0");
        assert!((whole[2] - without[2]).abs() > 1e-4, "{stage} {method}: {whole:?}, {without:?}");
    }
    let line =
        "sft --model base --data demonstrations.parquet --output run --batch-size 6 --evaluation-share 0 --quiet";
    bench.succeed(&format!("{line} --max-steps 1"));
    bench.succeed(&format!("{line} --max-steps 2 --resume --tokens-per-batch 64"));
    let warnings = String::from_utf8(bench.bytes("run/warnings.txt")).unwrap();
    assert!(warnings.contains("--tokens-per-batch is now 64 and was 4096"), "{warnings}");
}

#[test]
fn ppo_makes_the_minibatches_that_are_asked_for_and_tells_rewards_without_spread() {
    let bench = workbench();
    bench.put("same.sh", b"while read -r line; do echo 0.25; done");
    bench.put("long.sh", b"while read -r line; do echo \"0.${#line}\"; done");
    let line = "ppo --model base --data prompts.parquet --response-length 6 --max-length 64 --ppo-epochs 2 --max-steps 2 --temperature 2";
    let run = |run: &str, more: &str| {
        let output = bench.run(&format!("{line} --output {run} {more}"));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (bench.metrics(run), said)
    };
    let values = "--value-from policy --reward-command sh\u{a0}long.sh";
    let (metrics, said) = run("uneven", &format!("--batch-size 7 --minibatches 5 {values}"));
    assert!(metrics.iter().all(|line| number(line, "minibatches") == 10.0), "{metrics:?}");
    assert!(metrics.iter().all(|line| !line.contains_key("frac_reward_zero_std")));
    assert!(
        said.contains("scores 1 less (--missing-eos-penalty)") && said.contains("base, as it is at the start"),
        "{said}"
    );
    // Twelve prompts are all that there are.
    assert!(
        run("few", &format!("--batch-size 32 --epochs 2 {values}"))
            .1
            .contains("2 of 12 answers (1 to each of 12 prompts)")
    );
    for (batch, minibatches, prompts) in [(6, 7, 6), (32, 13, 12)] {
        let more = format!("--batch-size {batch} --minibatches {minibatches} {values}");
        let (code, error) = fault(&bench, &format!("{line} --output none {more}"));
        assert!(code == Some(2) && error.contains(&format!("an update has {prompts} prompts")), "{error}");
    }
    let (code, error) = fault(&bench, &format!("{line} --output none --batch-size 6 --critic-warmup 2 {values}"));
    assert!(code == Some(2) && error.contains("--critic-warmup 2: the run has 2 updates"), "{error}");
    for algorithm in ["grpo", "rloo"] {
        let group =
            format!("--batch-size 12 --answers 4 --algorithm {algorithm} --missing-eos-penalty 0 --reward-command");
        let (metrics, said) = run(&format!("{algorithm}-same"), &format!("{group} sh\u{a0}same.sh"));
        assert!(metrics.iter().all(|line| number(line, "frac_reward_zero_std") == 1.0), "{metrics:?}");
        assert!(said.contains("the answers to each prompt have one and the same reward"), "{said}");
        let (metrics, said) = run(&format!("{algorithm}-long"), &format!("{group} sh\u{a0}long.sh"));
        assert!(metrics.iter().all(|line| number(line, "frac_reward_zero_std") < 1.0), "{metrics:?}");
        assert!(!said.contains("one and the same reward"), "{said}");
    }
}

#[test]
fn a_plan_names_the_adapters_that_are_trained_further_merged_or_left() {
    let bench = workbench();
    let line = "--data demonstrations.parquet --max-steps 1 --batch-size 4 --evaluation-share 0";
    bench.succeed(&format!("sft --model base --output first --method lora {line} --quiet"));
    let plan = |more: &str| {
        let line = if more.contains("dpo") { line.replace("demonstrations", "rankings") } else { line.to_string() };
        let said = String::from_utf8(bench.run(&format!("sft --output out {line} {more}")).stderr).unwrap();
        said.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let further = plan("--model first --method lora --learning-rate 2e-4 --warmup-steps 0");
    for part in [
        "model base",
        "adapter first, trained further",
        "saved as f32",
        "optimizer steps 1, batches of 4",
        "learning rate 2e-4 at its peak, after a warm-up of 0 steps, then cosine to 2e-5",
    ] {
        assert!(further.contains(part), "expected {part:?} in {further}");
    }
    assert!(
        plan("--model base --adapter first --method full")
            .contains("first, merged into the weights, which are trained")
    );
    assert!(plan("--model first --method prompt-tuning").contains("first, not trained, below what is trained"));
    let dpo = plan("--model first --method lora --objective dpo");
    assert!(dpo.contains("objective dpo (sigmoid), beta 0.1 reference first, as it is at the start"), "{dpo}");
}
