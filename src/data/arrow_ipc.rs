//! Arrow files: the IPC format as a file (Feather 2) and as a stream, which is what `datasets` has in its cache.
//!
//! A record batch is read as a whole, so that memory is that of the largest of them. The numbers of a file are looked at before the reader takes them:
//! where a length goes beyond the file, or a compressed buffer beyond what a batch may have, the program would end without a word.
//! Source: "Arrow Columnar Format", sections "IPC Streaming Format" and "IPC File Format".

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{RecordBatch, UInt32Array};
use arrow::buffer::Buffer;
use arrow::compute::{cast, take_record_batch};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::{FileDecoder, read_footer_length};
use arrow::ipc::{self, Block, MessageHeader, MetadataVersion, root_as_footer, root_as_message};
use bytes::Bytes;

use super::batches::{ROWS_PER_BATCH, RowBatches, as_views};
use super::data_file::{DataFile, Version};
use super::form::{Form, Source};
use super::table::{Chosen, GroupReader, Projection, Table, advice, has_changed, projection, said, without_panic};
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// Bytes of what describes a batch, at most.
const MOST_METADATA: u64 = 16 << 20;
/// The mark before the length of a message; early writers left it out.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// The bytes at which an Arrow file begins and, behind its footer, ends.
const MAGIC: &[u8; 6] = b"ARROW1";

/// Where a message is in a file: what describes it, and what it holds.
#[derive(Debug, Clone, Copy)]
struct Place {
    start: u64,
    metadata: u64,
    body: u64,
}

impl Place {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.metadata).saturating_add(self.body)
    }

    fn block(&self) -> Block {
        // Neither is larger than a file, nor the first than `MOST_METADATA`.
        Block::new(self.start as i64, self.metadata as i32, self.body as i64)
    }
}

/// An Arrow file: where its batches are.
pub(super) struct IpcTable {
    path: Arc<Path>,
    file: DataFile,
    version: Version,
    metadata_version: MetadataVersion,
    schema: SchemaRef,
    dictionaries: Vec<Place>,
    batches: Vec<Batch>,
    rows: Vec<usize>,
}

struct Batch {
    place: Place,
    /// How many of the dictionaries come before it.
    dictionaries: usize,
}

impl IpcTable {
    /// Reads what describes the batches of a file.
    ///
    /// # Errors
    /// Where the file is truncated, or says of itself what cannot be.
    pub(super) fn open(path: &Path, source: Source) -> Result<Self> {
        let fault = |reason: String| {
            Error::input(format!("{}: the Arrow file cannot be read ({reason}); {}", path.display(), advice(path)))
        };
        let version = source.file.version().map_err(|error| fault(error.to_string()))?;
        let index = without_panic(|| match source.form {
            Form::ArrowFile => Index::of_file(&source.file),
            _ => Index::of_stream(&source.file),
        });
        let Index { schema, metadata_version, dictionaries, batches, rows } = index.map_err(fault)?;
        let path = path.into();
        Ok(IpcTable { path, file: source.file, version, metadata_version, schema, dictionaries, batches, rows })
    }

    fn is_same(&self) -> bool {
        self.file.version().is_ok_and(|version| version == self.version)
    }
}

/// What a file says of itself.
struct Index {
    schema: SchemaRef,
    metadata_version: MetadataVersion,
    dictionaries: Vec<Place>,
    batches: Vec<Batch>,
    rows: Vec<usize>,
}

impl Index {
    fn new(schema: ipc::Schema, metadata_version: MetadataVersion) -> Result<Self, String> {
        if !schema.endianness().equals_to_target_endianness() {
            return Err("its numbers are in the byte order of other machines".to_owned());
        }
        let schema: Schema = try_fb_to_schema(schema).map_err(|error| said(&error))?;
        let schema = Arc::new(schema);
        Ok(Index { schema, metadata_version, dictionaries: Vec::new(), batches: Vec::new(), rows: Vec::new() })
    }

    /// A file names its batches at its end.
    fn of_file(file: &DataFile) -> Result<Self, String> {
        let length = file.length().map_err(|error| error.to_string())?;
        let end = length.checked_sub(10).ok_or("it is truncated")?;
        let tail: [u8; 10] = read(file, end..length)?[..].try_into().map_err(|_| "it is truncated")?;
        if tail[4..] != MAGIC[..] {
            return Err("it is truncated: its last bytes, the footer, are missing".to_owned());
        }
        let footer_length = read_footer_length(tail).map_err(|error| said(&error))? as u64;
        let start = end.checked_sub(footer_length).filter(|_| footer_length <= MOST_METADATA);
        let start = start.ok_or_else(|| format!("its footer is said to be {footer_length} bytes long"))?;
        let bytes = read(file, start..end)?;
        let footer = root_as_footer(&bytes).map_err(|error| format!("its footer is damaged: {error}"))?;
        let mut index = Index::new(footer.schema().ok_or("its footer has no columns")?, footer.version())?;
        let place = |block: &Block| {
            let number = |number: i64| u64::try_from(number).map_err(|_| "its footer has negative numbers".to_owned());
            let metadata = number(block.metaDataLength().into())?;
            Ok::<Place, String>(Place { start: number(block.offset())?, metadata, body: number(block.bodyLength())? })
        };
        for block in footer.dictionaries().iter().flatten() {
            index.dictionaries.push(place(block)?);
        }
        for block in footer.recordBatches().iter().flatten() {
            let place = place(block)?;
            let bytes = metadata(file, &place)?;
            let message = message(&bytes)?;
            let header = message.header_as_record_batch().ok_or("its footer names a batch that is none")?;
            index.add_batch(place, header.length())?;
        }
        let places = index.dictionaries.iter().chain(index.batches.iter().map(|batch| &batch.place));
        match places.map(Place::end).max() {
            Some(end) if end > length => Err("its footer names a batch beyond its end".to_owned()),
            _ => Ok(index),
        }
    }

    /// In a stream each message says where the next begins.
    fn of_stream(file: &DataFile) -> Result<Self, String> {
        let length = file.length().map_err(|error| error.to_string())?;
        let (mut index, mut start): (Option<Index>, u64) = (None, 0);
        while start < length {
            let Some(metadata_length) = metadata_length(file, start, length)? else { break };
            let mut place = Place { start, metadata: metadata_length, body: 0 };
            let bytes = metadata(file, &place)?;
            let message = message(&bytes)?;
            place.body = u64::try_from(message.bodyLength()).map_err(|_| "a batch of negative length")?;
            if place.end() > length {
                return Err("it is truncated: it ends in the midst of a batch".to_owned());
            }
            match (message.header_type(), &mut index) {
                (MessageHeader::Schema, None) => {
                    let schema = message.header_as_schema().ok_or("it does not begin with its columns")?;
                    index = Some(Index::new(schema, message.version())?);
                }
                (MessageHeader::DictionaryBatch, Some(index)) => index.dictionaries.push(place),
                (MessageHeader::RecordBatch, Some(index)) => {
                    let header = message.header_as_record_batch().ok_or("a batch that is none")?;
                    index.add_batch(place, header.length())?;
                }
                (header, _) => return Err(format!("it holds a message of type {header:?} where none may be")),
            }
            start = place.end();
        }
        index.ok_or_else(|| "it does not begin with its columns".to_owned())
    }

    fn add_batch(&mut self, place: Place, rows: i64) -> Result<(), String> {
        self.rows.push(usize::try_from(rows).map_err(|_| format!("a batch of {rows} rows"))?);
        self.batches.push(Batch { place, dictionaries: self.dictionaries.len() });
        Ok(())
    }
}

fn read(file: &DataFile, range: Range<u64>) -> Result<Bytes, String> {
    file.read(range).map_err(|error| error.to_string())
}

/// The length of what describes the message that begins here, with the bytes that say it; `None` at the end of a stream.
fn metadata_length(file: &DataFile, start: u64, length: u64) -> Result<Option<u64>, String> {
    let bytes = read(file, start..length.min(start + 8))?;
    let (prefix, number) = match bytes.strip_prefix(&CONTINUATION) {
        Some(rest) => (8, rest.first_chunk::<4>()),
        None => (4, bytes.first_chunk::<4>()),
    };
    match number.map(|number| i32::from_le_bytes(*number)) {
        Some(0) => Ok(None),
        Some(number) => match u64::try_from(number) {
            Ok(number) => Ok(Some(prefix + number)),
            Err(_) => Err(format!("a description of {number} bytes")),
        },
        None => Err("it is truncated: it ends in the midst of a batch".to_owned()),
    }
}

/// What describes a message.
fn metadata(file: &DataFile, place: &Place) -> Result<Bytes, String> {
    if place.metadata > MOST_METADATA {
        return Err(format!(
            "a description of {} MiB; at most {} MiB are read",
            place.metadata >> 20,
            MOST_METADATA >> 20
        ));
    }
    read(file, place.start..place.start.saturating_add(place.metadata))
}

/// The message that some bytes begin with.
fn message(bytes: &[u8]) -> Result<ipc::Message<'_>, String> {
    let behind = if bytes.starts_with(&CONTINUATION) { 8 } else { 4 };
    let bytes = bytes.get(behind..).ok_or("a description without contents")?;
    root_as_message(bytes).map_err(|error| format!("a damaged description: {error}"))
}

impl Table for IpcTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn group_rows(&self) -> &[usize] {
        &self.rows
    }

    fn open(self: Arc<Self>, columns: Projection) -> Result<Box<dyn GroupReader>> {
        if !self.is_same() {
            return Err(has_changed(&self.path));
        }
        let columns = projection(&self.schema, columns);
        for &column in &columns {
            let field = self.schema.field(column);
            if let Some(kind) = unsupported(field.data_type()) {
                bail!(
                    "{}: column `{}` is stored as {kind}, which is not read; write it as plain lists and texts",
                    self.path.display(),
                    field.name()
                );
            }
        }
        let decoder = self.decoder(&columns);
        Ok(Box::new(IpcReader { table: self, columns, decoder, dictionaries: 0 }))
    }
}

impl IpcTable {
    fn decoder(&self, columns: &[usize]) -> FileDecoder {
        FileDecoder::new(self.schema.clone(), self.metadata_version).with_projection(columns.to_vec())
    }
}

/// A type whose values may be many times as large as what is stored of them, if it is one or has one in it.
fn unsupported(data_type: &DataType) -> Option<&'static str> {
    match data_type {
        DataType::ListView(_) | DataType::LargeListView(_) => Some("views of lists"),
        DataType::RunEndEncoded(..) => Some("run ends"),
        DataType::Union(..) => Some("a union"),
        DataType::Dictionary(_, values) if values.is_nested() => Some("a dictionary of lists or structs"),
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            unsupported(item.data_type())
        }
        DataType::Map(entries, _) => unsupported(entries.data_type()),
        DataType::Struct(fields) => fields.iter().find_map(|field| unsupported(field.data_type())),
        _ => None,
    }
}

struct IpcReader {
    table: Arc<IpcTable>,
    columns: Vec<usize>,
    decoder: FileDecoder,
    /// How many of the dictionaries the decoder has read.
    dictionaries: usize,
}

impl IpcReader {
    /// A batch as it is stored.
    fn batch(&mut self, group: usize) -> Result<RecordBatch, String> {
        let table = self.table.clone();
        let Batch { place, dictionaries } = &table.batches[group];
        if self.dictionaries > *dictionaries {
            (self.decoder, self.dictionaries) = (table.decoder(&self.columns), 0);
        }
        for place in &table.dictionaries[self.dictionaries..*dictionaries] {
            let bytes = checked(&table.file, place)?;
            self.decoder.read_dictionary(&place.block(), &bytes).map_err(|error| said(&error))?;
            self.dictionaries += 1;
        }
        let bytes = checked(&table.file, place)?;
        let batch = self.decoder.read_record_batch(&place.block(), &bytes).map_err(|error| said(&error))?;
        batch.filter(|batch| batch.num_rows() == table.rows[group]).ok_or_else(|| "a batch without rows".to_owned())
    }
}

impl GroupReader for IpcReader {
    fn read(&mut self, group: usize, chosen: &Chosen, most_rows: usize) -> Result<RowBatches, String> {
        if !self.table.is_same() {
            return Err("the file has changed since its rows were counted; leave it as it is during a run".to_owned());
        }
        let batch = self.batch(group)?;
        let fields = as_views(batch.schema_ref().fields());
        let columns = batch.columns().iter().zip(&fields).map(|(column, field)| cast(column, field.data_type()));
        let columns = columns.collect::<Result<_, _>>().map_err(|error| said(&error))?;
        let rows = batch.num_rows();
        let schema = Arc::new(Schema::new(fields).with_metadata(batch.schema_ref().metadata().clone()));
        let count = arrow::array::RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(schema, columns, &count).map_err(|error| said(&error))?;
        let step = most_rows.clamp(1, ROWS_PER_BATCH);
        // A slice of lists would keep the items of all.
        let part = move |rows: UInt32Array| take_record_batch(&batch, &rows).map_err(|error| said(&error));
        Ok(match chosen.clone() {
            Chosen::From(first) => {
                let starts = (first..rows).step_by(step);
                RowBatches::new(starts.map(move |start| {
                    let rows = start as u32..rows.min(start + step) as u32;
                    part(UInt32Array::from_iter_values(rows))
                }))
            }
            Chosen::Each(chosen) => {
                let parts: Vec<UInt32Array> = chosen
                    .chunks(step)
                    .map(|rows| UInt32Array::from_iter_values(rows.iter().map(|&row| row as u32)))
                    .collect();
                RowBatches::new(parts.into_iter().map(part))
            }
        })
    }
}

/// The bytes of a message, of which the lengths of compressed buffers were looked at.
fn checked(file: &DataFile, place: &Place) -> Result<Buffer, String> {
    if place.body > limits::RECORD_BATCH {
        return Err(too_large(place.body));
    }
    let bytes = read(file, place.start..place.end())?;
    let message = message(&bytes[..place.metadata as usize])?;
    let of_dictionary = message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data());
    let Some(batch) = message.header_as_record_batch().or(of_dictionary) else {
        return Err("a batch that is none".to_owned());
    };
    if !(0..=i64::from(u32::MAX)).contains(&batch.length()) {
        return Err(format!("a batch of {} rows", batch.length()));
    }
    if batch.compression().is_some() {
        let body = &bytes[place.metadata as usize..];
        let mut total = 0u64;
        for buffer in batch.buffers().iter().flatten().filter(|buffer| buffer.length() > 0) {
            let start = usize::try_from(buffer.offset()).ok().and_then(|start| body.get(start..));
            let length =
                start.and_then(|bytes| bytes.first_chunk::<8>()).ok_or("a buffer beyond the end of its batch")?;
            // A length of -1 says that the buffer is not compressed.
            total = total.saturating_add(u64::try_from(i64::from_le_bytes(*length)).unwrap_or(0));
        }
        if total > limits::RECORD_BATCH {
            return Err(too_large(total));
        }
    }
    Ok(Buffer::from(bytes))
}

fn too_large(bytes: u64) -> String {
    format!(
        "a record batch of {} MiB; at most {} MiB are read: write the file with fewer rows a batch",
        bytes >> 20,
        limits::RECORD_BATCH >> 20
    )
}

#[cfg(test)]
mod tests;
