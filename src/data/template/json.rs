//! The filter `tojson` of chat templates: Python's `json.dumps`.

use std::cmp::Ordering;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{ErrorKind, State};

use super::python::float_repr;

/// How deep the values may be that a template writes as JSON, and the longest indent of a level, in bytes.
const LIMITS: [usize; 2] = [100, 64];

/// What a filter gives.
type Result<T, E = minijinja::Error> = std::result::Result<T, E>;

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as `transformers` defines the filter: the options by
/// position or by name; any other option is an error.
pub(super) fn to_json(state: &State, value: &Value, positional: &[Value], named: Kwargs) -> Result<String> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if positional.len() > names.len() {
        return Err(refused("tojson takes at most 4 options".to_owned()));
    }
    let option = |index: usize| -> Result<Option<Value>> {
        let by_name: Option<Value> = named.get(names[index])?;
        Ok(by_name.or_else(|| positional.get(index).cloned()).filter(|value| !value.is_none()))
    };
    let is_true = |index: usize| Ok::<_, minijinja::Error>(option(index)?.is_some_and(|value| value.is_true()));
    let indent = option(1)?.map(indent).transpose()?;
    let separators = match option(2)? {
        Some(pair) => separators(&pair)?,
        None if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        None => [", ".to_owned(), ": ".to_owned()],
    };
    let mut json = Json {
        state,
        ensure_ascii: is_true(0)?,
        indent,
        separators,
        sort_keys: is_true(3)?,
        text: String::new(),
        paid: 0,
    };
    named.assert_all_used()?;
    json.write(value, 0)?;
    Ok(json.text)
}

fn refused(reason: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, reason)
}

/// What one level is indented by: so many spaces, or a text.
fn indent(option: Value) -> Result<String> {
    let indent = match option.kind() {
        ValueKind::String => option.to_string(),
        ValueKind::Bool => " ".repeat(usize::from(option.is_true())),
        ValueKind::Number if option.is_integer() => {
            let spaces = i64::try_from(option).unwrap_or(i64::MAX).max(0);
            " ".repeat((spaces as usize).min(LIMITS[1] + 1))
        }
        kind => return Err(refused(format!("the indent of tojson is a number or a text, not a {kind}"))),
    };
    if indent.len() > LIMITS[1] {
        return Err(refused(format!("JSON is indented by at most {} spaces", LIMITS[1])));
    }
    Ok(indent)
}

/// What is put between items, and between a key and its value.
fn separators(option: &Value) -> Result<[String; 2]> {
    let items: Vec<Value> = option.try_iter()?.collect();
    match &items[..] {
        [item, key] if [item, key].iter().all(|text| text.kind() == ValueKind::String) => {
            Ok([item.to_string(), key.to_string()])
        }
        _ => Err(refused("the separators of tojson are two texts".to_owned())),
    }
}

/// JSON as it is written.
struct Json<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    ensure_ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sort_keys: bool,
    text: String,
    /// The length of the text that steps were counted for.
    paid: usize,
}

impl Json<'_, '_, '_> {
    /// Counts a step, and one for every 64 bytes that were written since the last time.
    fn pay(&mut self) -> Result<()> {
        let written = (self.text.len() - self.paid) / 64;
        self.paid += written * 64;
        self.state.consume_fuel(1 + written as u64)
    }

    /// Begins a line where there are lines.
    fn line(&mut self, depth: usize) -> Result<()> {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            (0..depth).for_each(|_| self.text.push_str(indent));
        }
        self.pay()
    }

    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return self.text.push_str(&quoted);
        }
        for character in quoted.chars() {
            if matches!(character, ' '..='~') {
                self.text.push(character);
                continue;
            }
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                self.text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }

    /// A value that is neither list nor map, as it is written; `None` for other values.
    fn scalar(value: &Value) -> Option<String> {
        match value.kind() {
            ValueKind::None => Some("null".to_owned()),
            ValueKind::Bool => Some(if value.is_true() { "true" } else { "false" }.to_owned()),
            ValueKind::Number if value.is_integer() => Some(value.to_string()),
            ValueKind::Number => Some(match f64::try_from(value.clone()) {
                Ok(number) if number.is_nan() => "NaN".to_owned(),
                Ok(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
                Ok(number) => float_repr(number),
                Err(_) => value.to_string(),
            }),
            _ => None,
        }
    }

    fn write(&mut self, value: &Value, depth: usize) -> Result<()> {
        if depth > LIMITS[0] {
            return Err(refused(format!("a value that is more than {} deep cannot be written as JSON", LIMITS[0])));
        }
        if let Some(scalar) = Self::scalar(value) {
            self.text.push_str(&scalar);
            return Ok(());
        }
        match value.kind() {
            ValueKind::String => {
                let text = value.to_string();
                self.state.consume_fuel((text.len() / 64) as u64)?;
                self.string(&text);
                Ok(())
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', value.try_iter()?, depth, |json, item| json.write(&item, depth + 1))?;
                self.text.push(']');
                Ok(())
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = Vec::new();
                for key in value.try_iter()? {
                    self.state.consume_fuel(1)?;
                    keys.push(key);
                }
                if self.sort_keys {
                    sort(&mut keys)?;
                }
                self.items('{', keys.into_iter(), depth, |json, key| {
                    match (key.as_str(), Self::scalar(&key)) {
                        (Some(key), _) => json.string(key),
                        (None, Some(key)) => json.string(&key),
                        (None, None) => return Err(refused(format!("a {} cannot be a key of JSON", key.kind()))),
                    }
                    let colon = json.separators[1].clone();
                    json.text.push_str(&colon);
                    json.write(&value.get_item(&key)?, depth + 1)
                })?;
                self.text.push('}');
                Ok(())
            }
            kind => Err(refused(format!("a value of type {kind} cannot be written as JSON"))),
        }
    }

    /// An opening bracket and the items, up to the closing one.
    fn items(
        &mut self,
        open: char,
        items: impl Iterator<Item = Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, Value) -> Result<()>,
    ) -> Result<()> {
        self.text.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                let comma = self.separators[0].clone();
                self.text.push_str(&comma);
            }
            is_empty = false;
            self.line(depth + 1)?;
            write(self, item)?;
        }
        if is_empty { Ok(()) } else { self.line(depth) }
    }
}

/// Sorts keys as Python does, which compares texts with texts and numbers with numbers alone.
fn sort(keys: &mut [Value]) -> Result<()> {
    if keys.iter().all(|key| key.as_str().is_some()) {
        keys.sort_by(|left, right| left.as_str().cmp(&right.as_str()));
        return Ok(());
    }
    let number = |key: &Value| match key.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(key.is_true()))),
        ValueKind::Number => f64::try_from(key.clone()).ok(),
        _ => None,
    };
    if keys.len() > 1 && keys.iter().any(|key| number(key).is_none()) {
        return Err(refused("keys of different types cannot be sorted".to_owned()));
    }
    keys.sort_by(|left, right| number(left).partial_cmp(&number(right)).unwrap_or(Ordering::Equal));
    Ok(())
}
