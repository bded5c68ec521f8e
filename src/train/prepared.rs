//! Rows to examples: records are tokenized in parallel, and everything that is counted, noted or wrong is as
//! if they had been one after another.

use std::sync::Arc;

use rayon::prelude::*;

use super::examples::Example;
use crate::data::notes;
use crate::data::row_index::{RowIndex, RowReader};
use crate::data::schema::Layouts;
use crate::data::table::Rows;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;

/// Records of one task, which takes about a millisecond.
const RECORDS_AT_ONCE: usize = 16;

/// Makes an example, or nothing, of each row.
pub(super) type Prepare<'a, T> = Arc<dyn Fn(&Rows, &mut Truncation) -> Result<Vec<Option<T>>> + Send + Sync + 'a>;

/// Makes examples of rows by what makes them of records.
pub(super) fn of_rows<'a, R: Send + 'a, T: Send>(
    layouts: Layouts<R>,
    prepare: impl Fn(R, &mut Truncation) -> Result<Option<T>> + Send + Sync + 'a,
) -> Prepare<'a, T> {
    Arc::new(move |rows, truncation| in_order(layouts.records(rows)?, truncation, &prepare))
}

/// What `prepare` makes of each record, in their order. It runs in parallel; counts and notes are those of
/// one record after another.
///
/// # Errors
/// That of the first record that has one.
pub fn in_order<R: Send, T: Send>(
    records: Vec<R>,
    truncation: &mut Truncation,
    prepare: impl Fn(R, &mut Truncation) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if records.len() <= RECORDS_AT_ONCE {
        return records.into_iter().map(|record| prepare(record, truncation)).collect();
    }
    let made = records.into_par_iter().with_min_len(RECORDS_AT_ONCE).map(|record| {
        let mut cut = Truncation::default();
        let (made, notes) = notes::held(|| prepare(record, &mut cut));
        (made, cut, notes)
    });
    let made: Vec<_> = made.collect();
    let mut all = Vec::with_capacity(made.len());
    for (made, cut, notes) in made {
        *truncation += cut;
        notes.say();
        all.push(made?);
    }
    Ok(all)
}

/// What was made of some rows.
pub(super) struct Read<T> {
    pub(super) examples: Vec<Example<T>>,
    pub(super) truncation: Truncation,
}

impl<T> Read<T> {
    pub(super) fn new() -> Self {
        Read { examples: Vec::new(), truncation: Truncation::default() }
    }

    pub(super) fn add(&mut self, rows: &Rows, prepare: &Prepare<T>) -> Result<()> {
        for (row, value) in prepare(rows, &mut self.truncation)?.into_iter().enumerate() {
            match value {
                Some(value) => self.examples.push(Example { origin: rows.origin(row), value }),
                None => self.truncation.left_out += 1,
            }
        }
        Ok(())
    }
}

/// Reads the first rows of the indexed files, at most `count`.
pub(super) fn read_first<T>(index: &Arc<RowIndex>, count: usize, prepare: &Prepare<T>) -> Result<Read<T>> {
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
