//! Runs that are killed, stopped and gone on with end in the bytes of one that was left alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rand::Rng;
use rlhf::random::{Stream, stream};
use rlhf::train::checkpoint::Checkpoints;
use serde_json::Value;

use crate::workbench::Workbench;

/// How often each run is killed; `RLHF_KILLS` sets another number, for the long form (`benches/survival.py`).
fn kills() -> usize {
    std::env::var("RLHF_KILLS").map_or(3, |kills| kills.parse().unwrap())
}

/// A workbench with a model to start from and a reward model.
pub fn bench() -> Workbench {
    let bench = Workbench::new();
    bench.sft("start", "model", "--max-steps 4 --quiet");
    bench.reward("judge", "start", "--max-steps 4 --quiet");
    bench
}

/// Each stage, many steps of it, with a checkpoint after each.
pub fn line(stage: &str) -> String {
    let stage = match stage {
        "sft" => {
            "sft --model start --data demonstrations.parquet --evaluation-share 0.2 --epochs 12 --batch-size 4 --learning-rate 3e-3"
        }
        "reward" => {
            "reward --model start --data rankings.parquet --demonstrations demonstrations.parquet --normalize-first --evaluation-share 0.2 --epochs 12 --batch-size 4 --learning-rate 3e-3"
        }
        "ppo" => {
            "ppo --model start --reward-model judge --data prompts.parquet --batch-size 6 --minibatches 2 --epochs 6 --response-length 8 --max-length 64 \
             --learning-rate 1e-3 --kl-controller adaptive --ema-decay 0.9 --ptx-data demonstrations.parquet --ptx-ratio 1 \
             --sample-every 2 --policy-every 2"
        }
        _ => panic!("no stage {stage}"),
    };
    format!("{stage} --checkpoint-every 1 --quiet")
}

/// The files of a run that have to be the same: models and settings, without what tells the time.
fn models(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(run.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let (path, name) = (folder.join(entry.file_name()), entry.file_name().into_string().unwrap());
            assert!(!rlhf::files::is_temporary(Path::new(&name)), "{name} was left behind");
            if entry.path().is_dir() {
                // A checkpoint holds times.
                if name != "checkpoints" {
                    folders.push(path);
                }
            } else if !(name == "settings.toml" || name == "metrics.jsonl" || name.contains("tfevents")) {
                found.insert(path, std::fs::read(entry.path()).unwrap());
            }
        }
    }
    found
}

/// The metrics of a run without what tells the time or the memory.
fn curves(bench: &Workbench, run: &str) -> Vec<BTreeMap<String, Value>> {
    let mut lines = bench.metrics(run);
    for line in &mut lines {
        let is_time = |name: &str| name.starts_with("seconds") || name == "tokens_per_second";
        line.retain(|name, _| !is_time(name) && name != "peak_rss_mb");
    }
    lines
}

/// The steps of a run's TensorBoard events, record by record: a length, its checksum, the message, its checksum.
fn events(run: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = names.filter(|path| path.to_str().unwrap().contains("tfevents")).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let (bytes, mut at, mut steps) = (std::fs::read(&files[0]).unwrap(), 0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let message = &bytes[at + 12..at + 12 + length];
        // A double for the time (tag 1), then the step (tag 2), which is one byte as all are below 128; the first record has none.
        assert_eq!(message[0], 0x09);
        steps.push(if message[9] == 0x10 { u64::from(message[10]) } else { 0 });
        at += 16 + length;
    }
    steps
}

#[track_caller]
pub fn assert_same(bench: &Workbench, one: &str, other: &str) {
    let (left, right) = (models(&bench.path(one)), models(&bench.path(other)));
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right), "{one} and {other}");
    for (name, bytes) in &left {
        assert!(bytes == &right[name], "{} differs between {one} and {other}", name.display());
    }
    assert_eq!(curves(bench, one), curves(bench, other), "{one} and {other}");
    assert_eq!(events(&bench.path(one)), events(&bench.path(other)), "{one} and {other}");
}

/// Waits for so long at most.
fn wait(child: &mut std::process::Child, limit: Duration) -> Option<ExitStatus> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    None
}

/// Lets a run go on again and again, killing it `kills` times at random instants, until it is over.
fn kill_often(bench: &Workbench, line: &str, run: &str, longest: Duration, kills: usize, random: &mut Stream) {
    let command = format!("{line} --output {run} --resume");
    let mut killed = 0;
    while killed < kills {
        let mut child = bench.command(&command).stderr(Stdio::piped()).spawn().unwrap();
        match wait(&mut child, longest.mul_f64(random.random_range(0.0..1.0))) {
            Some(status) => {
                assert!(status.success(), "{command}: {:?}", child.wait_with_output().unwrap());
                // It was faster than the hand that was to kill it, and is over: begin again.
                std::fs::remove_dir_all(bench.path(run)).unwrap();
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                killed += 1;
            }
        }
    }
    bench.succeed(&command);
}

fn survives(stage: &str) {
    let bench = bench();
    let mut random = stream(0, stage, 0);
    let mut cases: Vec<(&str, &str)> = vec![("full", ""), ("lora", ""), ("prefix-tuning", ""), ("adapters", "")];
    cases.extend([("full", "--precision bf16"), ("lora", "--precision bf16")]);
    if stage == "ppo" {
        cases.push(("prefix-tuning", "--cache-precision bf16"));
    }
    for (number, (method, flags)) in cases.into_iter().enumerate() {
        for threads in [1, 2] {
            let line = format!("{} --method {method} {flags} --threads {threads}", line(stage));
            let [whole, killed] = ["whole", "killed"].map(|name| format!("{name}-{number}-{threads}"));
            let started = Instant::now();
            bench.succeed(&format!("{line} --output {whole}"));
            kill_often(&bench, &line, &killed, started.elapsed(), kills(), &mut random);
            assert_same(&bench, &whole, &killed);
        }
        // And whatever the number of threads.
        assert_same(&bench, &format!("whole-{number}-1"), &format!("killed-{number}-2"));
    }
}

#[test]
fn sft_survives_being_killed() {
    survives("sft");
}

#[test]
fn reward_survives_being_killed() {
    survives("reward");
}

#[test]
fn ppo_survives_being_killed() {
    survives("ppo");
}

/// Sends a signal by its name.
fn send(child: &std::process::Child, signal: &str) {
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
}

/// Starts a run, waits until it has done a step and a little longer, and sends it a signal.
fn stop(bench: &Workbench, line: &str, run: &str, signal: &str, later: Duration) -> std::process::Output {
    let length = || std::fs::metadata(bench.path(run).join("metrics.jsonl")).map_or(0, |file| file.len());
    let before = length();
    let child = bench.command(line).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while length() <= before && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(later);
    send(&child, signal);
    child.wait_with_output().unwrap()
}

/// Lets a run go on again and again, sending it a signal at random instants of a step, until `is_enough` of the states at
/// which it stopped, then to its end; it has to end as one that was left alone.
fn stop_often(
    bench: &Workbench,
    line: &str,
    name: &str,
    signal: &str,
    random: &mut Stream,
    mut is_enough: impl FnMut(&str) -> bool,
) {
    let [whole, stopped] = ["whole", "stopped"].map(|run| format!("{run}-{name}-{signal}"));
    let started = Instant::now();
    bench.succeed(&format!("{line} --output {whole}"));
    // Signals come at any time of a step, however long it takes on this machine.
    let step = started.elapsed() / bench.metrics(&whole).len() as u32;
    let command = format!("{line} --output {stopped} --resume");
    let mut stops = 0;
    for signals in 1.. {
        assert!(signals < 200, "{name}: {stops} stops, none of them as it should be");
        let output = stop(bench, &command, &stopped, signal, step.mul_f64(random.random_range(0.0..1.0)));
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            // It was faster than the hand that was to stop it, and is over: begin again.
            Some(0) => {
                assert_same(bench, &whole, &stopped);
                std::fs::remove_dir_all(bench.path(&stopped)).unwrap();
                continue;
            }
            Some(3) => stops += 1,
            other => panic!("{name}, {signal}: {other:?}: {said}"),
        }
        assert!(said.starts_with(&format!("error: stopped by SIG{signal} after step ")), "{said}");
        assert!(said.contains("--resume goes on from there") && said.lines().count() == 1, "{said}");
        let newest = Checkpoints::of(&bench.path(&stopped), 2).newest().unwrap().0.unwrap();
        if is_enough(&std::fs::read_to_string(newest.folder.join("state.toml")).unwrap()) && stops >= 4 {
            bench.succeed(&command);
            break;
        }
    }
    assert_same(bench, &whole, &stopped);
}

/// The line of a stage without checkpoints that are due by themselves, and long enough for signals.
fn line_without_checkpoints(stage: &str) -> String {
    line(stage)
        .replace("--epochs 12", "")
        .replace("--epochs 6", "")
        .replace("--checkpoint-every 1", "--checkpoint-every 60min --epochs 20")
}

#[test]
fn a_signal_stops_a_run_at_a_checkpoint_with_a_code_of_its_own() {
    let bench = bench();
    let mut random = stream(0, "signals", 0);
    for (stage, signal) in [("sft", "INT"), ("reward", "TERM"), ("ppo", "INT"), ("ppo", "TERM")] {
        let line = line_without_checkpoints(stage)
            .replace("--minibatches 2", "--minibatches 1 --ppo-epochs 1")
            .replace("--response-length 8", "--response-length 40");
        let mut within_rollouts = 0;
        stop_often(&bench, &line, stage, signal, &mut random, |state| {
            // One of them while answers were sampled, which is most of a step with one pass over few of them: those
            // are kept.
            within_rollouts += usize::from(state.contains("log_probs"));
            stage != "ppo" || within_rollouts > 0
        });
    }
}

#[test]
fn a_signal_ends_an_evaluation_in_the_middle_and_the_run_goes_on_with_it() {
    let bench = bench();
    let mut random = stream(0, "signals in evaluations", 0);
    // Most of the time goes into evaluations, of many passes each.
    let more = [
        ("sft", "--evaluation-share 0.2", "--evaluation-data many --evaluate-every 1"),
        ("reward", "--evaluation-share 0.2", "--evaluation-data many-ranked --evaluate-every 1"),
        (
            "ppo",
            "--policy-every 2",
            "--policy-every 2 --evaluation-data many-prompts --judge-model judge --evaluate-every 1 --max-steps 12",
        ),
    ];
    copies(&bench, "demonstrations.parquet", "many", 12);
    copies(&bench, "rankings.parquet", "many-ranked", 12);
    copies(&bench, "prompts.parquet", "many-prompts", 2);
    for (stage, before, after) in more {
        let line = line_without_checkpoints(stage).replace(before, after);
        let line = line.replace("--batch-size 4", "--batch-size 2 --max-steps 12") + " --tokens-per-batch 128";
        let mut within_evaluations = 0;
        stop_often(&bench, &line, &format!("{stage}-evaluation"), "TERM", &mut random, |state| {
            within_evaluations += usize::from(state.contains("evaluation_is_due = true"));
            within_evaluations >= 2
        });
    }
}

/// A folder with so many copies of a file.
fn copies(bench: &Workbench, from: &str, folder: &str, count: usize) {
    (0..count).for_each(|copy| bench.put(&format!("{folder}/{copy}.parquet"), &bench.bytes(from)));
}

#[test]
fn a_signal_while_hidden_states_are_looked_up_ends_the_run_soon_and_the_same_command_begins_again() {
    let bench = bench();
    let row = |row: usize| format!("{{\"text\": \"{} {row}\", \"label\": \"{}\"}}\n", "It is so. ".repeat(12), row % 2);
    bench.put("labelled.jsonl", (0..2000).map(row).collect::<String>().as_bytes());
    let command = "sft --objective classification --model start --method probing --data labelled.jsonl --max-steps 2 --quiet --output run";
    for attempt in 1.. {
        assert!(attempt < 50, "no signal came while hidden states were looked up");
        let child = bench.command(command).stderr(Stdio::piped()).spawn().unwrap();
        // The settings are written just before.
        let started = Instant::now();
        while !bench.path("run/settings.toml").is_file() && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&child, "TERM");
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if said
            == "error: stopped by SIGTERM before the first step was done, so that nothing is lost; the same command begins again\n"
        {
            assert_eq!(output.status.code(), Some(3));
            break;
        }
        assert!(output.status.code() == Some(3) && said.contains("after step"), "{:?}: {said}", output.status);
        std::fs::remove_dir_all(bench.path("run")).unwrap();
    }
    bench.succeed(command);
    let steps = bench.metrics("run").iter().filter(|line| line.contains_key("learning_rate")).count();
    assert_eq!(steps, 2);
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let bench = bench();
    let line = line("ppo").replace("--batch-size 6", "--batch-size 6 --reward-command sleep\u{a0}60");
    let child = bench.command(&format!("{line} --output run")).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    // The reward is waited for, so the first is only noted.
    send(&child, "TERM");
    std::thread::sleep(Duration::from_millis(200));
    let started = Instant::now();
    send(&child, "TERM");
    let status = child.wait_with_output().unwrap().status;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_may_not_change_when_a_run_goes_on_is_refused_and_named() {
    let bench = bench();
    let line = line("sft");
    bench.succeed(&format!("{line} --max-steps 5 --output run"));
    let fault = |line: &str| {
        let output = bench.run(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        String::from_utf8(output.stderr).unwrap()
    };
    let other =
        |from: &str, to: &str| fault(&format!("{} --max-steps 9 --output run --resume", line.replace(from, to)));
    let rate = other("3e-3", "2e-3");
    assert!(rate.contains("--learning-rate: was 0.003 when the run began, now it is 0.002"), "{rate}");
    assert!(fault(&format!("{line} --max-steps 4 --output run --resume")).contains("5 steps are done"));
    assert!(fault(&format!("{line} --output new --resume model")).contains("there is no checkpoint in it"));
    let reward = crate::survival::line("reward");
    assert!(
        fault(&format!("{reward} --output run --resume"))
            .contains("a checkpoint of sft, which reward cannot go on from")
    );
    // More steps, another output, another number of threads: as one run of as many steps would have gone on.
    bench.succeed(
        &format!("{line} --max-steps 9 --threads 1 --output longer --resume run --schedule constant")
            .replace("--schedule constant", ""),
    );
    assert_eq!(curves(&bench, "longer").len(), curves(&bench, "run").len() + 4 + 2);
    let warnings = String::from_utf8(bench.bytes("longer/warnings.txt")).unwrap();
    assert!(warnings.contains("the run is now one of 9 steps and was one of 5"), "{warnings}");
    // A run that is not over is not written over.
    std::fs::remove_file(bench.path("run/finished.json")).unwrap();
    assert!(fault(&format!("{line} --max-steps 5 --output run")).contains("holds a run that is not over"));
    // Data may have another name, but not other contents.
    let data = bench.bytes("demonstrations.parquet");
    std::fs::rename(bench.path("demonstrations.parquet"), bench.path("moved.parquet")).unwrap();
    let more = format!("{line} --max-steps 9 --output run --resume");
    bench.succeed(&more.replace("demonstrations.parquet", "moved.parquet"));
    let rows = rlhf::data::table::TableRows::open(bench.path("moved.parquet").to_str().unwrap()).unwrap();
    let batch = rows.map(|rows| rows.unwrap().batch).next().unwrap();
    rlhf::data::parquet::write(bench.path("demonstrations.parquet"), &batch.slice(0, 11)).unwrap();
    let now = bench.bytes("demonstrations.parquet").len();
    let changed = fault(&more);
    let sizes = format!("demonstrations.parquet had {} bytes when the run began, now {now}", data.len());
    assert!(changed.contains(&sizes), "{changed}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let bench = bench();
    let line = line("ppo");
    bench.succeed(&format!("{line} --output whole"));
    let mut child = bench.command(&format!("{line} --output run")).spawn().unwrap();
    let checkpoints = bench.path("run/checkpoints");
    while !checkpoints.join("step-000005").is_dir() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let newest = Checkpoints::of(&bench.path("run"), 2).newest().unwrap().0.unwrap();
    let tensors = newest.folder.join("state.safetensors");
    let mut bytes = std::fs::read(&tensors).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&tensors, bytes).unwrap();
    bench.succeed(&format!("{line} --output run --resume"));
    let warnings = String::from_utf8(bench.bytes("run/warnings.txt")).unwrap();
    assert!(
        warnings.contains("state.safetensors: not what was written, by its checksum; the checkpoint is passed over")
    );
    // But for this warning nothing is different.
    let others = warnings.lines().filter(|line| !line.contains("passed over")).map(|line| format!("{line}\n"));
    bench.put("run/warnings.txt", others.collect::<String>().as_bytes());
    assert_same(&bench, "whole", "run");
}
