//! A training run: its folder, what is printed while it goes on, what is recorded, and from where it can go on.
//!
//! The folder holds `settings.toml` as resolved, `metrics.jsonl`, TensorBoard events, checkpoints, the models `best/` and `last/`, and, at its
//! top, the best model, so that the folder itself is the model of the next stage.

mod stopping;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::checkpoint::Checkpoints;
use super::inputs::Inputs;
use super::kept::{BestAndLast, Kept};
use super::learned::{Learned, Outcome};
use super::metrics::{Metrics, peak_rss_mb};
use super::optimizer::StepReport;
use super::plan::Plan;
use super::progress::Progress;
use super::resume::{self, Identity, Record, Resumed};
use super::state::{StateReader, StateWriter};
use crate::bail;
use crate::data;
use crate::data::schema::Origin;
use crate::error::{Error, Result};
use crate::files::{
    FolderLock, clear_run_folder, publish, replace_folder_atomically, take_run_folder, write_atomically,
};
use crate::ops::Arithmetic;
use crate::settings::{self, CheckpointSettings, CommonSettings, Interval};
use crate::stop;
pub use stopping::{Evaluating, Turn, Turns};

/// One run of a training program.
pub struct Run {
    folder: PathBuf,
    quiet: bool,
    identity: Identity,
    metrics: Metrics,
    progress: Progress,
    kept: BestAndLast,
    last_kept: Option<usize>,
    learned: Learned,
    warnings: String,
    step_started: Instant,
    expected_memory: Option<u64>,
    /// Saved with the models that are kept.
    chat_template: Option<String>,
    checkpoints: Checkpoints,
    checkpoint_every: Interval,
    /// When a checkpoint was last written, or the run began.
    noted: Instant,
    /// The steps that were done at the newest checkpoint of the run, written by it or that from which it goes on.
    newest: Option<usize>,
    /// From where it goes on.
    resumed: Option<(Turns, StateReader)>,
    _listening: stop::Listening,
    _lock: FolderLock,
}

const WARNINGS: &str = "warnings.txt";
/// Examples of a step that are named where something is wrong with it.
const MOST_ROWS_NAMED: usize = 32;
/// Written when a run is over; without it, checkpoints are those of one that is not.
const FINISHED: &str = "finished.json";

impl Run {
    /// Takes the folder, records the settings, prints the plan, and starts the clock. With `--resume` the run goes on from a checkpoint:
    /// [`restore`](Run::restore) gives the state back.
    ///
    /// # Errors
    /// Where the folder holds a run that is not over and is not to go on, and where settings or inputs are not those of the checkpoint.
    pub fn start<S: Serialize>(
        settings: &S,
        common: &CommonSettings,
        checkpoints: &CheckpointSettings,
        plan: &Plan,
        total_steps: usize,
        inputs: Inputs,
    ) -> Result<Self> {
        let folder = common.output.clone();
        let own = Checkpoints::of(&folder, checkpoints.keep);
        let identity =
            Identity { program: plan.title().to_string(), settings: settings::table(settings)?, inputs, total_steps };
        // Before anything is touched.
        let (resumed, mut notes) = resume::choose(checkpoints.resume.as_deref(), &own, &identity)?;
        let lock = take_run_folder(&folder)?;
        if resumed.is_none() {
            clear(&folder, &own)?;
        }
        remove_if_there(&folder.join(FINISHED))?;
        let mut run = Run {
            quiet: common.quiet,
            identity,
            metrics: match &resumed {
                Some(resumed) => Metrics::resume(&folder, resumed.checkpoint.run(), &resumed.record.metrics)?,
                None => Metrics::create(&folder)?,
            },
            progress: Progress::new(plan.title(), total_steps, common.quiet),
            kept: BestAndLast::new(&folder),
            last_kept: None,
            learned: Learned::default(),
            warnings: String::new(),
            step_started: Instant::now(),
            expected_memory: plan.expected_memory(),
            chat_template: plan.chat_template().map(str::to_owned),
            checkpoints: own,
            checkpoint_every: checkpoints.checkpoint_every,
            noted: Instant::now(),
            newest: None,
            resumed: None,
            _listening: stop::listen()?,
            _lock: lock,
            folder,
        };
        settings::save(settings, run.folder.join("settings.toml"))?;
        let said = data::notes::take();
        plan.print(common.quiet);
        match resumed {
            // What there was to say when it began is in its `warnings.txt` already.
            Some(resumed) => notes.extend(run.go_on_from(resumed)?),
            None => {
                said.iter().try_for_each(|note| run.warn(&format!("note: {note}")))?;
                notes.extend(plan.warnings().iter().cloned());
            }
        }
        notes.iter().try_for_each(|note| run.warn(&format!("warning: {note}")))?;
        Ok(run)
    }

    /// Brings the folder to where it was at a checkpoint; what is worth a warning comes back.
    fn go_on_from(&mut self, resumed: Resumed) -> Result<Vec<String>> {
        let Resumed { checkpoint, record, state, notes } = resumed;
        if let Some(best) = checkpoint.best() {
            replace_folder_atomically(self.folder.join("best"), |folder| publish(&best, folder))?;
        }
        let last = checkpoint.run().join("last");
        if last.is_dir() && !self.folder.join("last").is_dir() {
            replace_folder_atomically(self.folder.join("last"), |folder| publish(&last, folder))?;
        }
        self.kept = BestAndLast::resume(&self.folder, record.best);
        self.last_kept = record.last_kept;
        self.learned = record.learned;
        let warnings = std::fs::read(checkpoint.run().join(WARNINGS)).unwrap_or_default();
        self.warnings = String::from_utf8_lossy(&warnings[..record.warnings.min(warnings.len())]).into_owned();
        match self.warnings.is_empty() {
            true => remove_if_there(&self.folder.join(WARNINGS))?,
            false => self.write(WARNINGS, &self.warnings)?,
        }
        self.progress.start_at(checkpoint.step);
        let (step, steps) = (checkpoint.step, self.identity.total_steps);
        self.note(&format!("goes on after step {step} of {steps}"));
        self.newest = Some(step);
        self.resumed = Some((Turns { done: step, steps, evaluation_is_due: record.evaluation_is_due }, state));
        Ok(notes)
    }

    /// Gives the state back with which the run goes on, and what there is left to do.
    pub fn restore(&mut self, restore: impl FnOnce(&mut StateReader) -> Result<()>) -> Result<Turns> {
        match self.resumed.take() {
            Some((turns, mut state)) => restore(&mut state).map(|()| turns),
            None => Ok(Turns { done: 0, steps: self.identity.total_steps, evaluation_is_due: false }),
        }
    }

    /// Writes a checkpoint after `step` steps if one is due: by `--checkpoint-every`, at the end, or because a signal asks the run to stop.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a signal, and where the checkpoint cannot be written.
    pub fn checkpoint<'a>(&mut self, step: usize, fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>) -> Result<()> {
        let last = step == self.identity.total_steps;
        let is_due = matches!(self.checkpoint_every, Interval::Steps(steps) if step.is_multiple_of(steps));
        if !is_due && !last {
            return self.checkpoint_within(step, fill);
        }
        self.write_checkpoint(step, fill)?;
        // At the end there is little left to do.
        stop::requested().filter(|_| !last).map_or(Ok(()), |signal| Err(self.stopped(step, signal)))
    }

    /// Writes a checkpoint in the middle of a step, `step` steps being done, if one is due by the minutes of `--checkpoint-every` or because a
    /// signal asks the run to stop.
    ///
    /// # Errors
    /// As [`checkpoint`](Run::checkpoint).
    pub fn checkpoint_within<'a>(
        &mut self,
        step: usize,
        fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<()> {
        let is_due = match self.checkpoint_every {
            Interval::Minutes(minutes) => self.noted.elapsed().as_secs_f64() >= 60.0 * minutes,
            Interval::Steps(_) => false,
        };
        let signal = stop::requested();
        if is_due || signal.is_some() {
            self.write_checkpoint(step, fill)?;
        }
        signal.map_or(Ok(()), |signal| Err(self.stopped(step, signal)))
    }

    /// Writes a checkpoint after `step` steps.
    pub fn write_checkpoint<'a>(
        &mut self,
        step: usize,
        fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<PathBuf> {
        let record = self.record()?;
        self.write_checkpoint_of(&record, step, fill)
    }

    /// What a checkpoint would hold of the run itself now.
    fn record(&mut self) -> Result<Record> {
        Ok(Record {
            program: self.identity.program.clone(),
            total_steps: self.identity.total_steps,
            products: Arithmetic::current().to_string(),
            learned: self.learned.clone(),
            best: self.kept.best(),
            last_kept: self.last_kept,
            evaluation_is_due: false,
            warnings: self.warnings.len(),
            metrics: self.metrics.sync()?,
        })
    }

    fn write_checkpoint_of<'a>(
        &mut self,
        record: &Record,
        step: usize,
        fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<PathBuf> {
        let mut state = StateWriter::default();
        fill(&mut state)?;
        self.identity.add_to(&mut state, record)?;
        let best = self.kept.best().map(|_| self.folder.join("best"));
        let path = self.checkpoints.write(step, best.as_deref(), state)?;
        self.noted = Instant::now();
        self.step_started = Instant::now();
        self.newest = Some(step);
        Ok(path)
    }

    /// Shows this beside the loss from now on, such as the score that PPO raises.
    pub fn show(&mut self, status: String) {
        self.progress.show(status);
    }

    /// Records one optimizer step over `tokens` real tokens.
    pub fn step(&mut self, step: usize, loss: f64, tokens: usize, values: &[(&str, f64)]) -> Result<()> {
        let seconds = self.step_started.elapsed().as_secs_f64();
        self.step_started = Instant::now();
        let mut all = vec![("loss", loss), ("tokens_per_second", tokens as f64 / seconds.max(1e-9))];
        all.extend_from_slice(values);
        self.progress.advance(Some(loss), tokens);
        self.metrics.write(step, &all)
    }

    /// Records an evaluation and prints it.
    pub fn evaluation(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let line: Vec<String> =
            values.iter().map(|(name, value)| format!("{} {value:.4}", name.replace('_', " "))).collect();
        self.progress.note(&format!("step {step}: {}", line.join(", ")));
        self.metrics.write(step, values)?;
        // An evaluation is no part of a step's time.
        self.step_started = Instant::now();
        Ok(())
    }

    /// Keeps the model, which `save` writes into an empty folder, as `last/`, and as `best/` if its evaluation loss is the lowest so far.
    pub fn keep(
        &mut self,
        step: usize,
        evaluation_loss: Option<f64>,
        save: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let template = self.chat_template.as_deref();
        let save = |folder: &Path| {
            save(folder)?;
            template.map_or(Ok(()), |source| {
                let path = folder.join("chat_template.jinja");
                write_atomically(path, |file| std::io::Write::write_all(file, source.as_bytes()))
            })
        };
        self.kept.keep(Kept { step, evaluation_loss }, save)?;
        self.last_kept = Some(step);
        self.learned.evaluation_loss = evaluation_loss;
        self.step_started = Instant::now();
        Ok(())
    }

    /// Whether a model of this evaluation loss would be kept as the best.
    pub fn is_better(&self, evaluation_loss: Option<f64>) -> bool {
        self.kept.is_better(evaluation_loss)
    }

    /// The best model so far and its folder.
    pub fn best(&self) -> Option<(Kept, PathBuf)> {
        self.kept.best().map(|best| (best, self.folder.join("best")))
    }

    /// Counts the optimizer steps of an update of several.
    pub fn count(&mut self, update: Learned) {
        self.learned.count_all(update);
    }

    /// Refuses to call the run over where it learned nothing, or where its last evaluation gave no number.
    ///
    /// # Errors
    /// The sentence says why, and where the best model is that it had, if one was evaluated.
    pub fn check_learned(&self) -> Result<()> {
        self.learned.check().map_err(|error| match self.best() {
            Some((Kept { step, evaluation_loss: Some(loss) }, folder)) if loss.is_finite() => error
                .and(format!("the model of step {step}, the best by its loss ({loss:.4}), is in {}", folder.display())),
            _ => error,
        })
    }

    /// The step after which a model was last kept.
    pub fn last_kept(&self) -> Option<usize> {
        self.last_kept
    }

    /// Prints text above the progress bar.
    pub fn note(&self, text: &str) {
        self.progress.note(text);
    }

    /// Prints a warning above the progress bar, and adds it to `warnings.txt`.
    pub fn warn(&mut self, text: &str) -> Result<()> {
        self.progress.note(text);
        self.warnings.push_str(text);
        self.warnings.push('\n');
        self.write(WARNINGS, &self.warnings)
    }

    /// What the optimizer's step after `step` others gave, over these examples. One that changed nothing, as something in its gradients was not
    /// finite, is warned of.
    ///
    /// # Errors
    /// Where it was one too many of these: then the weights, which are as they last were good, are in a checkpoint.
    pub fn stepped<'a, 'o>(
        &mut self,
        step: usize,
        stepped: Result<StepReport>,
        examples: impl IntoIterator<Item = &'o Origin>,
        fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<StepReport> {
        let mut examples = examples.into_iter().peekable();
        let is_empty = examples.peek().is_none();
        let stepped = match stepped {
            Err(error @ Error::NotFinite(_)) => {
                let checkpoint = self.write_checkpoint(step, fill)?;
                let error = self.gave_up(error, examples);
                return Err(error.and(format!("the weights as they last were good are in {}", checkpoint.display())));
            }
            stepped => stepped?,
        };
        if let Some(what) = &stepped.not_finite {
            let (number, examples) = (step + 1, rows_named(examples));
            self.warn(&format!(
                "step {number} changed nothing: of its gradients {what} is not finite; its examples: {examples}"
            ))?;
        }
        match &stepped.not_finite {
            Some(what) => self.learned.count(Outcome::Skipped(what.clone())),
            None if is_empty => self.learned.count(Outcome::Empty),
            None if stepped.changed => self.learned.count(Outcome::Changed),
            None => (),
        }
        Ok(stepped)
    }

    /// The error with which a run ends after too many such steps in a row, the last of them over these examples.
    pub fn gave_up<'o>(&self, error: Error, examples: impl IntoIterator<Item = &'o Origin>) -> Error {
        let before = match self.warnings.is_empty() {
            true => String::new(),
            false => format!(", those of the steps before are in {}", self.folder.join(WARNINGS).display()),
        };
        error.and(format!("the examples of the last step are {}{before}", rows_named(examples)))
    }

    /// Makes the run's folder itself the best model, and says where it is.
    pub fn finish(self) -> Result<()> {
        let best = self.kept.publish_best()?;
        let finished = serde_json::json!({
            "steps": self.identity.total_steps,
            "model_of_step": best.step,
            "products": Arithmetic::current().to_string(),
        });
        self.write(FINISHED, &format!("{finished}\n"))?;
        self.progress.finish();
        if !self.quiet {
            eprintln!("model of step {} in {}", best.step, self.folder.display());
            if let (Some(measured), Some(expected)) = (peak_rss_mb(), self.expected_memory) {
                eprintln!("memory at its peak {measured:.0} MB, expected {:.0} MB\n", expected as f64 / 1e6);
            }
        }
        Ok(())
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a text file into the run's folder.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        write_atomically(self.folder.join(name), |file| std::io::Write::write_all(file, text.as_bytes()))
    }
}

/// Rows by their files, such as `a.parquet rows 1, 5; b.parquet row 3 (counted from 0)`: the first of many, and how many there are beside them.
pub fn rows_named<'o>(origins: impl IntoIterator<Item = &'o Origin>) -> String {
    let mut files: BTreeMap<&Path, BTreeSet<usize>> = BTreeMap::new();
    for Origin { file, row } in origins {
        files.entry(file).or_default().insert(*row);
    }
    let (mut shown, mut left) = (Vec::new(), MOST_ROWS_NAMED);
    for (file, rows) in &files {
        let first: Vec<String> = rows.iter().take(left).map(usize::to_string).collect();
        left -= first.len();
        if !first.is_empty() {
            let rows = if first.len() == 1 { "row" } else { "rows" };
            shown.push(format!("{} {rows} {}", file.display(), first.join(", ")));
        }
    }
    let more = files.values().map(BTreeSet::len).sum::<usize>() - (MOST_ROWS_NAMED - left);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more} (counted from 0)", shown.join("; "))
}

/// Readies the folder of a run that begins: it may take the place of one that is over.
fn clear(folder: &Path, checkpoints: &Checkpoints) -> Result<()> {
    if checkpoints.any()? && !folder.join(FINISHED).is_file() {
        bail!(
            "--output {}: holds a run that is not over; go on with it by --resume, or choose another folder, or delete its folder checkpoints to begin again",
            folder.display()
        );
    }
    clear_run_folder(folder)
}

fn remove_if_there(path: &Path) -> Result<()> {
    if path.is_file() { std::fs::remove_file(path).map_err(Error::io(path)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn rows_are_named_by_their_files_and_the_rest_of_many_counted() {
        let origin = |file: &str, row| Origin { file: Arc::from(Path::new(file)), row };
        let few = [origin("b", 9), origin("a", 7), origin("a", 2), origin("a", 7)];
        assert_eq!(rows_named(&few), "a rows 2, 7; b row 9 (counted from 0)");
        let many: Vec<Origin> = (0..31).chain(50..90).map(|row| origin("a", row)).chain([origin("b", 1)]).collect();
        let named = rows_named(&many);
        assert!(
            named.starts_with("a rows 0, 1, 2, ") && named.ends_with(" 30, 50 and 40 more (counted from 0)"),
            "{named}"
        );
    }
}
