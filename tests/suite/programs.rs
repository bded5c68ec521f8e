//! The programs themselves, run as users run them: in order, again, and on input that cannot be used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int64Array};
use rlhf::data::{parquet, table};
use serde_json::Value;

use crate::common::{lists, strings, table};
use crate::workbench::{CONFIG, Workbench, number};

/// A model with learned positions, fewer than any example has tokens.
const SHORT: &str =
    r#"{"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8}"#;

/// Every file of a run except those that tell the time, by its path in the run's folder.
fn files_of(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![run.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            assert!(!name.starts_with('.'), "{} is left over", path.display());
            if path.is_dir() {
                // A checkpoint holds times.
                if name != "checkpoints" {
                    folders.push(path);
                }
            } else if name != "metrics.jsonl" && name != "settings.toml" && !name.starts_with("events.") {
                files.insert(path.strip_prefix(run).unwrap().to_path_buf(), std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The stages in order with one method, once with one thread and small batches in memory, once with two threads.
fn stages_in_order(method: &str, tensors: &str) -> Workbench {
    let bench = Workbench::new();
    // An adapter stands on a model that has weights and a tokenizer.
    let base = "base";
    bench.succeed(&format!(
        "sft --model model --data demonstrations.parquet --output {base} --max-steps 1 --learning-rate 0"
    ));
    for threads in [1, 2] {
        let more = format!("--method {method} --threads {threads} --seed 5");
        let run = |stage: &str| format!("{stage}-{threads}");
        bench.sft(&run("sft"), base, &more);
        // The paths are the same in both, as an adapter's folder names its base.
        bench.reward(&run("reward"), "sft-1", &more);
        bench.ppo(&run("ppo"), "sft-1", "reward-1", &more);
    }
    for stage in ["sft", "reward", "ppo"] {
        let [one, two] = [1, 2].map(|threads| files_of(&bench.path(&format!("{stage}-{threads}"))));
        assert!(one.contains_key(Path::new(tensors)) && one.contains_key(Path::new("last/checkpoint.json")));
        assert!(one == two, "{method}, {stage}: another number of threads, another model");
    }
    bench
}

fn check_metrics(bench: &Workbench) {
    for run in ["sft-1", "reward-1", "ppo-1"] {
        let all = bench.metrics(run);
        let steps: Vec<_> = all.iter().filter(|line| line.contains_key("loss")).collect();
        for name in ["step", "loss", "tokens_per_second", "seconds", "peak_rss_mb"] {
            steps.iter().for_each(|line| assert!(number(line, name).is_finite()));
        }
        if run != "ppo-1" {
            let (first, last) = (number(steps[0], "loss"), number(steps[steps.len() - 1], "loss"));
            assert!(last < 0.8 * first, "{run}: the loss went from {first} to {last}");
        }
    }
    let evaluation: Value = serde_json::from_slice(&bench.bytes("reward-1/evaluation.json")).unwrap();
    assert_eq!(evaluation["pairs"], 6);
    assert_eq!(evaluation["accuracy_by_rank_distance"]["2"]["pairs"], 2);
    assert!(evaluation["accuracy"].as_f64() > evaluation["accuracy_longer_wins"].as_f64());

    let ppo = bench.metrics("ppo-1");
    assert_eq!(ppo.len(), 4);
    assert_eq!(number(&ppo[0], "objective/kl"), 0.0, "before the first update the policy is the reference");
    for line in &ppo {
        let ratio = number(line, "val/first_ratio");
        assert!((ratio - 1.0).abs() < 1e-6, "the first minibatch of an update is learned from with ratio {ratio}");
        for name in ["objective/scores", "objective/entropy", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"]
            .into_iter()
            .chain(["loss/policy_avg", "loss/value_avg", "val/num_eos_tokens"])
        {
            assert!(number(line, name).is_finite());
        }
    }
    assert!(number(&ppo[3], "objective/kl") != 0.0, "the policy moved");
}

#[test]
fn the_stages_run_in_order_with_full_weights_and_threads_do_not_matter() {
    let bench = stages_in_order("full", "model.safetensors");
    check_metrics(&bench);

    bench.succeed(
        "sample --model ppo-1 --data prompts.parquet --output answers.parquet --answers 3 --response-length 8",
    );
    bench.succeed("score --model reward-1 --data answers.parquet --output scored.parquet");
    bench.succeed("score --model reward-1 --data answers.parquet --output best.parquet --add-eos --best");
    bench.succeed(
        "evaluate --answers answers.parquet --reward-model reward-1 --hallucination-scorer grounding --output report",
    );
    let report: Value = serde_json::from_slice(&bench.bytes("report/evaluation.json")).unwrap();
    assert!(report["models"]["answers"]["mean_reward"]["value"].is_f64(), "{report}");
    for (file, columns) in [
        ("scored.parquet", &["prompt", "responses", "ended", "log_prob", "tokens", "reward"][..]),
        ("best.parquet", &["prompt", "completion", "ended", "log_prob", "tokens", "reward"]),
    ] {
        let scored = table::TableRows::open(&bench.path(file).display().to_string()).unwrap();
        assert_eq!(scored.rows(), 12);
        let found: Vec<String> = scored.schemas()[0].1.fields().iter().map(|field| field.name().clone()).collect();
        assert_eq!(found, columns);
    }
    // The best of several are read as they were scored: with their end where they ended.
    bench.succeed("evaluate --answers best.parquet --reward-model reward-1 --output best");
    let report: Value = serde_json::from_slice(&bench.bytes("best/evaluation.json")).unwrap();
    let best = table::TableRows::open(&bench.path("best.parquet").display().to_string()).unwrap();
    let rewards =
        best.map(|rows| rows.unwrap().floats("reward").unwrap().iter().flatten().sum::<f64>()).sum::<f64>() / 12.0;
    let found = report["models"]["best"]["mean_reward"]["value"].as_f64().unwrap();
    assert!((found - rewards).abs() < 1e-4, "{found} is not {rewards}");

    // The record of a run reproduces it.
    bench.succeed("sft --settings sft-1/settings.toml --output again");
    assert!(files_of(&bench.path("again")) == files_of(&bench.path("sft-1")));
    // A run may be repeated in its folder; its curves are then the new run's.
    let before = bench.metrics("again").len();
    bench.succeed("sft --settings sft-1/settings.toml --output again");
    assert_eq!(bench.metrics("again").len(), before);
}

#[test]
fn the_stages_run_in_order_with_lora_and_threads_do_not_matter() {
    let bench = stages_in_order("lora --target-modules all-linear --lora-alpha 16", "adapter_model.safetensors");
    check_metrics(&bench);
    assert!(!bench.path("ppo-1/model.safetensors").exists());
    // An adapter's own folder names its base; the base may be named apart, too.
    let sample = "sample --data prompts.parquet --response-length 8 --output";
    bench.succeed(&format!("{sample} one.parquet --model sft-1"));
    bench.succeed(&format!("{sample} two.parquet --model base --adapter sft-1"));
    assert!(bench.bytes("one.parquet") == bench.bytes("two.parquet"));
}

#[test]
fn inspection_prints_tokens_with_their_loss_and_trains_nothing() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    let printed = bench.succeed("sft --model sft --data demonstrations.parquet --output none --inspect 2");
    assert_eq!(
        printed.lines().filter(|line| line.contains(" yes ") && line.ends_with("\"</s>\"")).count(),
        2,
        "{printed}"
    );
    let printed = bench.succeed("reward --model sft --data rankings.parquet --output none --inspect 1");
    assert!(printed.contains(" green") || printed.contains("red"), "{printed}");
    bench.reward("reward", "sft", "--max-steps 1");
    let ppo = "ppo --model sft --reward-model reward --data prompts.parquet --output none --inspect 1";
    assert!(bench.succeed(ppo).lines().any(|line| line.ends_with("\" the\"") && line.contains(" no ")));
    assert!(!bench.path("none").exists());
}

/// Runs the line, expects exit code 2 and one sentence with all of these parts, and that there is no `out`.
fn refused(bench: &Workbench, line: &str, parts: &[&str]) {
    let output = bench.run(&format!("{line} --output out --quiet"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{line}\n{error}");
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "{line}\n{error}");
    parts.iter().for_each(|part| assert!(error.contains(part), "{line}\nexpected {part:?} in {error}"));
    assert!(!bench.path("out").exists(), "{line}: something is left");
}

#[test]
fn a_run_whose_numbers_go_bad_names_them_and_ends_with_the_models_that_it_had() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    let line = "sft --model sft --data demonstrations.parquet --output out --quiet --batch-size 1 --evaluate-every 1 --epochs 100";
    let output =
        bench.run(&format!("{line} --learning-rate 1e30 --warmup-steps 0 --max-gradient-norm 0 --max-skipped-steps 3"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{error}");
    let parts = ["error: the gradients of 3 steps in a row are not finite", "that of \"", "--learning-rate"];
    parts.iter().for_each(|part| assert!(error.contains(part), "expected {part:?} in {error}"));
    let warnings = String::from_utf8(bench.bytes("out/warnings.txt")).unwrap();
    assert_eq!(warnings.lines().count(), 2, "{warnings}");
    assert!(warnings.lines().all(|line| line.contains(" changed nothing: of its gradients that of \"")), "{warnings}");
    let named = |text: &str| text.contains(" demonstrations.parquet row ") && text.contains(" (counted from 0)");
    assert!(warnings.lines().all(named) && named(&error) && error.contains("out/warnings.txt"), "{warnings}{error}");
    assert!(bench.path("out/last/model.safetensors").exists());
}

#[test]
fn ppo_names_the_prompts_of_an_update_with_skipped_steps() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    bench.reward("reward", "sft", "--max-steps 1");
    bench.succeed(
        "ppo --model sft --reward-model reward --data prompts.parquet --output ppo --batch-size 6 --minibatches 2 --response-length 8 --max-length 64 \
         --max-steps 1 --learning-rate 1e30 --warmup-steps 0 --max-gradient-norm 0 --max-skipped-steps 50 --quiet",
    );
    let warnings = String::from_utf8(bench.bytes("ppo/warnings.txt")).unwrap();
    let line = warnings.lines().find(|line| line.contains("optimizer steps changed nothing")).unwrap();
    assert!(line.starts_with("update 1: ") && line.contains(" gradients that of \""), "{line}");
    assert!(line.contains("its prompts: prompts.parquet rows ") && line.matches(", ").count() >= 5, "{line}");
}

#[test]
fn a_folder_in_use_is_left_to_the_run_that_writes_to_it() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    let again = "sft --model model --data demonstrations.parquet --output sft --max-steps 2 --quiet";
    let curve = bench.bytes("sft/metrics.jsonl");
    let lock = rlhf::files::FolderLock::take(&bench.path("sft")).unwrap();
    let output = bench.run(again);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.starts_with("error: --output sft: another run writes to this folder, suite"), "{error}");
    assert_eq!(bench.bytes("sft/metrics.jsonl"), curve);
    drop(lock);
    bench.succeed(again);
    assert_ne!(bench.bytes("sft/metrics.jsonl"), curve);
}

#[test]
fn unusable_data_is_one_sentence_and_leaves_nothing() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    bench.reward("reward", "sft", "--max-steps 1");
    let file = |name: &str, columns: Vec<(&str, ArrayRef)>| parquet::write(bench.path(name), &table(columns)).unwrap();
    let pair = |items: ArrayRef| lists(items, &[2]);
    let numbers = |numbers: &[f32]| -> ArrayRef { Arc::new(Float32Array::from(numbers.to_vec())) };
    let (prompt, responses) = (|| ("prompt", strings(&["p"])), || ("responses", pair(strings(&["x", "y"]))));
    file("no-completion.parquet", vec![prompt()]);
    file("number.parquet", vec![prompt(), ("completion", numbers(&[1.0]))]);
    file("empty-completion.parquet", vec![("text", strings(&[""]))]);
    file("ranks.parquet", vec![prompt(), responses(), ("ranks", lists(Arc::new(Int64Array::from(vec![0])), &[1]))]);
    file("nan.parquet", vec![prompt(), responses(), ("scores", pair(numbers(&[f32::NAN, 1.0])))]);
    file("tie.parquet", vec![prompt(), responses(), ("scores", pair(numbers(&[1.0, 1.0])))]);
    bench.put("empty.parquet", b"");
    let whole = bench.bytes("demonstrations.parquet");
    bench.put("truncated.parquet", &whole[..whole.len() / 2]);

    let sft = |data: &str| format!("sft --model sft --data {data}");
    refused(&bench, &sft("absent.parquet"), &["absent.parquet: there is no such file"]);
    refused(&bench, &sft("no-completion.parquet"), &["no-completion.parquet", "`completion`"]);
    refused(&bench, &sft("number.parquet"), &["number.parquet", "`completion`", "expected strings"]);
    refused(&bench, &sft("empty.parquet"), &["empty.parquet", "empty (0 bytes)"]);
    refused(&bench, &sft("truncated.parquet"), &["truncated.parquet", "truncated"]);
    refused(&bench, &sft("demonstrations.parquet --max-length 1"), &["demonstrations.parquet", "--max-length"]);
    let evaluated = "demonstrations.parquet --evaluation-data empty.parquet";
    refused(&bench, &sft(evaluated), &["empty.parquet", "empty (0 bytes)"]);

    let reward = |data: &str| format!("reward --model sft --data {data}");
    refused(&bench, &reward("ranks.parquet"), &["ranks.parquet", "`ranks`", "has 1 items, but `responses` has 2"]);
    refused(&bench, &reward("nan.parquet"), &["nan.parquet", "`scores`", "no finite number"]);
    refused(&bench, &reward("tie.parquet"), &["tie.parquet", "no ranking is left", "1 were one tie"]);
    let demonstrated = "rankings.parquet --demonstrations empty.parquet";
    refused(&bench, &reward(demonstrated), &["empty.parquet", "empty (0 bytes)"]);

    let ppo = "ppo --model sft --reward-model reward --data";
    refused(&bench, &format!("{ppo} empty.parquet"), &["empty.parquet", "empty (0 bytes)"]);
    refused(&bench, &format!("{ppo} prompts.parquet --max-length 53"), &["--max-length 53", "--response-length 53"]);
    let classifier = ["reward: tensor \"lm_head.weight\" is missing", "classifier"];
    refused(&bench, "sample --model reward --data prompts.parquet", &classifier);
    refused(&bench, "sft --model reward --data demonstrations.parquet", &classifier);
    refused(&bench, "sample --model sft --data empty.parquet", &["empty.parquet", "empty (0 bytes)"]);
    refused(&bench, "score --model sft --data prompts.parquet", &["prompts.parquet", "`completion`"]);
    refused(&bench, "evaluate --models base=sft other=nothing --data prompts.parquet", &["nothing"]);
    refused(&bench, "evaluate --votes prompts.parquet --data prompts.parquet", &["--data prompts.parquet", "--models"]);
    refused(&bench, "evaluate --answers prompts.parquet", &["prompts.parquet", "`response`"]);
    let toxicity = "evaluate --models base=sft --toxicity-prompts prompts.parquet";
    refused(&bench, toxicity, &["data/toxicity", "project's folder", "--toxicity-scorer"]);
}

#[test]
fn an_unusable_model_is_one_sentence_and_leaves_nothing() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    bench.sft("adapter", "sft", "--method lora --max-steps 1");
    let copy = |name: &str, config: &str| {
        for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            bench.put(&format!("{name}/{file}"), &bench.bytes(&format!("sft/{file}")));
        }
        bench.put(&format!("{name}/config.json"), config.as_bytes());
    };
    copy("t5", &CONFIG.replace("llama", "t5"));
    copy("wider", &CONFIG.replace(r#""hidden_size": 32"#, r#""hidden_size": 64"#));
    copy("deeper", &CONFIG.replace(r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 3"#));
    copy("half", CONFIG);
    let tensors = bench.bytes("sft/model.safetensors");
    bench.put("half/model.safetensors", &tensors[..tensors.len() / 2]);
    bench.put("small/config.json", CONFIG.replace("300", "260").as_bytes());
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        bench.put(&format!("small/{file}"), &bench.bytes(&format!("sft/{file}")));
    }
    std::fs::create_dir(bench.path("nothing")).unwrap();
    // A model with another width, to which the adapter does not belong.
    bench.put("model64/config.json", CONFIG.replace(r#""hidden_size": 32"#, r#""hidden_size": 64"#).as_bytes());
    bench.sft("other", "model64", "--max-steps 1");

    let sft = |model: &str| format!("sft --data demonstrations.parquet --model {model}");
    refused(&bench, &sft("absent"), &["absent: no such folder"]);
    refused(&bench, &sft("nothing"), &["nothing", "config.json"]);
    refused(&bench, &sft("t5"), &["t5/config.json", "\"t5\"", "llama"]);
    refused(
        &bench,
        &sft("wider"),
        &["wider/model.safetensors", "\"model.embed_tokens.weight\"", "[300, 32]", "[300, 64]"],
    );
    refused(&bench, &sft("deeper"), &["deeper", "\"model.layers.2.", "is missing"]);
    refused(&bench, &sft("half"), &["half/model.safetensors"]);
    refused(&bench, &sft("small"), &["tokenizer", "260"]);
    refused(&bench, &sft("other --adapter adapter"), &["adapter: this adapter was trained on other weights", "other"]);
    std::fs::remove_file(bench.path("adapter/base_model.json")).unwrap();
    refused(&bench, &sft("other --adapter adapter"), &["adapter/adapter_model.safetensors", "another base model"]);
    refused(&bench, &sft("sft --adapter other"), &["other: no adapter_config.json"]);
    bench.put("short/config.json", SHORT.as_bytes());
    refused(&bench, &sft("short"), &["longer than the 8 positions", "--max-length"]);
    let ppo = "ppo --model sft --data prompts.parquet --reward-model";
    refused(&bench, &format!("{ppo} sft"), &["sft: tensor \"score.weight\" is missing", "no reward model"]);
    let sample = |model: &str| format!("sample --model {model} --data prompts.parquet");
    refused(&bench, &sample("small"), &["small: there are no weights next to config.json"]);
    // A tokenizer with more tokens than the model has rows matters where a text holds such a token.
    bench.put("few/config.json", CONFIG.replace("300", "260").as_bytes());
    bench.sft("fewer", "few", "--max-steps 1");
    bench.put("fewer/tokenizer.json", &bench.bytes("sft/tokenizer.json"));
    let token = ["prompts.parquet: row 0", "fewer/tokenizer.json: the text holds the token", "embedding of 260 rows"];
    refused(&bench, &sample("fewer"), &token);
}

#[test]
fn a_folder_that_is_no_runs_is_left_alone() {
    let bench = Workbench::new();
    bench.put("mine/notes.txt", b"mine");
    let output = bench.run("sft --model model --data demonstrations.parquet --output mine --quiet");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && error.contains("mine: the folder is not empty"), "{error}");
    assert_eq!(std::fs::read_dir(bench.path("mine")).unwrap().count(), 1);
}

#[test]
fn every_program_explains_its_flags_with_their_defaults() {
    let bench = Workbench::new();
    for program in ["sft", "reward", "ppo", "sample", "score", "evaluate"] {
        let help = bench.succeed(&format!("{program} --help"));
        for flag in ["--output", "--seed", "--threads", "--max-length", "--tokens-per-batch", "--settings"] {
            assert!(help.contains(flag), "{program}: no {flag}");
        }
        assert!(help.contains("[default: 0]") && help.contains("--output <F"), "{program}");
        assert!(
            help.contains(&format!("Usage: {program} [OPTIONS] --")),
            "{program}: what is required is not in the usage"
        );
    }
}
