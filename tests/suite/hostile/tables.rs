//! Tables that are Parquet throughout, with columns of other types and values that no text or number should have.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, FixedSizeListArray, Float32Array, Float64Array, Int64Array,
    ListArray, NullArray, RecordBatch, StringArray, StructArray, UInt64Array, new_empty_array, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{concat, take};
use arrow::datatypes::{DataType, Field, Schema};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::seeds::{parquet_bytes, tables};

/// Lists of these items, all of them in the first row's.
fn in_first_row(items: ArrayRef, rows: usize) -> ArrayRef {
    let lengths = (0..rows).map(|row| if row == 0 { items.len() } else { 0 });
    let field = Arc::new(Field::new("item", items.data_type().clone(), true));
    Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths), items, None))
}

/// A list in a list in a list, `depth` times.
pub fn nested_lists(depth: usize, rows: usize) -> ArrayRef {
    (0..depth).fold(Arc::new(StringArray::from(vec!["deep"; rows])), |items: ArrayRef, _| {
        let field = Arc::new(Field::new("item", items.data_type().clone(), true));
        Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(vec![1; rows]), items, None))
    })
}

/// A column that has no business in a file of records.
fn odd_column(rows: usize, random: &mut ChaCha8Rng) -> ArrayRef {
    let repeated = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; rows])) };
    let field = |data_type: DataType| Arc::new(Field::new("item", data_type, true));
    match random.random_range(0..20) {
        0 => Arc::new(Float64Array::from(vec![f64::NAN; rows])),
        1 => Arc::new(Float32Array::from(vec![f32::INFINITY; rows])),
        2 => Arc::new(Int64Array::from(vec![i64::MIN; rows])),
        3 => Arc::new(UInt64Array::from(vec![u64::MAX; rows])),
        4 => Arc::new(Float64Array::from(vec![1e300; rows])),
        5 => Arc::new(NullArray::new(rows)),
        6 => new_null_array(&DataType::Utf8, rows),
        7 => repeated(""),
        8 => repeated("\0\0"),
        9 => repeated("\u{feff}\u{202e}é\u{10ffff}\r\n"),
        10 => repeated(&"word ".repeat(20_000)),
        11 => repeated(&"\u{e9}".repeat(20_000)),
        12 => Arc::new(BinaryArray::from(vec![&b"\xff\xfe"[..]; rows])),
        13 => Arc::new(BooleanArray::from(vec![true; rows])),
        14 => Arc::new(Date32Array::from(vec![i32::MIN; rows])),
        15 => nested_lists(random.random_range(1..30), rows),
        16 => in_first_row(Arc::new(Float64Array::from(vec![f64::NAN, 1.0])), rows),
        17 => in_first_row(new_null_array(&DataType::Utf8, 3), rows),
        18 => Arc::new(
            FixedSizeListArray::new(field(DataType::Utf8), 0, new_empty_array(&DataType::Utf8), None).slice(0, 0),
        ) as ArrayRef,
        _ => Arc::new(StructArray::from(vec![
            (field(DataType::Utf8), repeated("a")),
            (Arc::new(Field::new("role", DataType::Utf8, true)), repeated("user")),
        ])),
    }
}

/// A table like one of those that are read, with a column that is another's, odd, out of order, or not there.
pub fn odd_table(file: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let mut all = tables();
    let (_, table) = all.swap_remove(random.random_range(0..all.len()));
    let mut columns: Vec<(String, ArrayRef)> = (table.schema().fields().iter().zip(table.columns()))
        .map(|(field, column)| (field.name().clone(), column.clone()))
        .collect();
    for _ in 0..random.random_range(1..=2) {
        let place = random.random_range(0..columns.len());
        let column = columns[place].1.clone();
        let indices = |rows: Vec<Option<u64>>| take(&column, &UInt64Array::from(rows), None).unwrap();
        match random.random_range(0..5) {
            0 => columns[place].1 = indices(vec![None, Some(0)]),
            1 => columns[place].1 = indices(vec![Some(1), Some(1)]),
            2 if columns.len() > 1 => drop(columns.remove(place)),
            _ => {
                let odd = odd_column(column.len(), random);
                let rows = column.len();
                columns[place].1 = if odd.len() == rows { odd } else { new_null_array(odd.data_type(), rows) };
            }
        }
    }
    if random.random_bool(0.2) {
        let twice = |(_, column): &mut (String, ArrayRef)| *column = concat(&[&*column, &*column]).unwrap();
        columns.iter_mut().for_each(twice);
    }
    let fields: Vec<Field> =
        columns.iter().map(|(name, column)| Field::new(name, column.data_type().clone(), true)).collect();
    let columns = columns.into_iter().map(|(_, column)| column).collect();
    let table = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
    *file = parquet_bytes(&table, random.random_range(0..12));
}
