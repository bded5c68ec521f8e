//! A table in every form in which rows are read.

use std::io::Write;

use arrow::array::RecordBatch;
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow::json::{ArrayWriter, LineDelimitedWriter};
use serde_json::{Map, Value};

/// An object a line.
pub fn json_lines(rows: &RecordBatch) -> Vec<u8> {
    let mut writer = LineDelimitedWriter::new(Vec::new());
    writer.write(rows).unwrap();
    writer.finish().unwrap();
    writer.into_inner()
}

/// An array of objects.
pub fn json_array(rows: &RecordBatch) -> Vec<u8> {
    let mut writer = ArrayWriter::new(Vec::new());
    writer.write(rows).unwrap();
    writer.finish().unwrap();
    writer.into_inner()
}

/// Texts and numbers as they are, lists and objects in JSON, nothing for null.
pub fn separated(rows: &RecordBatch, delimiter: char) -> Vec<u8> {
    let quoted = |text: &str| match text.contains([delimiter, '"', '\n', '\r']) || text.is_empty() {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let line = |fields: Vec<String>| fields.join(&delimiter.to_string()) + "\r\n";
    let schema = rows.schema();
    let names: Vec<&String> = schema.fields().iter().map(|field| field.name()).collect();
    let mut text = line(names.iter().map(|name| quoted(name)).collect());
    for row in json_lines(rows).split(|byte| *byte == b'\n').filter(|row| !row.is_empty()) {
        let row: Map<String, Value> = serde_json::from_slice(row).unwrap();
        let field = |name: &&String| match row.get(*name) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => quoted(text),
            Some(other) => quoted(&other.to_string()),
        };
        text += &line(names.iter().map(field).collect());
    }
    text.into_bytes()
}

/// Arrow's file, or its stream.
pub fn arrow_ipc(rows: &RecordBatch, is_file: bool, compression: Option<CompressionType>) -> Vec<u8> {
    let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
    let mut bytes = Vec::new();
    if is_file {
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &rows.schema(), options).unwrap();
        writer.write(rows).unwrap();
        writer.finish().unwrap();
    } else {
        let mut writer = StreamWriter::try_new_with_options(&mut bytes, &rows.schema(), options).unwrap();
        writer.write(rows).unwrap();
        writer.finish().unwrap();
    }
    bytes
}

/// Compressed by gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Compressed by zstd.
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}

/// The endings of all forms but Parquet.
pub const ENDINGS: [&str; 12] = [
    "jsonl",
    "json",
    "csv",
    "tsv",
    "arrow",
    "arrows",
    "lz4.arrow",
    "jsonl.gz",
    "jsonl.zst",
    "json.gz",
    "csv.gz",
    "arrow.zst",
];

/// The table as a file of this ending.
pub fn bytes(rows: &RecordBatch, ending: &str) -> Vec<u8> {
    match ending {
        "jsonl" => json_lines(rows),
        "json" => json_array(rows),
        "csv" => separated(rows, ','),
        "tsv" => separated(rows, '\t'),
        "arrow" => arrow_ipc(rows, true, None),
        "arrows" => arrow_ipc(rows, false, Some(CompressionType::ZSTD)),
        "lz4.arrow" => arrow_ipc(rows, true, Some(CompressionType::LZ4_FRAME)),
        "jsonl.gz" => gzip(&json_lines(rows)),
        "jsonl.zst" => zstd(&json_lines(rows)),
        "json.gz" => gzip(&json_array(rows)),
        "csv.gz" => gzip(&separated(rows, ',')),
        "arrow.zst" => zstd(&arrow_ipc(rows, false, None)),
        other => panic!("no form {other}"),
    }
}
