//! A key-value cache in bf16: answers are nearly those of one in f32 and the same on any number of threads,
//! and a run keeps to its cache.

use arrow::array::{ArrayRef, AsArray};
use rlhf::data::parquet;
use rlhf::data::table::TableRows;

use crate::common::{strings, table};
use crate::survival;
use crate::workbench::Workbench;

/// The model that ships with the project.
const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/base");

/// A column of a file, all of whose rows are read together.
fn column(path: &str, name: &str) -> ArrayRef {
    TableRows::open(path).unwrap().next().unwrap().unwrap().batch.column_by_name(name).unwrap().clone()
}

/// Every fifth of the embedded world's prompts to evaluate on.
fn write_prompts(bench: &Workbench) -> usize {
    let all = column(concat!(env!("CARGO_MANIFEST_DIR"), "/data/evaluation.parquet"), "prompt");
    let prompts: Vec<&str> = all.as_string_view().iter().flatten().step_by(5).collect();
    parquet::write(bench.path("world.parquet"), &table(vec![("prompt", strings(&prompts))])).unwrap();
    prompts.len()
}

#[test]
fn greedy_answers_with_a_cache_in_bf16_are_mostly_those_with_one_in_f32() {
    let bench = Workbench::new();
    let prompts = write_prompts(&bench);
    let sample = |output: &str, more: &str| {
        let line = format!("sample --model {BASE} --data world.parquet --temperature 0 --output {output} {more}");
        let done = bench.run(&line);
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(done.status.success(), "{said}");
        let responses = column(bench.path(output).to_str().unwrap(), "responses");
        let answers = responses.as_list::<i32>().iter().map(|answers| {
            answers.unwrap().as_string_view().iter().map(|answer| answer.unwrap().to_string()).collect::<String>()
        });
        (said, answers.collect::<Vec<String>>())
    };
    let (said, in_f32) = sample("f32.parquet", "");
    assert!(said.contains("of at most 32,768 tokens at a time in f32, "), "{said}");
    let (said, in_bf16) = sample("bf16-1.parquet", "--cache-precision bf16 --threads 1");
    assert!(said.contains("of at most 32,768 tokens at a time in bf16, "), "{said}");
    for threads in [2, 3] {
        let output = format!("bf16-{threads}.parquet");
        sample(&output, &format!("--cache-precision bf16 --threads {threads}"));
        assert!(bench.bytes(&output) == bench.bytes("bf16-1.parquet"), "{threads} threads give other answers than one");
    }
    assert_eq!((in_f32.len(), in_bf16.len()), (prompts, prompts));
    let same = in_f32.iter().zip(&in_bf16).filter(|(one, other)| one == other).count();
    println!("{same} of {prompts} greedy answers are the same");
    assert!(4 * same >= 3 * prompts, "{same} of {prompts} greedy answers are the same");
}

#[test]
fn ppo_names_its_cache_and_keeps_to_it() {
    let bench = survival::bench();
    let line = "ppo --model start --reward-model judge --data prompts.parquet --batch-size 6 --minibatches 2 --response-length 8 --max-length 64 \
                --checkpoint-every 1 --output run";
    let said = |more: &str| {
        let done = bench.run(&format!("{line} {more}"));
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let (code, plan) = said("--cache-precision bf16 --max-steps 1");
    assert_eq!(code, Some(0), "{plan}");
    assert!(plan.contains("keys and values") && plan.contains(" tokens at a time in bf16, "), "{plan}");
    let settings = String::from_utf8(bench.bytes("run/settings.toml")).unwrap();
    assert!(settings.contains("cache_precision = \"bf16\""), "{settings}");
    let (code, fault) = said("--max-steps 2 --resume");
    assert_eq!(code, Some(2), "{fault}");
    assert!(fault.contains("--cache-precision: was \"bf16\" when the run began, now it is \"f32\""), "{fault}");
    let (code, resumed) = said("--cache-precision bf16 --max-steps 2 --resume");
    assert_eq!(code, Some(0), "{resumed}");
    // The sampler's probabilities are those of rounded keys and values, the policy's of exact ones.
    let differences = bench.metrics("run");
    let difference = differences.iter().filter_map(|line| line.get("val/sampler_difference")?.as_f64()).next();
    let difference = difference.expect("the first update's");
    assert!(difference > 1e-4 && difference < 0.2, "{difference}");
}
