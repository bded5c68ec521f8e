//! What SIGINT and SIGTERM do to a run beside its steps: work that changes nothing of what was learned ends in the middle, and is done
//! again as a whole when the run goes on.

use super::Run;
use crate::error::{Error, Result};
use crate::stop;
use crate::train::resume::Record;
use crate::train::state::StateWriter;

/// An evaluation that goes on.
#[derive(Debug)]
pub struct Evaluating {
    /// The run before it.
    before: Record,
    _heeding: stop::Heeding,
}

/// What is left of a run: its steps, and at first the evaluation alone that a signal ended after the step before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turns {
    /// Steps that are done.
    pub(super) done: usize,
    /// Steps of the run.
    pub(super) steps: usize,
    /// Whether the evaluation after the last that is done is still to be made.
    pub(super) evaluation_is_due: bool,
}

/// A step of a run, to learn from and then perhaps to evaluate after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Its number, the first being 0.
    pub step: usize,
    /// Whether what is learned in it is learned already.
    pub is_learned: bool,
}

impl Turns {
    /// Whether nothing of the run was done.
    pub fn is_start(&self) -> bool {
        self.done == 0
    }
}

impl Iterator for Turns {
    type Item = Turn;

    fn next(&mut self) -> Option<Turn> {
        if std::mem::take(&mut self.evaluation_is_due) {
            return Some(Turn { step: self.done.checked_sub(1)?, is_learned: true });
        }
        let step = self.done;
        self.done += 1;
        (step < self.steps).then_some(Turn { step, is_learned: false })
    }
}

impl Run {
    /// What a run says that a signal stopped after it wrote a checkpoint.
    pub(super) fn stopped(&self, step: usize, signal: &str) -> Error {
        Error::Stopped(format!(
            "stopped by {signal} after step {step} of {}; the same command with --resume goes on from there",
            self.identity.total_steps
        ))
    }

    /// Does what changes nothing of what was learned and may take minutes, such as to look up hidden states before the first step or
    /// to report on the model after the last; a signal ends it in the middle.
    ///
    /// # Errors
    /// Those of `work`; of a signal the sentence says from where the run goes on.
    pub fn heeding<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let heeding = stop::heed();
        let done = work();
        drop(heeding);
        match (done, stop::requested()) {
            (Err(Error::Stopped(_)), Some(signal)) => Err(match self.newest {
                Some(step) => self.stopped(step, signal),
                None => Error::Stopped(format!(
                    "stopped by {signal} before the first step was done, so that nothing is lost; the same command begins again"
                )),
            }),
            (done, _) => done,
        }
    }

    /// Begins an evaluation, which a signal ends in the middle until [`evaluated`](Run::evaluated) is told how it went.
    pub fn evaluating(&mut self) -> Result<Evaluating> {
        Ok(Evaluating { before: self.record()?, _heeding: stop::heed() })
    }

    /// Ends an evaluation after `step` steps. Where a signal ended it, a checkpoint is written of the point before it,
    /// and the run goes on with the whole evaluation.
    ///
    /// # Errors
    /// That of the evaluation, [`Error::Stopped`] after a signal; and where the checkpoint cannot be written.
    pub fn evaluated<'a, T>(
        &mut self,
        evaluating: Evaluating,
        evaluated: Result<T>,
        step: usize,
        fill: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<T> {
        match (evaluated, stop::requested()) {
            (Err(Error::Stopped(_)), Some(signal)) => {
                let record = Record { evaluation_is_due: true, ..evaluating.before };
                self.write_checkpoint_of(&record, step, fill)?;
                Err(self.stopped(step, signal))
            }
            (evaluated, _) => evaluated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_begins_with_an_evaluation_that_is_due() {
        let left = |done, evaluation_is_due| -> Vec<(usize, bool)> {
            let turns = Turns { done, steps: 3, evaluation_is_due };
            turns.map(|Turn { step, is_learned }| (step, is_learned)).collect()
        };
        assert_eq!(left(0, false), [(0, false), (1, false), (2, false)]);
        assert_eq!(left(2, false), [(2, false)]);
        assert_eq!(left(2, true), [(1, true), (2, false)]);
        assert_eq!(left(3, true), [(2, true)]);
        assert_eq!(left(3, false), []);
    }
}
