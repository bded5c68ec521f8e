//! Where the rows of many files are, and reading from any of them on.
//!
//! Rows are numbered through, from 0: those of the first file, then those of the second, and so on. Of Parquet files only the columns and the numbers of
//! rows are kept, of text files the places of every 1,024th row or so, so that an index takes some 64 bytes a group of rows, whatever its columns are.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;

use super::batches::{ROWS_PER_BATCH, RowBatches, copy_of_row};
use super::files::files;
use super::schema::{Layouts, Origin, Projection, note_unused};
use super::splits::Pattern;
use super::table::{self, Chosen, GroupReader, Rows, Table, no_rows, total_rows, unreadable_rows, without_panic};
use crate::error::Result;

/// Rows decoded at a time where each may be of another page: a batch keeps the pages of all its texts.
const SINGLE_ROWS_PER_BATCH: usize = 16;

/// A group of rows of one of the files, which can be read without the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowGroup {
    /// Its file's number.
    file: u32,
    /// Its number in its file.
    number: u32,
    /// The number of its first row in its file.
    first_row: usize,
    /// Its rows, numbered through all files.
    pub rows: Range<usize>,
}

/// The groups of rows of the files that a pattern names.
#[derive(Clone)]
pub struct RowIndex {
    files: Vec<(Arc<Path>, Arc<dyn Table>)>,
    groups: Vec<RowGroup>,
    columns: Projection,
}

impl RowIndex {
    /// Opens the files that `pattern` names (see [`files`]) and checks that records can be made of their columns.
    ///
    /// # Errors
    /// Where a file cannot be read, has none of the layouts, or has numbers of rows that cannot be true; or where there is not one row in all of them.
    pub fn open<'p, R>(pattern: impl Into<Pattern<'p>>, layouts: &Layouts<R>) -> Result<Self> {
        let pattern = pattern.into();
        let mut index = RowIndex { files: Vec::new(), groups: Vec::new(), columns: layouts.columns };
        let mut unused = Vec::new();
        for path in files(pattern)? {
            let table = table::open(&path)?;
            let file = Arc::<Path>::from(path);
            layouts.check(&file, table.schema())?;
            unused.extend(layouts.unused_columns(&file, table.schema()));
            index.add(file, table)?;
        }
        if index.groups.is_empty() {
            return Err(no_rows(pattern.text));
        }
        note_unused(pattern.text, unused);
        Ok(index)
    }

    fn add(&mut self, file: Arc<Path>, table: Arc<dyn Table>) -> Result<()> {
        let (mut first_row, mut start) = (0, self.rows());
        for (number, &rows) in table.group_rows().iter().enumerate().filter(|(_, rows)| **rows > 0) {
            let end = total_rows(&file, start, rows)?;
            let (file, number) = (self.files.len() as u32, number as u32);
            self.groups.push(RowGroup { file, number, first_row, rows: start..end });
            (first_row, start) = (first_row + rows, end);
        }
        self.files.push((file, table));
        Ok(())
    }

    /// The groups in the order of the files; none is empty.
    pub fn groups(&self) -> &[RowGroup] {
        &self.groups
    }

    /// The number of rows in all files.
    pub fn rows(&self) -> usize {
        self.groups.last().map_or(0, |group| group.rows.end)
    }

    /// The file and the row in it of a row that is numbered through.
    pub fn origin(&self, row: usize) -> Origin {
        let group = self.group_of(row);
        Origin { file: self.files[group.file as usize].0.clone(), row: group.first_row + (row - group.rows.start) }
    }

    fn group_of(&self, row: usize) -> &RowGroup {
        &self.groups[self.groups.partition_point(|group| group.rows.end <= row)]
    }
}

/// Reads rows of an indexed set of files. It stays where it is, so that rows in the order of a group are read in one pass.
pub struct RowReader {
    index: Arc<RowIndex>,
    /// The file read last, with its number.
    file: Option<(u32, Box<dyn GroupReader>)>,
    open: Option<OpenGroup>,
}

/// A group that is being read.
struct OpenGroup {
    reader: RowBatches,
    /// Decoded rows that were not asked for yet, and the number of the first of them.
    rest: Option<RecordBatch>,
    next: usize,
    end: usize,
}

impl RowReader {
    /// A reader of these files.
    pub fn new(index: Arc<RowIndex>) -> Self {
        RowReader { index, file: None, open: None }
    }

    /// The first rows of `rows`, which must not be empty: at least one of them, and none beyond its group.
    ///
    /// # Errors
    /// Where the file is damaged, ends early or is no longer the file that was indexed.
    pub fn read(&mut self, rows: Range<usize>) -> Result<Rows> {
        let index = self.index.clone();
        let group = index.group_of(rows.start);
        let mut open = match self.open.take().filter(|open| open.next == rows.start && open.next < open.end) {
            Some(open) => open,
            None => {
                let rest = Chosen::From(rows.start - group.rows.start);
                let reader = self.open_group(group, ROWS_PER_BATCH, &rest)?;
                OpenGroup { reader, rest: None, next: rows.start, end: group.rows.end }
            }
        };
        let origin = index.origin(rows.start);
        let mut batch = match open.rest.take() {
            Some(batch) => batch,
            None => next_batch(&mut open.reader, &origin)?,
        };
        let wanted = rows.end.min(open.end) - rows.start;
        if batch.num_rows() > wanted {
            open.rest = Some(batch.slice(wanted, batch.num_rows() - wanted));
            batch = batch.slice(0, wanted);
        }
        open.next += batch.num_rows();
        self.open = Some(open);
        Ok(Rows { file: origin.file, first_row: origin.row, batch })
    }

    /// Single rows, which must ascend, each handed to `take`. Every group among them is gone through once, and pages without
    /// any of them are skipped where the file allows it.
    ///
    /// # Errors
    /// As [`read`](Self::read), and those of `take`.
    pub fn read_each(&mut self, rows: &[usize], mut take: impl FnMut(Rows) -> Result<()>) -> Result<()> {
        let index = self.index.clone();
        let mut left = rows;
        while let Some(&first) = left.first() {
            let group = index.group_of(first);
            let (here, later) = left.split_at(left.partition_point(|&row| row < group.rows.end));
            let chosen = Chosen::Each(here.iter().map(|row| row - group.rows.start).collect());
            let mut reader = self.open_group(group, here.len().min(SINGLE_ROWS_PER_BATCH), &chosen)?;
            let mut here = here.iter();
            while here.len() > 0 {
                let origin = index.origin(here.as_slice()[0]);
                let batch = next_batch(&mut reader, &origin)?;
                for (number, &row) in (0..batch.num_rows()).zip(&mut here) {
                    let Origin { file, row: first_row } = index.origin(row);
                    take(single(&Rows { file, first_row, batch: batch.clone() }, number, first_row)?)?;
                }
            }
            left = later;
        }
        Ok(())
    }

    /// Opens a group of a file, which is opened where it is not the one read last.
    fn open_group(&mut self, group: &RowGroup, most_rows: usize, chosen: &Chosen) -> Result<RowBatches> {
        let (file, table) = &self.index.files[group.file as usize];
        let mut reader = match self.file.take() {
            Some((number, reader)) if number == group.file => reader,
            _ => table.clone().open(self.index.columns)?,
        };
        let batches = without_panic(|| reader.read(group.number as usize, chosen, most_rows));
        self.file = Some((group.file, reader));
        batches.map_err(|error| unreadable_rows(file, group.first_row, error))
    }
}

fn next_batch(reader: &mut RowBatches, origin: &Origin) -> Result<RecordBatch> {
    match without_panic(|| reader.next().transpose()) {
        Ok(Some(batch)) => Ok(batch),
        Ok(None) => Err(unreadable_rows(&origin.file, origin.row, "there are fewer rows than were counted")),
        Err(error) => Err(unreadable_rows(&origin.file, origin.row, error)),
    }
}

/// A copy of row `number` of some rows, which is `row` in its file: the others can go.
pub(super) fn single(rows: &Rows, number: usize, row: usize) -> Result<Rows> {
    let batch = copy_of_row(&rows.batch, number).map_err(|error| unreadable_rows(&rows.file, row, error))?;
    Ok(Rows { file: rows.file.clone(), first_row: row, batch })
}
