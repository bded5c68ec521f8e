//! `ppo` as users run it: presets and algorithms, rewards from elsewhere, what is written, and what happens when a reward fails.

use std::collections::BTreeMap;

use arrow::array::AsArray;
use arrow::datatypes::Float64Type;
use rlhf::data::table::TableRows;
use serde_json::Value;

use crate::workbench::{Workbench, number};

/// A model that has seen the answers, and a reward model of the same base.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--quiet");
    bench.reward("reward", "sft", "--quiet");
    bench
}

fn updates(bench: &Workbench, run: &str) -> Vec<BTreeMap<String, Value>> {
    bench.metrics(run).into_iter().filter(|line| line.contains_key("objective/kl")).collect()
}

/// A column of numbers of a Parquet file; nulls are not numbers.
fn numbers(bench: &Workbench, file: &str, column: &str) -> Vec<f64> {
    let rows = TableRows::open(bench.path(file).to_str().unwrap()).unwrap();
    let batches = rows.map(|rows| rows.unwrap().batch);
    let column = |batch: &arrow::array::RecordBatch| batch.column_by_name(column).unwrap().clone();
    batches
        .flat_map(|batch| column(&batch).as_primitive::<Float64Type>().iter().flatten().collect::<Vec<_>>())
        .collect()
}

const VARIANTS: [&str; 9] = [
    "--preset instructgpt --batch-size 6 --minibatches 2 --ptx-data demonstrations.parquet --ptx-ratio 1",
    "--preset n-plus --batch-size 6 --response-length 8",
    "--preset trl --batch-size 6 --response-length 8",
    "--batch-size 6 --algorithm rloo --answers 3",
    "--batch-size 8 --algorithm grpo --answers 4 --ppo-epochs 2",
    "--batch-size 6 --kl-in loss --kl-estimator k3 --value-from policy --critic-warmup 1 --entropy-coefficient 0.01 --reward-clip 1 --whiten-rewards true",
    "--batch-size 6 --kl-controller adaptive --kl-horizon 60 --whiten-advantages rollout --whitening-variance biased --epsilon-place before-correction",
    "--batch-size 6 --answers 2 --method lora --ema-decay 0.5 --reshuffle false --early-stop-kl 0.01",
    "--batch-size 6 --missing-eos-score -1 --stop-token . --stop-after 3 --value-from policy --value-head normal --reward-combination minimum --reward-model reward reward",
];

#[test]
fn every_preset_and_algorithm_starts_at_ratio_one_and_samples_what_the_update_sees() {
    let bench = workbench();
    for (index, variant) in VARIANTS.iter().enumerate() {
        let run = format!("ppo-{index}");
        let reward = if variant.contains("--reward-model") { "" } else { "--reward-model reward" };
        let length = if variant.contains("--response-length") { "" } else { "--response-length 8" };
        bench.succeed(&format!(
            "ppo --model sft {reward} --data prompts.parquet --output {run} --max-steps 3 --epochs 9 {length} --max-length 64 \
             --learning-rate 1e-3 --warmup-steps 0 --sample-every 2 --policy-every 3 --quiet {variant}"
        ));
        let updates = updates(&bench, &run);
        assert_eq!(updates.len(), 3, "{variant}");
        for update in &updates {
            assert!((number(update, "val/first_ratio") - 1.0).abs() < 1e-5, "{variant}: {update:?}");
            assert!(number(update, "val/sampler_difference") < 1e-4, "{variant}: {update:?}");
        }
        // The divergence is that of the rollout: before the first update there is none.
        assert!(number(&updates[0], "objective/kl").abs() < 1e-6, "{variant}");
        assert_eq!(updates[0].contains_key("loss/value_avg"), !variant.contains("--algorithm"), "{variant}");
        assert_eq!(updates[0].contains_key("loss/ptx_avg"), variant.contains("--ptx-data"), "{variant}");
        assert_eq!(bench.path(&run).join("value-model").is_dir(), !variant.contains("--algorithm"), "{variant}");
        let text = String::from_utf8(bench.bytes(&format!("{run}/samples/update-000002.txt"))).unwrap();
        assert!(text.contains(">>>") && text.contains("reward "), "{text}");
        assert!(!numbers(&bench, &format!("{run}/samples/update-000002.parquet"), "score").is_empty());
        bench.succeed(&format!(
            "sample --model {run}/policies/step-000003 --data prompts.parquet --output {run}.parquet --response-length 4 --quiet"
        ));
    }
    let adaptive: Vec<f64> =
        updates(&bench, "ppo-6").iter().map(|line| number(line, "objective/kl_coefficient")).collect();
    assert!((adaptive[1] - 0.05 * (1.0 - 0.2 * 6.0 / 60.0)).abs() < 1e-9, "{adaptive:?}");
    let warmed: Vec<f64> = updates(&bench, "ppo-5").iter().map(|line| number(line, "policy/gradient_norm")).collect();
    assert!(warmed[0] == 0.0 && warmed[1] > 0.0, "{warmed:?}");
}

#[test]
fn a_reward_model_of_another_tokenizer_gives_the_scores_of_the_program_score() {
    let bench = workbench();
    let world = concat!(env!("CARGO_MANIFEST_DIR"), "/data/base");
    bench.succeed(&format!(
        "reward --model {world} --data rankings.parquet --output other --evaluation-share 0 --max-steps 2 --batch-size 4 --quiet"
    ));
    let run = |more: &str| {
        bench.run(&format!(
            "ppo --model sft --reward-model other --data prompts.parquet --output ppo --max-steps 2 --batch-size 12 --response-length 8 \
             --max-length 64 --missing-eos-penalty 0 --sample-every 1 --samples 12 --quiet {more}"
        ))
    };
    let refused = String::from_utf8(run("").stderr).unwrap();
    assert!(refused.contains("another tokenizer") && refused.contains("--value-from policy"), "{refused}");
    assert!(run("--value-from policy").status.success());
    let samples = "ppo/samples/update-000001.parquet";
    let rewards = numbers(&bench, samples, "reward");
    let ended = {
        let rows = TableRows::open(bench.path(samples).to_str().unwrap()).unwrap();
        let batch = rows.map(|rows| rows.unwrap().batch).next().unwrap();
        let column = batch.column_by_name("ended").unwrap().as_boolean().clone();
        (0..column.len()).map(|row| column.value(row)).collect::<Vec<bool>>()
    };
    assert!(rewards.len() == 12 && ended.contains(&true));
    // The head says that it was trained on answers with their end, and the data say which have one.
    bench.succeed(&format!(
        "score --model other --data {samples} --output scored.parquet --prefix by_ --max-length 64 --quiet"
    ));
    let scores = numbers(&bench, "scored.parquet", "by_reward");
    for row in 0..12 {
        assert!((rewards[row] - scores[row]).abs() < 1e-5, "row {row}: {} is not {}", rewards[row], scores[row]);
    }
}

#[test]
fn a_reward_command_that_fails_ends_the_run_with_its_name_and_the_policy_safe() {
    let bench = workbench();
    for (index, (command, reason)) in [
        ("head -c 700 >/dev/null; sleep 20", "gave no number within 1 seconds"),
        ("for i in 1 2 3 4 5 6 7 8; do read line; echo 0.5; done; exit 4", "ended (exit status: 4)"),
        ("for i in 1 2 3 4 5 6 7 8; do read line; echo 0.5; done; echo good; cat", "wrote \"good\""),
        ("for i in 1 2 3 4 5 6 7 8; do read line; echo 0.5; done; echo NaN; cat", "wrote \"NaN\""),
    ]
    .into_iter()
    .enumerate()
    {
        bench.put("judge.sh", command.as_bytes());
        let run = format!("failed-{index}");
        let output = bench.run(&format!(
            "ppo --model sft --reward-command sh\u{a0}judge.sh --reward-timeout 1 --value-from policy --data prompts.parquet --output {run} \
             --max-steps 4 --epochs 9 --batch-size 6 --response-length 8 --max-length 64 --quiet"
        ));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("`sh judge.sh`") && error.contains(reason), "{error}");
        if index > 0 {
            assert!(error.contains(&format!("the policy after 1 updates is in {run}/last")), "{error}");
            bench.succeed(&format!("sample --model {run}/last --data prompts.parquet --output {run}.parquet --quiet"));
        }
    }
}

#[test]
fn the_best_policy_by_the_held_out_judge_is_kept_beside_the_last() {
    let bench = workbench();
    // Likes short answers; the policy is trained towards long ones.
    bench.put("short.sh", b"while read -r line; do echo \"-${#line}\"; done");
    bench.put("long.sh", b"while read -r line; do echo \"${#line}\"; done");
    bench.succeed(
        "ppo --model sft --reward-command sh\u{a0}long.sh --value-from policy --data prompts.parquet --output ppo --max-steps 6 --epochs 9 \
         --batch-size 6 --response-length 8 --max-length 64 --learning-rate 1e-2 --warmup-steps 0 --missing-eos-penalty 0 --kl-coefficient 0 \
         --evaluation-data prompts.parquet --judge-command sh\u{a0}short.sh --evaluate-every 2 --quiet",
    );
    let found: Vec<f64> = (bench.metrics("ppo").iter().filter(|line| line.contains_key("evaluation/judge")))
        .map(|line| number(line, "evaluation/judge"))
        .collect();
    let kept = |folder: &str| -> Value {
        serde_json::from_slice(&bench.bytes(&format!("ppo/{folder}/checkpoint.json"))).unwrap()
    };
    let best = found.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    assert_eq!(found.len(), 3);
    assert_eq!(kept("last")["step"], 6);
    assert!((kept("best")["evaluation_loss"].as_f64().unwrap() + best).abs() < 1e-9, "{found:?}");
    let refused = bench.run("ppo --model sft --reward-model reward --data prompts.parquet --evaluation-data prompts.parquet --output no --response-length 8");
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("give --judge-model, --judge-classifier, --judge-command or --judge-rule")
    );
}
