//! From which checkpoint a run goes on, and whether it may: with the settings with which it began, but for those that cannot change what comes out.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::checkpoint::{self, Checkpoint, Checkpoints};
use super::inputs::Inputs;
use super::kept::Kept;
use super::learned::Learned;
use super::metrics::Position;
use super::state::{StateReader, StateWriter};
use crate::bail;
use crate::error::Result;
use crate::ops::Arithmetic;

/// Settings that may be others when a run goes on: they say how long it goes on and what is written, not what it computes.
const SAFE: [&str; 14] = [
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
    "gradient_checkpointing",
    TOKENS_PER_BATCH,
    KV_CACHE_TOKENS,
];
/// Sums over micro-batches are then rounded in another order, and nothing else changes; a run that ran out of memory can go on with less.
const TOKENS_PER_BATCH: &str = "tokens_per_batch";
/// So are sums over answers that are sampled together.
const KV_CACHE_TOKENS: &str = "kv_cache_tokens";
/// Settings that name files and folders, which are compared by what is in them ([`super::inputs`]).
const INPUTS: [&str; 8] =
    ["model", "adapter", "data", "evaluation_data", "demonstrations", "ptx_data", "reward_model", "judge_model"];

/// Those that name folders with labels, `FOLDER@LABEL`, of which the labels, behind the last `@`, may not change.
const LABELLED_INPUTS: [&str; 2] = ["reward_classifier", "judge_classifier"];

/// Settings that the checkpoints of earlier versions lack, and what they were there.
const ADDED: [(&str, &str); 3] = [("precision", "f32"), ("base_precision", "stored"), ("cache_precision", "f32")];

/// What makes a run the one that it is.
#[derive(Debug)]
pub struct Identity {
    /// Its program.
    pub program: String,
    /// Its settings by name.
    pub settings: Table,
    /// What it reads.
    pub inputs: Inputs,
    /// How many steps it has.
    pub total_steps: usize,
}

/// What a checkpoint holds of the run itself, beside its settings and inputs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its program.
    pub program: String,
    /// How many steps it had.
    pub total_steps: usize,
    /// How products were made, in words.
    #[serde(default = "in_f32")]
    pub products: String,
    /// What it has learned.
    #[serde(default)]
    pub learned: Learned,
    /// The best model so far.
    pub best: Option<Kept>,
    /// The step after which a model was last kept.
    pub last_kept: Option<usize>,
    /// Whether the evaluation after its last step is still to be made: a signal came meanwhile.
    #[serde(default)]
    pub evaluation_is_due: bool,
    /// Bytes of its warnings.
    pub warnings: usize,
    /// How far its curves were.
    pub metrics: Position,
}

/// How products were made before there was a choice.
fn in_f32() -> String {
    Arithmetic::F32.to_string()
}

/// A checkpoint from which a run may go on.
pub struct Resumed {
    /// Where it lies.
    pub checkpoint: Checkpoint,
    /// What it holds of the run.
    pub record: Record,
    /// And of everything else.
    pub state: StateReader,
    /// What is not as it was, though it may change.
    pub notes: Vec<String>,
}

const RECORD: &str = "run";
const SETTINGS: &str = "settings";
const FILES: &str = "inputs";

impl Identity {
    /// Adds itself and the record to a checkpoint's state.
    pub fn add_to(&self, state: &mut StateWriter, record: &Record) -> Result<()> {
        state.value(RECORD, record)?;
        state.value(SETTINGS, &self.settings)?;
        state.value(FILES, &self.inputs)
    }

    /// Opens a checkpoint, and refuses it where it is of another run.
    fn open(&self, checkpoint: Checkpoint) -> Result<Resumed> {
        let Checkpoint { folder, step } = &checkpoint;
        let state = StateReader::open(folder)?;
        let record: Record = state.value(RECORD)?;
        if record.program != self.program {
            bail!("{}: a checkpoint of {}, which {} cannot go on from", folder.display(), record.program, self.program);
        }
        let then: Table = state.value(SETTINGS)?;
        check_settings(&self.settings, &then, folder)?;
        self.inputs.check(&state.value(FILES)?, folder)?;
        if *step > self.total_steps {
            bail!(
                "{}: {step} steps are done, and --max-steps and --epochs allow {}; raise them",
                folder.display(),
                self.total_steps
            );
        }
        let notes = self.notes(&record, &then);
        Ok(Resumed { checkpoint, record, state, notes })
    }

    /// Sentences about what is another than in the checkpoint and changes what comes out, in the way that the user asked for.
    fn notes(&self, record: &Record, then: &Table) -> Vec<String> {
        let mut notes = Vec::new();
        if record.total_steps != self.total_steps {
            notes.push(format!(
                "the run is now one of {} steps and was one of {}; the course of the learning rate changes with it",
                self.total_steps, record.total_steps
            ));
        }
        let products = Arithmetic::current().to_string();
        if record.products != products {
            notes.push(format!(
                "products are now made in {products} and were made in {}, as this is another kind of processor; sums are rounded in another order, so the \
                 run ends with other last digits than one that was not interrupted",
                record.products
            ));
        }
        for (key, flag) in [(TOKENS_PER_BATCH, "--tokens-per-batch"), (KV_CACHE_TOKENS, "--kv-cache-tokens")] {
            if let (Some(now), Some(then)) = (self.settings.get(key), then.get(key))
                && now != then
            {
                notes.push(format!(
                    "{flag} is now {now} and was {then}; sums are rounded in another order, so the run ends with other last digits than one that \
                     was not interrupted"
                ));
            }
        }
        notes
    }
}

/// The checkpoint that `--resume` names, `auto` being the newest of the run's own, if there is one; and sentences about damaged ones.
///
/// # Errors
/// Where none is whole, or it is of a run with other settings or inputs; the sentence says which.
pub fn choose(resume: Option<&Path>, own: &Checkpoints, run: &Identity) -> Result<(Option<Resumed>, Vec<String>)> {
    let (found, damaged) = match resume {
        None => (None, Vec::new()),
        Some(auto) if auto == Path::new("auto") => match own.newest()? {
            (None, damaged) if !damaged.is_empty() => bail!(
                "no checkpoint of this run is whole: {}; delete the folder checkpoints to begin again",
                damaged.join("; ")
            ),
            found => found,
        },
        Some(folder) => checkpoint::named(folder).map(|(checkpoint, damaged)| (Some(checkpoint), damaged))?,
    };
    Ok((found.map(|checkpoint| run.open(checkpoint)).transpose()?, damaged))
}

/// Refuses to go on with other settings.
pub fn check_settings(now: &Table, then: &Table, checkpoint: &Path) -> Result<()> {
    for key in now.keys().chain(then.keys()) {
        let is_labelled = LABELLED_INPUTS.contains(&&**key);
        let added = match is_labelled {
            true => Some(Value::Array(Vec::new())),
            false => ADDED.iter().find(|(added, _)| added == key).map(|&(_, value)| Value::from(value)),
        };
        let [was, is] = [then, now].map(|table| table.get(key).or(added.as_ref()));
        let is_same = is == was || is_labelled && labels(is) == labels(was);
        if SAFE.contains(&&**key) || INPUTS.contains(&&**key) || is_same {
            continue;
        }
        let shown = |value: Option<&Value>| value.map_or("not given".to_string(), Value::to_string);
        bail!(
            "--{}: was {} when the run began, now it is {}, and the run cannot go on from {} as it would have; set it to what it was, or start a new run in another --output",
            key.replace('_', "-"),
            shown(was),
            shown(is),
            checkpoint.display()
        );
    }
    Ok(())
}

/// The labels of a list of folders with labels.
fn labels(list: Option<&Value>) -> Option<Vec<&str>> {
    let label = |named: &str| named.rfind('@').map_or(named.len(), |at| at + 1);
    let named = list?.as_array()?.iter().map(Value::as_str);
    named.map(|named| named.map(|named| &named[label(named)..])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_the_result_may_not_be_changed_and_is_named() {
        let table = |text: &str| text.parse::<Table>().unwrap();
        let then = table("output = 'a'\nepochs = 1\ndata = 'x'\ntokens_per_batch = 9\nlearning_rate = 1e-4\nseed = 3");
        let check = |text: &str| check_settings(&table(text), &then, Path::new("step-1"));
        check("output = 'b'\nepochs = 2\nmax_steps = 7\ndata = 'y'\nlearning_rate = 1e-4\nseed = 3").unwrap();
        let fault = |text: &str| check(text).unwrap_err().to_string();
        let rate = fault("output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 2e-4\nseed = 3");
        assert!(rate.starts_with("--learning-rate: was 0.0001 when the run began, now it is 0.0002"), "{rate}");
        let seed = fault("output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 1e-4");
        assert!(seed.starts_with("--seed: was 3 when the run began, now it is not given"), "{seed}");
        // A classifier may move, and none was named before there was the setting.
        let same = "output = 'a'\nepochs = 1\ndata = 'x'\nlearning_rate = 1e-4\nseed = 3";
        check(&format!("{same}\nreward_classifier = []")).unwrap();
        let named = |folder: &str| table(&format!("{same}\nreward_classifier = ['{folder}']"));
        check_settings(&named("new/a@-toxic"), &named("a@-toxic"), Path::new("step-1")).unwrap();
        for other in ["a@toxic", "a"] {
            let error = check_settings(&named(other), &named("a@-toxic"), Path::new("step-1")).unwrap_err().to_string();
            assert!(error.starts_with("--reward-classifier: was [\"a@-toxic\"]"), "{error}");
        }
        // Runs of versions without the settings were in f32.
        for (key, flag) in [("precision", "--precision"), ("cache_precision", "--cache-precision")] {
            check(&format!("{same}\n{key} = 'f32'")).unwrap();
            let changed = fault(&format!("{same}\n{key} = 'bf16'"));
            let expected = format!("{flag}: was \"f32\" when the run began, now it is \"bf16\"");
            assert!(changed.starts_with(&expected), "{changed}");
        }
    }
}
