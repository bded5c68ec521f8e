//! A training run: its folder, what is printed while it goes on, and what is recorded.
//!
//! The folder holds `settings.toml` as resolved, `metrics.jsonl`, TensorBoard events, the models `best/` and `last/`, and, at its
//! top, the best model, so that the folder itself is the model of the next stage.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::checkpoint::{BestAndLast, Kept};
use super::metrics::{Metrics, peak_rss_mb};
use super::plan::Plan;
use super::progress::Progress;
use crate::error::Result;
use crate::files::{FolderLock, prepare_run_folder, write_atomically};
use crate::settings::{self, CommonSettings};

/// One run of a training program.
pub struct Run {
    folder: PathBuf,
    quiet: bool,
    metrics: Metrics,
    progress: Progress,
    kept: BestAndLast,
    step_started: Instant,
    expected_memory: Option<u64>,
    last_kept: Option<usize>,
    warnings: String,
    _lock: FolderLock,
}

impl Run {
    /// Makes the folder, records the settings, prints the plan, and starts the clock.
    pub fn start<S: Serialize>(settings: &S, common: &CommonSettings, plan: &Plan, total_steps: usize) -> Result<Self> {
        let folder = common.output.clone();
        let lock = prepare_run_folder(&folder)?;
        settings::save(settings, folder.join("settings.toml"))?;
        plan.print(common.quiet);
        Ok(Run {
            quiet: common.quiet,
            metrics: Metrics::create(&folder)?,
            progress: Progress::new(plan.title(), total_steps, common.quiet),
            kept: BestAndLast::new(&folder),
            step_started: Instant::now(),
            expected_memory: plan.expected_memory(),
            last_kept: None,
            warnings: String::new(),
            _lock: lock,
            folder,
        })
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
        self.kept.keep(Kept { step, evaluation_loss }, save)?;
        self.last_kept = Some(step);
        self.step_started = Instant::now();
        Ok(())
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
        self.write("warnings.txt", &self.warnings)
    }

    /// Warns of a step that changed nothing, as something in its gradients was not finite.
    pub fn skipped(&mut self, step: usize, not_finite: Option<&str>) -> Result<()> {
        match not_finite {
            Some(what) => self.warn(&format!("step {step} changed nothing: of its gradients {what} is not finite")),
            None => Ok(()),
        }
    }

    /// Makes the run's folder itself the best model, and says where it is.
    pub fn finish(self) -> Result<()> {
        let best = self.kept.publish_best()?;
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
