//! Labelled texts and their classes.

use arrow::array::{Array, BooleanArray, Int64Array, LargeStringArray};

use super::schema::Labelled;
use super::table::Rows;
use crate::error::Result;

/// The columns that labelled texts may use.
pub(super) const COLUMNS: &[&str] = &["text", "text_pair", "sentence", "sentence1", "sentence2", "label"];

/// Reads labelled texts.
pub(super) fn labelled(rows: &Rows) -> Result<Vec<Labelled>> {
    let (Some(text), true) = (rows.first_of(&["text", "sentence", "sentence1"]), rows.has("label")) else {
        return Err(rows.no_layout(
            "labelled texts",
            "`text` and `label`, or `text`, `text_pair` and `label`, or `sentence1`, `sentence2` and `label`",
        ));
    };
    let texts = rows.strings(text)?;
    let pair = rows.first_of(&["text_pair", "sentence2"]);
    let pairs = pair.map(|name| rows.strings(name)).transpose()?;
    let labels = Labels::new(rows)?;
    rows.map(|row| {
        let null = |name: &str| rows.fault(row, name, "is null, expected a text");
        let second = match (&pairs, pair) {
            (Some(pairs), Some(name)) if pairs.is_null(row) => return Err(null(name)),
            (Some(pairs), _) => Some(pairs.value(row).to_string()),
            (None, _) => None,
        };
        if texts.is_null(row) {
            return Err(null(text));
        }
        let (text, label) = (texts.value(row).to_string(), labels.get(row)?);
        Ok(Labelled { text, pair: second, label, origin: rows.origin(row) })
    })
}

/// The class of each row.
pub(super) fn classes(rows: &Rows) -> Result<Vec<String>> {
    let labels = Labels::new(rows)?;
    rows.map(|row| labels.get(row))
}

/// The column `label`: names, numbers, truth values, or numbers that the file's metadata give names to.
struct Labels<'a> {
    rows: &'a Rows,
    values: LabelValues,
}

enum LabelValues {
    Names(LargeStringArray),
    Truth(BooleanArray),
    Numbers(Int64Array, Option<Vec<String>>),
}

impl<'a> Labels<'a> {
    fn new(rows: &'a Rows) -> Result<Self> {
        let values = match (rows.strings("label"), rows.booleans("label")) {
            (Ok(names), _) => LabelValues::Names(names),
            (_, Ok(truth)) => LabelValues::Truth(truth),
            _ => LabelValues::Numbers(rows.integers("label")?, class_names(rows)),
        };
        Ok(Labels { rows, values })
    }

    fn get(&self, row: usize) -> Result<String> {
        let fault = |fault: String| Err(self.rows.fault(row, "label", fault));
        let (is_null, text) = match &self.values {
            LabelValues::Names(names) => (names.is_null(row), names.value(row).to_string()),
            LabelValues::Truth(truth) => (truth.is_null(row), truth.value(row).to_string()),
            LabelValues::Numbers(numbers, None) => (numbers.is_null(row), numbers.value(row).to_string()),
            LabelValues::Numbers(numbers, Some(names)) => {
                let number = numbers.value(row);
                match usize::try_from(number).ok().and_then(|index| names.get(index)) {
                    Some(name) => (numbers.is_null(row), name.clone()),
                    None => return fault(format!("is {number}, but the file's metadata name {} classes", names.len())),
                }
            }
        };
        if is_null { fault("is null, expected a class".to_string()) } else { Ok(text) }
    }
}

/// The names that Hugging Face's `datasets` writes into a file's metadata for a column of class numbers.
pub(super) fn class_names(rows: &Rows) -> Option<Vec<String>> {
    let schema = rows.batch.schema();
    let json: serde_json::Value = serde_json::from_str(schema.metadata().get("huggingface")?).ok()?;
    let names = json.pointer("/info/features/label/names")?.as_array()?;
    names.iter().map(|name| Some(name.as_str()?.to_string())).collect()
}
