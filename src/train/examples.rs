//! The examples that a program learns from, by optimizer step: in memory where they are few, read as they are needed where they are many.
//!
//! Data of at most one window of rows ([`Source::window`]) are read, prepared and kept whole at the start, so that every count is exact and a row
//! that cannot be used is found before training; so are examples that were made in memory. Of larger data only the footers are
//! read at the start; a step's rows are decoded and prepared when the step comes ([`crate::data::window`]), so that memory is that of a window.
//! Either way a step's examples depend on the seed, the step and the files alone.

use std::sync::Arc;

use super::order::{Order, Steps, evaluation_split, held_out_rows};
use crate::data::parquet::Rows;
use crate::data::row_index::{RowIndex, RowReader};
use crate::data::schema::{Layouts, Origin};
use crate::data::tokenize_records::Truncation;
use crate::data::window::WindowedRows;
use crate::error::Result;

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

/// Which rows a program learns from, and in which order.
#[derive(Debug, Clone, Copy)]
pub struct Source<'s> {
    /// A Parquet file, folder or glob.
    pub data: &'s str,
    /// The same of the examples to evaluate on; they are kept in memory, all of them.
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
    evaluation: Option<Vec<Arc<Example<T>>>>,
    way: Way<'a, T>,
    truncation: Truncation,
    left_out: usize,
}

enum Way<'a, T> {
    InMemory { all: Vec<Arc<Example<T>>>, training: Vec<usize>, order: Order },
    Streamed(Box<Streamed<'a, T>>),
}

/// Examples that are made when they are asked for.
struct Streamed<'a, T> {
    index: Arc<RowIndex>,
    rows: WindowedRows,
    held_out: Vec<usize>,
    prepare: Prepare<'a, T>,
    /// The examples of the first rows.
    sample: Vec<Arc<Example<T>>>,
    sampled_rows: usize,
}

/// Makes an example, or nothing, of each row.
type Prepare<'a, T> = Box<dyn Fn(&Rows, &mut Truncation) -> Result<Vec<Option<T>>> + 'a>;

impl<'a, T> Examples<'a, T> {
    /// The examples that `prepare` makes of the records of `source`; where it gives `None`, there is nothing to learn from a row. It counts
    /// what it cuts.
    ///
    /// # Errors
    /// Where a file cannot be read or has none of the layouts; and where a row cannot be used, if the data fit in memory.
    pub fn open<R: 'a>(
        source: &Source,
        layouts: Layouts<R>,
        prepare: impl Fn(R, &mut Truncation) -> Result<Option<T>> + 'a,
    ) -> Result<Self> {
        let index = RowIndex::open(source.data, &layouts)?;
        let evaluation = source.evaluation_data.map(|pattern| RowIndex::open(pattern, &layouts)).transpose()?;
        let prepare: Prepare<T> = Box::new(move |rows, truncation| {
            layouts.records(rows)?.into_iter().map(|record| prepare(record, truncation)).collect()
        });
        let whole = index.rows() <= source.window;
        let sampled_rows = if whole { index.rows() } else { index.rows().min(SAMPLED_ROWS) };
        let index = Arc::new(index);
        let read = read_first(&index, sampled_rows, &prepare)?;
        let evaluation = match evaluation {
            Some(index) => Some(read_first(&Arc::new(index), usize::MAX, &prepare)?.examples),
            None => None,
        };
        let mut examples = if whole {
            Examples::in_memory(source, read.examples, evaluation)
        } else {
            let share = if evaluation.is_some() { 0.0 } else { source.evaluation_share };
            let held_out = held_out_rows(index.rows(), share, source.seed);
            let rows = WindowedRows::new(index.clone(), held_out.clone(), source.window, source.seed);
            let steps = source.steps(rows.rows());
            let sample = read.examples.into_iter().map(Arc::new).collect();
            let way = Way::Streamed(Box::new(Streamed { index, rows, held_out, prepare, sample, sampled_rows }));
            let evaluation = evaluation.map(|examples| examples.into_iter().map(Arc::new).collect());
            Examples { steps, evaluation, way, truncation: Truncation::default(), left_out: 0 }
        };
        (examples.truncation, examples.left_out) = (read.truncation, read.left_out);
        Ok(examples)
    }

    /// Examples that are in memory already, and those to evaluate on; without these, a share of all is set aside.
    pub fn in_memory(source: &Source, all: Vec<Example<T>>, evaluation: Option<Vec<Example<T>>>) -> Self {
        let share = if evaluation.is_some() { 0.0 } else { source.evaluation_share };
        let (training, held_out) = evaluation_split(all.len(), share, source.seed);
        let all: Vec<_> = all.into_iter().map(Arc::new).collect();
        let evaluation = match evaluation {
            Some(examples) => examples.into_iter().map(Arc::new).collect(),
            None => held_out.into_iter().map(|index| all[index].clone()).collect(),
        };
        let order = Order::new(training.clone(), source.batch_size, source.seed);
        let order = if source.drops_rest { order.without_rest() } else { order };
        Examples {
            steps: source.steps(training.len()),
            evaluation: Some(evaluation),
            way: Way::InMemory { all, training, order },
            truncation: Truncation::default(),
            left_out: 0,
        }
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
        match (&self.evaluation, &self.way) {
            (Some(examples), _) => examples.len(),
            (None, Way::Streamed(streamed)) => streamed.held_out.len(),
            (None, Way::InMemory { .. }) => 0,
        }
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

    /// The largest of what `measure` gives for the examples to train and to evaluate on; `None` where they are streamed, so that it is not known.
    pub fn largest(&self, measure: impl Fn(&T) -> usize) -> Option<usize> {
        let Way::InMemory { all, .. } = &self.way else { return None };
        let examples = all.iter().chain(self.evaluation.iter().flatten());
        Some(examples.map(|example| measure(&example.value)).max().unwrap_or(0))
    }

    /// What was cut in the data; where they are streamed, in their first rows ([`sampled_rows`](Self::sampled_rows)).
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// Rows in which there was nothing to learn; where the data are streamed, among their first rows.
    pub fn left_out(&self) -> usize {
        self.left_out
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
            Way::Streamed(streamed) => {
                let (epoch, places) = self.steps.places(step);
                let mut read = Read::new();
                for rows in streamed.rows.at(epoch, places)? {
                    read.add(&rows, &streamed.prepare)?;
                }
                Ok(read.examples.into_iter().map(Arc::new).collect())
            }
        }
    }

    /// The examples to evaluate on, in the order of the files. Where they are a share of streamed data, they are read when this is first called, and kept.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluation(&mut self) -> Result<&[Arc<Example<T>>]> {
        let examples = match (self.evaluation.take(), &self.way) {
            (Some(examples), _) => examples,
            (None, Way::InMemory { .. }) => Vec::new(),
            (None, Way::Streamed(streamed)) => {
                let mut read = Read::new();
                let mut reader = RowReader::new(streamed.index.clone());
                reader.read_each(&streamed.held_out, |rows| read.add(&rows, &streamed.prepare))?;
                read.examples.into_iter().map(Arc::new).collect()
            }
        };
        Ok(self.evaluation.insert(examples))
    }
}

impl Source<'_> {
    fn steps(&self, examples: usize) -> Steps {
        Steps { examples, batch_size: self.batch_size.max(1), drops_rest: self.drops_rest }
    }
}

/// What was made of some rows.
struct Read<T> {
    examples: Vec<Example<T>>,
    truncation: Truncation,
    left_out: usize,
}

impl<T> Read<T> {
    fn new() -> Self {
        Read { examples: Vec::new(), truncation: Truncation::default(), left_out: 0 }
    }

    fn add(&mut self, rows: &Rows, prepare: &Prepare<T>) -> Result<()> {
        for (row, value) in prepare(rows, &mut self.truncation)?.into_iter().enumerate() {
            match value {
                Some(value) => self.examples.push(Example { origin: rows.origin(row), value }),
                None => self.left_out += 1,
            }
        }
        Ok(())
    }
}

/// Reads the first rows of the indexed files, at most `count`.
fn read_first<T>(index: &Arc<RowIndex>, count: usize, prepare: &Prepare<T>) -> Result<Read<T>> {
    let (mut read, mut reader) = (Read::new(), RowReader::new(index.clone()));
    for group in index.groups() {
        let mut left = group.rows.start..group.rows.end.min(count);
        while !left.is_empty() {
            let rows = reader.read(left.clone())?;
            left.start += rows.batch.num_rows();
            read.add(&rows, prepare)?;
        }
    }
    Ok(read)
}
