//! Rewards that read a row's other columns: by rule, by command, by group, alone and together.

use std::sync::Arc;

use arrow::array::{ArrayRef, StringArray};
use rlhf::data::parquet;

use crate::common::table;
use crate::workbench::{Workbench, number};

const PPO: &str = "--data coloured.parquet --max-steps 3 --epochs 9 --batch-size 12 --algorithm grpo --answers 4 --response-length 6 --max-length 64 \
                   --learning-rate 1e-3 --missing-eos-penalty 0 --quiet";

/// Reads the answer and the column `wanted` of each line, and says whether the first holds the second.
const JUDGE: &str = r#"while read -r line; do
    said=$(printf '%s' "$line" | sed 's/.*"response":"\(.*\)","ended".*/\1/')
    wanted=$(printf '%s' "$line" | sed 's/.*"wanted":"\([a-z]*\)".*/\1/')
    case "$said" in *"$wanted"*) echo 1;; *) echo 0;; esac
done"#;

/// The same for a line with all answers to a prompt, of which there are four.
const GROUP_JUDGE: &str = r#"while read -r line; do
    wanted=$(printf '%s' "$line" | sed 's/.*"wanted":"\([a-z]*\)".*/\1/')
    printf '%s' "$line" | sed 's/.*"responses":\["\(.*\)"\],"ended".*/\1/; s/","/\
/g' | { list=; while read -r said || [ -n "$said" ]; do
        case "$said" in *"$wanted"*) list="$list,1";; *) list="$list,0";; esac
    done; echo "[${list#,}]"; }
done"#;

fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--quiet");
    let things = ["boat", "lamp", "chair", "coat", "clock", "bag", "ring", "hat", "cup", "door", "tree", "bird"];
    let prompts = things.iter().map(|thing| format!("The {thing} is of the colour"));
    let wanted = (0..12).map(|row| ["red", "green", "blue", "white"][row % 4]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", Arc::new(StringArray::from_iter_values(prompts))),
        ("wanted", Arc::new(StringArray::from_iter_values(wanted))),
    ];
    parquet::write(bench.path("coloured.parquet"), &table(columns)).unwrap();
    bench.put("judge.sh", JUDGE.as_bytes());
    bench.put("group.sh", GROUP_JUDGE.as_bytes());
    bench
}

#[test]
fn a_rule_and_commands_that_read_the_same_column_train_the_same_model() {
    let bench = workbench();
    for (run, rewards) in [
        ("rule", "--reward-rule contains --reward-column wanted"),
        ("command", "--reward-command sh\u{a0}judge.sh"),
        ("group", "--reward-command sh\u{a0}group.sh --reward-group"),
    ] {
        bench.succeed(&format!("ppo --model sft --output {run} {rewards} {PPO}"));
        assert!(bench.bytes(&format!("{run}/model.safetensors")) == bench.bytes("rule/model.safetensors"), "{run}");
    }
    let rewards: Vec<f64> = bench.metrics("rule").iter().map(|line| number(line, "objective/rewards")).collect();
    // Some answers pass and some do not, so that there is something to learn from.
    assert!(rewards.iter().all(|&reward| reward > 0.0 && reward < 1.0), "{rewards:?}");
}

#[test]
fn several_rewards_are_weighted_and_recorded_apart() {
    let bench = workbench();
    bench.succeed(&format!(
        "ppo --model sft --output both --reward-command sh\u{a0}judge.sh --reward-rule contains regex --reward-column wanted wanted \
         --reward-combination sum --reward-weights 2,0.5,-1 {PPO}"
    ));
    for line in bench.metrics("both").iter().filter(|line| line.contains_key("objective/rewards")) {
        let of = |name: &str| number(line, &format!("rewards/{name}/mean"));
        let (command, contains, regex) = (of("command"), of("contains(wanted)"), of("regex(wanted)"));
        assert_eq!((command, contains), (contains, regex));
        assert!((number(line, "objective/rewards") - (2.0 * command + 0.5 * contains - regex)).abs() < 1e-6);
        assert!((number(line, "rewards/command/std") - (command * (1.0 - command)).sqrt()).abs() < 1e-6);
    }
}

#[test]
fn a_classifier_rewards_judges_and_is_the_same_after_a_resume() {
    let bench = workbench();
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/data/toxicity");
    let ppo = |output: &str, steps: usize, more: &str| {
        let shared = PPO.replace("--max-steps 3", &format!("--max-steps {steps} --schedule constant --warmup-steps 0"));
        format!(
            "ppo --model sft --output {output} --reward-classifier {shipped}@-toxic --evaluation-data coloured.parquet --evaluate-every 2 \
             --judge-classifier {shipped}@harmless {shared} {more}"
        )
    };
    bench.succeed(&ppo("whole", 3, ""));
    let scores: Vec<f64> =
        bench.metrics("whole").iter().filter_map(|line| line.get("objective/scores")?.as_f64()).collect();
    assert!(scores.len() == 3 && scores.iter().all(|score| score.is_finite() && *score != 0.0), "{scores:?}");
    // Of two labels one is the other's opposite, so the judge gives what the reward does.
    let mut evaluated = bench.metrics("whole");
    evaluated.retain(|line| line.contains_key("evaluation/judge"));
    assert!(!evaluated.is_empty());
    for line in evaluated {
        assert!((number(&line, "evaluation/judge") - number(&line, "evaluation/reward")).abs() < 1e-4);
    }
    // Weights stand in the order of models, classifiers, command and rules.
    let several = "--reward-rule contains --reward-column wanted --reward-combination sum --reward-weights 0.5,-3";
    bench.succeed(&ppo("several", 1, several));
    for line in bench.metrics("several").iter().filter(|line| line.contains_key("objective/rewards")) {
        let of = |name: &str| number(line, &format!("rewards/{name}/mean"));
        let sum = 0.5 * of("toxicity@-toxic") - 3.0 * of("contains(wanted)");
        assert!((number(line, "objective/rewards") - sum).abs() < 1e-4);
    }
    bench.succeed(&ppo("parts", 2, ""));
    bench.succeed(&ppo("parts", 3, "--resume"));
    assert!(bench.bytes("parts/model.safetensors") == bench.bytes("whole/model.safetensors"));
    for (line, expected) in [
        (ppo("parts", 4, "--resume").replace("@-toxic", "@toxic"), "--reward-classifier: was"),
        (ppo("unnamed", 3, "").replace("@-toxic", ""), "has the labels harmless, toxic; name the one"),
    ] {
        let output = bench.run(&line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(expected), "{error}");
    }
}

#[test]
fn a_row_that_a_rule_cannot_compare_with_is_refused_before_training() {
    let bench = workbench();
    for (rewards, reason) in [
        ("--reward-rule numeric --reward-column wanted", "no number"),
        ("--reward-rule exact --reward-column answer", "column `answer`, which --reward-rule exact reads, is missing"),
        ("--reward-rule exact", "--reward-column"),
        ("--reward-column wanted --reward-command cat", "--reward-rule"),
    ] {
        let output = bench.run(&format!("ppo --model sft --output refused {rewards} {PPO}"));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(reason), "{error}");
        assert!(!bench.path("refused").exists());
    }
}

#[test]
fn held_out_answers_are_judged_by_a_rule_and_the_value_model_starts_from_the_policy() {
    let bench = workbench();
    bench.succeed(
        "ppo --model sft --output judged --reward-rule contains --reward-column wanted --data coloured.parquet --evaluation-data coloured.parquet \
         --judge-rule contains --judge-column wanted --max-steps 2 --batch-size 6 --response-length 6 --max-length 64 --learning-rate 1e-3 --quiet",
    );
    let found: Vec<f64> = (bench.metrics("judged").iter().filter(|line| line.contains_key("evaluation/judge")))
        .map(|line| number(line, "evaluation/judge") - number(line, "evaluation/reward"))
        .collect();
    assert!(!found.is_empty() && found.iter().all(|&difference| difference == 0.0), "{found:?}");
}
