//! Every write of a run fails once: afterwards there is a checkpoint not older than the one before, and the run goes on to the same bytes.

use std::path::Path;
use std::process::{Command, Output};

use rlhf::train::checkpoint::Checkpoints;

use crate::survival::{assert_same, bench, line};
use crate::workbench::Workbench;

/// How many of the operations of each kind are let fail, at equal distances; `RLHF_FAULTS=all` takes every one.
const CHOSEN: usize = 12;
/// What becomes of an operation (see `fault.c`).
const KINDS: [&str; 5] = ["error", "full", "short", "kill", "after"];

/// Makes the library that lets operations fail.
fn make_shim(bench: &Workbench) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/fault.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(bench.path("fault.so")).arg(source).arg("-ldl");
    assert!(compiler.status().unwrap().success(), "cc cannot compile fault.c");
}

fn with_fault(bench: &Workbench, command: &str, run: &str, more: &[(&str, String)]) -> Output {
    let mut command = bench.command(command);
    command.env("LD_PRELOAD", bench.path("fault.so")).env("FAULT_FOLDER", bench.path(run));
    command.envs(more.iter().map(|(name, value)| (name, value)));
    command.output().unwrap()
}

/// The step of the newest checkpoint that is complete after 0, 1, ... operations, by the renames among them.
fn complete_after(operations: &[String]) -> Vec<usize> {
    let mut newest = vec![0];
    let mut step = 0;
    for operation in operations {
        if let Some((_, name)) = operation.split_once("/checkpoints/step-")
            && operation.starts_with("rename")
            && !name.contains('/')
        {
            step = name.parse().unwrap();
        }
        newest.push(step);
    }
    newest
}

fn faults(stage: &str, method: &str, more: &str) {
    let bench = bench();
    make_shim(&bench);
    let line = format!("{} --method {method} --max-steps 3 {more}", line(stage));
    bench.succeed(&format!("{line} --output whole"));
    let log = bench.path("log");
    with_fault(&bench, &format!("{line} --output run"), "run", &[("FAULT_LOG", log.display().to_string())]);
    let operations: Vec<String> = std::fs::read_to_string(&log).unwrap().lines().map(str::to_string).collect();
    let complete = complete_after(&operations);
    assert!(operations.len() > 100 && complete[operations.len()] == 3, "{operations:#?}");
    assert_same(&bench, "whole", "run");
    let chosen = if std::env::var("RLHF_FAULTS").is_ok() { operations.len() } else { CHOSEN };
    for (number, kind) in KINDS.iter().enumerate() {
        for case in 0..chosen {
            // Other ones for each kind.
            let at = 1 + (case * operations.len() + number * operations.len() / KINDS.len()) / chosen;
            let at = at.min(operations.len());
            std::fs::remove_dir_all(bench.path("run")).unwrap();
            let fault = [("FAULT_AT", at.to_string()), ("FAULT_KIND", kind.to_string())];
            let output = with_fault(&bench, &format!("{line} --output run"), "run", &fault);
            let what = format!("{kind} at operation {at}, {}", operations[at - 1]);
            let said = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                // What can be done without, such as a hard link.
                Some(0) => {}
                Some(2) => assert!(said.starts_with("error: ") && said.lines().count() == 1, "{what}: {said}"),
                None => assert!(["kill", "after"].contains(kind), "{what}: {output:?}"),
                other => panic!("{what}: exit code {other:?}: {said}"),
            }
            let newest = Checkpoints::of(&bench.path("run"), 2).newest().unwrap();
            let step = newest.0.map_or(0, |checkpoint| checkpoint.step);
            assert!(step >= complete[at - 1], "{what}: the newest is of step {step}");
            assert!(newest.1.is_empty(), "{what}: {:?}", newest.1);
            bench.succeed(&format!("{line} --output run --resume"));
            assert_same(&bench, "whole", "run");
        }
    }
}

#[test]
fn after_a_failed_write_of_sft_there_is_a_checkpoint_and_the_run_goes_on() {
    faults("sft", "full", "--evaluate-every 2");
}

#[test]
fn after_a_failed_write_of_ppo_there_is_a_checkpoint_and_the_run_goes_on() {
    // It has no data to evaluate on.
    faults("ppo", "lora", "");
}
