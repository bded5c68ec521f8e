//! Parquet files in and out: rows are streamed, so that memory does not grow with the data.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::arrow_writer::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, ParquetStatisticsPolicy};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, Length};
use parquet::schema::types::SchemaDescriptor;

use crate::bail;
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::limits;
use crate::remote::objects;

use super::parquet_batches::{ROWS_PER_BATCH, RowBatches};
use super::parquet_file::ParquetFile;
use super::schema::Projection;
use super::splits::{self, Pattern, Wanted};
use super::{parquet_structs, thrift};

/// Rows of a row group that is written: what the writer holds in memory.
const ROWS_PER_GROUP: usize = 16 * 1024;
/// The four bytes at which a Parquet file begins and ends.
const MAGIC: &[u8; 4] = b"PAR1";

/// The Parquet files that `pattern` names, sorted: a file, a folder (every `*.parquet` below it, hidden ones left out; of one with several splits
/// the split that is wanted, see [`splits`]) or a glob (`data/train-*.parquet`), here or in an object store (see [`objects::files`]).
pub fn files<'p>(pattern: impl Into<Pattern<'p>>) -> Result<Vec<PathBuf>> {
    let Pattern { text: pattern, wanted } = pattern.into();
    if objects::is_remote(pattern) {
        let (mut found, readme) = objects::files(pattern)?;
        // A README that cannot be read declares nothing.
        let readme = readme.and_then(|file| objects::read_text(&file, limits::SMALL_FILE).ok());
        of_split(pattern, &mut found, readme.as_deref(), wanted)?;
        return Ok(found);
    }
    let path = Path::new(pattern);
    let mut found = Vec::new();
    if path.is_dir() {
        files_below(path, &mut found)?;
        if found.is_empty() {
            bail!("{pattern}: the folder holds no file whose name ends in .parquet; name a folder that does");
        }
        let readme = Some(path.join("README.md")).filter(|readme| readme.is_file());
        let readme = readme.and_then(|readme| limits::read_text(readme, limits::SMALL_FILE).ok());
        of_split(pattern, &mut found, readme.as_deref(), wanted)?;
    } else if path.exists() {
        found.push(path.to_path_buf());
    } else if pattern.contains(['*', '?', '[']) {
        let matches = glob::glob(pattern)
            .map_err(|error| Error::input(format!("{pattern}: not a valid file pattern: {error}")))?;
        for entry in matches {
            let entry = entry.map_err(|error| {
                let path = error.path().to_path_buf();
                Error::io(path)(error.into())
            })?;
            if entry.is_file() {
                found.push(entry);
            }
        }
        if found.is_empty() {
            bail!("{pattern}: no file matches this pattern");
        }
    } else {
        bail!("{pattern}: there is no such file or folder");
    }
    found.sort();
    Ok(found)
}

/// Leaves of the files below a folder those of the split that is wanted; other patterns name their files one by one.
fn of_split(folder: &str, found: &mut Vec<PathBuf>, readme: Option<&str>, wanted: Wanted) -> Result<()> {
    let folder = folder.trim_end_matches('/');
    let within = |file: &PathBuf| {
        let file = file.to_string_lossy().replace('\\', "/");
        Some(file.strip_prefix(folder)?.trim_start_matches('/').to_owned()).filter(|name| !name.is_empty())
    };
    let Some(names) = found.iter().map(within).collect::<Option<Vec<_>>>() else { return Ok(()) };
    let chosen: BTreeSet<String> = splits::chosen(folder, names, readme, wanted)?.into_iter().collect();
    found.retain(|file| within(file).is_some_and(|name| chosen.contains(&name)));
    Ok(())
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in folder.read_dir().map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            files_below(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "parquet") {
            found.push(path);
        }
    }
    Ok(())
}

/// Some consecutive rows of one file.
#[derive(Debug, Clone)]
pub struct Rows {
    /// The file they are from.
    pub file: Arc<Path>,
    /// The number of the first row in its file, counted from 0.
    pub first_row: usize,
    /// The rows. Texts are string views, of which many may lie in one place.
    pub batch: RecordBatch,
}

/// An iterator over the rows of one or many files, a batch of at most 1,024 rows at a time (fewer where their texts are
/// long), row group by row group.
pub struct ParquetRows {
    files: std::vec::IntoIter<(Arc<Path>, ArrowReaderMetadata)>,
    columns: Projection,
    current: Option<OpenFile>,
    schemas: Vec<(Arc<Path>, SchemaRef)>,
    rows: usize,
}

struct OpenFile {
    file: Arc<Path>,
    next_row: usize,
    reader: RowBatches,
}

impl ParquetRows {
    /// Opens what `pattern` names (see [`files`]) and reads the footer of every file, so that a file that cannot be read
    /// is an error before work begins. It is an error, too, if there is not one row in all of them.
    pub fn open<'p>(pattern: impl Into<Pattern<'p>>) -> Result<Self> {
        let pattern = pattern.into();
        let mut opened = Vec::new();
        let mut rows = 0;
        for path in files(pattern)? {
            let metadata = read_footer(&path)?;
            for count in rows_of_groups(&path, metadata.metadata())? {
                rows = total_rows(&path, rows, count)?;
            }
            opened.push((Arc::<Path>::from(path), metadata));
        }
        if rows == 0 {
            bail!("{}: a valid Parquet file, but without a single row; name one that has rows", pattern.text);
        }
        let schemas = opened.iter().map(|(file, metadata)| (file.clone(), metadata.schema().clone())).collect();
        Ok(Self { files: opened.into_iter(), columns: Projection::All, current: None, schemas, rows })
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

    fn open_file(&self, file: Arc<Path>, metadata: ArrowReaderMetadata) -> Result<OpenFile> {
        let handle = ParquetFile::open(&file)?;
        let columns = projection(metadata.schema(), metadata.parquet_schema(), self.columns);
        let groups = (0..metadata.metadata().num_row_groups()).collect();
        let reader = without_panic(|| RowBatches::open(handle, &metadata, groups, columns, None, ROWS_PER_BATCH));
        let reader = reader.map_err(|error| unreadable(&file, 0, error))?;
        Ok(OpenFile { file, next_row: 0, reader })
    }
}

impl Iterator for ParquetRows {
    type Item = Result<Rows>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(open) = &mut self.current {
                match without_panic(|| open.reader.next().transpose()) {
                    Ok(Some(batch)) => {
                        let rows = Rows { file: open.file.clone(), first_row: open.next_row, batch };
                        open.next_row += rows.batch.num_rows();
                        return Some(Ok(rows));
                    }
                    Err(error) => {
                        let error = unreadable(&open.file, open.next_row, error);
                        // A damaged file ends the stream: what follows could not be told from what was lost.
                        self.current = None;
                        self.files = Vec::new().into_iter();
                        return Some(Err(error));
                    }
                    Ok(None) => self.current = None,
                }
            }
            let (file, metadata) = self.files.next()?;
            match self.open_file(file, metadata) {
                Ok(open) => self.current = Some(open),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Which of a file's columns are decoded.
pub(super) fn projection(schema: &SchemaRef, stored: &SchemaDescriptor, columns: Projection) -> ProjectionMask {
    let Projection::Only(columns) = columns else { return ProjectionMask::all() };
    let fields = schema.fields().iter().enumerate();
    let wanted = fields.filter(|(_, field)| columns.contains(&field.name().as_str())).map(|(index, _)| index);
    ProjectionMask::roots(stored, wanted)
}

pub(super) fn unreadable(file: &Path, row: usize, error: impl std::fmt::Display) -> Error {
    let name = file.display();
    Error::input(format!("{name}: the rows from {row} on cannot be read ({error}); {}", advice(file)))
}

/// What to do where a file's bytes cannot be read or are wrong.
fn advice(file: &Path) -> &'static str {
    match objects::is_remote(file) {
        true => "the connection, the server or the file is at fault: try again, or copy the file here",
        false => "the file is damaged: copy or make it again",
    }
}

/// Reads the footer of a file without its statistics, which nothing here looks at, or says in one sentence what the file is instead of a Parquet file.
pub(super) fn read_footer(path: &Path) -> Result<ArrowReaderMetadata> {
    let file = ParquetFile::open(path)?;
    let name = path.display();
    let length = file.len();
    if length == 0 {
        bail!("{name}: the file is empty (0 bytes), expected a Parquet file");
    }
    let is_magic = |start: u64| file.get_bytes(start, MAGIC.len()).map(|bytes| *bytes == MAGIC[..]);
    // A remote file's beginning would be a request of its own.
    let is_whole = || {
        let ends = length >= 12 && is_magic(length - 4)?;
        Ok((length >= 12 && (ends && objects::is_remote(path) || is_magic(0)?), ends))
    };
    let is_whole: parquet::errors::Result<(bool, bool)> = is_whole();
    let fault = |error| Error::input(format!("{name}: cannot be read ({}); {}", said(&error), advice(path)));
    match is_whole.map_err(fault)? {
        (true, true) => {}
        (true, false) => {
            bail!(
                "{name}: the Parquet file is truncated (its last bytes, the footer, are missing); copy or make it again"
            )
        }
        _ => bail!("{name}: not a Parquet file (it does not begin and end with PAR1); convert it to Parquet first"),
    }
    let unreadable = |reason: &str| {
        Error::input(format!("{name}: the footer of the Parquet file cannot be read ({reason}); {}", advice(path)))
    };
    let options = ArrowReaderOptions::new()
        .with_column_stats_policy(ParquetStatisticsPolicy::SkipAll)
        .with_size_stats_policy(ParquetStatisticsPolicy::SkipAll)
        .with_encoding_stats_policy(ParquetStatisticsPolicy::SkipAll);
    let decoded = without_panic(|| {
        let bytes = footer_bytes(&file)?;
        let metadata = ParquetMetaDataReader::decode_metadata_with_options(&bytes, Some(options.metadata_options()))?;
        ArrowReaderMetadata::try_new(Arc::new(metadata), options)
    });
    decoded.map_err(|reason| unreadable(&reason))
}

/// The struct that is the footer, looked at (see [`thrift`]): it ends before the last eight bytes of a file, of which the first four are its length.
fn footer_bytes(file: &ParquetFile) -> parquet::errors::Result<Vec<u8>> {
    let end = file.len() - 8;
    let mut length = [0; 4];
    length.copy_from_slice(&file.get_bytes(end, 4)?);
    let length = u32::from_le_bytes(length);
    let start = end.checked_sub(u64::from(length)).ok_or_else(|| {
        ParquetError::EOF(format!("it is said to be {length} bytes long, more than there are in the file"))
    })?;
    let bytes = file.get_bytes(start, length as usize)?;
    Ok(thrift::read_struct(&mut &bytes[..], parquet_structs::FOOTER)?)
}

/// The numbers of rows of a file's row groups, which must be possible.
pub(super) fn rows_of_groups(file: &Path, footer: &ParquetMetaData) -> Result<Vec<usize>> {
    let (name, all) = (file.display(), footer.file_metadata().num_rows());
    let mut sum = 0i64;
    let mut counts = Vec::with_capacity(footer.num_row_groups());
    for (number, group) in footer.row_groups().iter().enumerate() {
        let rows = group.num_rows();
        let (Ok(count), Some(total)) = (usize::try_from(rows), sum.checked_add(rows)) else {
            bail!(
                "{name}: the footer gives row group {number} (counted from 0) {rows} rows, which cannot be; the file is \
                 damaged: copy or make it again"
            );
        };
        counts.push(count);
        sum = total;
    }
    if sum != all {
        bail!("{name}: the footer counts {all} rows, its row groups {sum}; the file is damaged: copy or make it again");
    }
    Ok(counts)
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

/// Runs a step of the Parquet reader, which takes some numbers of a file on trust and panics where damage made them
/// impossible; what it was working on must be dropped then.
pub(super) fn without_panic<T, E: std::fmt::Display>(step: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match limits::without_panic(step) {
        Some(result) => result.map_err(|error| said(&error)),
        None => Err("it holds impossible numbers".to_owned()),
    }
}

/// What an error says, without the word by which the Parquet reader marks those that are not its own.
fn said(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.strip_prefix("External: ").map_or(text.clone(), str::to_owned)
}

/// Writes a Parquet file (zstd) that appears under its name only when it is complete, at [`finish`](Self::finish) (see
/// [`OutputFile`]). Dropped unfinished, it leaves nothing.
pub struct ParquetWriter {
    path: PathBuf,
    writer: ArrowWriter<OutputFile>,
}

impl ParquetWriter {
    /// Begins a file at `path` for batches of this schema.
    pub fn create(path: impl AsRef<Path>, schema: SchemaRef) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = OutputFile::create(&path)?;
        // Without it other programs read dates in milliseconds as numbers: Parquet has dates in days alone.
        let has_dates = schema.flattened_fields().iter().any(|field| *field.data_type() == DataType::Date64);
        let properties = WriterProperties::builder()
            .set_coerce_types(has_dates)
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
            .build();
        let writer = ArrowWriter::try_new(file, schema, Some(properties)).map_err(|error| unwritable(&path, error))?;
        Ok(Self { path, writer })
    }

    /// Appends rows.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.writer.write(batch).map_err(|error| unwritable(&self.path, error))
    }

    /// Writes the footer and gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.writer.into_inner().map_err(|error| unwritable(&self.path, error))?.commit()
    }
}

fn unwritable(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::input(format!("{}: the Parquet file cannot be written ({error})", path.display()))
}

/// Writes one batch as a file of its own (see [`ParquetWriter`]).
pub fn write(path: impl AsRef<Path>, batch: &RecordBatch) -> Result<()> {
    let mut writer = ParquetWriter::create(path, batch.schema())?;
    writer.write(batch)?;
    writer.finish()
}
