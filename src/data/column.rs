//! Columns by name, whatever Arrow type a file stores them in.
//!
//! The same strings are written as `string`, `large_string`, `string_view` or a dictionary of these; lists as `list`,
//! `large_list`, `fixed_size_list` or `list_view`; numbers in any width. Each accessor converts to one form and says
//! which column of which file has what type when it cannot. Numbers, truth values and lists that are written as texts, as in CSV, are read from them.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, LargeListArray, LargeStringArray,
};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type};
use serde_json::Value;

use super::json_column::{JsonColumn, is_json};
use super::schema::{Message, Text};
use super::table::Rows;
use super::{json_types, typed_text};
use crate::bail;
use crate::error::{Error, Result};

/// Characters that are shown of a text that is something else than was expected.
const SHOWN: usize = 40;

/// A column of lists: for each row a range of `values`, or null.
#[derive(Debug, Clone)]
pub struct Lists<T> {
    lists: LargeListArray,
    /// The items of all lists, one after the other.
    pub values: T,
}

impl<T> Lists<T> {
    /// The items of this row's list, as a range of `values`; `None` where the list is null.
    pub fn range(&self, row: usize) -> Option<Range<usize>> {
        if self.lists.is_null(row) {
            return None;
        }
        let offsets = self.lists.value_offsets();
        Some(offsets[row] as usize..offsets[row + 1] as usize)
    }
}

/// A column of text: plain strings or lists of messages.
#[derive(Debug, Clone)]
pub enum TextColumn {
    /// Strings. Those that are JSON lists of messages are read as messages.
    Plain {
        /// The strings.
        strings: LargeStringArray,
        /// Whether all of them are declared to be JSON.
        is_json: bool,
    },
    /// Lists of messages: structs, or JSON texts of one message each.
    Messages(Box<Lists<JsonColumn>>),
}

impl TextColumn {
    /// The text of this row, or `None` where it is null. The error is a part of a sentence ("message 2 has no role").
    pub fn get(&self, row: usize) -> Result<Option<Text>, String> {
        match self {
            TextColumn::Plain { strings, .. } if strings.is_null(row) => Ok(None),
            TextColumn::Plain { strings, is_json: true } => declared_json(strings.value(row)),
            TextColumn::Plain { strings, is_json: false } => match messages_in_json(strings.value(row)) {
                Some(messages) => Ok(Some(Text::messages(messages?))),
                None => Ok(Some(Text::Plain(strings.value(row).to_owned()))),
            },
            TextColumn::Messages(lists) => {
                let Some(range) = lists.range(row) else { return Ok(None) };
                let start = range.start;
                let message = |index| of_message(index - start, lists.values.get(index).and_then(message));
                Ok(Some(Text::messages(range.map(message).collect::<Result<_, _>>()?)))
            }
        }
    }
}

/// An error that names the message where there is one.
fn of_message<T>(number: usize, result: Result<T, String>) -> Result<T, String> {
    result.map_err(|reason| format!("message {number} (counted from 0) {reason}"))
}

/// A message of a struct, or of a text that is a JSON object.
fn message(value: Value) -> Result<Message, String> {
    match value {
        Value::Object(fields) => Message::from_fields(fields),
        Value::Null => Err("is null".to_owned()),
        Value::String(text) => match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Message::from_fields(fields),
            _ => Err("is a text, expected {role, content} or the same as JSON".to_owned()),
        },
        other => Err(format!("is {other}, expected {{role, content}}")),
    }
}

fn messages(values: Vec<Value>) -> Result<Vec<Message>, String> {
    values.into_iter().enumerate().map(|(number, value)| of_message(number, message(value))).collect()
}

/// What a text that is declared to be JSON holds: a string, messages or nothing.
fn declared_json(text: &str) -> Result<Option<Text>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Null) => Ok(None),
        Ok(Value::String(text)) => Ok(Some(Text::Plain(text))),
        Ok(Value::Array(values)) => Ok(Some(Text::messages(messages(values)?))),
        Ok(_) => Err("is JSON of another kind, expected a string or a list of {role, content}".to_owned()),
        Err(error) => Err(format!("cannot be read as JSON ({error})")),
    }
}

/// Whether a text begins like a list of messages, in JSON or in Python's notation.
pub(super) fn begins_like_messages(text: &str) -> bool {
    let after = |text: &'_ str, start: &str| text.trim_start().strip_prefix(start).map(str::to_owned);
    let begin = &text[..text.char_indices().nth(64).map_or(text.len(), |(end, _)| end)];
    let Some(first) = after(begin, "[").and_then(|text| after(&text, "{")) else { return false };
    ["\"", "'"].iter().any(|quote| {
        let name = after(&first, quote).and_then(|text| text.split_once(quote).map(|(name, _)| name.to_owned()));
        name.is_some_and(|name| ["role", "from", "content", "value"].contains(&name.as_str()))
    })
}

/// The messages of a text that is a JSON list of them; `None` for other texts.
pub(super) fn messages_in_json(text: &str) -> Option<Result<Vec<Message>, String>> {
    if !text.trim_start().strip_prefix('[')?.trim_start().starts_with('{') {
        return None;
    }
    let values: Vec<Value> = serde_json::from_str(text).ok()?;
    let has = |value: &Value, names: [&str; 2]| names.iter().any(|name| value.get(name).is_some());
    let is_message = |value: &Value| has(value, ["role", "from"]) && has(value, ["content", "value"]);
    values.iter().any(is_message).then(|| messages(values))
}

thread_local! {
    /// The columns that were asked for since [`columns_used`] began on this thread.
    static USED: RefCell<Option<BTreeSet<String>>> = const { RefCell::new(None) };
}

/// The names of the columns that `step` reads of any rows.
pub(super) fn columns_used<T>(step: impl FnOnce() -> T) -> (T, BTreeSet<String>) {
    let before = USED.replace(Some(BTreeSet::new()));
    let result = step();
    (result, USED.replace(before).unwrap_or_default())
}

impl Rows {
    /// The column of this name, if there is one.
    ///
    /// # Errors
    /// Where there are several, which Parquet and Arrow files may have.
    pub fn column(&self, name: &str) -> Result<Option<&ArrayRef>> {
        match self.batch.schema_ref().fields().iter().filter(|field| field.name() == name).count() {
            0 | 1 => Ok(self.batch.column_by_name(name)),
            count => bail!(
                "{}: has {count} columns of the name `{name}`, and it is not known which one is meant; rename the others, or leave them out",
                self.file.display()
            ),
        }
    }

    /// Whether there is a column of this name.
    pub fn has(&self, name: &str) -> bool {
        self.batch.column_by_name(name).is_some()
    }

    /// The type of the column of this name, with its metadata.
    fn field(&self, name: &str) -> FieldRef {
        let schema = self.batch.schema();
        let field = schema.fields().iter().find(|field| field.name() == name).cloned();
        field.unwrap_or_else(|| Arc::new(Field::new(name, DataType::Null, true)))
    }

    /// A column of any type, as JSON.
    pub(super) fn json(&self, name: &str) -> Result<JsonColumn> {
        let column = self.required(name)?;
        JsonColumn::new(&self.field(name), column).ok_or_else(|| self.wrong_type(name, column, "values of JSON"))
    }

    /// A column of strings.
    pub fn strings(&self, name: &str) -> Result<LargeStringArray> {
        self.required(name).and_then(|column| strings(column).ok_or_else(|| self.wrong_type(name, column, "strings")))
    }

    /// A column of whole numbers of any width; numbers stored as floats count if they are whole.
    pub fn integers(&self, name: &str) -> Result<Int64Array> {
        self.required(name)
            .and_then(|column| integers(column).ok_or_else(|| self.wrong_type(name, column, "whole numbers")))
    }

    /// A column of numbers of any kind.
    pub fn floats(&self, name: &str) -> Result<Float64Array> {
        self.required(name).and_then(|column| floats(column).ok_or_else(|| self.wrong_type(name, column, "numbers")))
    }

    /// A column of truth values.
    pub fn booleans(&self, name: &str) -> Result<BooleanArray> {
        let column = self.required(name)?;
        booleans(column).ok_or_else(|| self.wrong_type(name, column, "booleans"))
    }

    /// A column of strings or of lists of messages.
    pub fn texts(&self, name: &str) -> Result<TextColumn> {
        let column = self.required(name)?;
        let texts = texts(&self.field(name), column);
        texts.ok_or_else(|| self.wrong_type(name, column, "strings or lists of {role, content}"))
    }

    /// A column of lists of strings, or of lists of lists of messages.
    pub fn text_lists(&self, name: &str) -> Result<Lists<TextColumn>> {
        self.lists(name, "lists of strings or of messages", texts)
    }

    /// A column of lists of strings.
    pub fn string_lists(&self, name: &str) -> Result<Lists<LargeStringArray>> {
        self.lists(name, "lists of strings", |_, column| strings(column))
    }

    /// A column of lists of whole numbers.
    pub fn integer_lists(&self, name: &str) -> Result<Lists<Int64Array>> {
        self.lists(name, "lists of whole numbers", |_, column| integers(column))
    }

    /// A column of lists of numbers.
    pub fn float_lists(&self, name: &str) -> Result<Lists<Float64Array>> {
        self.lists(name, "lists of numbers", |_, column| floats(column))
    }

    /// A column of lists of truth values.
    pub fn boolean_lists(&self, name: &str) -> Result<Lists<BooleanArray>> {
        self.lists(name, "lists of truth values", |_, column| booleans(column))
    }

    /// The fields of a column of structs, as columns of rows of their own.
    pub fn structs(&self, name: &str) -> Result<Rows> {
        let column = self.required(name)?;
        let nested = written(column).and_then(|texts| typed_text::nested(&texts));
        let Some(structs) = nested.as_ref().unwrap_or(column).as_struct_opt() else {
            return Err(self.wrong_type(name, column, "structs"));
        };
        if let Some(row) = (0..structs.len()).find(|&row| structs.is_null(row)) {
            bail!("{}, column `{name}`: is null; expected a value", self.origin(row));
        }
        Ok(Rows { file: self.file.clone(), first_row: self.first_row, batch: structs.into() })
    }

    /// The names of all columns, for messages: `a`, `b` and so on.
    pub fn column_names(&self) -> String {
        let schema = self.batch.schema();
        schema.fields().iter().map(|field| format!("`{}`", field.name())).collect::<Vec<_>>().join(", ")
    }

    fn lists<T>(
        &self,
        name: &str,
        expected: &str,
        items: impl Fn(&FieldRef, &ArrayRef) -> Option<T>,
    ) -> Result<Lists<T>> {
        let column = self.required(name)?;
        let lists = lists_of(column, items);
        lists.ok_or_else(|| self.wrong_type(name, column, expected))
    }

    fn required(&self, name: &str) -> Result<&ArrayRef> {
        USED.with_borrow_mut(|used| used.as_mut().map(|used| used.insert(name.to_owned())));
        let field = self.batch.schema_ref().field_with_name(name).ok();
        match (self.column(name)?, field.and_then(json_types::mixed)) {
            (_, Some(mixed)) => {
                bail!("{}: column `{name}` {mixed}, expected values of one type", self.file.display())
            }
            (Some(column), None) => Ok(column),
            (None, None) => {
                bail!("{}: there is no column `{name}`; the columns are {}", self.file.display(), self.column_names())
            }
        }
    }

    fn wrong_type(&self, name: &str, column: &ArrayRef, expected: &str) -> Error {
        let texts = written(column);
        if let Some((row, text)) = texts.as_ref().and_then(typed_text::odd_one) {
            let start: String = text.chars().take(SHOWN).collect();
            let more = if start.len() < text.len() { " and more" } else { "" };
            return self.fault(row, name, format!("is the text {start:?}{more}, expected {expected}"));
        }
        let found = describe(column.data_type());
        let file = self.file.display();
        Error::input(format!("{file}: column `{name}` holds {found}, expected {expected}"))
    }
}

/// The texts of a column of texts, in which something else may be written.
pub(in crate::data) fn written(column: &ArrayRef) -> Option<LargeStringArray> {
    strings(column).filter(|_| *column.data_type() != DataType::Null)
}

/// A type in the words that a person would use for it.
fn describe(data_type: &DataType) -> String {
    match data_type {
        DataType::Dictionary(_, values) => describe(values),
        DataType::RunEndEncoded(_, values) => describe(values.data_type()),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "strings".to_owned(),
        other if is_binary(other) => "binary that is not UTF-8 text".to_owned(),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => format!("lists of {}", describe(item.data_type())),
        DataType::Struct(fields) => {
            let field = |field: &FieldRef| match field.data_type() {
                data_type if is_string(data_type) => field.name().clone(),
                data_type => format!("{}: {}", field.name(), describe(data_type)),
            };
            format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string().to_lowercase(),
    }
}

/// Whether values are text. Binary counts, as some programs store text without saying that it is: it is read as UTF-8.
fn is_string(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => true,
        DataType::Dictionary(_, values) => is_string(values),
        DataType::RunEndEncoded(_, values) => is_string(values.data_type()),
        other => is_binary(other),
    }
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary | DataType::LargeBinary | DataType::BinaryView)
}

/// Converts; a value that does not fit the new type makes the whole conversion fail rather than one value null.
fn convert(column: &ArrayRef, to: &DataType) -> Option<ArrayRef> {
    let options = CastOptions { safe: false, ..Default::default() };
    cast_with_options(column, to, &options).ok()
}

fn strings(column: &ArrayRef) -> Option<LargeStringArray> {
    if !is_string(column.data_type()) {
        return None;
    }
    convert(column, &DataType::LargeUtf8)?.as_string_opt::<i64>().cloned()
}

fn booleans(column: &ArrayRef) -> Option<BooleanArray> {
    match written(column) {
        Some(texts) => typed_text::booleans(&texts),
        None => column.as_boolean_opt().cloned(),
    }
}

fn integers(column: &ArrayRef) -> Option<Int64Array> {
    if let Some(texts) = written(column) {
        return typed_text::integers(&texts);
    }
    let data_type = column.data_type();
    if data_type.is_floating() {
        let floats = floats(column)?;
        if floats.iter().flatten().any(|value| value.fract() != 0.0) {
            return None;
        }
    } else if !data_type.is_integer() && *data_type != DataType::Null {
        return None;
    }
    convert(column, &DataType::Int64)?.as_primitive_opt::<Int64Type>().cloned()
}

fn floats(column: &ArrayRef) -> Option<Float64Array> {
    if let Some(texts) = written(column) {
        return typed_text::floats(&texts);
    }
    if !column.data_type().is_numeric() && *column.data_type() != DataType::Null {
        return None;
    }
    convert(column, &DataType::Float64)?.as_primitive_opt::<Float64Type>().cloned()
}

fn lists(column: &ArrayRef) -> Option<LargeListArray> {
    let nested = written(column).and_then(|texts| typed_text::nested(&texts));
    let column = nested.as_ref().unwrap_or(column);
    let item = match column.data_type() {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => item.clone(),
        DataType::Null => Arc::new(Field::new("item", DataType::Null, true)),
        _ => return None,
    };
    convert(column, &DataType::LargeList(item))?.as_list_opt::<i64>().cloned()
}

/// A column of lists, with their items as `items` reads them.
fn lists_of<T>(column: &ArrayRef, items: impl Fn(&FieldRef, &ArrayRef) -> Option<T>) -> Option<Lists<T>> {
    let lists = lists(column)?;
    let DataType::LargeList(item) = lists.data_type() else { return None };
    let values = items(item, lists.values())?;
    Some(Lists { lists, values })
}

fn texts(field: &FieldRef, column: &ArrayRef) -> Option<TextColumn> {
    if let Some(strings) = strings(column) {
        return Some(TextColumn::Plain { strings, is_json: is_json(field) });
    }
    lists_of(column, message_items).map(|lists| TextColumn::Messages(Box::new(lists)))
}

/// Items of lists that may be messages: structs with a role, or texts.
fn message_items(field: &FieldRef, items: &ArrayRef) -> Option<JsonColumn> {
    let is_role = |field: &FieldRef| ["role", "from"].contains(&field.name().as_str()) && is_string(field.data_type());
    let is_message = match items.data_type() {
        DataType::Struct(fields) => fields.iter().any(is_role),
        other => is_string(other),
    };
    is_message.then(|| JsonColumn::new(field, items)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::schema::{DEMONSTRATIONS, PROMPTS_WITH_COLUMNS};
    use arrow::array::{RecordBatch, StringArray};
    use arrow::datatypes::{Fields, Schema};
    use std::path::Path;

    fn rows(columns: Vec<(Field, ArrayRef)>) -> Rows {
        let (fields, columns): (Vec<Field>, Vec<ArrayRef>) = columns.into_iter().unzip();
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
        Rows { file: Path::new("two.parquet").into(), first_row: 0, batch }
    }

    fn strings_of(names: &[&str]) -> Rows {
        let column = |name: &&str| {
            let values: ArrayRef = Arc::new(StringArray::from(vec![*name]));
            (Field::new(*name, DataType::Utf8, true), values)
        };
        rows(names.iter().map(column).collect())
    }

    #[test]
    fn two_columns_of_one_name_are_refused_where_they_are_used() {
        let fault = |names: &[&str]| DEMONSTRATIONS.records(&strings_of(names)).unwrap_err().to_string();
        let expected = "two.parquet: has 2 columns of the name `completion`, and it is not known which one is meant";
        assert!(fault(&["prompt", "completion", "completion"]).starts_with(expected));
        assert!(fault(&["prompt", "completion", "label", "label"]).contains("2 columns of the name `label`"));
        assert!(DEMONSTRATIONS.records(&strings_of(&["prompt", "completion", "note", "note"])).is_ok());
        let error = PROMPTS_WITH_COLUMNS.records(&strings_of(&["prompt", "note", "note"])).unwrap_err().to_string();
        assert!(error.contains("2 columns of the name `note`"), "{error}");
    }

    #[test]
    fn messages_with_two_fields_of_one_name_are_refused() {
        let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, true));
        let fields = Fields::from(["role", "content", "content"].map(field).to_vec());
        let item = Arc::new(Field::new("item", DataType::Struct(fields), true));
        let column = arrow::array::new_null_array(&DataType::List(item.clone()), 1);
        let error = DEMONSTRATIONS.records(&rows(vec![(Field::new("messages", DataType::List(item), true), column)]));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("`messages` holds lists of {role, content, content}, expected"), "{error}");
    }
}
