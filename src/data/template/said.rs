//! What messages say, and whether it is in the text that a template wrote.

use serde_json::Value;

use super::REASONING;
use crate::data::record::Message;

/// Whether a last message of the assistant is the beginning of an answer, as it is unless it calls tools.
pub fn is_open(message: &Message) -> bool {
    let calls = message.fields().get("tool_calls").and_then(|calls| calls.as_array());
    message.is_assistant() && message.fields().contains_key("content") && calls.is_none_or(|calls| calls.is_empty())
}

/// The names of the functions that a message calls.
fn called(message: &Message) -> impl Iterator<Item = &str> {
    let calls = message.fields().get("tool_calls").and_then(|calls| calls.as_array());
    calls.into_iter().flatten().filter_map(move |call| call.get("function").unwrap_or(call).get("name")?.as_str())
}

/// The messages of which the content, without white space around it, or a called function is not in the text.
pub fn not_written(messages: &[Message], text: &str) -> Vec<usize> {
    let mut reached = 0;
    let mut missing = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        let content = message.content().trim();
        // They come in their order, as a rule.
        match text[reached..].find(content).map(|at| reached + at).or_else(|| text.find(content)) {
            Some(at) if called(message).all(|name| text.contains(name)) => reached = reached.max(at),
            _ => missing.push(index),
        }
    }
    missing
}

/// Whether a message has a field of this name that says something: no null, empty list or white space alone.
pub(super) fn says(message: &Message, name: &str) -> bool {
    match message.fields().get(name) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(Value::Array(values)) => !values.is_empty(),
        Some(_) => true,
    }
}

/// Whether a message has no content behind its first `given` bytes but white space, calls no function, and
/// has no reasoning.
pub(super) fn says_nothing(message: &Message, given: usize) -> bool {
    let mut others = ["tool_calls", "function_call"].into_iter().chain(REASONING);
    let rest = message.content().get(given..).unwrap_or_default();
    rest.trim().is_empty() && !others.any(|name| says(message, name))
}
