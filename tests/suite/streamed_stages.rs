//! Every stage on data of more rows than a window.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};

use crate::common::{lists, table};
use crate::streaming::write;
use crate::survival::assert_same;
use crate::workbench::{Workbench, number};

/// A workbench with a model to start from, a reward model, and files of more rows than a window of 40.
fn bench_of_many() -> Workbench {
    let bench = Workbench::new();
    bench.sft("start", "model", "--max-steps 4 --quiet");
    bench.reward("judge", "start", "--max-steps 4 --quiet");
    let things = ["boat", "lamp", "chair", "coat", "clock", "bag", "ring"];
    let colours = ["red", "green", "blue", "white"];
    for file in 0..3 {
        let numbers = || file * 40..(file + 1) * 40;
        let column =
            |of: &dyn Fn(usize) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(numbers().map(of))) };
        let prompt = || column(&|row| format!("The {} {row} is of the colour", things[row % 7]));
        let right = |row: usize| format!(" {}.", colours[row % 4]);
        let wrong = |row: usize| format!(" {}, or so.", colours[(row + 1) % 4]);
        let write = |folder: &str, columns: Vec<(&str, ArrayRef)>| {
            std::fs::create_dir_all(bench.path(folder)).unwrap();
            write(&bench.path(folder).join(format!("{file}.parquet")), &table(columns), &[17, 23]);
        };
        write("demonstrations", vec![("prompt", prompt()), ("completion", column(&right))]);
        // Of every third row both answers are the same in rank.
        let ranks = numbers().flat_map(|row| if row % 3 == 0 { [0, 0] } else { [0, 1] });
        let ends: Vec<i32> = (1..=40).map(|row| 2 * row).collect();
        let answers = numbers().flat_map(|row| [right(row), wrong(row)]);
        let responses = lists(Arc::new(StringArray::from_iter_values(answers)), &ends);
        let ranks = lists(Arc::new(Int64Array::from_iter_values(ranks)), &ends);
        write("rankings", vec![("prompt", prompt()), ("responses", responses), ("ranks", ranks)]);
        write("prompts", vec![("prompt", prompt())]);
        let label = column(&|row| (if row % 2 == 0 { "even" } else { "odd" }).to_string());
        write("labelled", vec![("text", prompt()), ("label", label)]);
    }
    bench
}

const MANY: &str = "--shuffle-window 40 --checkpoint-every 1 --quiet --seed 2";

/// Each stage on data of three windows.
fn line_of_many(stage: &str) -> String {
    let line = match stage {
        "sft" => "sft --model start --data demonstrations --evaluation-share 0.2 --batch-size 9",
        "dpo" => "sft --objective dpo --model start --data rankings --evaluation-share 0.2 --batch-size 9 --epochs 2",
        "classification" => {
            "sft --objective classification --model start --data labelled --evaluation-share 0.2 --batch-size 9"
        }
        "reward" => "reward --model start --data rankings --evaluation-share 0.2 --batch-size 9",
        "ppo" => {
            "ppo --model start --reward-model judge --data prompts --batch-size 14 --minibatches 2 --response-length 6 --max-length 64 --ptx-data demonstrations --ptx-ratio 1"
        }
        _ => panic!("no stage {stage}"),
    };
    format!("{line} --learning-rate 3e-3 {MANY}")
}

#[test]
fn stages_on_data_larger_than_a_window_are_the_same_when_interrupted_and_on_any_number_of_threads() {
    let bench = bench_of_many();
    for stage in ["sft", "dpo", "classification", "reward", "ppo"] {
        let line = line_of_many(stage);
        let whole = format!("whole-{stage}");
        bench.succeed(&format!("{line} --threads 1 --output {whole}"));
        for threads in [1, 2] {
            // In the middle of a window, of the second window, and of an epoch's last.
            let parts = format!("parts-{stage}-{threads}");
            for steps in [2, 5, 8] {
                stop_after(&bench, &format!("{line} --threads {threads} --output {parts} --resume"), &parts, steps);
            }
            bench.succeed(&format!("{line} --threads {threads} --output {parts} --resume"));
            assert_same(&bench, &whole, &parts);
        }
    }
}

/// Starts a run, waits until it has done so many steps, and kills it.
fn stop_after(bench: &Workbench, line: &str, run: &str, steps: usize) {
    let mut child = bench.command(line).spawn().unwrap();
    let done = || {
        let text = std::fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter(|line| line.contains("\"loss\"")).count()
    };
    while done() < steps && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn streamed_dpo_keeps_to_the_model_as_it_was_at_the_start() {
    let bench = bench_of_many();
    bench.succeed(&format!("{} --output dpo", line_of_many("dpo")));
    let lines = bench.metrics("dpo");
    let margins: Vec<f64> = lines.iter().filter_map(|line| line.get("rewards/margins")?.as_f64()).collect();
    assert!(margins[0] == 0.0 && margins[margins.len() - 1] > 0.01, "{margins:?}");
}

#[test]
fn steps_without_anything_to_learn_count_and_change_nothing() {
    let bench = bench_of_many();
    bench.succeed(&format!("{} --output run --batch-size 1", line_of_many("reward").replace("--batch-size 9", "")));
    let lines = bench.metrics("run");
    let steps: Vec<_> = lines.iter().filter(|line| line.contains_key("loss")).collect();
    let empty: Vec<_> = steps.iter().filter(|line| line["loss"].is_null()).collect();
    // 120 rows, a fifth of them to evaluate on, a third of them ties.
    assert!(steps.len() == 96 && (20..50).contains(&empty.len()), "{} {}", steps.len(), empty.len());
    assert!(empty.iter().all(|line| line["gradient_norm"] == 0.0 && line["skipped_steps"] == 0.0));
    assert!(steps.iter().all(|line| line["loss"].is_null() == line["accuracy"].is_null()));
}

#[test]
fn the_plan_of_streamed_data_says_what_is_estimated_and_what_needs_all_data_is_refused() {
    let bench = bench_of_many();
    let plan = |line: &str| String::from_utf8(bench.run(&line.replace("--quiet", "")).stderr).unwrap();
    let found = plan(&format!("{} --output reward --max-steps 1", line_of_many("reward")));
    let found = found.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "96 rows to train on, 24 to evaluate on",
        "tokens an epoch about ",
        "random in windows of 40 rows, read as they are needed",
        "40 of the first 120 prompts whose answers are one tie",
        "mean reward 0 over ",
    ] {
        assert!(found.contains(part), "expected {part:?} in {found}");
    }
    let probing = plan(&format!("{} --output probe --method probing", line_of_many("classification")));
    assert!(probing.contains("--shuffle-window is 40") && probing.contains("raise --shuffle-window"), "{probing}");
    bench.put(
        "gpt2/config.json",
        br#"{"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}"#,
    );
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        bench.put(&format!("gpt2/{name}"), &bench.bytes(&format!("start/{name}")));
    }
    let long = plan(&format!("{} --output long", line_of_many("sft").replace("--model start", "--model gpt2")));
    assert!(long.contains("--max-length is 1024, the model has 128 positions"), "{long}");
    let fits = format!("{} --output fits --max-length 128 --max-steps 1", line_of_many("sft"));
    bench.succeed(&fits.replace("--model start", "--model gpt2"));
}

#[test]
fn examples_are_shown_without_a_look_at_those_to_evaluate_on() {
    let bench = bench_of_many();
    let line = line_of_many("sft").replace("--evaluation-share 0.2", "--evaluation-data none --inspect 2");
    let line = format!("{line} --output none");
    assert!(bench.succeed(&line).contains(" red"));
}

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_rows() {
    let bench = Workbench::new();
    bench.sft("start", "model", "--max-steps 1 --quiet");
    for rows in [10_000, 200_000] {
        let texts = |first: usize| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(
                (first..first + rows).map(|row| format!("The number {row} is of the colour")),
            ))
        };
        let batch = table(vec![("prompt", texts(0)), ("completion", texts(7))]);
        write(&bench.path(&format!("{rows}.parquet")), &batch, &vec![10_000; rows / 10_000]);
    }
    let peak = |rows: usize| {
        let line =
            format!("sft --model start --data {rows}.parquet --output run-{rows} --max-steps 3 --threads 1 --quiet");
        bench.succeed(&format!("{line} --evaluation-data demonstrations.parquet"));
        number(&bench.metrics(&format!("run-{rows}"))[2], "peak_rss_mb")
    };
    let (few, many) = (peak(10_000), peak(200_000));
    assert!(many < 1.2 * few, "{few} MB for 10 thousand rows, {many} MB for 200 thousand");
}
