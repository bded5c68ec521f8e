//! Parquet files in and out: rows are streamed, so that memory does not grow with the data. It is the form that is recommended, and the only one that is
//! written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, RowSelection};
use parquet::arrow::arrow_writer::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, ParquetStatisticsPolicy};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, Length};

use crate::bail;
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::remote::objects;

use super::batches::{BYTES_PER_BATCH, ROWS_PER_BATCH, RowBatches, as_views};
use super::parquet_file::ParquetFile;
use super::table::{Chosen, GroupReader, Projection, Table, advice, has_changed, projection, said, without_panic};
use super::{form, parquet_pages, parquet_structs, thrift};

/// Rows of a row group that is written: what the writer holds in memory.
const ROWS_PER_GROUP: usize = 16 * 1024;
/// The four bytes at which a Parquet file begins and ends.
const MAGIC: &[u8; 4] = b"PAR1";

/// A Parquet file, of whose footer only the columns and the numbers of rows are kept.
pub(super) struct ParquetTable {
    path: Arc<Path>,
    schema: SchemaRef,
    group_rows: Vec<usize>,
}

impl ParquetTable {
    /// Reads the footer of a file.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let footer = read_footer(path)?;
        let group_rows = rows_of_groups(path, footer.metadata())?;
        Ok(ParquetTable { path: path.into(), schema: footer.schema().clone(), group_rows })
    }
}

impl Table for ParquetTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn group_rows(&self) -> &[usize] {
        &self.group_rows
    }

    fn open(self: Arc<Self>, columns: Projection) -> Result<Box<dyn GroupReader>> {
        let footer = read_footer(&self.path)?;
        let same = footer.schema() == &self.schema && rows_of_groups(&self.path, footer.metadata())? == self.group_rows;
        if !same {
            return Err(has_changed(&self.path));
        }
        Ok(Box::new(ParquetReader { table: self, footer, columns }))
    }
}

/// A Parquet file that is being read. Memory is that of a few pages and of the rows decoded at a time, whatever the size of the row groups.
struct ParquetReader {
    table: Arc<ParquetTable>,
    footer: ArrowReaderMetadata,
    columns: Projection,
}

impl GroupReader for ParquetReader {
    fn read(&mut self, group: usize, rows: &Chosen, most_rows: usize) -> Result<RowBatches, String> {
        let all = self.table.group_rows.get(group).copied().unwrap_or(0);
        let selection = match rows {
            Chosen::From(0) => None,
            Chosen::From(first) => Some(RowSelection::from_consecutive_ranges(std::iter::once(*first..all), all)),
            Chosen::Each(rows) => {
                Some(RowSelection::from_consecutive_ranges(rows.iter().map(|&row| row..row + 1), all))
            }
        };
        let columns = ProjectionMask::roots(self.footer.parquet_schema(), projection(&self.table.schema, self.columns));
        let handle = ParquetFile::open(&self.table.path).map_err(|error| error.to_string())?;
        without_panic(|| open_group(handle, &self.footer, group, columns, selection, most_rows))
    }
}

/// Opens the chosen columns and rows (all of them without a choice) of a row group, of which `most_rows` are decoded at a time: fewer where the footer says
/// that they are long. Texts are string views.
fn open_group(
    file: ParquetFile,
    footer: &ArrowReaderMetadata,
    group: usize,
    columns: ProjectionMask,
    rows: Option<RowSelection>,
    most_rows: usize,
) -> parquet::errors::Result<RowBatches> {
    let room = (BYTES_PER_BATCH / foretold_bytes_per_row(footer, group, &columns).max(1)) as usize;
    let batch_size = most_rows.min(ROWS_PER_BATCH).min(room).max(1);
    let fields = as_views(footer.schema().fields());
    let reader = parquet_pages::read(file, footer, &fields, vec![group], columns, rows, batch_size)?;
    Ok(RowBatches::new(reader.map(|batch| batch.map_err(|error| said(&error)))))
}

/// What a footer says of the size of a row group's chosen columns, over its rows.
fn foretold_bytes_per_row(footer: &ArrowReaderMetadata, group: usize, columns: &ProjectionMask) -> u64 {
    let group = footer.metadata().row_group(group);
    let chosen = group.columns().iter().enumerate().filter(|(leaf, _)| columns.leaf_included(*leaf));
    let sizes = chosen.map(|(_, column)| u64::try_from(column.uncompressed_size()).unwrap_or(0));
    let bytes = sizes.fold(0, u64::saturating_add);
    bytes / u64::try_from(group.num_rows()).unwrap_or(0).max(1)
}

/// Reads the footer of a file without its statistics, which nothing here looks at, or says in one sentence what the file is instead of a Parquet file.
fn read_footer(path: &Path) -> Result<ArrowReaderMetadata> {
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
        _ => bail!("{name}: not a Parquet file (it does not begin and end with PAR1); {}", form::KNOWN),
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
fn rows_of_groups(file: &Path, footer: &ParquetMetaData) -> Result<Vec<usize>> {
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
