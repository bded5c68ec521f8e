//! Prompts and answers as columns of a Parquet file, in the form in which they were read.

use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema};
use serde_json::Value;

use super::json_column::as_json;
use super::record::{Message, Text};
use crate::error::{Error, Result};

/// What the columns of some texts hold, so that all batches of a file have one schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextForm {
    /// The fields of the messages, and whether the values of each are strings; others are written as JSON.
    fields: Vec<(String, bool)>,
    has_tools: bool,
    has_variables: bool,
}

impl TextForm {
    /// The form that fits all of `texts`.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a Text>) -> Self {
        let fields = ["role", "content"].map(|name| (name.to_owned(), true)).to_vec();
        let mut form = TextForm { fields, has_tools: false, has_variables: false };
        texts.into_iter().for_each(|text| form.add(text));
        form
    }

    /// Makes the form fit one more text.
    pub fn add(&mut self, text: &Text) {
        let Text::Messages(conversation) = text else { return };
        self.has_tools |= conversation.inputs.tools.is_some();
        self.has_variables |= !conversation.inputs.variables.is_empty();
        for (name, value) in conversation.iter().flat_map(|message| message.fields()) {
            match self.fields.iter_mut().find(|(known, _)| known == name) {
                Some((_, is_string)) => *is_string &= value.is_string(),
                None => self.fields.push((name.clone(), value.is_string())),
            }
        }
    }

    /// The texts as a column of this name: strings, or lists of messages. `None` where the two are mixed.
    pub fn column(&self, name: &str, texts: &[&Text]) -> Option<(FieldRef, ArrayRef)> {
        let column: ArrayRef = match texts {
            [Text::Plain(_), ..] => {
                let plain = |text: &&Text| match text {
                    Text::Plain(text) => Some(text.clone()),
                    Text::Messages(_) => None,
                };
                Arc::new(StringArray::from(texts.iter().map(plain).collect::<Option<Vec<_>>>()?))
            }
            _ => {
                let turns = |text: &&'_ Text| match text {
                    Text::Plain(_) => None,
                    Text::Messages(conversation) => Some(conversation.messages.clone()),
                };
                Arc::new(self.messages(&texts.iter().map(turns).collect::<Option<Vec<_>>>()?))
            }
        };
        Some((Arc::new(Field::new(name, column.data_type().clone(), true)), column))
    }

    fn messages(&self, conversations: &[Vec<Message>]) -> ListArray {
        let all = || conversations.iter().flatten();
        let (mut fields, mut columns): (Vec<Field>, Vec<ArrayRef>) = (Vec::new(), Vec::new());
        for (name, is_string) in &self.fields {
            let value = |message: &Message| {
                let value = message.fields().get(name)?;
                Some(if *is_string { value.as_str()?.to_owned() } else { value.to_string() })
            };
            let field = Field::new(name, DataType::Utf8, true);
            fields.push(if *is_string { field } else { as_json(field) });
            columns.push(Arc::new(all().map(value).collect::<StringArray>()));
        }
        let fields = Fields::from(fields);
        let item = Field::new("item", DataType::Struct(fields.clone()), true);
        let lengths = conversations.iter().map(Vec::len);
        let messages = StructArray::new(fields, columns, None);
        ListArray::new(Arc::new(item), OffsetBuffer::from_lengths(lengths), Arc::new(messages), None)
    }

    /// The columns `tools` and `chat_template_kwargs` of the texts, as JSON, where some text has such.
    pub fn input_columns(&self, texts: &[&Text]) -> Vec<(FieldRef, ArrayRef)> {
        let inputs = |text: &&Text| match text {
            Text::Messages(conversation) => Some(conversation.inputs.clone()),
            Text::Plain(_) => None,
        };
        let column = |name: &str, value: &dyn Fn(&Text) -> Option<String>| -> (FieldRef, ArrayRef) {
            let values: StringArray = texts.iter().map(|text| value(text)).collect();
            (Arc::new(as_json(Field::new(name, DataType::Utf8, true))), Arc::new(values))
        };
        let tools = |text: &Text| Some(inputs(&text)?.tools.as_ref()?.to_string());
        let variables = |text: &Text| {
            let variables = inputs(&text)?.variables.clone();
            (!variables.is_empty()).then(|| Value::Object(variables).to_string())
        };
        let mut columns = Vec::new();
        columns.extend(self.has_tools.then(|| column("tools", &tools)));
        columns.extend(self.has_variables.then(|| column("chat_template_kwargs", &variables)));
        columns
    }
}

/// Rows of these columns.
pub fn batch_of(columns: Vec<(FieldRef, ArrayRef)>) -> Result<RecordBatch> {
    let (fields, columns): (Vec<FieldRef>, Vec<ArrayRef>) = columns.into_iter().unzip();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(|error| Error::input(error.to_string()))
}

/// A column of other values under this name.
pub fn named(name: &str, column: ArrayRef) -> (FieldRef, ArrayRef) {
    (Arc::new(Field::new(name, column.data_type().clone(), true)), column)
}
