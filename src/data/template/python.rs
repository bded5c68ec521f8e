//! What templates expect of Python beyond the template engine: how numbers are written, and methods of strings.

use std::fmt::Write;

use minijinja::value::{Tuple, Value, ValueKind, from_args};
use minijinja::{ErrorKind, State};
use minijinja_contrib::pycompat;

type Result<T, E = minijinja::Error> = std::result::Result<T, E>;

/// `repr` of a float: the shortest digits that give the number again, with an exponent from `1e+16` on and below `0.0001`.
pub(super) fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    let text = format!("{number:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// How deep lists and maps are written here; deeper ones the engine writes.
const DEEPEST: usize = 64;

/// Writes values as Jinja2 in Python does; other than floats, the engine does so by itself.
pub(super) fn write_value(output: &mut minijinja::Output, state: &mut State, value: &Value) -> Result<()> {
    if value.kind() == ValueKind::Number
        && !value.is_integer()
        && let Ok(number) = f64::try_from(value.clone())
    {
        return Ok(output.write_str(&float_repr(number))?);
    }
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
        let mut text = String::new();
        if repr(state, value, DEEPEST, &mut text)? {
            return Ok(output.write_str(&text)?);
        }
    }
    minijinja::escape_formatter(output, state, value)
}

/// Adds `repr` of a value to a text; what is more than `depth` deep gives false.
fn repr(state: &State, value: &Value, depth: usize, text: &mut String) -> Result<bool> {
    state.consume_fuel(1)?;
    let is_map = match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            text.push_str(&f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr));
            return Ok(true);
        }
        ValueKind::Seq => false,
        ValueKind::Map => true,
        _ => {
            let before = text.len();
            // Writing to a string does not fail.
            let _ = write!(text, "{value:?}");
            state.consume_fuel(((text.len() - before) / 64) as u64)?;
            return Ok(true);
        }
    };
    let Some(depth) = depth.checked_sub(1) else { return Ok(false) };
    let is_tuple = value.downcast_object_ref::<Tuple>().is_some();
    let (open, close) = if is_map {
        ('{', '}')
    } else if is_tuple {
        ('(', ')')
    } else {
        ('[', ']')
    };
    text.push(open);
    let mut count = 0;
    for item in value.try_iter()? {
        text.push_str(if count == 0 { "" } else { ", " });
        count += 1;
        if !repr(state, &item, depth, text)? {
            return Ok(false);
        }
        if is_map {
            text.push_str(": ");
            if !repr(state, &value.get_item(&item)?, depth, text)? {
                return Ok(false);
            }
        }
    }
    text.push_str(if is_tuple && count == 1 { "," } else { "" });
    text.push(close);
    Ok(true)
}

/// The filter `int`: what is no number is `default`.
pub(super) fn int(value: &Value, default: Option<Value>, base: Option<u32>) -> Result<Value> {
    let default = default.unwrap_or_else(|| Value::from(0));
    let Some(text) = value.as_str() else {
        return match value.kind() {
            ValueKind::Number if value.is_integer() => Ok(value.clone()),
            ValueKind::Number => Ok(f64::try_from(value.clone()).map_or(default, |number| whole(number.trunc()))),
            ValueKind::Bool => Ok(Value::from(i64::from(value.is_true()))),
            _ => Ok(default),
        };
    };
    let digits = text.trim().replace('_', "");
    let base = base.unwrap_or(10);
    let digits = match base {
        2 => digits.trim_start_matches("0b"),
        8 => digits.trim_start_matches("0o"),
        16 => digits.trim_start_matches("0x"),
        10 => &digits,
        _ => return Err(refused(format!("int reads numbers of base 2, 8, 10 and 16, not {base}"))),
    };
    if let Ok(number) = i128::from_str_radix(digits, base) {
        return Ok(Value::from(number));
    }
    Ok(digits.parse::<f64>().ok().filter(|number| number.is_finite()).map_or(default, |number| whole(number.trunc())))
}

fn whole(number: f64) -> Value {
    Value::from(number as i128)
}

/// The filter `float`: what is no number is `default`.
pub(super) fn float(value: &Value, default: Option<Value>) -> Value {
    let number = match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse::<f64>().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    number.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// The test `sequence`: texts and maps are some too, as in Jinja2.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
}

/// The filter `wordcount`.
pub(super) fn word_count(text: &str) -> usize {
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    text.split(|character| !is_word(character)).filter(|word| !word.is_empty()).count()
}

/// The filter `center`.
pub(super) fn center(state: &State, text: &str, width: Option<i64>) -> Result<String> {
    justified(state, text, "center", &[Value::from(width.unwrap_or(80))])
}

fn refused(reason: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Methods of Python's strings that the engine does not have, before those that it has.
pub(super) fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value> {
    if let Some(text) = value.as_str().filter(|_| value.kind() == ValueKind::String)
        && let Some(result) = string_method(state, text, name, arguments)?
    {
        return Ok(result);
    }
    if name == "index" && value.kind() == ValueKind::Seq {
        let (item,): (&Value,) = from_args(arguments)?;
        let index = value.try_iter()?.position(|other| other == *item);
        return index.map(Value::from).ok_or_else(|| refused("the list does not hold the value"));
    }
    pycompat::unknown_method_callback(state, value, name, arguments)
}

fn string_method(state: &State, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>> {
    let argument = || from_args::<(&str,)>(arguments).map(|(argument,)| argument);
    Ok(Some(match name {
        "removeprefix" => Value::from(text.strip_prefix(argument()?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(argument()?).unwrap_or(text)),
        "partition" | "rpartition" => {
            let separator = argument()?;
            if separator.is_empty() {
                return Err(refused("empty separator"));
            }
            let parts = match name {
                "partition" => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
                _ => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "index" => match text.find(argument()?) {
            Some(at) => Value::from(text[..at].chars().count()),
            None => return Err(refused("substring not found")),
        },
        "swapcase" => {
            let swapped = |character: char| match character.is_uppercase() {
                true => character.to_lowercase().collect::<String>(),
                false => character.to_uppercase().collect(),
            };
            Value::from(text.chars().map(swapped).collect::<String>())
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "title" => Value::from(title(text)),
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            if let Some(item) = items.try_iter()?.find(|item| item.kind() != ValueKind::String) {
                return Err(refused(format!("join joins texts, not a {}", item.kind())));
            }
            return Ok(None);
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
            rsplit(text, separator, most)?.into_iter().map(Value::from).collect()
        }
        "zfill" | "ljust" | "rjust" | "center" => Value::from(justified(state, text, name, arguments)?),
        _ => return Ok(None),
    }))
}

/// Words with a large first letter, where a word is a run of letters.
fn title(text: &str) -> String {
    let mut is_inside = false;
    let mut titled = String::with_capacity(text.len());
    for character in text.chars() {
        match is_inside {
            true => titled.extend(character.to_lowercase()),
            false => titled.extend(character.to_uppercase()),
        }
        is_inside = character.is_alphabetic();
    }
    titled
}

/// The parts of a text, at most `most` of them cut off from its end.
fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: Option<i64>) -> Result<Vec<&'t str>> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text;
    match separator {
        Some("") => return Err(refused("empty separator")),
        Some(separator) => {
            while parts.len() < most
                && let Some((before, part)) = rest.rsplit_once(separator)
            {
                parts.push(part);
                rest = before;
            }
            parts.push(rest);
        }
        None => {
            rest = rest.trim_end();
            while parts.len() < most
                && let Some(at) = rest.rfind(char::is_whitespace)
            {
                let part = rest[at..].trim_start();
                parts.push(part);
                rest = rest[..at].trim_end();
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    parts.reverse();
    Ok(parts)
}

/// A text filled up to a number of characters.
fn justified(state: &State, text: &str, name: &str, arguments: &[Value]) -> Result<String> {
    let (width, fill) = match name {
        "zfill" => (from_args::<(i64,)>(arguments)?.0, Some("0")),
        _ => from_args::<(i64, Option<&str>)>(arguments)?,
    };
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    state.consume_fuel((missing / 64) as u64)?;
    let fill = fill.unwrap_or(" ");
    let filled = |count: usize| fill.repeat(count);
    Ok(match name {
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", filled(missing))
        }
        "ljust" => format!("{text}{}", filled(missing)),
        "rjust" => format!("{}{text}", filled(missing)),
        // As Python: what cannot be halved is on the left where the width is odd.
        _ => {
            let left = missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1);
            format!("{}{text}{}", filled(left), filled(missing - left))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (-1.0, "-1.0"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00001234, "1.234e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.5e300, "-1.5e+300"),
            (f64::INFINITY, "inf"),
        ];
        for (number, text) in cases {
            assert_eq!(float_repr(number), text);
        }
    }
}
