//! JSON Lines and JSON arrays: an object is a row, its fields are the columns.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::SchemaRef;
use arrow::json::ReaderBuilder;
use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::batches::RowBatches;
use super::form::{Form, Source};
use super::json_split::{Elements, Lines};
use super::json_types::{Types, is_kept_as_text};
use super::table::{Chosen, GroupReader, Projection, Table};
use super::text_parts::{Fault, Record, TextParts};
use crate::error::Result;

/// A file of JSON Lines, or of one JSON array.
pub(super) struct JsonTable {
    parts: TextParts,
    schema: SchemaRef,
    is_array: bool,
}

impl JsonTable {
    /// Reads a file through.
    ///
    /// # Errors
    /// Where a line or an element is not an object of JSON; the sentence names the line.
    pub(super) fn open(path: &Path, source: Source) -> Result<Self> {
        let mut types = Types::default();
        let is_array = source.form == Form::JsonArray;
        let visit = |record: &Record| {
            expect_object(record)?;
            types.add(record.text.trim_end(), record.line).map(|()| true).map_err(|error| fault(record, &error))
        };
        let parts = match is_array {
            true => TextParts::index(path, source, Elements::whole(), visit)?,
            false => TextParts::index(path, source, Lines::default(), visit)?,
        };
        Ok(JsonTable { parts, schema: Arc::new(types.schema()), is_array })
    }
}

fn expect_object(record: &Record) -> Result<(), Fault> {
    let found = match record.text.bytes().next() {
        Some(b'{') => return Ok(()),
        Some(b'[') => "a list",
        Some(b'"') => "a string",
        Some(b'0'..=b'9' | b'-') => "a number",
        _ if ["true", "false", "null"].contains(&record.text.trim_end()) => record.text.trim_end(),
        _ => "text that is not JSON",
    };
    Err(Fault::new(record.line, format!("found {found}, expected an object ({{...}}), whose fields are the columns")))
}

/// What a parser says of a record, with the line of the file.
fn fault(record: &Record, error: &serde_json::Error) -> Fault {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or_default();
    let line = record.line + error.line().saturating_sub(1) as u64;
    let at = record.text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let rest = at.get(error.column().saturating_sub(1)..).unwrap_or_default();
    let advice = match rest.trim_start_matches('-') {
        rest if rest.starts_with("NaN") || rest.starts_with("Inf") => {
            "; NaN and Infinity are not JSON, write null in their place"
        }
        _ if error.is_eof() => {
            "; the object ends in another line, or the file is truncated: write each object in one line, or all in an array"
        }
        _ => "",
    };
    Fault::new(line, format!("not valid JSON at column {} ({reason}){advice}", error.column()))
}

impl Table for JsonTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn group_rows(&self) -> &[usize] {
        self.parts.rows()
    }

    fn open(self: Arc<Self>, columns: Projection) -> Result<Box<dyn GroupReader>> {
        let schema = self.schema.project(&self.parts.open(&self.schema, columns)?).map(Arc::new);
        let schema = schema.map_err(|error| super::table::unreadable(&self.parts.path, error))?;
        Ok(Box::new(JsonReader { table: self, schema }))
    }
}

struct JsonReader {
    table: Arc<JsonTable>,
    /// The columns that are read.
    schema: SchemaRef,
}

impl GroupReader for JsonReader {
    fn read(&mut self, group: usize, chosen: &Chosen, _: usize) -> Result<RowBatches, String> {
        let mut rows = Vec::new();
        let visit = |record: &Record| {
            rows.push(row(record.text, &self.schema).map_err(|error| error.to_string())?);
            Ok(())
        };
        match self.table.is_array {
            true => self.table.parts.read(group, chosen, Elements::part(), visit)?,
            false => self.table.parts.read(group, chosen, Lines::default(), visit)?,
        }
        let batch = batch_of(&rows, &self.schema);
        Ok(RowBatches::new((!rows.is_empty()).then_some(batch).into_iter()))
    }
}

/// The columns of rows that have these types.
pub(super) fn batch_of(rows: &[Map<String, Value>], schema: &SchemaRef) -> Result<RecordBatch, String> {
    let convert = || {
        if schema.fields().is_empty() {
            let count = RecordBatchOptions::new().with_row_count(Some(rows.len()));
            return RecordBatch::try_new_with_options(schema.clone(), Vec::new(), &count).map(Some);
        }
        let mut decoder = ReaderBuilder::new(schema.clone()).with_batch_size(rows.len()).build_decoder()?;
        decoder.serialize(rows)?;
        decoder.flush()
    };
    let batch = convert().map_err(|error| error.to_string())?;
    Ok(batch.unwrap_or_else(|| RecordBatch::new_empty(schema.clone())))
}

/// The fields of an object that are columns of a schema.
fn row(text: &str, schema: &SchemaRef) -> serde_json::Result<Map<String, Value>> {
    serde_json::Deserializer::from_str(text).deserialize_map(FieldsVisitor { schema })
}

struct FieldsVisitor<'a> {
    schema: &'a SchemaRef,
}

impl<'de> Visitor<'de> for FieldsVisitor<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let Some((_, field)) = self.schema.fields().find(&name) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = match map.next_value::<Value>()? {
                value if value.is_null() || !is_kept_as_text(field) => value,
                value => Value::String(value.to_string()),
            };
            fields.insert(name, value);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{self, Chosen};
    use super::*;
    use arrow::array::AsArray;
    use std::fmt::Write;

    fn open(name: &str, text: &str) -> Result<Arc<dyn Table>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        // The file stays open, so that its folder may go.
        table::open(&path)
    }

    fn fault(text: &str) -> String {
        open("a.jsonl", text).err().unwrap().to_string()
    }

    #[test]
    fn faults_name_the_line() {
        for (text, expected) in [
            ("{\"a\": 1}\n\n{\"a\": }\n", "a.jsonl: line 3: not valid JSON at column 7 (expected value)"),
            ("{\"a\": 1}\n[1]\n", "line 2: found a list, expected an object"),
            ("{\"a\": 1}\nnull\n", "line 2: found null"),
            ("{\"a\": 1}\nabc\n", "line 2: found text that is not JSON"),
            ("{\"a\": 1} {\"a\": 2}\n", "line 1: not valid JSON at column 10 (trailing characters)"),
            ("{\"a\": 1}\n{\"a\":\n1}\n", "line 2: not valid JSON"),
            ("{\"a\": NaN}\n", "write null in their place"),
            ("{\"a\": \"\\ud800\"}\n", "line 1: not valid JSON"),
            ("{\"a\": 1e999}\n", "line 1: not valid JSON at column 11 (number out of range)"),
            ("[\n{\"a\": 1},\n{\"a\":\n 1,}]", "line 4: not valid JSON at column 4"),
            ("[{\"a\": 1}, 2]", "line 1: found a number"),
        ] {
            assert!(fault(text).contains(expected), "{text}: {}", fault(text));
        }
        let deep = format!("{{\"a\": {}1{}}}\n", "[".repeat(500), "]".repeat(500));
        assert!(fault(&deep).contains("line 1: not valid JSON at column 13"), "{}", fault(&deep));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, b"{\"a\": \"x\"}\n{\"a\": \"\xff\"}\n").unwrap();
        let error = table::open(&path).err().unwrap().to_string();
        assert!(error.contains("line 2: byte 7 of it is not UTF-8"), "{error}");
    }

    #[test]
    fn any_rows_of_a_long_file_are_read_by_their_place() {
        let (mut lines, mut array) = (String::new(), String::from("[\n"));
        for row in 0..5000 {
            let object = format!("{{\"text\": \"row {row}\", \"list\": [{row}, {}], \"late\": null}}", row + 1);
            writeln!(lines, "{object}").unwrap();
            let comma = if row > 0 { ",\n" } else { "" };
            write!(array, "{comma}{object}").unwrap();
        }
        writeln!(lines, "{{\"late\": \"a field that comes late\"}}").unwrap();
        writeln!(array, ",{{\"late\": \"a field that comes late\"}}]").unwrap();
        for (name, text) in [("a.jsonl", lines), ("a.json", array)] {
            let table = open(name, &text).unwrap();
            assert_eq!(table.group_rows(), [1024, 1024, 1024, 1024, 905]);
            let mut reader = table.clone().open(Projection::Only(&["text", "late"])).unwrap();
            let mut read = |group, chosen| {
                let batches: Vec<_> = reader.read(group, &chosen, 1).unwrap().map(Result::unwrap).collect();
                assert!(batches.len() == 1 && batches[0].num_columns() == 2);
                let text = |column: &str, row: usize| {
                    let column = batches[0].column_by_name(column).unwrap().as_string::<i32>().clone();
                    column.iter().nth(row).unwrap().map(str::to_owned)
                };
                (batches[0].num_rows(), text("text", 0), text("late", batches[0].num_rows() - 1))
            };
            assert_eq!(read(3, Chosen::From(1000)), (24, Some("row 4072".into()), None));
            let late = Some("a field that comes late".to_owned());
            assert_eq!(read(4, Chosen::Each(vec![7, 904])), (2, Some("row 4103".into()), late));
            assert_eq!(read(0, Chosen::From(0)).0, 1024);
        }
    }

    #[test]
    fn values_of_several_types_are_kept_as_json_texts() {
        let table =
            open("a.jsonl", "{\"a\": [1, \"x\"], \"b\": 1}\n{\"a\": null}\n{\"a\": {\"y\": [null, 0.5]}}\n").unwrap();
        let batches = table.clone().open(Projection::All).unwrap().read(0, &Chosen::From(0), 1).unwrap();
        let batch = batches.map(Result::unwrap).next().unwrap();
        let texts: Vec<_> = batch.column(0).as_string::<i32>().iter().collect();
        assert_eq!(texts, [Some("[1,\"x\"]"), None, Some("{\"y\":[null,0.5]}")]);
    }
}
