//! Files of rows, whatever their form: one trait for all of them, and their rows in order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::arrow_ipc::IpcTable;
use super::batches::{ROWS_PER_BATCH, RowBatches};
use super::csv::CsvTable;
use super::data_file::{DataFile, Version};
use super::files::files;
use super::form::{self, Form};
use super::json_rows::JsonTable;
use super::parquet::ParquetTable;
use super::splits::Pattern;
use crate::error::{Error, Result};
use crate::limits;
use crate::remote::objects;

/// Some consecutive rows of one file.
#[derive(Debug, Clone)]
pub struct Rows {
    /// The file they are from.
    pub file: Arc<Path>,
    /// The number of the first row in its file, counted from 0.
    pub first_row: usize,
    /// The rows. Texts may be string views, of which many are in one place.
    pub batch: RecordBatch,
}

/// Which columns of a file are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// All of them.
    All,
    /// Those of these names that the file has.
    Only(&'static [&'static str]),
}

/// A file of rows. Its rows are in groups, any of which can be read without the others: a row group of Parquet, a batch of Arrow, a part of a text file.
pub(super) trait Table: Send + Sync {
    /// The columns.
    fn schema(&self) -> &SchemaRef;

    /// The number of rows of each group. They come from the file, and are not checked against one another.
    fn group_rows(&self) -> &[usize];

    /// Opens it for reading these columns.
    ///
    /// # Errors
    /// Where it cannot be opened, or is no longer the file that it was.
    fn open(self: Arc<Self>, columns: Projection) -> Result<Box<dyn GroupReader>>;
}

/// A table that is open.
pub(super) trait GroupReader: Send {
    /// The chosen rows of a group, at most so many decoded at a time. Errors are reasons, to be a part of a sentence.
    fn read(&mut self, group: usize, rows: &Chosen, most_rows: usize) -> Result<RowBatches, String>;
}

/// Rows of a group, counted from its first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Chosen {
    /// From this one on.
    From(usize),
    /// Each of these, which ascend.
    Each(Vec<usize>),
}

impl Chosen {
    /// Whether a row is chosen. Rows are asked for in their order, and `next` is where the list was left.
    pub(super) fn holds(&self, row: usize, next: &mut usize) -> bool {
        match self {
            Chosen::From(first) => row >= *first,
            Chosen::Each(rows) => {
                let is_chosen = rows.get(*next) == Some(&row);
                *next += usize::from(is_chosen);
                is_chosen
            }
        }
    }
}

/// Rows that any file may say that it has, and further rows by its length: a column of one value takes less than a bit a row. More are not believed, as
/// room may be made for something of each.
const MOST_ROWS: u128 = 1 << 20;
const ROWS_PER_BYTE: u64 = 1 << 13;

/// Tables that took a pass over the whole file to open, with the version of the file: several parts of a program read the same data.
static INDEXED: Mutex<BTreeMap<PathBuf, Indexed>> = Mutex::new(BTreeMap::new());

type Indexed = (Version, Arc<dyn Table>);

/// Opens a file of rows in any of the forms (see [`form`]). Parquet and Arrow files are read by their footers; others are read through once.
///
/// # Errors
/// Where it cannot be read, is in none of the forms, or is damaged.
pub(super) fn open(path: &Path) -> Result<Arc<dyn Table>> {
    let file = DataFile::open(path)?;
    let version = file.version().map_err(|error| unreadable(path, error))?;
    let table = open_version(path, file, version)?;
    let most = MOST_ROWS + u128::from(version.length()) * u128::from(ROWS_PER_BYTE);
    let rows: u128 = table.group_rows().iter().map(|rows| *rows as u128).sum();
    if rows > most {
        return Err(unreadable(path, format!("its {} bytes are said to hold {rows} rows", version.length())));
    }
    Ok(table)
}

fn open_version(path: &Path, file: DataFile, version: Version) -> Result<Arc<dyn Table>> {
    // A look at a remote file's beginning would be a request of its own.
    if objects::is_remote(path) && form::has_extension(path, "parquet") {
        return Ok(Arc::new(ParquetTable::open(path)?));
    }
    let lock = || INDEXED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, table)) = lock().get(path).filter(|(known, _)| *known == version) {
        return Ok(table.clone());
    }
    let source = form::recognise(path, file)?;
    let table: Arc<dyn Table> = match source.form {
        Form::Parquet => return Ok(Arc::new(ParquetTable::open(path)?)),
        Form::JsonLines | Form::JsonArray => Arc::new(JsonTable::open(path, source)?),
        Form::Csv { delimiter } => Arc::new(CsvTable::open(path, source, delimiter)?),
        Form::ArrowFile | Form::ArrowStream => Arc::new(IpcTable::open(path, source)?),
    };
    if version.is_settled() {
        lock().insert(path.to_path_buf(), (version, table.clone()));
    }
    Ok(table)
}

/// An iterator over the rows of one or many files, a batch of at most 1,024 rows at a time (fewer where their texts are long).
pub struct TableRows {
    tables: std::vec::IntoIter<(Arc<Path>, Arc<dyn Table>)>,
    columns: Projection,
    current: Option<OpenTable>,
    schemas: Vec<(Arc<Path>, SchemaRef)>,
    rows: usize,
}

struct OpenTable {
    file: Arc<Path>,
    next_row: usize,
    groups: std::ops::Range<usize>,
    reader: Box<dyn GroupReader>,
    batches: Option<RowBatches>,
}

impl TableRows {
    /// Opens what `pattern` names (see [`files`]), so that a file that cannot be read is an error before work begins. It is an error, too, if there is
    /// not one row in all of them.
    pub fn open<'p>(pattern: impl Into<Pattern<'p>>) -> Result<Self> {
        let pattern = pattern.into();
        let mut opened = Vec::new();
        let mut rows = 0;
        for path in files(pattern)? {
            let table = open(&path)?;
            for &count in table.group_rows() {
                rows = total_rows(&path, rows, count)?;
            }
            opened.push((Arc::<Path>::from(path), table));
        }
        if rows == 0 {
            return Err(no_rows(pattern.text));
        }
        let schemas = opened.iter().map(|(file, table)| (file.clone(), table.schema().clone())).collect();
        Ok(Self { tables: opened.into_iter(), columns: Projection::All, current: None, schemas, rows })
    }

    /// Decodes only these columns.
    pub fn only(mut self, columns: Projection) -> Self {
        self.columns = columns;
        self
    }

    /// The number of rows in all files.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Every file with its schema.
    pub fn schemas(&self) -> &[(Arc<Path>, SchemaRef)] {
        &self.schemas
    }
}

impl OpenTable {
    /// The next batch of the table, if there is one, or the reason why it cannot be read.
    fn next(&mut self) -> Result<Option<RecordBatch>, String> {
        loop {
            if let Some(batches) = &mut self.batches {
                match batches.next().transpose()? {
                    Some(batch) => return Ok(Some(batch)),
                    None => self.batches = None,
                }
            }
            let Some(group) = self.groups.next() else { return Ok(None) };
            self.batches = Some(self.reader.read(group, &Chosen::From(0), ROWS_PER_BATCH)?);
        }
    }
}

impl Iterator for TableRows {
    type Item = Result<Rows>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(open) = &mut self.current {
                match without_panic(|| open.next()) {
                    Ok(Some(batch)) => {
                        let rows = Rows { file: open.file.clone(), first_row: open.next_row, batch };
                        open.next_row += rows.batch.num_rows();
                        return Some(Ok(rows));
                    }
                    Err(error) => {
                        let error = unreadable_rows(&open.file, open.next_row, error);
                        // A damaged file ends the stream: what follows could not be told from what was lost.
                        self.current = None;
                        self.tables = Vec::new().into_iter();
                        return Some(Err(error));
                    }
                    Ok(None) => self.current = None,
                }
            }
            let (file, table) = self.tables.next()?;
            let groups = 0..table.group_rows().len();
            match table.open(self.columns) {
                Ok(reader) => self.current = Some(OpenTable { file, next_row: 0, groups, reader, batches: None }),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The sentence for data without rows.
pub(super) fn no_rows(pattern: &str) -> Error {
    Error::input(format!("{pattern}: there is not a single row in it; name data that has rows"))
}

/// The sentence for a file whose bytes cannot be read.
pub(super) fn unreadable(file: &Path, error: impl std::fmt::Display) -> Error {
    Error::input(format!("{}: cannot be read ({error}); {}", file.display(), advice(file)))
}

/// The sentence for rows that cannot be read.
pub(super) fn unreadable_rows(file: &Path, row: usize, error: impl std::fmt::Display) -> Error {
    let name = file.display();
    Error::input(format!("{name}: the rows from {row} on cannot be read ({error}); {}", advice(file)))
}

/// What to do where a file's bytes cannot be read or are wrong.
pub(super) fn advice(file: &Path) -> &'static str {
    match objects::is_remote(file) {
        true => "the connection, the server or the file is at fault: try again, or copy the file here",
        false => "the file is damaged: copy or make it again",
    }
}

/// The sentence for a file that is not what it was when it was opened first.
pub(super) fn has_changed(file: &Path) -> Error {
    Error::input(format!(
        "{}: the file has changed since its rows were counted; leave it as it is during a run",
        file.display()
    ))
}

/// Adds to a number of rows, up to what can be counted.
pub(super) fn total_rows(file: &Path, rows: usize, more: usize) -> Result<usize> {
    let counted = rows.checked_add(more).filter(|&total| i64::try_from(total).is_ok());
    counted.ok_or_else(|| {
        Error::input(format!(
            "{}: with its rows there are more than can be counted; the file is damaged: copy or make it again",
            file.display()
        ))
    })
}

/// Runs a step of a reader that is not ours, which takes some numbers of a file on trust and panics where damage made them impossible; what it was
/// working on must be dropped then.
pub(super) fn without_panic<T, E: std::fmt::Display>(step: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match limits::without_panic(step) {
        Some(result) => result.map_err(|error| said(&error)),
        None => Err("it holds impossible numbers".to_owned()),
    }
}

/// What an error says, without the words by which readers mark those that are not their own.
pub(super) fn said(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.strip_prefix("External: ").map_or(text.clone(), str::to_owned)
}

/// The columns that a schema has of those that are read, by their places in it.
pub(super) fn projection(schema: &SchemaRef, columns: Projection) -> Vec<usize> {
    let is_wanted = |name: &str| match columns {
        Projection::All => true,
        Projection::Only(columns) => columns.contains(&name),
    };
    let fields = schema.fields().iter().enumerate();
    fields.filter(|(_, field)| is_wanted(field.name())).map(|(index, _)| index).collect()
}
