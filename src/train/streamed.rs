//! Examples that are made when they are needed, those of the next step while a step is computed.

use std::sync::Arc;
use std::thread;

use super::examples::Example;
use super::order::Steps;
use super::prepared::{Prepare, Read};
use crate::data::notes::{self, Held};
use crate::data::row_index::RowIndex;
use crate::data::window::WindowedRows;
use crate::error::Result;

/// The stack of the thread that makes examples: as large as that of the main thread, on which they are made
/// otherwise.
const STACK: usize = 8 << 20;

/// Examples that are made when they are asked for, or one step before.
pub(super) struct Streamed<'a, T> {
    pub(super) index: Arc<RowIndex>,
    pub(super) rows: WindowedRows,
    pub(super) window: usize,
    pub(super) prepare: Prepare<'a, T>,
    /// The examples of the first rows.
    pub(super) sample: Vec<Arc<Example<T>>>,
    pub(super) sampled_rows: usize,
    /// Those of one step, if they were made before it.
    pub(super) ahead: Option<Ahead<T>>,
}

/// The examples of a step that has not come yet.
pub(super) struct Ahead<T> {
    step: usize,
    examples: Vec<Arc<Example<T>>>,
    /// What is to be noted of their rows when the step comes.
    notes: Held,
}

impl<T> Streamed<'_, T> {
    /// The examples of a step.
    pub(super) fn step(&mut self, step: usize, steps: &Steps) -> Result<Vec<Arc<Example<T>>>> {
        match self.ahead.take().filter(|ahead| ahead.step == step) {
            Some(ahead) => {
                ahead.notes.say();
                Ok(ahead.examples)
            }
            None => self.make(step, steps),
        }
    }

    fn make(&mut self, step: usize, steps: &Steps) -> Result<Vec<Arc<Example<T>>>> {
        let (epoch, places) = steps.places(step);
        let mut read = Read::new();
        for rows in self.rows.at(epoch, places)? {
            read.add(&rows, &self.prepare)?;
        }
        Ok(read.examples.into_iter().map(Arc::new).collect())
    }

    /// Does `work` while another thread makes the examples of a step. The thread has ended when this returns.
    ///
    /// An error of that thread is forgotten: the step meets it again when it comes, if it comes, with nothing
    /// else going on that might have been its cause.
    pub(super) fn while_making<R>(&mut self, step: usize, steps: &Steps, work: impl FnOnce() -> R) -> R
    where
        T: Send + Sync,
    {
        let make = || {
            let (made, notes) = notes::held(|| self.make(step, steps));
            made.ok().map(|examples| Ahead { step, examples, notes })
        };
        let (result, ahead) = thread::scope(|scope| {
            let builder = thread::Builder::new().name("next examples".to_owned()).stack_size(STACK);
            let maker = builder.spawn_scoped(scope, make);
            let result = work();
            let ahead = maker.ok().map(|maker| maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            (result, ahead.flatten())
        });
        self.ahead = ahead;
        result
    }
}
