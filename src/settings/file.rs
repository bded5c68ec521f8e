//! A TOML file as command-line arguments.

use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command};
use toml::Value;

use crate::error::{Error, Result};
use crate::limits;

/// A key of a settings file.
pub(super) struct Key {
    /// As it is written there.
    pub name: String,
    /// The id of the argument that it names.
    pub id: String,
    /// The arguments that it is in place of.
    pub arguments: Vec<String>,
}

/// The keys of the TOML file at `path`, without those that the user gave (by argument id).
pub(super) fn read(command: &Command, path: &Path, by_user: impl Fn(&str) -> bool) -> Result<Vec<Key>> {
    let text = limits::read_text(path, limits::SMALL_FILE)?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        Error::input(format!("{}: line {line}: not valid TOML: {}", path.display(), one_line(error.message())))
    })?;
    let complain = |key: &str, reason: String| Error::input(format!("{}: key `{key}`: {reason}", path.display()));
    let mut all = Vec::new();
    for (key, value) in &table {
        let Some(argument) = find(command, key) else {
            return Err(complain(key, unknown_key(command, key)));
        };
        let arguments = arguments(argument, value).map_err(|reason| complain(key, reason))?;
        check(command, &arguments).map_err(|reason| complain(key, reason))?;
        let id = argument.get_id().to_string();
        if !by_user(&id) {
            all.push(Key { name: key.clone(), id, arguments });
        }
    }
    Ok(all)
}

/// The argument that a key names: its flag's name, with `-` or `_`.
pub(super) fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let flag = key.replace('_', "-");
    command.get_arguments().find(|argument| {
        let settable = !matches!(argument.get_id().as_str(), "settings" | "help" | "version");
        settable && argument.get_long() == Some(flag.as_str())
    })
}

/// `value` as arguments of the form `--flag=value`, one for each item of a list; or why it cannot be one.
pub(super) fn arguments(argument: &Arg, value: &Value) -> Result<Vec<String>, String> {
    let flag = argument.get_long().unwrap_or_default();
    match (argument.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(true)) => Ok(vec![format!("--{flag}")]),
        (ArgAction::SetTrue, Value::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, other) => Err(format!("expected true or false, found {}", describe(other))),
        (ArgAction::Append, Value::Array(items)) => {
            items.iter().map(|item| Ok(format!("--{flag}={}", scalar(item)?))).collect()
        }
        (_, value) => Ok(vec![format!("--{flag}={}", scalar(value)?)]),
    }
}

fn scalar(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        other => Err(format!("expected a single value, found {}", describe(other))),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".to_string(),
        Value::Array(_) => "a list".to_string(),
        Value::Datetime(_) => "a date".to_string(),
        other => format!("`{other}`"),
    }
}

/// Lets clap judge these arguments alone; the error is its sentence.
fn check(command: &Command, arguments: &[String]) -> Result<(), String> {
    let alone = command.clone().mut_args(|argument| argument.required(false));
    let words = std::iter::once(command.get_name().to_string()).chain(arguments.iter().cloned());
    alone.try_get_matches_from(words).map(drop).map_err(|error| first_paragraph(&error))
}

fn unknown_key(command: &Command, key: &str) -> String {
    let flag = key.replace('_', "-");
    let words = [command.get_name().to_string(), format!("--{flag}")];
    let error = command.clone().try_get_matches_from(words).err();
    match error.as_ref().and_then(|error| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(similar)) => {
            format!(
                "{} has no such setting; a similar one is `{}`",
                command.get_name(),
                similar.trim_start_matches('-')
            )
        }
        _ => format!("{0} has no such setting; `{0} --help` lists them", command.get_name()),
    }
}

/// clap's sentence, without the usage and the tips that follow it.
pub(super) fn first_paragraph(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    one_line(paragraph.trim_start_matches("error: "))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
