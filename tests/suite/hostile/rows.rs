//! Parquet files that are hostile on purpose, one of each kind that is known.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, DictionaryArray, Int32Array, Int64Array, LargeListArray, ListArray, RecordBatch,
    StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;
use rlhf::data::schema::{self, Message, Text};
use rlhf::data::table::{Rows, TableRows};
use tempfile::TempDir;

use super::seeds::parquet_bytes;
use super::tables::nested_lists;
use super::{expect, folder, quickly, sentence};
use crate::common::{lists, strings, table};

fn parquet_of(columns: Vec<(&str, ArrayRef)>) -> TempDir {
    folder(&[("rows.parquet", &parquet_bytes(&table(columns), 1))])
}

fn demonstrations(folder: &TempDir) -> rlhf::Result<usize> {
    let path = folder.path().join("rows.parquet").display().to_string();
    schema::demonstrations(&path)?.try_fold(0, |count, record| record.map(|_| count + 1))
}

#[test]
fn lists_fifty_deep_are_no_texts() {
    let deep = parquet_of(vec![("prompt", nested_lists(50, 2)), ("completion", strings(&["a", "b"]))]);
    expect(&sentence(demonstrations(&deep), "lists"), &["rows.parquet", "`prompt`", "expected strings"]);
}

#[test]
fn strings_that_are_no_text_are_refused() {
    // Bytes that the schema calls strings.
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"good"[..], &b"\xff\xfe\x80"[..]]));
    let rows = table(vec![("text", bytes)]);
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    let folder = folder(&[("rows.parquet", &file)]);
    expect(&sentence(demonstrations(&folder), "binary"), &["rows.parquet", "`text`"]);
    // The same with the letters of a string replaced.
    let text = "A text that is seen in the file.";
    let rows = table(vec![("text", strings(&[text]))]);
    let mut file = parquet_bytes(&rows, 1);
    let found: Vec<usize> =
        (0..file.len() - text.len()).filter(|&at| &file[at..at + text.len()] == text.as_bytes()).collect();
    assert!(!found.is_empty());
    found.iter().for_each(|&at| file[at + 3] = 0xff);
    std::fs::write(folder.path().join("rows.parquet"), &file).unwrap();
    expect(&sentence(demonstrations(&folder), "no UTF-8"), &["rows.parquet", "UTF-8"]);
}

#[test]
fn numbers_in_a_footer_that_do_not_fit_the_file_are_refused() {
    let rows = table(vec![("text", strings(&["one", "two"]))]);
    let whole = parquet_bytes(&rows, 1);
    let length = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize;
    let footer = whole.len() - 8 - length;
    let mut refused = 0;
    // Every byte of the footer in turn, as large as it can be and as small: statistics, counts, sizes, offsets, types.
    for at in footer..whole.len() - 8 {
        for value in [0x00, 0x7f, 0xff] {
            let mut file = whole.clone();
            file[at] = value;
            let folder = folder(&[("rows.parquet", &file)]);
            match quickly("a footer", 10, || demonstrations(&folder)) {
                Ok(count) => assert!(count <= 2, "{count} rows"),
                Err(error) => {
                    assert!(error.to_string().contains("rows.parquet"), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > length, "{refused} of {}", 3 * length);
}

#[test]
fn huge_texts_and_nul_bytes_are_texts() {
    let (huge, nul) = ("x".repeat(10 << 20), "a\0b");
    let columns = || {
        let column = |texts: Vec<&str>| -> ArrayRef { Arc::new(StringArray::from(texts)) };
        vec![("prompt", column(vec![&huge, nul])), ("completion", column(vec![nul, &huge]))]
    };
    let folder = parquet_of(columns());
    assert_eq!(quickly("10 MB", 10, || demonstrations(&folder)).unwrap(), 2);
}

#[test]
fn a_schema_of_a_thousand_columns_is_read_for_those_that_are_wanted() {
    let names: Vec<String> = (0..1000).map(|column| format!("column\0{column}")).collect();
    let mut columns: Vec<(&str, ArrayRef)> = names.iter().map(|name| (name.as_str(), strings(&["x"]))).collect();
    columns.push(("text", strings(&["a"])));
    assert_eq!(demonstrations(&parquet_of(columns)).unwrap(), 1);
    let fields = vec![Field::new("text", DataType::Utf8, true), Field::new("text", DataType::Utf8, true)];
    let both =
        arrow::array::RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![strings(&["a"]), strings(&["b"])]);
    let folder = folder(&[("rows.parquet", &parquet_bytes(&both.unwrap(), 1))]);
    assert!(demonstrations(&folder).is_ok_and(|count| count == 1) || demonstrations(&folder).is_err());
}

#[test]
fn a_page_that_counts_more_values_than_there_can_be_is_refused() {
    // Found by the fuzzer: 72 quadrillion lengths of strings, behind a header whose numbers are of other kinds than Parquet's.
    let folder = folder(&[("rows.parquet", include_bytes!("delta_count.parquet"))]);
    let error = quickly("a count", 10, || sentence(demonstrations(&folder), "a page of 72 quadrillion values"));
    expect(&error, &["rows.parquet", "the rows from 0 on cannot be read"]);
}

#[test]
fn lists_that_cost_time_but_no_bytes_are_refused() {
    // Field 15, which is unknown: a list of two billion booleans.
    let booleans = [0xf9, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07, 0x00];
    let length = (booleans.len() as u32).to_le_bytes();
    let footer = [b"PAR1", &booleans[..], &length, b"PAR1"].concat();
    let folder = folder(&[("rows.parquet", &footer)]);
    let error = quickly("a footer", 10, || sentence(demonstrations(&folder), "booleans in the footer"));
    expect(&error, &["rows.parquet", "footer", "list of booleans"]);
    // The same in place of the header of the first page.
    let mut file = parquet_bytes(&table(vec![("text", strings(&["A text that is longer than the header."]))]), 1);
    file[4..4 + booleans.len()].copy_from_slice(&booleans);
    std::fs::write(folder.path().join("rows.parquet"), &file).unwrap();
    let error = quickly("a header", 10, || sentence(demonstrations(&folder), "booleans in a header"));
    expect(&error, &["rows.parquet", "list of booleans"]);
}

/// The rows of a file, a batch at a time.
fn batches(folder: &TempDir) -> impl Iterator<Item = rlhf::Result<Rows>> {
    TableRows::open(&folder.path().join("rows.parquet").display().to_string()).unwrap()
}

/// All rows of a file, as one table of these types.
fn all_rows(folder: &TempDir, schema: SchemaRef) -> RecordBatch {
    let batches: Vec<RecordBatch> = batches(folder).map(|rows| rows.unwrap().batch).collect();
    let found = concat_batches(&batches[0].schema(), &batches).unwrap();
    let columns = found.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type()).unwrap()).collect();
    RecordBatch::try_new(schema, columns).unwrap()
}

/// A file whose only text, of 64 KiB less a byte, stands in each of 1,024 rows: alone, in a list of two, and as the content of a message.
fn one_text_many_times() -> (TempDir, String) {
    const ROWS: usize = 1024;
    let text = "many ".repeat((1 << 16) / 5);
    let text_of = |count: usize| -> ArrayRef {
        let texts = StringArray::from(vec![text.as_str()]);
        Arc::new(DictionaryArray::new(Int32Array::from(vec![0; count]), Arc::new(texts)))
    };
    let ends: Vec<i32> = (1..=ROWS as i32).collect();
    let roles: ArrayRef = Arc::new(StringArray::from(vec!["user"; ROWS]));
    let message =
        |name: &str, column: &ArrayRef| (Arc::new(Field::new(name, column.data_type().clone(), true)), column.clone());
    let contents = text_of(ROWS);
    let messages = StructArray::from(vec![message("role", &roles), message("content", &contents)]);
    // Lists with offsets of 64 bits are not converted, so that a slice of them would keep the items of all.
    let item = Field::new_list_field(contents.data_type().clone(), true);
    let pairs = LargeListArray::new(Arc::new(item), OffsetBuffer::from_lengths(vec![2; ROWS]), text_of(2 * ROWS), None);
    let rows =
        table(vec![("text", contents), ("pair", Arc::new(pairs)), ("messages", lists(Arc::new(messages), &ends))]);
    let mut file = Vec::new();
    let zstd = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(&mut file, rows.schema(), Some(zstd)).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    assert!(file.len() < 100_000, "{} bytes", file.len());
    (folder(&[("rows.parquet", &file)]), text)
}

#[test]
fn rows_are_decoded_by_the_length_of_their_texts_not_by_what_the_file_says() {
    let (folder, text) = one_text_many_times();
    let mut count = 0;
    for rows in quickly("256 MiB of texts", 10, || batches(&folder).collect::<rlhf::Result<Vec<_>>>()).unwrap() {
        // With the role, the texts of a row have 256 KiB.
        assert_eq!((rows.first_row, rows.batch.num_rows()), (count, 64), "16 MiB");
        count += 64;
        let texts = rows.strings("text").unwrap();
        assert!((0..64).all(|row| texts.value(row) == text));
        let pairs = rows.string_lists("pair").unwrap();
        assert!((0..64).all(|row| pairs.range(row) == Some(2 * row..2 * row + 2)));
        assert_eq!(pairs.values.len(), 128, "the items of other rows are left out, in the last batch too");
        assert!((0..128).all(|item| pairs.values.value(item) == text));
        let messages = rows.texts("messages").unwrap();
        let message = Text::messages(vec![Message::user(text.clone())]);
        assert!((0..64).all(|row| messages.get(row).unwrap().as_ref() == Some(&message)));
    }
    assert_eq!(count, 1024);
}

#[test]
fn a_row_of_more_text_than_fits_is_refused() {
    let text = "x".repeat(1 << 16);
    let texts = DictionaryArray::new(Int32Array::from(vec![0; 17_000]), Arc::new(StringArray::from(vec![text])));
    let rows = table(vec![("text", strings(&["a", "b"])), ("many", lists(Arc::new(texts), &[1, 17_000]))]);
    let folder = folder(&[("rows.parquet", &parquet_bytes(&rows, 1))]);
    let mut batches = quickly("1.04 GiB in a row", 10, || batches(&folder).collect::<Vec<_>>()).into_iter();
    assert_eq!(batches.next().unwrap().unwrap().batch.num_rows(), 1);
    let error = sentence(batches.next().unwrap().map(|_| ()), "a row of 1.04 GiB");
    expect(&error, &["rows.parquet", "the rows from 1 on", "1062 MiB", "1024 MiB"]);
    assert!(batches.next().is_none());
}

#[test]
fn delta_encodings_are_read_as_they_were_written() {
    for (rows, version) in [1, 2, 33, 129, 1000, 5000]
        .into_iter()
        .flat_map(|rows| [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0].map(|version| (rows, version)))
    {
        let text = |row: usize| (row % 7 != 3).then(|| format!("{}{}", "same ".repeat(row % 5), row * row));
        let texts: ArrayRef = Arc::new((0..rows).map(text).collect::<StringArray>());
        let numbers: ArrayRef =
            Arc::new((0..rows).map(|row| text(row).map(|text| (text.len() * row) as i64)).collect::<Int64Array>());
        let ends: Vec<i32> = (0..=rows as i32).map(|row| row / 2).collect();
        let lists = ListArray::new(
            Arc::new(Field::new_list_field(DataType::Utf8, true)),
            OffsetBuffer::new(ends.into()),
            texts.clone(),
            None,
        );
        let table =
            table(vec![("text", texts.clone()), ("length", texts), ("number", numbers), ("lists", Arc::new(lists))]);
        let encoded = |column: &str, encoding| (ColumnPath::from(column), encoding);
        let encodings = [
            encoded("text", Encoding::DELTA_BYTE_ARRAY),
            encoded("length", Encoding::DELTA_LENGTH_BYTE_ARRAY),
            encoded("number", Encoding::DELTA_BINARY_PACKED),
            (ColumnPath::new(["lists", "list", "item"].map(str::to_owned).to_vec()), Encoding::DELTA_BYTE_ARRAY),
        ];
        let mut properties = WriterProperties::builder()
            .set_writer_version(version)
            .set_dictionary_enabled(false)
            .set_data_page_row_count_limit(700);
        for (column, encoding) in encodings {
            properties = properties.set_column_encoding(column, encoding);
        }
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, table.schema(), Some(properties.build())).unwrap();
        writer.write(&table).unwrap();
        let footer = writer.close().unwrap();
        let used = |column: usize| footer.row_group(0).column(column).encodings().collect::<Vec<_>>();
        assert!(used(0).contains(&Encoding::DELTA_BYTE_ARRAY) && used(3).contains(&Encoding::DELTA_BYTE_ARRAY));
        assert!(all_rows(&folder(&[("rows.parquet", &file)]), table.schema()) == table, "{rows} rows, {version:?}");
    }
}
