//! Batches of rows, cut to what there is room for, whatever a file says of their size.
//!
//! A text that a file holds once (in a page's dictionary, or that of an Arrow file) may be the value of every row, so that a file of a kilobyte has rows of
//! many gigabytes. Such texts are therefore decoded as views (16 bytes each, into the page), and only as many rows are handed on as their texts, written
//! out, have room for.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{cast, take_record_batch};
use arrow::datatypes::{ArrowNativeType, DataType, Field, FieldRef, Fields, Schema};
use arrow::error::ArrowError;

/// Rows handed on at a time, at most.
pub(super) const ROWS_PER_BATCH: usize = 1024;
/// Bytes of their texts, at most, unless one row has more.
pub(super) const BYTES_PER_BATCH: u64 = 16 << 20;
/// Bytes of the texts of one row, at most.
const BYTES_PER_ROW: u64 = 1 << 30;

/// Batches of rows of a file, or the reason why there are no more.
pub(super) struct RowBatches {
    batches: Box<dyn Iterator<Item = Result<RecordBatch, String>> + Send>,
    /// Decoded rows for which there was no room in the batch before.
    rest: Option<RecordBatch>,
}

impl RowBatches {
    /// These batches, each cut where its texts are too long.
    pub(super) fn new(batches: impl Iterator<Item = Result<RecordBatch, String>> + Send + 'static) -> Self {
        RowBatches { batches: Box::new(batches), rest: None }
    }

    fn cut(&mut self, batch: RecordBatch) -> Result<RecordBatch, String> {
        let rows = rows_with_room(&batch)?;
        if rows == batch.num_rows() {
            return Ok(batch);
        }
        let part = |rows| rows_of(&batch, rows).map_err(|error| error.to_string());
        self.rest = Some(part(rows..batch.num_rows())?);
        part(0..rows)
    }
}

impl Iterator for RowBatches {
    type Item = Result<RecordBatch, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = match self.rest.take() {
            Some(batch) => batch,
            None => match self.batches.next()? {
                Ok(batch) => batch,
                Err(reason) => return Some(Err(reason)),
            },
        };
        Some(self.cut(batch))
    }
}

/// How many of the first rows have texts for which there is room in a batch: one at least.
fn rows_with_room(batch: &RecordBatch) -> Result<usize, String> {
    let bytes_to = |rows: usize| bytes_of_texts(batch, 0..rows);
    if bytes_to(batch.num_rows()) <= BYTES_PER_BATCH {
        return Ok(batch.num_rows());
    }
    let (mut room, mut beyond) = (0, batch.num_rows());
    while beyond - room > 1 {
        let middle = room.midpoint(beyond);
        match bytes_to(middle) <= BYTES_PER_BATCH {
            true => room = middle,
            false => beyond = middle,
        }
    }
    let first_row = bytes_to(1);
    if first_row > BYTES_PER_ROW {
        return Err(format!(
            "the texts of one row are {} MiB long; at most {} MiB are read",
            first_row >> 20,
            BYTES_PER_ROW >> 20
        ));
    }
    Ok(room.max(1))
}

/// The bytes of all texts in some rows, each as often as it occurs.
fn bytes_of_texts(batch: &RecordBatch, rows: Range<usize>) -> u64 {
    batch.columns().iter().map(|column| bytes_of_texts_in(column, rows.clone())).sum()
}

fn bytes_of_texts_in(array: &dyn Array, rows: Range<usize>) -> u64 {
    let lengths = |views: &[u128]| views[rows.clone()].iter().map(|view| u64::from(*view as u32)).sum();
    match array.data_type() {
        DataType::Utf8View => lengths(array.as_string_view().views()),
        DataType::BinaryView => lengths(array.as_binary_view().views()),
        DataType::List(_) => {
            let lists = array.as_list::<i32>();
            bytes_of_texts_in(lists.values(), between(lists.value_offsets(), rows))
        }
        DataType::LargeList(_) => {
            let lists = array.as_list::<i64>();
            bytes_of_texts_in(lists.values(), between(lists.value_offsets(), rows))
        }
        DataType::Map(..) => bytes_of_texts_in(array.as_map().entries(), between(array.as_map().value_offsets(), rows)),
        DataType::FixedSizeList(_, length) => {
            let length = length.as_usize();
            bytes_of_texts_in(array.as_fixed_size_list().values(), rows.start * length..rows.end * length)
        }
        DataType::Struct(_) => {
            array.as_struct().columns().iter().map(|field| bytes_of_texts_in(field, rows.clone())).sum()
        }
        _ => 0,
    }
}

/// The items of some lists.
fn between<T: ArrowNativeType>(offsets: &[T], lists: Range<usize>) -> Range<usize> {
    offsets[lists.start].as_usize()..offsets[lists.end].as_usize()
}

/// Some rows, without the items of others: a slice of lists keeps the items of all, and a conversion would go through them.
fn rows_of(batch: &RecordBatch, rows: Range<usize>) -> Result<RecordBatch, ArrowError> {
    take_record_batch(batch, &UInt32Array::from_iter_values(rows.start as u32..rows.end as u32))
}

/// A copy of one row, which holds on to nothing of the page that it is from.
pub(super) fn copy_of_row(batch: &RecordBatch, row: usize) -> Result<RecordBatch, ArrowError> {
    let batch = rows_of(batch, row..row + 1)?;
    let fields = written_out(batch.schema_ref().fields());
    let columns = batch.columns().iter().zip(&fields).map(|(column, field)| cast(column, field.data_type()));
    let columns = columns.collect::<Result<_, _>>()?;
    let one_row = RecordBatchOptions::new().with_row_count(Some(1));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &one_row)
}

/// Columns of these types with their texts as views.
pub(super) fn as_views(fields: &Fields) -> Fields {
    fn leaf(data_type: &DataType) -> Option<DataType> {
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 => Some(DataType::Utf8View),
            DataType::Binary | DataType::LargeBinary => Some(DataType::BinaryView),
            DataType::Dictionary(_, values) => leaf(values).or_else(|| Some(DataType::clone(values))),
            _ => None,
        }
    }
    fields.iter().map(|field| with_leaves(field, &leaf)).collect()
}

/// Columns of these types with their texts in buffers of their own.
fn written_out(fields: &Fields) -> Fields {
    let leaf = |data_type: &DataType| match data_type {
        DataType::Utf8View => Some(DataType::LargeUtf8),
        DataType::BinaryView => Some(DataType::LargeBinary),
        _ => None,
    };
    fields.iter().map(|field| with_leaves(field, &leaf)).collect()
}

/// A field with other types where `leaf` gives some, in whatever lists and structs these stand.
fn with_leaves(field: &FieldRef, leaf: &dyn Fn(&DataType) -> Option<DataType>) -> FieldRef {
    let inner = |item: &FieldRef| with_leaves(item, leaf);
    let data_type = match field.data_type() {
        DataType::List(item) | DataType::ListView(item) => DataType::List(inner(item)),
        DataType::LargeList(item) | DataType::LargeListView(item) => DataType::LargeList(inner(item)),
        DataType::Map(entries, sorted) => DataType::Map(inner(entries), *sorted),
        DataType::FixedSizeList(item, length) => DataType::FixedSizeList(inner(item), *length),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect()),
        other => match leaf(other) {
            Some(found) => found,
            None => return field.clone(),
        },
    };
    Arc::new(Field::clone(field).with_data_type(data_type))
}
