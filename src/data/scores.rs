//! Numbers about answers, written beside them.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, LargeListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{Field, Schema};

use super::parquet::Rows;
use super::schema::{AnswerLayout, Answered};
use crate::bail;
use crate::error::{Error, Result};

/// Some rows as they were read, with the answers found in them. What is added to them stands beside their own columns.
#[derive(Debug, Clone)]
pub struct AnsweredRows {
    /// The rows with all their columns.
    pub rows: Rows,
    /// The form of the answers.
    pub layout: AnswerLayout,
    /// One record a row.
    pub records: Vec<Answered>,
}

impl AnsweredRows {
    /// Adds a number for each answer of each row: as a column of numbers where a row holds one answer, of lists where it
    /// holds a list, and as the columns `chosen_<name>` and `rejected_<name>` for pairs. A column that already has the
    /// name is replaced.
    pub fn add_floats(&mut self, name: &str, values: &[Vec<f64>]) -> Result<()> {
        self.add(name, values, |values| Arc::new(Float64Array::from_iter_values(values)))
    }

    /// As [`add_floats`](Self::add_floats), for whole numbers.
    pub fn add_integers(&mut self, name: &str, values: &[Vec<i64>]) -> Result<()> {
        self.add(name, values, |values| Arc::new(Int64Array::from_iter_values(values)))
    }

    fn add<T: Copy>(&mut self, name: &str, values: &[Vec<T>], array: impl Fn(Vec<T>) -> ArrayRef) -> Result<()> {
        let lengths = || values.iter().map(Vec::len);
        let matches = lengths().eq(self.records.iter().map(|record| record.answers.len()));
        if !matches {
            bail!("{}: `{name}` does not hold one number for each answer", self.rows.file.display());
        }
        let nth = |index: usize| array(values.iter().map(|values| values[index]).collect());
        match self.layout {
            AnswerLayout::One => self.set_column(name, nth(0)),
            AnswerLayout::Pair => {
                self.set_column(&format!("chosen_{name}"), nth(0))?;
                self.set_column(&format!("rejected_{name}"), nth(1))
            }
            AnswerLayout::List => {
                let items = array(values.concat());
                let field = Arc::new(Field::new("element", items.data_type().clone(), true));
                let offsets = OffsetBuffer::from_lengths(lengths());
                self.set_column(name, Arc::new(LargeListArray::new(field, offsets, items, None)))
            }
        }
    }

    fn set_column(&mut self, name: &str, column: ArrayRef) -> Result<()> {
        let schema = self.rows.batch.schema();
        let mut fields: Vec<_> = schema.fields().iter().cloned().collect();
        let mut columns = self.rows.batch.columns().to_vec();
        let field = Arc::new(Field::new(name, column.data_type().clone(), true));
        match fields.iter().position(|field| field.name() == name) {
            Some(index) => (fields[index], columns[index]) = (field, column),
            None => {
                fields.push(field);
                columns.push(column);
            }
        }
        let schema = Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()));
        self.rows.batch = RecordBatch::try_new(schema, columns)
            .map_err(|error| Error::input(format!("{}: `{name}`: {error}", self.rows.file.display())))?;
        Ok(())
    }
}
