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
mod tests {
    use super::super::table;
    use super::*;
    use arrow::array::{ArrayRef, AsArray, DictionaryArray, Int64Array, ListArray, StringArray};
    use arrow::datatypes::{Field, Int8Type, Int32Type};
    use arrow::ipc::CompressionType;
    use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};

    fn batch(first: i64, rows: i64) -> RecordBatch {
        let text = |row: i64| format!("row {row}");
        let texts: ArrayRef = Arc::new(StringArray::from_iter_values((first..first + rows).map(text)));
        let kinds: DictionaryArray<Int8Type> =
            (0..rows).map(|row| Some(if row % 3 == 0 { "a" } else { "b" })).collect();
        let lists = ListArray::from_iter_primitive::<arrow::datatypes::Int64Type, _, _>(
            (first..first + rows).map(|row| Some(vec![Some(row); (row % 4) as usize])),
        );
        let number: ArrayRef = Arc::new(Int64Array::from_iter_values(first..first + rows));
        let columns: Vec<(&str, ArrayRef)> =
            vec![("text", texts), ("kind", Arc::new(kinds)), ("list", Arc::new(lists)), ("number", number)];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    /// The batches as a file or a stream.
    fn written(batches: &[RecordBatch], is_file: bool, compression: Option<CompressionType>) -> Vec<u8> {
        let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
        let (mut bytes, schema) = (Vec::new(), batches[0].schema());
        if is_file {
            let mut writer = FileWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
            batches.iter().for_each(|batch| writer.write(batch).unwrap());
            writer.finish().unwrap();
        } else {
            let mut writer = StreamWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
            batches.iter().for_each(|batch| writer.write(batch).unwrap());
            writer.finish().unwrap();
        }
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Arc<dyn Table>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.arrow");
        std::fs::write(&path, bytes).unwrap();
        table::open(&path)
    }

    fn texts(table: &Arc<dyn Table>, group: usize, chosen: Chosen, most_rows: usize) -> Vec<(usize, String)> {
        let mut reader = table.clone().open(Projection::Only(&["text", "kind"])).unwrap();
        let batches: Vec<_> = reader.read(group, &chosen, most_rows).unwrap().map(Result::unwrap).collect();
        let text = |batch: &RecordBatch, row: usize| {
            let column = |index: usize| batch.column(index).as_string_view().value(row).to_owned();
            (batch.num_rows(), format!("{} {}", column(0), column(1)))
        };
        batches.iter().flat_map(|batch| (0..batch.num_rows()).map(move |row| text(batch, row))).collect()
    }

    #[test]
    fn files_and_streams_are_read_by_batches_whatever_their_compression() {
        let batches = [batch(0, 5), batch(5, 2000)];
        for is_file in [true, false] {
            for compression in [None, Some(CompressionType::ZSTD), Some(CompressionType::LZ4_FRAME)] {
                let table = open(&written(&batches, is_file, compression)).unwrap();
                assert_eq!(table.group_rows(), [5, 2000]);
                let all = texts(&table, 1, Chosen::From(3), 5000);
                assert_eq!((all.len(), &all[0]), (1997, &(1024, "row 8 a".to_owned())));
                let some = texts(&table, 1, Chosen::Each(vec![0, 7, 1999]), 2);
                let expected = [(2, "row 5 a"), (2, "row 12 b"), (1, "row 2004 b")];
                assert_eq!(some, expected.map(|(rows, text)| (rows, text.to_owned())));
                assert_eq!(texts(&table, 0, Chosen::From(4), 9), [(1, "row 4 b".to_owned())]);
                let whole =
                    table.open(Projection::All).unwrap().read(0, &Chosen::From(0), 9).unwrap().next().unwrap().unwrap();
                assert_eq!(whole.column(2), batches[0].column(2));
            }
        }
    }

    #[test]
    fn dictionaries_of_a_stream_may_be_replaced_between_batches() {
        let column = |values: [&str; 2]| {
            let array: DictionaryArray<Int32Type> = values.into_iter().map(Some).collect();
            RecordBatch::try_from_iter([
                ("text", Arc::new(array.clone()) as ArrayRef),
                ("kind", Arc::new(array) as ArrayRef),
            ])
        };
        let batches = [column(["a", "b"]).unwrap(), column(["c", "d"]).unwrap()];
        let table = open(&written(&batches, false, None)).unwrap();
        let mut reader = table.open(Projection::Only(&["text"])).unwrap();
        for (group, expected) in [(1, "d"), (0, "b"), (1, "d")] {
            let batch = reader.read(group, &Chosen::From(1), 9).unwrap().next().unwrap().unwrap();
            assert_eq!(batch.column(0).as_string_view().value(0), expected);
        }
    }

    #[test]
    fn truncated_files_are_told() {
        for is_file in [true, false] {
            let bytes = written(&[batch(0, 50)], is_file, None);
            for length in [9, 100, bytes.len() / 2, bytes.len() - 20] {
                match open(&bytes[..length]) {
                    Err(error) => assert!(error.to_string().contains("a.arrow: "), "{error}"),
                    // Of a stream, the mark of its end may be missing.
                    Ok(table) => assert!(!is_file && table.group_rows() == [50], "{length}"),
                }
            }
        }
    }

    #[test]
    fn lengths_beyond_the_file_are_refused_before_memory_is_taken() {
        let bytes = written(&[batch(0, 2000)], false, Some(CompressionType::ZSTD));
        let table = open(&bytes).unwrap();
        drop(table);
        // The length before each compressed buffer.
        let whole: Vec<usize> = (0..bytes.len() - 8).filter(|&at| bytes[at..at + 8] == 8004u64.to_le_bytes()).collect();
        assert!(!whole.is_empty(), "the offsets of 2,000 texts");
        let mut broken = bytes.clone();
        broken[whole[0]..whole[0] + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
        let mut reader = open(&broken).unwrap().open(Projection::All).unwrap();
        let reason = reader.read(0, &Chosen::From(0), 9).err().unwrap();
        assert!(reason.contains("at most 2048 MiB"), "{reason}");
    }

    #[test]
    fn types_that_unfold_are_refused_by_name() {
        let item = Arc::new(Field::new_list_field(DataType::Utf8, true));
        let list = DataType::List(Arc::new(Field::new_list_field(DataType::ListView(item), true)));
        assert_eq!(unsupported(&list), Some("views of lists"));
        let dictionary = |values| DataType::Dictionary(Box::new(DataType::Int8), Box::new(values));
        assert_eq!(unsupported(&dictionary(DataType::Utf8)), None);
        assert_eq!(unsupported(&dictionary(list.clone())), Some("a dictionary of lists or structs"));
    }
}
