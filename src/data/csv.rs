//! CSV and TSV with a header, as RFC 4180 has them: fields may be quoted, and quoted ones may hold delimiters, line breaks and doubled quotes.
//!
//! Every column is of strings, whatever they look like: what a text is, only the layouts know (see [`super::typed_text`]). An empty field is an empty string.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::batches::RowBatches;
use super::form::Source;
use super::table::{Chosen, GroupReader, Projection, Table};
use super::text_parts::{Fault, Found, Record, Split, TextParts};
use crate::error::Result;
use crate::limits;

/// A file of CSV or TSV.
pub(super) struct CsvTable {
    parts: TextParts,
    schema: SchemaRef,
    delimiter: u8,
}

impl CsvTable {
    /// Reads a file through.
    ///
    /// # Errors
    /// Where the header is missing or names a column twice, and where a row has not as many fields as it; the sentence names the line.
    pub(super) fn open(path: &Path, source: Source, delimiter: u8) -> Result<Self> {
        let mut names: Option<Vec<String>> = None;
        let parts = TextParts::index(path, source, CsvSplit::new(delimiter), |record: &Record| match &names {
            None => {
                names = Some(header(record, delimiter)?);
                Ok(false)
            }
            Some(names) => {
                let found = fields(record.text, delimiter).count();
                match found == names.len() {
                    true => Ok(true),
                    false => Err(Fault::new(
                        record.line,
                        format!(
                            "the row that begins here has {found} fields, the header {}; put fields that hold the delimiter or a line break in quotes",
                            names.len()
                        ),
                    )),
                }
            }
        })?;
        let columns = names.unwrap_or_default().into_iter().map(|name| Field::new(name, DataType::Utf8, true));
        Ok(CsvTable { parts, schema: Arc::new(Schema::new(columns.collect::<Vec<_>>())), delimiter })
    }
}

/// The names of the columns.
fn header(record: &Record, delimiter: u8) -> Result<Vec<String>, Fault> {
    let names: Vec<String> = fields(record.text, delimiter).map(|name| name.trim().to_owned()).collect();
    let fault = |reason: String| Err(Fault::new(record.line, reason));
    if names.len() > limits::COLUMNS {
        return fault(format!("the header has more than {} columns, which is the most that is read", limits::COLUMNS));
    }
    let mut sorted = names.clone();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => fault(format!(
            "the header names the column `{}` twice; the first line is expected to name every column once",
            pair[0]
        )),
        None => Ok(names),
    }
}

impl Table for CsvTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn group_rows(&self) -> &[usize] {
        self.parts.rows()
    }

    fn open(self: Arc<Self>, columns: Projection) -> Result<Box<dyn GroupReader>> {
        let columns = self.parts.open(&self.schema, columns)?;
        Ok(Box::new(CsvReader { table: self, columns }))
    }
}

struct CsvReader {
    table: Arc<CsvTable>,
    /// The places of the columns that are read, which ascend.
    columns: Vec<usize>,
}

impl GroupReader for CsvReader {
    fn read(&mut self, group: usize, chosen: &Chosen, _: usize) -> Result<RowBatches, String> {
        let CsvTable { parts, schema, delimiter } = &*self.table;
        let mut columns: Vec<StringBuilder> = self.columns.iter().map(|_| StringBuilder::new()).collect();
        let mut rows = 0;
        parts.read(group, chosen, CsvSplit::new(*delimiter), |record| {
            let mut wanted = self.columns.iter().zip(&mut columns).peekable();
            for (index, field) in fields(record.text, *delimiter).enumerate() {
                if let Some((_, column)) = wanted.next_if(|(place, _)| **place == index) {
                    column.append_value(field);
                }
            }
            rows += 1;
            match wanted.next() {
                None => Ok(()),
                Some(_) => Err(format!("line {}: the row has too few fields", record.line)),
            }
        })?;
        let columns = columns.into_iter().map(|mut column| Arc::new(column.finish()) as ArrayRef).collect();
        let count = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = schema
            .project(&self.columns)
            .and_then(|schema| RecordBatch::try_new_with_options(Arc::new(schema), columns, &count));
        let batch = batch.map_err(|error| error.to_string());
        Ok(RowBatches::new((rows > 0).then_some(batch).into_iter()))
    }
}

/// Where the records of a file begin and end; empty lines are passed over.
#[derive(Debug)]
struct CsvSplit {
    delimiter: u8,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    BeforeRecord,
    BeforeField,
    Plain,
    Quoted,
    /// Behind a quote in a quoted field: its end, or the first of two.
    Quote,
}

impl CsvSplit {
    fn new(delimiter: u8) -> Self {
        CsvSplit { delimiter, state: State::BeforeRecord }
    }
}

impl Split for CsvSplit {
    fn next(&mut self, bytes: &[u8]) -> Result<Found, String> {
        if self.state == State::BeforeRecord {
            let gap = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
            if gap > 0 {
                return Ok(Found::Gap(gap));
            }
            if bytes.is_empty() {
                return Ok(Found::More);
            }
            self.state = State::BeforeField;
        }
        for (index, &byte) in bytes.iter().enumerate() {
            self.state = match (self.state, byte) {
                (State::Quoted, b'"') => State::Quote,
                (State::Quoted, _) => State::Quoted,
                (State::Quote, b'"') => State::Quoted,
                (State::BeforeField, b'"') => State::Quoted,
                (_, b'\n' | b'\r') => {
                    self.state = State::BeforeRecord;
                    return Ok(Found::Record(index + 1));
                }
                (_, byte) if byte == self.delimiter => State::BeforeField,
                (State::Quote, _) => {
                    return Err("there is text behind the quote that ends a field of the row that begins here; write a quote within quotes twice".to_owned());
                }
                _ => State::Plain,
            };
        }
        Ok(Found::More)
    }

    fn end(&mut self) -> Result<(), String> {
        match self.state {
            State::Quoted => Err("a quote of the row that begins here is not closed".to_owned()),
            _ => Ok(()),
        }
    }
}

/// The fields of a record.
fn fields(record: &str, delimiter: u8) -> impl Iterator<Item = Cow<'_, str>> {
    let record = record.trim_end_matches(['\r', '\n']);
    let mut rest = Some(record);
    std::iter::from_fn(move || {
        let text = rest?;
        let (field, behind) = match text.strip_prefix('"') {
            Some(quoted) => {
                let end = end_of_quoted(quoted);
                let (field, behind) = quoted.split_at(end);
                let field = match field.contains('"') {
                    true => Cow::Owned(field.replace("\"\"", "\"")),
                    false => Cow::Borrowed(field),
                };
                (field, behind.get(1..).unwrap_or_default())
            }
            None => {
                let (field, behind) = text.split_at(text.find(char::from(delimiter)).unwrap_or(text.len()));
                (Cow::Borrowed(field), behind)
            }
        };
        rest = behind.strip_prefix(char::from(delimiter));
        Some(field)
    })
}

/// Where the quote is that ends a field, of which the first quote is taken off.
fn end_of_quoted(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'"', Some(b'"')) => at += 2,
            (b'"', _) => return at,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::super::table;
    use super::super::text_parts::tests::records;
    use super::*;
    use arrow::array::{Array, AsArray};
    use proptest::prelude::*;

    fn open(text: &[u8]) -> Result<Arc<dyn Table>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        std::fs::write(&path, text).unwrap();
        table::open(&path)
    }

    /// The names of the columns, and the rows.
    fn read(text: &[u8]) -> (Vec<String>, Vec<Vec<String>>) {
        let table = open(text).unwrap();
        let names = table.schema().fields().iter().map(|field| field.name().clone()).collect();
        let groups = table.group_rows().len();
        let mut reader = table.open(Projection::All).unwrap();
        let mut rows = Vec::new();
        for group in 0..groups {
            for batch in reader.read(group, &Chosen::From(0), 1).unwrap() {
                let batch = batch.unwrap();
                rows.extend((0..batch.num_rows()).map(|row| {
                    batch.columns().iter().map(|column| column.as_string::<i32>().value(row).to_owned()).collect()
                }));
            }
        }
        (names, rows)
    }

    #[test]
    fn quotes_line_breaks_and_marks_are_read_as_spreadsheets_write_them() {
        let text = b"\xef\xbb\xbfprompt,\"completion\"\r\n\"a, \"\"b\"\"\r\nc\",42\r\n\r\n,5\" pipe\r\n\"\",2024-01-01";
        let (names, rows) = read(text);
        assert_eq!(names, ["prompt", "completion"]);
        assert_eq!(rows, [["a, \"b\"\r\nc", "42"], ["", "5\" pipe"], ["", "2024-01-01"]]);
        assert_eq!(read(b"a\rb\rc\r").1, [["b"], ["c"]]);
    }

    #[test]
    fn faults_name_the_line() {
        for (text, expected) in [
            (&b"a,b\n1,2\n3\n"[..], "a.csv: line 3: the row that begins here has 1 fields, the header 2"),
            (b"a,b\n\"1\n\n\",2\n3,4,5\n", "line 5: the row that begins here has 3 fields"),
            (b"a,b\n1,\"2\n3,4\n", "line 2: a quote of the row that begins here is not closed"),
            (b"a,b\n1,\"2\"x\n", "line 2: there is text behind the quote"),
            (b"a,a\n1,2\n", "line 1: the header names the column `a` twice"),
            (b"a,b\n1,\xff\n", "line 2: byte 2 of it is not UTF-8"),
        ] {
            let error = open(text).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let none = table::TableRows::open(&{
            let folder = tempfile::tempdir().unwrap().keep();
            std::fs::write(folder.join("a.csv"), "a,b\n").unwrap();
            folder.join("a.csv").display().to_string()
        });
        assert!(none.err().unwrap().to_string().contains("not a single row"));
    }

    proptest! {
        #[test]
        fn what_is_written_by_arrow_is_read_back(
            rows in prop::collection::vec(prop::collection::vec("[ab\",\n\r é]{0,6}", 3), 1..40),
            piece in 1usize..50,
        ) {
            let column = |index: usize| -> ArrayRef {
                Arc::new(arrow::array::StringArray::from_iter_values(rows.iter().map(|row| row[index].clone())))
            };
            let batch = RecordBatch::try_from_iter([("x", column(0)), ("y, z", column(1)), ("\"", column(2))]).unwrap();
            let mut text = Vec::new();
            let mut writer = arrow::csv::Writer::new(&mut text);
            writer.write(&batch).unwrap();
            drop(writer);
            let (names, found) = read(&text);
            prop_assert_eq!(names, ["x", "y, z", "\""]);
            prop_assert_eq!(found, rows);
            let pieces = records(&text, piece, CsvSplit::new(b',')).unwrap();
            prop_assert_eq!(pieces, records(&text, text.len(), CsvSplit::new(b',')).unwrap());
        }

        #[test]
        fn fields_are_those_that_arrow_reads(text in "[ab\",é]{0,12}") {
            let is_read = records(text.as_bytes(), 3, CsvSplit::new(b',')).is_ok_and(|all| all.len() == 1);
            prop_assume!(is_read);
            let found: Vec<String> = fields(&text, b',').map(Cow::into_owned).collect();
            let columns = (0..found.len()).map(|index| Field::new(index.to_string(), DataType::Utf8, true));
            let schema = Arc::new(Schema::new(columns.collect::<Vec<_>>()));
            let mut reader = arrow::csv::ReaderBuilder::new(schema).build(text.as_bytes()).unwrap();
            let batch = reader.next().unwrap().unwrap();
            let expected = |column: &ArrayRef| {
                let column = column.as_string::<i32>();
                // Arrow reads nothing as null.
                if column.is_null(0) { String::new() } else { column.value(0).to_owned() }
            };
            let expected: Vec<String> = batch.columns().iter().map(expected).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
