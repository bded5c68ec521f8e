//! Prompts and answers as a Parquet column, in the form in which they were read.

use std::sync::Arc;

use arrow::array::{ArrayRef, ListBuilder, StringArray, StringBuilder, StructBuilder};
use arrow::datatypes::{DataType, Field, Fields};

use super::schema::Text;

/// A column of strings, or of lists of messages. `None` where the two are mixed.
pub fn text_column(texts: &[&Text]) -> Option<ArrayRef> {
    if let [Text::Plain(_), ..] = texts {
        let plain = |text: &&Text| match text {
            Text::Plain(text) => Some(text.clone()),
            Text::Messages(_) => None,
        };
        let texts: Vec<String> = texts.iter().map(plain).collect::<Option<_>>()?;
        return Some(Arc::new(StringArray::from(texts)));
    }
    let field = |name: &str| Field::new(name, DataType::Utf8, true);
    let fields = Fields::from(vec![field("role"), field("content")]);
    let mut column = ListBuilder::new(StructBuilder::from_fields(fields, 0));
    for text in texts {
        let Text::Messages(messages) = text else { return None };
        for message in messages {
            for (index, text) in [&message.role, &message.content].into_iter().enumerate() {
                column.values().field_builder::<StringBuilder>(index)?.append_value(text);
            }
            column.values().append(true);
        }
        column.append(true);
    }
    Some(Arc::new(column.finish()))
}
