//! Every method at every stage: it trains, is saved, and goes on training from what was saved.

use std::path::Path;

use crate::workbench::{Workbench, number};

/// The mean of a metric over some lines of a run.
fn mean(bench: &Workbench, run: &str, name: &str, of: impl Fn(usize, usize) -> bool) -> f64 {
    let all = bench.metrics(run);
    let lines: Vec<_> = all.iter().filter(|line| line.contains_key(name)).collect();
    let chosen = lines.iter().enumerate().filter(|(index, _)| of(*index, lines.len()));
    let values: Vec<f64> = chosen.map(|(_, line)| number(line, name)).collect();
    values.iter().sum::<f64>() / values.len() as f64
}

fn first(bench: &Workbench, run: &str, name: &str) -> f64 {
    mean(bench, run, name, |index, count| index < count / 8 + 1)
}

fn last(bench: &Workbench, run: &str, name: &str) -> f64 {
    mean(bench, run, name, |index, count| index + count / 8 + 1 >= count)
}

/// Runs the three stages with a method, each from what the one before saved, and the first again from its own adapter.
fn stages(bench: &Workbench, method: &str, rate: f64, ppo_rate: f64) {
    let name = method.split(' ').next().unwrap();
    let run = |stage: &str| format!("{stage}-{}", method.replace([' ', '+', ','], "_"));
    let has_virtual_tokens = ["prompt", "p-tuning", "prefix"].iter().any(|part| method.contains(part));
    let tokens = if has_virtual_tokens { "--num-virtual-tokens 6 " } else { "" };
    let more = |rate: f64| format!("--method {method} --learning-rate {rate} {tokens}--seed 3 --quiet");
    bench.succeed(&format!(
        "sft --model base --data demonstrations.parquet --output {} --evaluation-share 0 --epochs 10 --batch-size 4 {}",
        run("sft"),
        more(rate)
    ));
    let (start, end) = (first(bench, &run("sft"), "loss"), last(bench, &run("sft"), "loss"));
    assert!(end < start, "{method}, sft: the loss went from {start} to {end}");

    bench.succeed(&format!(
        "sft --model {} --data demonstrations.parquet --output {} --evaluation-share 0 --epochs 4 --batch-size 4 {} {}",
        run("sft"),
        run("again"),
        more(0.3 * rate),
        if name == "full" { "" } else { "--resume-optimizer" }
    ));
    assert!(name == "full" || bench.path(&run("sft")).join("optimizer.safetensors").is_file());
    let resumed = first(bench, &run("again"), "loss");
    assert!(resumed < 0.5 * (start + end), "{method}, sft again: starts at {resumed}, had come from {start} to {end}");
    let tensors = |run: &str| -> Vec<String> {
        let files = ["adapter_model.safetensors", "adapter.safetensors", "adapters.json", "model.safetensors"];
        files.into_iter().filter(|file| bench.path(run).join(file).is_file()).map(String::from).collect()
    };
    assert_eq!(tensors(&run("sft")), tensors(&run("again")), "{method}: the form of what is saved");
    assert!(name == "full" || !tensors(&run("sft")).contains(&"model.safetensors".to_string()));

    bench.succeed(&format!(
        "reward --model {} --data rankings.parquet --output {} --evaluation-share 0 --epochs 12 --batch-size 4 {}",
        run("sft"),
        run("reward"),
        more(rate)
    ));
    let (start, end) = (first(bench, &run("reward"), "loss"), last(bench, &run("reward"), "loss"));
    assert!(end < start, "{method}, reward: the loss went from {start} to {end}");

    bench.succeed(&format!(
        "ppo --model {} --reward-model {} --data prompts --output {} --batch-size 60 --epochs 200 --minibatches 2 --ppo-epochs 4 \
         --response-length 6 --max-length 64 --kl-coefficient 0 --missing-eos-penalty 0 --max-steps 20 {}",
        run("sft"),
        run("reward"),
        run("ppo"),
        more(ppo_rate)
    ));
    let (start, end) = (first(bench, &run("ppo"), "objective/scores"), last(bench, &run("ppo"), "objective/scores"));
    assert!(end > start, "{method}, ppo: the score went from {start} to {end}");
    // What came out answers.
    bench.succeed(&format!(
        "sample --model {} --data prompts.parquet --output {}.parquet --response-length 4 --quiet",
        run("ppo"),
        run("answers")
    ));
    assert!(Path::new(&bench.path(&format!("{}.parquet", run("answers")))).is_file());
}

/// A base model that knows all answers, and not which are good.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    bench.succeed(
        "sft --model model --data mixed.parquet --output base --evaluation-share 0 --epochs 30 --batch-size 12 \
         --learning-rate 3e-3 --quiet",
    );
    // Each prompt several times, so that a rollout's mean is not all noise.
    (0..5).for_each(|copy| bench.put(&format!("prompts/{copy}.parquet"), &bench.bytes("prompts.parquet")));
    bench
}

/// Methods with the learning rates that suit a model of this size: of sft and reward, and of ppo.
const METHODS: [(&str, f64, f64); 15] = [
    ("full", 1e-3, 3e-4),
    ("probing", 1e-2, 3e-3),
    ("bitfit", 1e-2, 3e-3),
    ("lora", 1e-2, 5e-3),
    ("prompt-tuning", 3e-2, 5e-2),
    ("p-tuning", 3e-3, 1e-2),
    ("p-tuning --encoder-reparameterization-type lstm", 1e-2, 2e-2),
    ("prefix-tuning", 3e-2, 1e-1),
    ("prefix-tuning --prefix-projection", 1e-2, 2e-2),
    ("p-tuning-v2", 3e-2, 1e-1),
    ("adapters", 5e-3, 2e-3),
    ("adapters --adapter-placement pfeiffer", 5e-3, 2e-3),
    ("adapters --adapter-placement parallel", 5e-3, 2e-3),
    ("ia3", 5e-2, 1e-2),
    ("lora --use-dora --target-modules all-linear", 1e-2, 3e-3),
];

const STACKS: [(&str, f64, f64); 4] = [
    ("lora+prompt-tuning", 1e-2, 3e-3),
    ("bitfit+prefix-tuning", 1e-2, 3e-3),
    ("adapters+ia3", 5e-3, 2e-3),
    ("lora+probing", 5e-3, 2e-3),
];

#[test]
fn every_method_trains_at_every_stage_and_goes_on_from_what_was_saved() {
    let bench = workbench();
    METHODS.iter().for_each(|(method, rate, ppo_rate)| stages(&bench, method, *rate, *ppo_rate));
}

#[test]
fn methods_on_top_of_each_other_train_at_every_stage_too() {
    let bench = workbench();
    STACKS.iter().for_each(|(method, rate, ppo_rate)| stages(&bench, method, *rate, *ppo_rate));
}
