//! Columns by name, whatever Arrow type a file stores them in.
//!
//! The same strings are written as `string`, `large_string`, `string_view` or a dictionary of these; lists as `list`,
//! `large_list`, `fixed_size_list` or `list_view`; numbers in any width. Each accessor converts to one form and says
//! which column of which file has what type when it cannot. Numbers, truth values and lists that are written as texts, as in CSV, are read from them.

use std::ops::Range;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, LargeListArray, LargeStringArray, StructArray,
};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type};
use std::sync::Arc;

use super::parquet::Rows;
use super::schema::{Message, Text};
use super::{json_types, typed_text};
use crate::bail;
use crate::error::{Error, Result};

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
    /// Strings.
    Plain(LargeStringArray),
    /// Lists of `{role, content}`.
    Messages(Box<Lists<MessageColumn>>),
}

/// Messages: the `role` and `content` (or `from` and `value`) fields of a struct.
#[derive(Debug, Clone)]
pub struct MessageColumn {
    whole: StructArray,
    role: LargeStringArray,
    content: LargeStringArray,
    /// Whether the roles are ShareGPT's (`human`, `gpt`).
    sharegpt: bool,
}

impl TextColumn {
    /// The text of this row, or `None` where it is null. The error is a part of a sentence ("message 2 has no role").
    pub fn get(&self, row: usize) -> Result<Option<Text>, String> {
        match self {
            TextColumn::Plain(strings) => Ok(strings.is_valid(row).then(|| Text::Plain(strings.value(row).to_owned()))),
            TextColumn::Messages(lists) => {
                let Some(range) = lists.range(row) else { return Ok(None) };
                let start = range.start;
                let messages: Result<_, _> = range.map(|index| lists.values.get(index, index - start)).collect();
                Ok(Some(Text::Messages(messages?)))
            }
        }
    }
}

impl MessageColumn {
    fn get(&self, index: usize, number: usize) -> Result<Message, String> {
        let missing = |what: &str| Err(format!("message {number} (counted from 0) {what}"));
        if self.whole.is_null(index) {
            return missing("is null");
        }
        if self.role.is_null(index) {
            return missing("has no role");
        }
        if self.content.is_null(index) {
            return missing("has no content (calls of tools are not supported)");
        }
        let role = self.role.value(index);
        let role = match role {
            "human" if self.sharegpt => "user",
            "gpt" | "chatgpt" | "bing" | "bard" | "model" if self.sharegpt => "assistant",
            _ => role,
        };
        Ok(Message { role: role.to_owned(), content: self.content.value(index).to_owned() })
    }
}

impl Rows {
    /// The column of this name, if there is one.
    pub fn column(&self, name: &str) -> Option<&ArrayRef> {
        self.batch.column_by_name(name)
    }

    /// Whether there is a column of this name.
    pub fn has(&self, name: &str) -> bool {
        self.column(name).is_some()
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
        texts(column).ok_or_else(|| self.wrong_type(name, column, "strings or lists of {role, content}"))
    }

    /// A column of lists of strings, or of lists of lists of messages.
    pub fn text_lists(&self, name: &str) -> Result<Lists<TextColumn>> {
        self.lists(name, "lists of strings or of messages", texts)
    }

    /// A column of lists of strings.
    pub fn string_lists(&self, name: &str) -> Result<Lists<LargeStringArray>> {
        self.lists(name, "lists of strings", strings)
    }

    /// A column of lists of whole numbers.
    pub fn integer_lists(&self, name: &str) -> Result<Lists<Int64Array>> {
        self.lists(name, "lists of whole numbers", integers)
    }

    /// A column of lists of numbers.
    pub fn float_lists(&self, name: &str) -> Result<Lists<Float64Array>> {
        self.lists(name, "lists of numbers", floats)
    }

    /// A column of lists of truth values.
    pub fn boolean_lists(&self, name: &str) -> Result<Lists<BooleanArray>> {
        self.lists(name, "lists of truth values", booleans)
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

    fn lists<T>(&self, name: &str, expected: &str, items: impl Fn(&ArrayRef) -> Option<T>) -> Result<Lists<T>> {
        let column = self.required(name)?;
        let wrong_type = || self.wrong_type(name, column, expected);
        let lists = lists(column).ok_or_else(wrong_type)?;
        let values = items(lists.values()).ok_or_else(wrong_type)?;
        Ok(Lists { lists, values })
    }

    fn required(&self, name: &str) -> Result<&ArrayRef> {
        let field = self.batch.schema_ref().field_with_name(name).ok();
        match (self.column(name), field.and_then(json_types::mixed)) {
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
            return self.fault(row, name, format!("is the text {text:?}, expected {expected}"));
        }
        let found = describe(column.data_type());
        let file = self.file.display();
        Error::input(format!("{file}: column `{name}` holds {found}, expected {expected}"))
    }
}

/// The texts of a column of texts, in which something else may be written.
fn written(column: &ArrayRef) -> Option<LargeStringArray> {
    strings(column).filter(|_| *column.data_type() != DataType::Null)
}

/// A type in the words that a person would use for it.
fn describe(data_type: &DataType) -> String {
    match data_type {
        other if is_string(other) => "strings".to_owned(),
        DataType::BinaryView => "binary".to_owned(),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => format!("lists of {}", describe(item.data_type())),
        DataType::Struct(fields) => {
            let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
            format!("{{{}}}", names.join(", "))
        }
        other => other.to_string().to_lowercase(),
    }
}

fn is_string(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => true,
        DataType::Dictionary(_, values) => is_string(values),
        DataType::RunEndEncoded(_, values) => is_string(values.data_type()),
        _ => false,
    }
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

fn texts(column: &ArrayRef) -> Option<TextColumn> {
    if let Some(strings) = strings(column) {
        return Some(TextColumn::Plain(strings));
    }
    let lists = lists(column)?;
    let whole = lists.values().as_struct_opt()?.clone();
    let field = |name: &str| whole.column_by_name(name).and_then(strings);
    let (role, content, sharegpt) = match (field("role"), field("content")) {
        (Some(role), Some(content)) => (role, content, false),
        _ => (field("from")?, field("value")?, true),
    };
    let values = MessageColumn { whole, role, content, sharegpt };
    Some(TextColumn::Messages(Box::new(Lists { lists, values })))
}
