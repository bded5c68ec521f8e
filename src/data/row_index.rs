//! Where the rows of many Parquet files lie, and reading from any of them on.
//!
//! Rows are numbered through, from 0: those of the first file, then those of the second, and so on. Of each footer only the
//! numbers of rows are kept, so that an index takes 32 bytes a row group, whatever its columns are.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, RowSelection};
use parquet::file::metadata::ParquetMetaData;

use super::parquet::{Rows, files, projection, read_footer, rows_of_groups, total_rows, unreadable, without_panic};
use super::parquet_batches::{ROWS_PER_BATCH, RowBatches, copy_of_row};
use super::parquet_file::ParquetFile;
use super::schema::{Layouts, Origin, Projection, note_unused};
use super::splits::Pattern;
use crate::bail;
use crate::error::Result;

/// Rows decoded at a time where each may be of another page: a batch keeps the pages of all its texts.
const SINGLE_ROWS_PER_BATCH: usize = 16;

/// A row group of one of the files.
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

/// The row groups of the files that a pattern names.
#[derive(Debug, Clone)]
pub struct RowIndex {
    files: Vec<Arc<Path>>,
    groups: Vec<RowGroup>,
    columns: Projection,
}

impl RowIndex {
    /// Reads the footers of the files that `pattern` names (see [`files`]) and checks that records can be made of their columns.
    ///
    /// # Errors
    /// Where a file cannot be read, has none of the layouts, or has a footer whose numbers of rows cannot be true; or where there is not one row
    /// in all of them.
    pub fn open<'p, R>(pattern: impl Into<Pattern<'p>>, layouts: &Layouts<R>) -> Result<Self> {
        let pattern = pattern.into();
        let mut index = RowIndex { files: Vec::new(), groups: Vec::new(), columns: layouts.columns };
        let mut unused = Vec::new();
        for path in files(pattern)? {
            let footer = read_footer(&path)?;
            let file = Arc::<Path>::from(path);
            layouts.check(&file, footer.schema())?;
            unused.extend(layouts.unused_columns(&file, footer.schema()));
            index.add(file, footer.metadata())?;
        }
        if index.groups.is_empty() {
            bail!("{}: a valid Parquet file, but without a single row; name one that has rows", pattern.text);
        }
        note_unused(pattern.text, unused);
        Ok(index)
    }

    fn add(&mut self, file: Arc<Path>, footer: &ParquetMetaData) -> Result<()> {
        let counts = rows_of_groups(&file, footer)?;
        let (mut first_row, mut start) = (0, self.rows());
        for (number, rows) in counts.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            let end = total_rows(&file, start, rows)?;
            let (file, number) = (self.files.len() as u32, number as u32);
            self.groups.push(RowGroup { file, number, first_row, rows: start..end });
            (first_row, start) = (first_row + rows, end);
        }
        self.files.push(file);
        Ok(())
    }

    /// The row groups in the order of the files; none is empty.
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
        Origin { file: self.file(group).clone(), row: group.first_row + (row - group.rows.start) }
    }

    fn file(&self, group: &RowGroup) -> &Arc<Path> {
        &self.files[group.file as usize]
    }

    fn group_of(&self, row: usize) -> &RowGroup {
        &self.groups[self.groups.partition_point(|group| group.rows.end <= row)]
    }
}

/// Reads rows of an indexed set of files. It stays where it is, so that rows in the order of a row group are read in one pass; memory is that
/// of a few pages and of the rows decoded at a time, whatever the size of the row groups.
pub struct RowReader {
    index: Arc<RowIndex>,
    /// The footer read last, with its file's number.
    footer: Option<(u32, ArrowReaderMetadata)>,
    open: Option<OpenGroup>,
}

/// A row group that is being read.
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
        RowReader { index, footer: None, open: None }
    }

    /// The first rows of `rows`, which must not be empty: at least one of them, and none beyond its row group.
    ///
    /// # Errors
    /// Where the file is damaged, ends early or is no longer the file that was indexed.
    pub fn read(&mut self, rows: Range<usize>) -> Result<Rows> {
        let index = self.index.clone();
        let group = index.group_of(rows.start);
        let mut open = match self.open.take().filter(|open| open.next == rows.start && open.next < open.end) {
            Some(open) => open,
            None => {
                let (skipped, all) = (rows.start - group.rows.start, group.rows.len());
                let rest = RowSelection::from_consecutive_ranges(std::iter::once(skipped..all), all);
                let reader = self.open_group(group, ROWS_PER_BATCH, (skipped > 0).then_some(rest))?;
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

    /// Single rows, which must ascend, each handed to `take`. Every row group among them is gone through once, and pages without
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
            let within = here.iter().map(|row| row - group.rows.start);
            let chosen = RowSelection::from_consecutive_ranges(within.map(|row| row..row + 1), group.rows.len());
            let mut reader = self.open_group(group, here.len().min(SINGLE_ROWS_PER_BATCH), Some(chosen))?;
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

    /// Opens a row group after its file's footer, which is read again where it is not at hand.
    fn open_group(&mut self, group: &RowGroup, most_rows: usize, chosen: Option<RowSelection>) -> Result<RowBatches> {
        let file = self.index.file(group).clone();
        let footer = match self.footer.take() {
            Some((number, footer)) if number == group.file => footer,
            _ => read_footer(&file)?,
        };
        let number = group.number as usize;
        let stored = footer.metadata().row_groups().get(number);
        if stored.is_none_or(|stored| stored.num_rows() != group.rows.len() as i64) {
            bail!(
                "{}: the file has changed since its rows were counted; leave it as it is during a run",
                file.display()
            );
        };
        let mask = projection(footer.schema(), footer.parquet_schema(), self.index.columns);
        let handle = ParquetFile::open(&file)?;
        let reader = without_panic(|| RowBatches::open(handle, &footer, vec![number], mask, chosen, most_rows));
        self.footer = Some((group.file, footer));
        reader.map_err(|error| unreadable(&file, group.first_row, error))
    }
}

fn next_batch(reader: &mut RowBatches, origin: &Origin) -> Result<RecordBatch> {
    match without_panic(|| reader.next().transpose()) {
        Ok(Some(batch)) => Ok(batch),
        Ok(None) => Err(unreadable(&origin.file, origin.row, "there are fewer rows than its footer counts")),
        Err(error) => Err(unreadable(&origin.file, origin.row, error)),
    }
}

/// A copy of row `number` of some rows, which is `row` in its file: the others can go.
pub(super) fn single(rows: &Rows, number: usize, row: usize) -> Result<Rows> {
    let batch = copy_of_row(&rows.batch, number).map_err(|error| unreadable(&rows.file, row, error))?;
    Ok(Rows { file: rows.file.clone(), first_row: row, batch })
}
