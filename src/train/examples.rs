//! The examples that a program learns from, by optimizer step: in memory where they are few, read as they are needed where they are many.
//!
//! Data of at most one window of rows ([`Source::window`]) are read, prepared and kept whole at the start, so that every count is exact and a row
//! that cannot be used is found before training; so are examples that were made in memory. Of larger data only the footers are
//! read at the start; a step's rows are decoded and prepared when the step comes ([`crate::data::window`]), so that memory is that of a window.
//! Either way a step's examples depend on the seed, the step and the files alone.

use std::collections::HashSet;
use std::sync::Arc;

use super::order::{MOST_HELD_OUT, Order, Steps, evaluation_split, held_out_rows};
use super::prepared::{Prepare, Read, of_rows, read_first};
use super::streamed::Streamed;
use crate::data::batch::largest_run;
use crate::data::row_index::{RowIndex, RowReader};
use crate::data::schema::{Layouts, Origin};
use crate::data::splits::Pattern;
use crate::data::tokenize_records::Truncation;
use crate::data::window::WindowedRows;
use crate::error::Result;
use crate::settings::{CommonSettings, ExampleSettings, TrainingSettings};

/// Rows at the start of data larger than a window from which counts are estimated.
const SAMPLED_ROWS: usize = 256;

/// What is learned from one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Example<T> {
    /// The row.
    pub origin: Origin,
    /// What was made of it.
    pub value: T,
}

/// What is learned from each of some examples.
pub fn values<T>(examples: &[Arc<Example<T>>]) -> Vec<&T> {
    examples.iter().map(|example| &example.value).collect()
}

/// Which rows a program learns from, and in which order.
#[derive(Debug, Clone, Copy)]
pub struct Source<'s> {
    /// A file, folder, glob or data set of the hub.
    pub data: &'s str,
    /// The same of the examples to evaluate on. All of them are read at the start and kept, unless there are more than [`MOST_HELD_OUT`] and
    /// than a window: then so many random ones of them stand for all.
    pub evaluation_data: Option<&'s str>,
    /// The share of `data` to evaluate on, where there is no `evaluation_data`.
    pub evaluation_share: f64,
    /// Rows among which the order is random; data of no more rows are kept in memory.
    pub window: usize,
    /// Examples of an optimizer step.
    pub batch_size: usize,
    /// Whether a last step that would be short is left out, unless there is no other.
    pub drops_rest: bool,
    /// The seed of the order and of what is set aside.
    pub seed: u64,
}

/// Examples to train on by step, and to evaluate on.
pub struct Examples<'a, T> {
    steps: Steps,
    way: Way<'a, T>,
    evaluation: Vec<Arc<Example<T>>>,
    /// Examples to evaluate on that were not read yet.
    unread: Option<Unread<'a, T>>,
    /// Rows of the data to evaluate on, where only some of them are kept.
    evaluation_rows: Option<usize>,
    truncation: Truncation,
    evaluation_truncation: Truncation,
}

/// Epochs whose steps are looked through for the largest.
const EPOCHS_LOOKED_AT: usize = 4;

enum Way<'a, T> {
    InMemory { all: Vec<Arc<Example<T>>>, training: Vec<usize>, order: Order },
    Streamed(Box<Streamed<'a, T>>),
}

/// Chosen rows, of which examples can be made.
struct Unread<'a, T> {
    index: Arc<RowIndex>,
    /// Ascending.
    rows: Vec<usize>,
    prepare: Prepare<'a, T>,
}

impl<'a, T> Examples<'a, T> {
    /// The examples that `prepare` makes of the records of `source`; where it gives `None`, there is nothing to learn from a row. It counts
    /// what it cuts.
    ///
    /// # Errors
    /// Where a file cannot be read or has none of the layouts; and where a row cannot be used, if the data fit in memory.
    pub fn open<R: Send + 'a>(
        source: &Source,
        layouts: Layouts<R>,
        prepare: impl Fn(R, &mut Truncation) -> Result<Option<T>> + Send + Sync + 'a,
    ) -> Result<Self>
    where
        T: Send,
    {
        let index = Arc::new(RowIndex::open(source.data, &layouts)?);
        let evaluation =
            source.evaluation_data.map(|pattern| RowIndex::open(Pattern::evaluation(pattern), &layouts)).transpose()?;
        let prepare = of_rows(layouts, prepare);
        let examples = if index.rows() <= source.window {
            let Read { examples, truncation } = read_first(&index, index.rows(), &prepare)?;
            Examples::in_memory(source, examples).counting(truncation)
        } else {
            Examples::streamed(source, index, prepare.clone())?
        };
        match evaluation {
            Some(index) => examples.evaluating(Arc::new(index), source, prepare),
            None => Ok(examples),
        }
    }

    /// The same with the examples to evaluate on that the `evaluation_data` of `source` hold, if it names such.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_evaluation_data<R: Send + 'a>(
        self,
        source: &Source,
        layouts: Layouts<R>,
        prepare: impl Fn(R, &mut Truncation) -> Result<Option<T>> + Send + Sync + 'a,
    ) -> Result<Self>
    where
        T: Send,
    {
        let Some(pattern) = source.evaluation_data else { return Ok(self) };
        let index = RowIndex::open(Pattern::evaluation(pattern), &layouts)?;
        self.evaluating(Arc::new(index), source, of_rows(layouts, prepare))
    }

    fn evaluating(mut self, index: Arc<RowIndex>, source: &Source, prepare: Prepare<'a, T>) -> Result<Self> {
        let rows = index.rows();
        if rows <= source.window.max(MOST_HELD_OUT) {
            let Read { examples, truncation } = read_first(&index, rows, &prepare)?;
            return Ok(self.with_evaluation(examples, truncation));
        }
        self.evaluation_rows = Some(rows);
        self.unread = Some(Unread { index, rows: held_out_rows(rows, 1.0, source.seed), prepare });
        Ok(self)
    }

    fn streamed(source: &Source, index: Arc<RowIndex>, prepare: Prepare<'a, T>) -> Result<Self> {
        let sampled_rows = index.rows().min(SAMPLED_ROWS);
        let Read { examples, truncation } = read_first(&index, sampled_rows, &prepare)?;
        let held_out = held_out_rows(index.rows(), source.share(), source.seed);
        let rows = WindowedRows::new(index.clone(), held_out.clone(), source.window, source.seed);
        let unread = Unread { index: index.clone(), rows: held_out, prepare: prepare.clone() };
        let sample = examples.into_iter().map(Arc::new).collect();
        Ok(Examples {
            steps: source.steps(rows.rows()),
            way: Way::Streamed(Box::new(Streamed {
                index,
                rows,
                window: source.window,
                prepare,
                sample,
                sampled_rows,
                ahead: None,
            })),
            evaluation: Vec::new(),
            unread: Some(unread),
            evaluation_rows: None,
            truncation,
            evaluation_truncation: Truncation::default(),
        })
    }

    /// Examples that are in memory already; unless `source` names others to evaluate on, a share of them is set aside.
    pub fn in_memory(source: &Source, all: Vec<Example<T>>) -> Self {
        let (training, held_out) = evaluation_split(all.len(), source.share(), source.seed);
        let all: Vec<_> = all.into_iter().map(Arc::new).collect();
        let evaluation = held_out.into_iter().map(|index| all[index].clone()).collect();
        let order = Order::new(training.clone(), source.batch_size, source.seed);
        let order = if source.drops_rest { order.without_rest() } else { order };
        Examples {
            steps: source.steps(training.len()),
            way: Way::InMemory { all, training, order },
            evaluation,
            unread: None,
            evaluation_rows: None,
            truncation: Truncation::default(),
            evaluation_truncation: Truncation::default(),
        }
    }

    /// The same with these to evaluate on, where none are set aside, and what was cut and left out of them.
    pub fn with_evaluation(self, evaluation: Vec<Example<T>>, evaluation_truncation: Truncation) -> Self {
        let evaluation = evaluation.into_iter().map(Arc::new).collect();
        Examples { evaluation, evaluation_truncation, unread: None, ..self }
    }

    /// The same, of which it is known what was cut and left out when they were made.
    pub fn counting(self, truncation: Truncation) -> Self {
        Examples { truncation, ..self }
    }

    /// Whether the examples are read as they are needed: counts of other things than rows are estimates then.
    pub fn is_streamed(&self) -> bool {
        matches!(self.way, Way::Streamed(_))
    }

    /// The number of examples to train on; where they are streamed, that of the rows, some of which may hold nothing to learn.
    pub fn len(&self) -> usize {
        self.steps.examples
    }

    /// Whether there is nothing to train on.
    pub fn is_empty(&self) -> bool {
        match &self.way {
            Way::InMemory { training, .. } => training.is_empty(),
            // That all of a sample holds nothing to learn is no accident.
            Way::Streamed(streamed) => streamed.sample.is_empty(),
        }
    }

    /// The number of examples to evaluate on, which may hold rows with nothing to learn as long as they were not read.
    pub fn evaluation_len(&self) -> usize {
        self.evaluation.len() + self.unread.as_ref().map_or(0, |unread| unread.rows.len())
    }

    /// The number of rows of the data to evaluate on, where they are so many that only some of them stand for all.
    pub fn evaluation_rows(&self) -> Option<usize> {
        self.evaluation_rows
    }

    /// The data in which there is nothing to learn from, or nothing to evaluate on, if there are such.
    pub fn nothing_in<'s>(&self, source: &Source<'s>) -> Option<&'s str> {
        let nothing = self.is_empty().then_some(source.data);
        nothing.or(source.evaluation_data.filter(|_| self.evaluation_len() == 0))
    }

    /// Rows among which the order is random, where the examples are streamed.
    pub fn window(&self) -> Option<usize> {
        match &self.way {
            Way::InMemory { .. } => None,
            Way::Streamed(streamed) => Some(streamed.window),
        }
    }

    /// All examples to train on, in the order of the files; `None` where they are streamed.
    pub fn training(&self) -> Option<Vec<Arc<Example<T>>>> {
        match &self.way {
            Way::InMemory { all, training, .. } => Some(training.iter().map(|&index| all[index].clone()).collect()),
            Way::Streamed(_) => None,
        }
    }

    /// All examples to train on, in the order of the files; where they are streamed, those of the first steps, at least `count` if there are so many.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn training_or_some(&mut self, count: usize) -> Result<Vec<Arc<Example<T>>>> {
        if let Some(all) = self.training() {
            return Ok(all);
        }
        let mut some = Vec::new();
        for step in 0..self.steps_per_epoch() {
            if some.len() >= count {
                break;
            }
            some.extend(self.step(step)?);
        }
        Ok(some)
    }

    /// The sum over the examples to train on of what `measure` gives for each, such as its tokens; where they are streamed, an estimate from
    /// the first rows.
    pub fn sum(&self, measure: impl Fn(&T) -> usize) -> usize {
        match &self.way {
            Way::InMemory { all, training, .. } => training.iter().map(|&index| measure(&all[index].value)).sum(),
            Way::Streamed(streamed) => {
                let sampled: usize = streamed.sample.iter().map(|example| measure(&example.value)).sum();
                (sampled as f64 * self.len() as f64 / streamed.sampled_rows as f64).round() as usize
            }
        }
    }

    /// The most rows of one pass in the first `steps` steps: a pass has at most `budget` of them, or is one example
    /// that has more. Of data that are read as they are needed it is what one step in
    /// a thousand would exceed: the mean of those that are known and three standard deviations, and no more than
    /// the largest of them in every place.
    pub fn largest_pass(&self, rows: impl Fn(&T) -> usize, budget: usize, steps: usize) -> usize {
        match &self.way {
            Way::InMemory { all, order, .. } => {
                let rows: Vec<usize> = all.iter().map(|example| rows(&example.value)).collect();
                let mut order = order.clone();
                // What comes after some epochs is hardly larger.
                let steps = steps.min(EPOCHS_LOOKED_AT * order.steps_per_epoch());
                let of_step = |step| {
                    let rows: Vec<usize> = order.step(step).iter().map(|&index| rows[index]).collect();
                    largest_run(&rows, budget)
                };
                (0..steps).map(of_step).max().unwrap_or(0)
            }
            Way::Streamed(streamed) => {
                let rows = streamed.sample.iter().map(|example| rows(&example.value) as f64);
                let (count, batch) = (rows.clone().count().max(1) as f64, self.steps.batch_size as f64);
                let mean = rows.clone().sum::<f64>() / count;
                let variance = rows.clone().map(|rows| (rows - mean).powi(2)).sum::<f64>() / count;
                let largest = rows.fold(0.0, f64::max);
                let of_step = (batch * mean + 3.0 * (batch * variance).sqrt()).min(batch * largest);
                of_step.min((budget as f64).max(largest)) as usize
            }
        }
    }

    /// The same of a pass over all examples to train on; `None` where they are streamed.
    pub fn largest_training_pass(&self, rows: impl Fn(&T) -> usize, budget: usize) -> Option<usize> {
        let Way::InMemory { all, training, .. } = &self.way else { return None };
        let rows: Vec<usize> = training.iter().map(|&index| rows(&all[index].value)).collect();
        Some(largest_run(&rows, budget))
    }

    /// The same of a pass over the examples to evaluate on; where they are not read yet, as if each were the
    /// largest of those that are known.
    pub fn largest_evaluation_pass(&self, rows: impl Fn(&T) -> usize, budget: usize) -> usize {
        if let Some(unread) = self.unread.as_ref().filter(|unread| !unread.rows.is_empty()) {
            let largest = self.known().map(|example| rows(&example.value)).max().unwrap_or(budget);
            return largest.saturating_mul(unread.rows.len()).min(budget.max(largest));
        }
        let rows: Vec<usize> = self.evaluation.iter().map(|example| rows(&example.value)).collect();
        largest_run(&rows, budget)
    }

    /// The largest of what `measure` gives for the examples to train and to evaluate on; `None` where some are not read yet, so that it is not known.
    pub fn largest(&self, measure: impl Fn(&T) -> usize) -> Option<usize> {
        let Way::InMemory { all, .. } = &self.way else { return None };
        if self.unread.is_some() {
            return None;
        }
        let examples = all.iter().chain(&self.evaluation);
        Some(examples.map(|example| measure(&example.value)).max().unwrap_or(0))
    }

    /// All examples to train and to evaluate on that are read already: where they are streamed, those of the
    /// first rows.
    pub fn known(&self) -> impl Iterator<Item = &Example<T>> {
        let known = match &self.way {
            Way::InMemory { all, .. } => all,
            Way::Streamed(streamed) => &streamed.sample,
        };
        // Those that were set aside for evaluation are in `all`, where this is in memory.
        let places: HashSet<_> = known.iter().map(Arc::as_ptr).collect();
        let others = self.evaluation.iter().filter(move |example| !places.contains(&Arc::as_ptr(example)));
        known.iter().chain(others).map(|example| &**example)
    }

    /// What was cut and left out in the data; where they are streamed, in their first rows ([`sampled_rows`](Self::sampled_rows)).
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// Says on the standard error stream what is not learned or read as the data have it.
    pub fn say_remarks(&self) {
        self.truncation.chats.remarks("").iter().for_each(|(_, text)| eprintln!("{text}"));
    }

    /// The same in data of their own to evaluate on, where all of them are read at the start.
    pub fn evaluation_truncation(&self) -> Truncation {
        self.evaluation_truncation
    }

    /// The rows that estimates are made from, where the examples are streamed.
    pub fn sampled_rows(&self) -> Option<usize> {
        match &self.way {
            Way::InMemory { .. } => None,
            Way::Streamed(streamed) => Some(streamed.sampled_rows),
        }
    }

    /// The first examples of the data, in their order, whether they are to train or to evaluate on: at most `count` of them.
    pub fn first(&self, count: usize) -> Result<Vec<Arc<Example<T>>>> {
        let (known, streamed) = match &self.way {
            Way::InMemory { all, .. } => (all, None),
            Way::Streamed(streamed) => (&streamed.sample, Some(streamed)),
        };
        match streamed {
            Some(streamed) if count > known.len() => {
                // Of the rows, some may hold nothing to learn.
                let mut rows = streamed.sampled_rows;
                loop {
                    rows = rows.saturating_add(count).min(streamed.index.rows());
                    let read = read_first(&streamed.index, rows, &streamed.prepare)?.examples;
                    if read.len() >= count || rows == streamed.index.rows() {
                        return Ok(read.into_iter().take(count).map(Arc::new).collect());
                    }
                }
            }
            _ => Ok(known.iter().take(count).cloned().collect()),
        }
    }

    /// The number of steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps.per_epoch()
    }

    /// The number of steps of a run of `epochs`, which may be a fraction, and at most `max_steps`.
    pub fn total_steps(&self, epochs: f64, max_steps: Option<usize>) -> usize {
        self.steps.total(epochs, max_steps)
    }

    /// The examples of optimizer step `step`, the first being 0, in their order. Where they are streamed, rows with nothing to learn make them fewer,
    /// so that there may be none.
    ///
    /// # Errors
    /// Where a file is damaged or has changed, or a row cannot be used, if the examples are streamed.
    pub fn step(&mut self, step: usize) -> Result<Vec<Arc<Example<T>>>> {
        match &mut self.way {
            Way::InMemory { all, order, .. } => Ok(order.step(step).iter().map(|&index| all[index].clone()).collect()),
            Way::Streamed(streamed) => streamed.step(step, &self.steps),
        }
    }

    /// Hands the examples of optimizer step `step` to `work`. Where they are streamed, those of the next step
    /// of `total` are made meanwhile on another thread, unless the program has only one: `work` is most of
    /// the time of a step.
    ///
    /// # Errors
    /// As [`step`](Self::step); what is wrong with the next step's examples is an error of the next step.
    pub fn during<R>(
        &mut self,
        step: usize,
        total: usize,
        work: impl FnOnce(Vec<Arc<Example<T>>>) -> Result<R>,
    ) -> Result<R>
    where
        T: Send + Sync,
    {
        let chosen = self.step(step)?;
        match &mut self.way {
            Way::Streamed(streamed) if step + 1 < total && rayon::current_num_threads() > 1 => {
                streamed.while_making(step + 1, &self.steps, || work(chosen))
            }
            _ => work(chosen),
        }
    }

    /// The examples to evaluate on, in the order of the files. Where they are a share of streamed data, or some of many, they are read when this is first
    /// called, and kept.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluation(&mut self) -> Result<&[Arc<Example<T>>]> {
        if let Some(unread) = self.unread.take() {
            let mut read = Read::new();
            let mut reader = RowReader::new(unread.index);
            reader.read_each(&unread.rows, |rows| read.add(&rows, &unread.prepare))?;
            self.evaluation = read.examples.into_iter().map(Arc::new).collect();
        }
        Ok(&self.evaluation)
    }
}

impl<'s> Source<'s> {
    /// What a program's settings say of the data of `--data`. Examples that are only shown need none to evaluate on.
    pub fn new(
        data: &'s str,
        examples: &'s ExampleSettings,
        training: &TrainingSettings,
        common: &CommonSettings,
    ) -> Self {
        Source {
            data,
            evaluation_data: examples.evaluation_data.as_deref().filter(|_| examples.inspect.is_none()),
            evaluation_share: examples.evaluation_share,
            window: examples.shuffle_window,
            batch_size: training.batch_size,
            drops_rest: false,
            seed: common.seed,
        }
    }

    /// The share of the data to evaluate on.
    fn share(&self) -> f64 {
        if self.evaluation_data.is_some() { 0.0 } else { self.evaluation_share }
    }

    fn steps(&self, examples: usize) -> Steps {
        Steps { examples, batch_size: self.batch_size.max(1), drops_rest: self.drops_rest }
    }
}

#[cfg(test)]
mod tests;
