//! Columns that are carried from the data to the output, as they were stored.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::{CastOptions, can_cast_types, cast_with_options};
use arrow::datatypes::{FieldRef, Schema, SchemaRef};

use crate::data::table::Rows;
use crate::error::{Error, Result};

/// Some rows with the columns and the metadata of their file, and `new` columns after them. Rows are read with their texts as views, and
/// with other types where these are of no matter to a reader: here they get the file's types back.
pub(super) fn with_columns(rows: &Rows, stored: &SchemaRef, new: Vec<(FieldRef, ArrayRef)>) -> Result<RecordBatch> {
    let unwritable = |error: arrow::error::ArrowError| Error::input(format!("{}: {error}", rows.file.display()));
    let read = rows.batch.schema();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in read.fields().iter().zip(rows.batch.columns()) {
        let stored = stored.fields().iter().find(|stored| stored.name() == field.name()).unwrap_or(field);
        let (field, column) = match stored.data_type() {
            same if same == field.data_type() => (stored, column.clone()),
            other if can_cast_types(field.data_type(), other) => {
                let options = CastOptions { safe: false, ..Default::default() };
                (stored, cast_with_options(column, other, &options).map_err(unwritable)?)
            }
            _ => (field, column.clone()),
        };
        fields.push(field.clone());
        columns.push(column);
    }
    for (field, column) in new {
        fields.push(field);
        columns.push(column);
    }
    let schema = Arc::new(Schema::new_with_metadata(fields, stored.metadata().clone()));
    RecordBatch::try_new(schema, columns).map_err(unwritable)
}
