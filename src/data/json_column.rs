//! Columns of any type as JSON: what a chat template is given of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StructArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Float64Type, Int64Type, UInt64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::{Map, Number, Value};

/// The key of a field's metadata that names its extension type, and the type of texts that are JSON.
const EXTENSION: (&str, &str) = ("ARROW:extension:name", "arrow.json");

/// Whether a column's texts are declared to be JSON: the extension type `arrow.json`, as `datasets` writes its feature `Json()`.
pub(super) fn is_json(field: &Field) -> bool {
    field.metadata().get(EXTENSION.0).is_some_and(|name| name == EXTENSION.1)
}

/// The field with the metadata that declares its texts to be JSON.
pub(super) fn as_json(field: Field) -> Field {
    let metadata = [(EXTENSION.0, EXTENSION.1), ("ARROW:extension:metadata", "")];
    field.with_metadata(HashMap::from(metadata.map(|(key, value)| (key.to_owned(), value.to_owned()))))
}

/// A column whose values are read as JSON: structs and maps as objects (without fields that are null), lists as lists, texts as strings or, where they
/// are declared to be JSON, as what they hold; dates, times and other types as text.
#[derive(Debug, Clone)]
pub struct JsonColumn {
    field: FieldRef,
    values: ArrayRef,
}

impl JsonColumn {
    /// `None` where Arrow cannot convert the column, or its objects would have two fields of one name.
    pub(super) fn new(field: &FieldRef, column: &ArrayRef) -> Option<Self> {
        if repeats_a_name(field.data_type()) {
            return None;
        }
        let field = canonical(field);
        let options = CastOptions { safe: false, ..Default::default() };
        let values = cast_with_options(column, field.data_type(), &options).ok()?;
        Some(Self { field, values })
    }

    /// The value of a row, which may be null. The error is a part of a sentence: "holds …".
    pub(super) fn get(&self, row: usize) -> Result<Value, String> {
        value(&self.field, &self.values, row)
    }
}

/// The first name that a field shares with an earlier one.
pub(super) fn repeated_name(fields: &Fields) -> Option<&str> {
    let mut names = HashSet::new();
    fields.iter().map(|field| field.name().as_str()).find(|name| !names.insert(*name))
}

/// Whether structs of a type, or in it, have two fields of one name.
fn repeats_a_name(data_type: &DataType) -> bool {
    match data_type {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _)
        | DataType::Map(item, _) => repeats_a_name(item.data_type()),
        DataType::Dictionary(_, values) => repeats_a_name(values),
        DataType::Struct(fields) => {
            repeated_name(fields).is_some() || fields.iter().any(|field| repeats_a_name(field.data_type()))
        }
        _ => false,
    }
}

/// A field with the few types that [`value`] reads.
fn canonical(field: &FieldRef) -> FieldRef {
    fn leaf(data_type: &DataType) -> DataType {
        match data_type {
            DataType::Utf8 | DataType::Utf8View => DataType::LargeUtf8,
            DataType::Binary | DataType::BinaryView | DataType::FixedSizeBinary(_) => DataType::LargeBinary,
            DataType::Dictionary(_, values) => leaf(values),
            DataType::RunEndEncoded(_, values) => leaf(values.data_type()),
            unsigned if unsigned.is_unsigned_integer() => DataType::UInt64,
            integer if integer.is_integer() => DataType::Int64,
            float if float.is_floating() => DataType::Float64,
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::ListView(item)
            | DataType::LargeListView(item)
            | DataType::FixedSizeList(item, _) => DataType::LargeList(canonical(item)),
            DataType::Struct(fields) => DataType::Struct(fields.iter().map(canonical).collect()),
            DataType::Map(entries, sorted) => DataType::Map(canonical(entries), *sorted),
            other => other.clone(),
        }
    }
    Arc::new(Field::clone(field).with_data_type(leaf(field.data_type())))
}

fn value(field: &Field, column: &ArrayRef, row: usize) -> Result<Value, String> {
    if column.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match column.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => Value::Bool(column.as_boolean().value(row)),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float64 => {
            let number = column.as_primitive::<Float64Type>().value(row);
            let finite = Number::from_f64(number).map(Value::Number);
            finite.ok_or_else(|| format!("holds {number} in `{}`, expected a finite number", field.name()))?
        }
        DataType::LargeUtf8 => text(field, column.as_string::<i64>().value(row))?,
        DataType::LargeBinary => {
            let bytes = column.as_binary::<i64>().value(row);
            let decoded = std::str::from_utf8(bytes)
                .map_err(|_| format!("holds binary in `{}`, expected text (UTF-8)", field.name()));
            text(field, decoded?)?
        }
        DataType::LargeList(item) => {
            let items = column.as_list::<i64>().value(row);
            (0..items.len()).map(|index| value(item, &items, index)).collect::<Result<_, _>>()?
        }
        DataType::Struct(fields) => {
            let columns = fields.iter().zip(column.as_struct().columns());
            let values = columns.map(|(field, column)| Ok((field.name().clone(), value(field, column, row)?)));
            let values: Map<String, Value> = values.collect::<Result<_, String>>()?;
            values.into_iter().filter(|(_, value)| !value.is_null()).collect()
        }
        DataType::Map(entries, _) => pairs(entries, &column.as_map().value(row))?,
        _ => displayed(column, row)?,
    })
}

/// A map's entries, whose keys are text.
fn pairs(field: &Field, entries: &StructArray) -> Result<Value, String> {
    let (DataType::Struct(fields), [keys, values]) = (field.data_type(), entries.columns()) else {
        return Err(format!("holds a map in `{}` that is not one of keys and values", field.name()));
    };
    let pair = |index: usize| {
        let key = match value(&fields[0], keys, index)? {
            Value::String(key) => key,
            other => other.to_string(),
        };
        Ok((key, value(&fields[1], values, index)?))
    };
    (0..entries.len()).map(pair).collect::<Result<Map<_, _>, String>>().map(Value::Object)
}

fn text(field: &Field, text: &str) -> Result<Value, String> {
    match is_json(field) {
        true => serde_json::from_str(text)
            .map_err(|error| format!("holds JSON in `{}` that cannot be read ({error})", field.name())),
        false => Ok(text.into()),
    }
}

fn displayed(column: &ArrayRef, row: usize) -> Result<Value, String> {
    let unreadable = |error: arrow::error::ArrowError| format!("holds a value that cannot be read ({error})");
    let formatter = ArrayFormatter::try_new(column, &FormatOptions::default()).map_err(unreadable)?;
    Ok(formatter.value(row).try_to_string().map_err(unreadable)?.into())
}
