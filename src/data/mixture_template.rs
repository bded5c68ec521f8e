//! A template that makes a demonstration of a row, whatever its columns.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

use super::schema::{Demonstration, Text};
use super::table::Rows;
use crate::error::{Error, Result};

/// Steps that rendering one row may take.
const STEP_LIMIT: u64 = 100_000;

/// A prompt and a completion with the row's columns as variables.
pub struct RowTemplate {
    name: String,
    mixture: String,
    environment: Environment<'static>,
}

impl RowTemplate {
    /// Compiles a template of the mixture in the file `mixture`. A column that the row does not have is an error where it is used.
    pub fn new(mixture: &str, name: &str, prompt: &str, completion: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|error| Error::input(format!("{mixture}: {error}")))?);
        environment.set_fuel(Some(STEP_LIMIT));
        for (part, text) in [("prompt", prompt), ("completion", completion)] {
            let invalid =
                |error| Error::input(format!("{mixture}: template \"{name}\": the {part} cannot be read: {error}"));
            environment.add_template_owned(part, text.to_string()).map_err(invalid)?;
        }
        Ok(RowTemplate { name: name.to_string(), mixture: mixture.to_string(), environment })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The demonstration that the template makes of a row.
    pub fn render(&self, rows: &Rows, row: usize) -> Result<Demonstration> {
        let schema = rows.batch.schema();
        let cells = schema
            .fields()
            .iter()
            .zip(rows.batch.columns())
            .map(|(field, column)| (field.name().clone(), cell(column, row)));
        let values = Value::from_pairs(cells);
        let part = |part: &str| {
            let rendered = self.environment.get_template(part).and_then(|template| template.render(values.clone()));
            rendered.map_err(|error| {
                let columns = rows.column_names();
                Error::input(format!(
                    "{}: template \"{}\" of {}, {part}: {error} (the columns are {columns})",
                    rows.origin(row),
                    self.name,
                    self.mixture
                ))
            })
        };
        let (prompt, completion) = (part("prompt")?, part("completion")?);
        Ok(Demonstration {
            prompt: Some(Text::Plain(prompt)),
            completion: Text::Plain(completion),
            origin: rows.origin(row),
        })
    }
}

/// A value of a column as a template sees it; undefined for types that have no place in a text.
fn cell(column: &ArrayRef, row: usize) -> Value {
    if column.is_null(row) {
        return Value::from(());
    }
    let one = column.slice(row, 1);
    let cast = |to: &DataType| arrow::compute::cast(&one, to).ok();
    match column.data_type() {
        DataType::Boolean => Value::from(column.as_boolean().value(row)),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..) => {
            let text = cast(&DataType::LargeUtf8);
            text.map_or(Value::UNDEFINED, |text| Value::from(text.as_string::<i64>().value(0)))
        }
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            let list = cast(&DataType::LargeList(item.clone()));
            list.map_or(Value::UNDEFINED, |list| {
                let items = list.as_list::<i64>().value(0);
                Value::from((0..items.len()).map(|index| cell(&items, index)).collect::<Vec<_>>())
            })
        }
        DataType::Struct(fields) => {
            let structs = column.as_struct();
            let pairs = fields.iter().zip(structs.columns());
            Value::from_pairs(pairs.map(|(field, column)| (field.name().clone(), cell(column, row))))
        }
        integer if integer.is_integer() => cast(&DataType::Int64)
            .map_or(Value::UNDEFINED, |number| Value::from(number.as_primitive::<Int64Type>().value(0))),
        number if number.is_numeric() => {
            let number = cast(&DataType::Float64);
            number.map_or(Value::UNDEFINED, |number| Value::from(number.as_primitive::<Float64Type>().value(0)))
        }
        _ => Value::UNDEFINED,
    }
}
