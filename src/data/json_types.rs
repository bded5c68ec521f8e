//! The types of the columns of JSON objects, from all of them.
//!
//! A column is numbers, truth values, strings, lists or objects; whole numbers and others are one type, and null is of every type. Objects of one column
//! have the fields of all of them. Where the lists and objects of a column have parts of several types (a content that is a string here and a list of
//! parts there), the column's values stay what they are, as JSON texts. A column of strings here and numbers there is nobody's intention, and an error
//! as soon as it is used.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::json_column::{as_json, is_json};
use crate::limits;

/// Fields of the objects within a column, all of them together; objects with more are taken for dictionaries, and stay JSON texts.
const MOST_FIELDS: usize = 1000;
/// The key of a field's metadata under which the sentence stands that says what types the column has.
const MIXED: &str = "rlhf.mixed";

/// Why a column cannot be used, where it has values of several types.
pub(super) fn mixed(field: &Field) -> Option<&str> {
    field.metadata().get(MIXED).map(String::as_str)
}

/// Whether a column's values are kept as JSON texts, for one reason or the other.
pub(super) fn is_kept_as_text(field: &Field) -> bool {
    is_json(field) || mixed(field).is_some()
}

/// What values are.
#[derive(Debug, Default)]
enum Kind {
    #[default]
    Null,
    Bool,
    Integer,
    Float,
    Text,
    List(Box<Kind>),
    Object(Fields),
    /// Of several kinds, of which this was found last.
    Mixed(&'static str),
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Kind::Null => "null",
            Kind::Bool => "a truth value",
            Kind::Integer | Kind::Float => "a number",
            Kind::Text => "a string",
            Kind::List(_) => "a list",
            Kind::Object(_) => "an object",
            Kind::Mixed(last) => last,
        }
    }

    /// The Arrow type; `None` where values of this kind are kept as JSON texts.
    fn data_type(&self) -> Option<DataType> {
        Some(match self {
            Kind::Null => DataType::Null,
            Kind::Bool => DataType::Boolean,
            Kind::Integer => DataType::Int64,
            Kind::Float => DataType::Float64,
            Kind::Text => DataType::Utf8,
            Kind::List(item) => DataType::List(Arc::new(Field::new_list_field(item.data_type()?, true))),
            // Parquet cannot hold objects without fields.
            Kind::Object(fields) if fields.all.is_empty() => return None,
            Kind::Object(fields) => {
                let field = |(name, kind): &(String, Kind)| Some(Field::new(name, kind.data_type()?, true));
                DataType::Struct(fields.all.iter().map(field).collect::<Option<_>>()?)
            }
            Kind::Mixed(_) => return None,
        })
    }

    fn scalar(&mut self, found: Kind) {
        *self = match (std::mem::take(self), found) {
            (Kind::Null, found) => found,
            (Kind::Bool, Kind::Bool) => Kind::Bool,
            (Kind::Integer, Kind::Integer) => Kind::Integer,
            (Kind::Integer | Kind::Float, Kind::Integer | Kind::Float) => Kind::Float,
            (Kind::Text, Kind::Text) => Kind::Text,
            (Kind::Mixed(last), _) => Kind::Mixed(last),
            (_, found) => Kind::Mixed(found.name()),
        };
    }
}

/// The fields of objects, in the order in which they were met.
#[derive(Debug, Default)]
struct Fields {
    all: Vec<(String, Kind)>,
    by_name: HashMap<String, usize>,
}

impl Fields {
    /// The place of a field, if there is one of this name. Most objects have their fields in the order of the one before.
    fn find(&self, name: &str, guess: usize) -> Option<usize> {
        let is_guessed = self.all.get(guess).is_some_and(|(known, _)| known == name);
        is_guessed.then_some(guess).or_else(|| self.by_name.get(name).copied())
    }

    fn add(&mut self, name: &str) -> usize {
        self.by_name.insert(name.to_owned(), self.all.len());
        self.all.push((name.to_owned(), Kind::Null));
        self.all.len() - 1
    }
}

/// What else is known of a column.
#[derive(Debug, Default)]
struct Column {
    /// The line in which its first value is that is not null.
    since: u64,
    /// Fields of the objects within it.
    fields: usize,
    /// What makes it unusable.
    mixed: Option<String>,
}

/// The types of the columns of all objects so far.
#[derive(Debug, Default)]
pub(super) struct Types {
    kinds: Fields,
    columns: Vec<Column>,
}

impl Types {
    /// Adds an object, which begins in this line.
    ///
    /// # Errors
    /// Where the text is not an object of JSON, or has more columns than are read.
    pub(super) fn add(&mut self, text: &str, line: u64) -> serde_json::Result<()> {
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_map(RowVisitor { types: self, line })?;
        json.end()
    }

    /// The columns as Arrow has them.
    pub(super) fn schema(&self) -> Schema {
        let columns = self.kinds.all.iter().zip(&self.columns);
        let field = |((name, kind), column): (&(String, Kind), &Column)| {
            let data_type = kind.data_type().filter(|_| column.fields <= MOST_FIELDS);
            let field = match data_type {
                Some(data_type) => Field::new(name, data_type, true),
                None => as_json(Field::new(name, DataType::Utf8, true)),
            };
            let Some(sentence) = &column.mixed else { return field };
            field.with_metadata(HashMap::from([(MIXED.to_owned(), sentence.clone())]))
        };
        Schema::new(columns.map(field).collect::<Vec<_>>())
    }
}

/// Merges an object into the columns.
struct RowVisitor<'a> {
    types: &'a mut Types,
    line: u64,
}

impl<'de> Visitor<'de> for RowVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let RowVisitor { types: Types { kinds, columns }, line } = self;
        let mut guess = 0;
        while let Some(index) = map.next_key_seed(KeySeed { fields: kinds, guess })? {
            guess = index + 1;
            if index == columns.len() {
                columns.push(Column::default());
            }
            if index >= limits::COLUMNS {
                return Err(A::Error::custom(format!("the objects have more than {} fields", limits::COLUMNS)));
            }
            let (kind, column) = (&mut kinds.all[index].1, &mut columns[index]);
            let (was, was_mixed) = (kind.name(), matches!(kind, Kind::Mixed(_)));
            map.next_value_seed(KindVisitor { kind, fields: &mut column.fields })?;
            if column.since == 0 && !matches!(kind, Kind::Null) {
                column.since = line;
            }
            let is_scalar = |name: &str| !["a list", "an object"].contains(&name);
            match kind {
                Kind::Mixed(now) if !was_mixed && is_scalar(was) && is_scalar(now) => {
                    column.mixed = Some(format!("holds {now} in line {line} and {was} in line {}", column.since));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The place of the field that a key names.
struct KeySeed<'a> {
    fields: &'a mut Fields,
    guess: usize,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<usize, E> {
        Ok(self.fields.find(name, self.guess).unwrap_or_else(|| self.fields.add(name)))
    }
}

/// Merges a value into a kind.
struct KindVisitor<'a> {
    kind: &'a mut Kind,
    /// Fields of objects in the column.
    fields: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for KindVisitor<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for KindVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.kind.scalar(Kind::Bool);
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.kind.scalar(Kind::Integer);
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.kind.scalar(if i64::try_from(value).is_ok() { Kind::Integer } else { Kind::Float });
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.kind.scalar(Kind::Float);
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        self.kind.scalar(Kind::Text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        if matches!(self.kind, Kind::Null) {
            *self.kind = Kind::List(Box::default());
        }
        if !matches!(self.kind, Kind::List(_) | Kind::Mixed(_)) {
            *self.kind = Kind::Mixed("a list");
        }
        match self.kind {
            Kind::List(item) => {
                while items.next_element_seed(KindVisitor { kind: item, fields: self.fields })?.is_some() {}
            }
            _ => while items.next_element::<IgnoredAny>()?.is_some() {},
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if matches!(self.kind, Kind::Null) {
            *self.kind = Kind::Object(Fields::default());
        }
        if !matches!(self.kind, Kind::Object(_) | Kind::Mixed(_)) {
            *self.kind = Kind::Mixed("an object");
        }
        // What stays JSON text anyway need not be known any closer.
        let Kind::Object(fields) = self.kind else { return rest(map) };
        if *self.fields > MOST_FIELDS {
            return rest(map);
        }
        let mut guess = 0;
        while let Some(index) = {
            let before = fields.all.len();
            let index = map.next_key_seed(KeySeed { fields, guess })?;
            *self.fields += fields.all.len() - before;
            index
        } {
            guess = index + 1;
            map.next_value_seed(KindVisitor { kind: &mut fields.all[index].1, fields: self.fields })?;
        }
        Ok(())
    }
}

/// Passes over the rest of an object.
fn rest<'de, A: MapAccess<'de>>(mut map: A) -> Result<(), A::Error> {
    while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(rows: &[&str]) -> Schema {
        let mut types = Types::default();
        rows.iter().zip(1..).for_each(|(row, line)| types.add(row, line).unwrap());
        types.schema()
    }

    /// The type of the column `a`, or `json`.
    fn of_a(rows: &[&str]) -> String {
        let schema = schema(rows);
        let field = schema.field_with_name("a").unwrap();
        if is_json(field) { "json".to_owned() } else { field.data_type().to_string() }
    }

    #[test]
    fn types_are_those_of_all_rows() {
        for (rows, expected) in [
            (vec![r#"{"a": null}"#, "{}"], "Null"),
            (vec![r#"{"a": 1}"#, r#"{"a": null}"#, r#"{"a": -2}"#], "Int64"),
            (vec![r#"{"a": 1}"#, r#"{"a": 0.5}"#], "Float64"),
            (vec![r#"{"a": 18446744073709551615}"#], "Float64"),
            (vec!["{}", r#"{"b": 1, "a": "x"}"#], "Utf8"),
            (vec![r#"{"a": []}"#, r#"{"a": [true]}"#], "List(Boolean)"),
            (
                vec![r#"{"a": [{"x": 1}]}"#, r#"{"a": [{"y": "z"}, {"x": 2}]}"#],
                "List(Struct(\"x\": Int64, \"y\": Utf8))",
            ),
            (vec![r#"{"a": {}}"#], "json"),
            (vec![r#"{"a": [1, "x"]}"#], "json"),
            (vec![r#"{"a": "x"}"#, r#"{"a": ["x"]}"#], "json"),
            (vec![r#"{"a": [{"content": "x"}, {"content": [{"text": "x"}]}]}"#], "json"),
            (vec![r#"{"a": [{"x": {}}]}"#], "json"),
        ] {
            assert_eq!(of_a(&rows), expected, "{rows:?}");
            assert_eq!(schema(&rows).fields().iter().find_map(|field| mixed(field)), None);
        }
    }

    #[test]
    fn strings_beside_numbers_are_told_with_their_lines() {
        let found = schema(&[r#"{"a": null}"#, r#"{"a": "x"}"#, r#"{"a": "y", "b": 1}"#, r#"{"a": 42, "b": false}"#]);
        let sentences: Vec<_> = found.fields().iter().map(|field| mixed(field).unwrap()).collect();
        assert_eq!(
            sentences,
            ["holds a number in line 4 and a string in line 2", "holds a truth value in line 4 and a number in line 3"]
        );
    }

    #[test]
    fn objects_with_thousands_of_fields_are_dictionaries() {
        let rows: Vec<String> =
            (0..1200).map(|row| format!(r#"{{"a": {{"key {row}": 1}}, "b": [{{"x": 1}}]}}"#)).collect();
        let found = schema(&rows.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(is_json(found.field(0)) && !is_json(found.field(1)));
        let wide: Vec<String> = (0..=limits::COLUMNS).map(|column| format!("\"{column}\": 1")).collect();
        let error = Types::default().add(&format!("{{{}}}", wide.join(",")), 1).unwrap_err().to_string();
        assert!(error.contains("more than 10000 fields"), "{error}");
    }
}
