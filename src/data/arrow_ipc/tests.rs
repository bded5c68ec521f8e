use super::super::table;
use super::*;
use arrow::array::{ArrayRef, AsArray, DictionaryArray, Int64Array, ListArray, StringArray};
use arrow::datatypes::{Field, Int8Type, Int32Type};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};

fn batch(first: i64, rows: i64) -> RecordBatch {
    let text = |row: i64| format!("row {row}");
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((first..first + rows).map(text)));
    let kinds: DictionaryArray<Int8Type> = (0..rows).map(|row| Some(if row % 3 == 0 { "a" } else { "b" })).collect();
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
