//! From which checkpoint a run goes on, and whether it may: with the settings with which it began, but for those that cannot change what comes out.

use std::path::Path;

use toml::{Table, Value};

use super::checkpoint::{self, Checkpoint, Checkpoints};
use crate::bail;
use crate::error::Result;

/// Settings that may be others when a run goes on: they say how long it goes on and what is written, not what it computes.
const SAFE: [&str; 11] = [
    "output",
    "quiet",
    "threads",
    "max_steps",
    "epochs",
    "checkpoint_every",
    "keep",
    "policy_every",
    "sample_every",
    "samples",
    "max_skipped_steps",
];
/// Settings that name files and folders, which are compared by what is in them ([`super::inputs`]).
const INPUTS: [&str; 8] =
    ["model", "adapter", "data", "evaluation_data", "demonstrations", "ptx_data", "reward_model", "judge_model"];

/// The checkpoint that `--resume` names, `auto` being the newest of the run's own, if there is one; and sentences about damaged ones.
pub fn choose(resume: Option<&Path>, own: &Checkpoints) -> Result<(Option<Checkpoint>, Vec<String>)> {
    match resume {
        None => Ok((None, Vec::new())),
        Some(auto) if auto == Path::new("auto") => match own.newest()? {
            (None, damaged) if !damaged.is_empty() => bail!(
                "no checkpoint of this run is whole: {}; delete the folder checkpoints to begin again",
                damaged.join("; ")
            ),
            found => Ok(found),
        },
        Some(folder) => checkpoint::named(folder).map(|(checkpoint, damaged)| (Some(checkpoint), damaged)),
    }
}

/// Refuses to go on with other settings.
pub fn check_settings(now: &Table, then: &Table, checkpoint: &Path) -> Result<()> {
    for key in now.keys().chain(then.keys()) {
        if SAFE.contains(&&**key) || INPUTS.contains(&&**key) || now.get(key) == then.get(key) {
            continue;
        }
        let shown = |value: Option<&Value>| value.map_or("not given".to_string(), Value::to_string);
        bail!(
            "--{}: was {} when the run began, now it is {}, and the run cannot go on from {} as it would have; set it to what it was, or start a new run in another --output",
            key.replace('_', "-"),
            shown(then.get(key)),
            shown(now.get(key)),
            checkpoint.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_the_result_may_not_be_changed_and_is_named() {
        let table = |text: &str| text.parse::<Table>().unwrap();
        let then = table("output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 1e-4\nseed = 3");
        let check = |text: &str| check_settings(&table(text), &then, Path::new("step-1"));
        check("output = 'b'\nepochs = 2\nmax_steps = 7\ndata = 'y'\nlearning_rate = 1e-4\nseed = 3").unwrap();
        let fault = |text: &str| check(text).unwrap_err().to_string();
        let rate = fault("output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 2e-4\nseed = 3");
        assert!(rate.starts_with("--learning-rate: was 0.0001 when the run began, now it is 0.0002"), "{rate}");
        let seed = fault("output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 1e-4");
        assert!(seed.starts_with("--seed: was 3 when the run began, now it is not given"), "{seed}");
    }
}
