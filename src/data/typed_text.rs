//! Numbers, truth values, lists and objects that are written as texts, as in CSV, where all columns are
//! texts.
//!
//! A layout that wants numbers of a column of texts reads them by their usual spelling, and lists and objects
//! as JSON. Where one text cannot be read so, none of the column is. An empty text is null.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, LargeStringArray};
use serde_json::{Map, Value};

use super::json_rows::batch_of;
use super::json_types::{Types, is_kept_as_text};

/// Reads every text by `parse`, but for empty ones.
fn all<T>(texts: &LargeStringArray, parse: impl Fn(&str) -> Option<T>) -> Option<Vec<Option<T>>> {
    let value = |text: Option<&str>| match text.map(str::trim).filter(|text| !text.is_empty()) {
        Some(text) => parse(text).map(Some),
        None => Some(None),
    };
    texts.iter().map(value).collect()
}

/// Whole numbers, also where they are written as `1.0`.
pub(super) fn integers(texts: &LargeStringArray) -> Option<Int64Array> {
    Some(Int64Array::from(all(texts, whole)?))
}

fn whole(text: &str) -> Option<i64> {
    let of_float = || text.parse::<f64>().ok().filter(|number| number.fract() == 0.0 && number.abs() < 9e15);
    text.parse().ok().or_else(|| of_float().map(|number| number as i64))
}

/// Numbers.
pub(super) fn floats(texts: &LargeStringArray) -> Option<Float64Array> {
    Some(Float64Array::from(all(texts, |text| text.parse().ok())?))
}

/// `true` and `false`, in any case.
pub(super) fn booleans(texts: &LargeStringArray) -> Option<BooleanArray> {
    Some(BooleanArray::from(all(texts, truth)?))
}

fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// Whether any of the texts is a truth value or a whole number. One is enough, so that it does not matter how
/// many rows are looked at together.
pub(super) fn has_mark(texts: &LargeStringArray) -> bool {
    texts.iter().flatten().map(str::trim).any(|text| truth(text).is_some() || whole(text).is_some())
}

/// Lists and objects in JSON, all of them of one type.
pub(super) fn nested(texts: &LargeStringArray) -> Option<ArrayRef> {
    let parse = |text: &str| text.starts_with(['[', '{']).then(|| serde_json::from_str::<Value>(text).ok()).flatten();
    let values = all(texts, parse)?;
    let mut types = Types::default();
    let rows: Vec<Map<String, Value>> =
        values.into_iter().map(|value| Map::from_iter([("value".to_owned(), value.unwrap_or_default())])).collect();
    for row in &rows {
        types.add(&serde_json::to_string(row).ok()?, 1).ok()?;
    }
    let schema = Arc::new(types.schema());
    if schema.fields().iter().any(|field| is_kept_as_text(field)) {
        return None;
    }
    match rows.is_empty() {
        true => Some(arrow::array::new_empty_array(&arrow::datatypes::DataType::Null)),
        false => batch_of(&rows, &schema).ok()?.columns().first().cloned(),
    }
}

/// A text that is neither empty nor JSON, as numbers, truth values, lists and objects are, or the first one:
/// what is shown where a column cannot be read.
pub(super) fn odd_one(texts: &LargeStringArray) -> Option<(usize, &str)> {
    let filled =
        || texts.iter().enumerate().filter_map(|(row, text)| Some((row, text.filter(|text| !text.trim().is_empty())?)));
    filled().find(|(_, text)| serde_json::from_str::<serde::de::IgnoredAny>(text).is_err()).or_else(|| filled().next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, AsArray};

    fn texts(texts: &[&str]) -> LargeStringArray {
        LargeStringArray::from(texts.to_vec())
    }

    #[test]
    fn numbers_and_truth_values_are_read_by_their_spelling() {
        let found = integers(&texts(&["1", " -2 ", "", "3.0"])).unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [Some(1), Some(-2), None, Some(3)]);
        assert!(integers(&texts(&["1", "1.5"])).is_none() && integers(&texts(&["one"])).is_none());
        let found = floats(&texts(&["0.5", "", "1e-3"])).unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [Some(0.5), None, Some(1e-3)]);
        let found = booleans(&texts(&["True", "false", "TRUE", ""])).unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [Some(true), Some(false), Some(true), None]);
        assert!(booleans(&texts(&["1", "0"])).is_none());
    }

    #[test]
    fn marks_are_found_in_the_same_columns_whatever_rows_are_read_together() {
        for column in [&["1", "", "False"][..], &["0", "1", "2", "5"], &["good", "1"], &["a", "1.0"]] {
            assert!(has_mark(&texts(column)) && column.iter().any(|text| has_mark(&texts(&[text]))), "{column:?}");
        }
        assert!(!has_mark(&texts(&["", "good", "0.5", "1st"])));
    }

    #[test]
    fn lists_are_read_as_json() {
        let found = nested(&texts(&["[1, 2]", "", " [0.5]"])).unwrap();
        let lists = found.as_list::<i32>();
        assert_eq!((lists.value_length(0), lists.is_null(1), lists.values().len()), (2, true, 3));
        assert!(nested(&texts(&[])).unwrap().is_empty());
        for wrong in [&["['a']"][..], &["[1", "[1]"], &["[1]", "[\"a\"]"], &["1"]] {
            assert!(nested(&texts(wrong)).is_none(), "{wrong:?}");
        }
        assert_eq!(odd_one(&texts(&["", "1", "abc"])), Some((2, "abc")));
        assert_eq!(odd_one(&texts(&["", "1"])), Some((1, "1")));
    }
}
