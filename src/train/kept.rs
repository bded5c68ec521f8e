//! The models that a run keeps: the best by evaluation loss and the last.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{publish, replace_folder_atomically, write_atomically};

/// Which model a kept folder holds; written into it as `checkpoint.json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// The number of optimizer steps done.
    pub step: usize,
    /// The loss on the evaluation examples, in nats; `None` in a run without them.
    pub evaluation_loss: Option<f64>,
}

/// Keeps the folders `best` and `last` in a run's folder.
#[derive(Debug)]
pub struct BestAndLast {
    run: PathBuf,
    best: Option<Kept>,
}

impl BestAndLast {
    /// For the run in this folder, nothing being kept yet.
    pub fn new(run: impl AsRef<Path>) -> Self {
        BestAndLast { run: run.as_ref().to_path_buf(), best: None }
    }

    /// For a run that goes on, whose best model so far is this one.
    pub fn resume(run: impl AsRef<Path>, best: Option<Kept>) -> Self {
        BestAndLast { run: run.as_ref().to_path_buf(), best }
    }

    /// Keeps a model, which `save` writes into an empty folder: as `last`, and as `best` if its loss is below that of every
    /// one before. Says whether it is the best.
    ///
    /// Without evaluation examples (no loss) the newest is the best. A loss that is not a number is never below another.
    pub fn keep(&mut self, kept: Kept, save: impl FnOnce(&Path) -> Result<()>) -> Result<bool> {
        let last = self.run.join("last");
        replace_folder_atomically(&last, |folder| {
            save(folder)?;
            write_atomically(folder.join("checkpoint.json"), |file| Ok(serde_json::to_writer_pretty(file, &kept)?))
        })?;
        let is_best = self.is_better(kept.evaluation_loss);
        if is_best {
            replace_folder_atomically(self.run.join("best"), |folder| publish(&last, folder))?;
            self.best = Some(kept);
        }
        Ok(is_best)
    }

    /// Whether a model of this loss would be the best.
    pub fn is_better(&self, evaluation_loss: Option<f64>) -> bool {
        match self.best.map(|best| (evaluation_loss, best.evaluation_loss)) {
            // Anything is better than nothing, and than a loss that is not a number.
            None => true,
            Some((Some(new), Some(old))) => new < old || old.is_nan() && !new.is_nan(),
            Some(_) => true,
        }
    }

    /// The best so far.
    pub fn best(&self) -> Option<Kept> {
        self.best
    }

    /// Makes the run's folder itself a model: the best one. Its files are shared with the folder `best` where the file system can.
    pub fn publish_best(&self) -> Result<Kept> {
        let best = self.best.ok_or_else(|| Error::input(format!("{}: no model was kept", self.run.display())))?;
        publish(&self.run.join("best"), &self.run)?;
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(folder: &Path) -> Result<String> {
        std::fs::read_to_string(folder.join("model.txt")).map_err(Error::io(folder))
    }

    fn keep(models: &mut BestAndLast, step: usize, loss: Option<f64>) -> Result<bool> {
        models.keep(Kept { step, evaluation_loss: loss }, |folder| {
            std::fs::write(folder.join("model.txt"), format!("model {step}")).map_err(Error::io(folder))
        })
    }

    #[test]
    fn the_lowest_loss_is_the_best_and_the_newest_is_the_last() {
        let run = tempfile::tempdir().unwrap();
        let mut models = BestAndLast::new(run.path());
        let losses = [f64::NAN, 3.0, 2.0, 2.0, f64::NAN, 2.5];
        let is_best: Vec<bool> =
            losses.iter().enumerate().map(|(step, &loss)| keep(&mut models, step, Some(loss)).unwrap()).collect();
        assert_eq!(is_best, [true, true, true, false, false, false]);
        assert_eq!(model(&run.path().join("best")).unwrap(), "model 2");
        assert_eq!(model(&run.path().join("last")).unwrap(), "model 5");
        let best = models.publish_best().unwrap();
        assert_eq!(best, Kept { step: 2, evaluation_loss: Some(2.0) });
        assert_eq!(model(run.path()).unwrap(), "model 2");
        let record = std::fs::read(run.path().join("best/checkpoint.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Kept>(&record).unwrap(), best);
    }

    #[test]
    fn without_evaluation_the_newest_is_the_best() {
        let run = tempfile::tempdir().unwrap();
        let mut models = BestAndLast::new(run.path());
        assert!(models.publish_best().is_err());
        for step in 1..=2 {
            assert!(keep(&mut models, step, None).unwrap());
        }
        assert_eq!(model(&run.path().join("best")).unwrap(), "model 2");
    }

    #[test]
    fn a_model_that_fails_to_save_leaves_the_earlier_ones() {
        let run = tempfile::tempdir().unwrap();
        let mut models = BestAndLast::new(run.path());
        keep(&mut models, 1, Some(1.0)).unwrap();
        let kept = Kept { step: 2, evaluation_loss: Some(0.5) };
        assert!(models.keep(kept, |_| crate::bail!("disk full")).is_err());
        assert_eq!(model(&run.path().join("best")).unwrap(), "model 1");
        assert_eq!(model(&run.path().join("last")).unwrap(), "model 1");
        assert_eq!(models.best().map(|best| best.step), Some(1));
    }
}
