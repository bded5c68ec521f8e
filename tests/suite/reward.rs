//! `reward` as users run it: its losses, what it reports, how scores are normalised, and models whose head is missing.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, StringArray};
use arrow::datatypes::Float64Type;
use rlhf::data::parquet;
use rlhf::data::table::TableRows;
use serde_json::Value;

use crate::common::table;
use crate::workbench::{Workbench, number};

/// With a model that has seen the demonstrations.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--quiet");
    bench
}

fn json(bench: &Workbench, file: &str) -> Value {
    serde_json::from_slice(&bench.bytes(file)).unwrap()
}

/// Pairs with a weight and the share of labellers who agree: every third order is the wrong way round, and counts nothing.
fn pairs(bench: &Workbench) {
    let rows = 12usize;
    let colours = ["red", "green", "blue", "white"];
    let right: Vec<String> = (0..rows).map(|row| format!(" {}.", colours[row % 4])).collect();
    let wrong: Vec<String> = (0..rows).map(|row| format!(" {}, or so.", colours[(row + 1) % 4])).collect();
    let either = |row: usize, wanted: bool| {
        if (row.is_multiple_of(3)) == wanted { wrong[row].clone() } else { right[row].clone() }
    };
    let prompts = (0..rows).map(|row| format!("The thing number {row} is of the colour"));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", Arc::new(StringArray::from_iter_values(prompts))),
        ("chosen", Arc::new(StringArray::from_iter_values((0..rows).map(|row| either(row, true))))),
        ("rejected", Arc::new(StringArray::from_iter_values((0..rows).map(|row| either(row, false))))),
        (
            "weight",
            Arc::new(Float64Array::from_iter_values(
                (0..rows).map(|row| if row.is_multiple_of(3) { 0.0 } else { 2.0 }),
            )),
        ),
        (
            "agreement",
            Arc::new(Float64Array::from_iter_values(
                (0..rows).map(|row| if row.is_multiple_of(3) { 0.55 } else { 0.95 }),
            )),
        ),
    ];
    parquet::write(bench.path("pairs.parquet"), &table(columns)).unwrap();
}

#[test]
fn prompts_count_by_their_weight_and_the_report_tells_pairs_apart_by_agreement() {
    let bench = workbench();
    pairs(&bench);
    bench.succeed(
        "reward --model sft --data pairs.parquet --evaluation-data pairs.parquet --output reward --epochs 30 --batch-size 6 \
         --learning-rate 3e-3 --quiet",
    );
    let report = json(&bench, "reward/evaluation.json");
    let accuracy = |key: &str| report["accuracy_by_labeller_agreement"][key]["accuracy"].as_f64().unwrap();
    // What is the wrong way round was not learned.
    assert!(accuracy("from 90%") > 0.8 && accuracy("from 50%") < 0.2, "{report:#}");
    for key in
        ["calibration_error", "accuracy_shuffled_labels", "length_correlation", "length_correlation_within_prompts"]
    {
        assert!(report[key].as_f64().unwrap().is_finite(), "{key}");
    }
    // Of the pairs of a few prompts the interval is wide, and around what was measured.
    let [low, high] = [0, 1].map(|end| report["accuracy_interval"][end].as_f64().unwrap());
    let measured = report["accuracy"].as_f64().unwrap();
    assert!(0.0 <= low && low <= measured && measured <= high && high <= 1.0 && low + 0.01 < high, "{report:#}");
    let figure = String::from_utf8(bench.bytes("reward/calibration.svg")).unwrap();
    assert!(figure.starts_with("<svg") && figure.contains("predicted win rate"));
}

#[test]
fn scores_of_demonstrations_have_mean_0_and_variance_1_wherever_the_model_is_read() {
    let bench = workbench();
    for (loss, more) in [
        ("pairwise", "--label-smoothing 0.1 --margin 0.1"),
        ("plackett-luce", "--normalize-first --centring-coefficient 0.01"),
    ] {
        bench.reward("reward", "sft", &format!("--loss {loss} --normalize mean-and-variance --quiet {more}"));
        bench.succeed("score --model reward --data demonstrations.parquet --add-eos --output scored.parquet --quiet");
        let rows = TableRows::open(bench.path("scored.parquet").to_str().unwrap()).unwrap();
        let batch = rows.map(|rows| rows.unwrap().batch).next().unwrap();
        let scores: Vec<f64> = batch.column_by_name("reward").unwrap().as_primitive::<Float64Type>().values().to_vec();
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / scores.len() as f64;
        assert!(mean.abs() < 1e-4 && (variance - 1.0).abs() < 1e-3, "{loss}: {mean}, {variance}");
    }
}

#[test]
fn a_model_whose_head_is_missing_is_refused_and_gets_no_new_one() {
    let bench = workbench();
    bench.reward("reward", "sft", "--quiet");
    // The weights of a model without a head, in the folder of one that had it.
    bench.put("reward/model.safetensors", &bench.bytes("sft/model.safetensors"));
    let start = "--data prompts.parquet --output out --response-length 4";
    for line in [
        "reward --model reward --data rankings.parquet --output out".to_string(),
        format!("ppo --model sft --reward-model reward {start}"),
    ] {
        let error = String::from_utf8(bench.run(&line).stderr).unwrap();
        assert!(
            error.contains("reward: config.json says that this model has a head") && error.contains("score.weight"),
            "{line}: {error}"
        );
    }
}

#[test]
fn dpo_learns_rankings_without_a_reward_model_and_starts_at_the_reference() {
    let bench = workbench();
    for method in ["full", "lora"] {
        let rate = if method == "full" { "1e-3" } else { "1e-2" };
        bench.succeed(&format!(
            "sft --objective dpo --method {method} --model sft --data rankings.parquet --output dpo --evaluation-share 0.2 --epochs 8 --batch-size 4 \
             --learning-rate {rate} --warmup-steps 0 --quiet"
        ));
        let lines = bench.metrics("dpo");
        let steps: Vec<_> = lines.iter().filter(|line| line.contains_key("rewards/margins")).collect();
        let (first, last) = (steps.first().unwrap(), steps.last().unwrap());
        // The policy is the reference, so both rewards are 0 and the loss is log 2.
        assert!(
            (number(first, "loss") - 2f64.ln()).abs() < 1e-5 && number(first, "rewards/accuracies") == 0.5,
            "{first:?}"
        );
        assert!(number(last, "loss") < 0.5 && number(last, "rewards/margins") > 0.3, "{last:?}");
    }
    bench.succeed("sample --model dpo --data prompts.parquet --output answers.parquet --quiet");
}
