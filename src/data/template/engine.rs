//! The template engine, set up as `transformers` sets up Jinja2 for chat templates, with bounds on what a
//! template may do.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};

use super::{dates, json, python};
use crate::error::{Error, Result};
use crate::limits;

/// Steps after which a template is stopped; one step is an instruction or 64 bytes of text, so that it holds
/// 128 MB at most.
const STEP_LIMIT: u64 = 2_000_000;
/// The stack of a template, of which only what it uses takes memory: values in values as deep as its steps
/// allow can be written and dropped.
const STACK: usize = 1 << 30;
/// How long a template may take, and by how many bytes memory may grow meanwhile: not every operation on
/// lists is counted as the steps that it takes.
const TIME: Duration = Duration::from_secs(10);
const MEMORY: usize = 1 << 30;
/// The name of the one template of an environment.
const NAME: &str = "chat";

thread_local! {
    /// The characters that are put around what stands in `{% generation %}`, on the thread of a rendering
    /// that wants them.
    static GENERATION_MARKS: Cell<Option<[char; 2]>> = const { Cell::new(None) };
}

/// Runs a step of the template engine on a stack of its own; the error is a reason. Where a bound is reached
/// the step goes on by itself until the program ends.
fn within_bounds<T: Send + 'static>(step: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = channel();
    let guarded = || limits::without_panic(step).unwrap_or_else(|| Err("it does what cannot be".to_owned()));
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || drop(sender.send(guarded())));
    thread.map_err(|error| format!("it needs a stack of {} MiB: {error}", STACK >> 20))?;
    let (start, mut memory) = (Instant::now(), None);
    loop {
        match receiver.recv_timeout(Duration::from_millis(10)) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err("it does what cannot be".to_owned()),
            Err(RecvTimeoutError::Timeout) => {
                let now = limits::resident_memory();
                if now > memory.get_or_insert(now).saturating_add(MEMORY) {
                    return Err(format!("it fills more than {} MiB of memory", MEMORY >> 20));
                }
                if start.elapsed() > TIME {
                    return Err(format!("it takes longer than {} seconds", TIME.as_secs()));
                }
            }
        }
    }
}

/// The environment that holds the template `source`; the error names `origin`.
pub(super) fn environment(source: &str, origin: &str) -> Result<Arc<Environment<'static>>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| Error::input(format!("{origin}: {error}")))?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(python::write_value);
    environment.set_unknown_method_callback(python::method);
    environment.set_fuel(Some(STEP_LIMIT));
    // They indent a deep value in time that grows with the square of its depth, and jinja2's own do something
    // else.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("generation", generation);
    environment.add_filter("int", python::int);
    environment.add_filter("float", python::float);
    environment.add_filter("wordcount", python::word_count);
    environment.add_filter("center", python::center);
    environment.add_test("sequence", python::is_sequence);
    // Python's `None` cannot be iterated over; minijinja's can.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| dates::strftime(&format, dates::now()));
    let source = with_generation_filter(source);
    let read = move || {
        let added = environment.add_template_owned(NAME, source);
        added.map_err(|error| error.to_string()).map(|()| Arc::new(environment))
    };
    within_bounds(read).map_err(|reason| Error::input(format!("{origin}: the chat template cannot be read: {reason}")))
}

/// What the template gives for `context`, with `marks` around what stands in `{% generation %}`. The error is
/// a reason.
pub(super) fn render(
    environment: &Arc<Environment<'static>>,
    context: Value,
    marks: Option<[char; 2]>,
) -> Result<String, String> {
    let environment = environment.clone();
    within_bounds(move || {
        GENERATION_MARKS.set(marks);
        let template = environment.get_template(NAME);
        template
            .and_then(|template| template.render(context))
            .map_err(|error| error.detail().map_or_else(|| error.to_string(), str::to_owned))
    })
}

/// What stands in a block `{% generation %}`.
fn generation(text: &str) -> String {
    match GENERATION_MARKS.get() {
        Some([start, end]) => format!("{start}{text}{end}"),
        None => text.to_owned(),
    }
}

/// `{% generation %}` marks the assistant's text for training in `transformers`; it writes nothing. Here it
/// is a block with a filter, which trims white space just as its own tags do.
fn with_generation_filter(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    for part in tags(source) {
        match part {
            Part::Text(text) => result.push_str(text),
            Part::Tag(tag) => result.push_str(&match tag_name(tag) {
                "generation" => tag.replace("generation", "filter generation"),
                "endgeneration" => tag.replace("endgeneration", "endfilter"),
                _ => tag.to_owned(),
            }),
        }
    }
    result
}

/// Whether a template has blocks `{% generation %}`.
pub(super) fn has_generation(source: &str) -> bool {
    tags(source).any(|part| matches!(part, Part::Tag(tag) if tag_name(tag) == "generation"))
}

/// The identifiers in a template's expressions and tags, and the strings in them that are one, as keys of
/// fields are. Comments and text have none.
pub(super) fn identifiers(source: &str) -> BTreeSet<String> {
    let is_part = |c: char| c == '_' || c.is_ascii_alphanumeric();
    let (mut found, mut rest) = (BTreeSet::new(), source);
    while let Some(start) = rest.find('{') {
        rest = &rest[start + 1..];
        let Some(opening) = rest.chars().next().filter(|&opening| "#{%".contains(opening)) else { continue };
        rest = &rest[1..];
        let end = match opening {
            '#' => {
                rest = rest.split_once("#}").map_or("", |(_, rest)| rest);
                continue;
            }
            '{' => "}}",
            _ => "%}",
        };
        // Objects may end in `}}` too.
        let mut depth = 0_usize;
        while let Some(first) = rest.chars().next().filter(|_| depth > 0 || !rest.starts_with(end)) {
            match first {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            let (word, after) = match first {
                '"' | '\'' => quoted(&rest[1..], first),
                _ if is_part(first) => rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len())),
                _ => ("", &rest[first.len_utf8()..]),
            };
            if !word.is_empty() && word.chars().all(is_part) {
                found.insert(word.to_owned());
            }
            rest = after;
        }
    }
    found
}

/// What a string holds up to its closing quote, and what follows it.
fn quoted(text: &str, quote: char) -> (&str, &str) {
    let mut is_escaped = false;
    let end = text.find(|c| {
        let is_end = c == quote && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        is_end
    });
    end.map_or((text, ""), |end| (&text[..end], &text[end + 1..]))
}

enum Part<'s> {
    Text(&'s str),
    /// What stands between `{%` and `%}`.
    Tag(&'s str),
}

/// A template's source in parts that are together the whole.
fn tags(source: &str) -> impl Iterator<Item = Part<'_>> {
    let mut rest = source;
    let mut is_inside = false;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let was_inside = std::mem::take(&mut is_inside);
        if was_inside && let Some(length) = rest.find("%}") {
            let (tag, after) = rest.split_at(length);
            rest = after;
            return Some(Part::Tag(tag));
        }
        let length = rest.find("{%").filter(|_| !was_inside).map_or(rest.len(), |start| start + 2);
        is_inside = length < rest.len();
        let (text, after) = rest.split_at(length);
        rest = after;
        Some(Part::Text(text))
    })
}

fn tag_name(tag: &str) -> &str {
    tag.trim_matches(['-', '+', ' ', '\n', '\t'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_those_of_code_and_of_keys() {
        let source = "tools {# reads thinking #}{%- if enable_thinking and 'tool_calls' in message %}{{ message['a\\'b}}'] ~ \"<documents>\" ~ x.y1 }}{ z }";
        let expected = ["and", "enable_thinking", "if", "in", "message", "tool_calls", "x", "y1"];
        assert_eq!(identifiers(source).iter().map(String::as_str).collect::<Vec<_>>(), expected);
        let of_objects = identifiers("{{ {'a': {'b': c}} ~ d }} e {{ f }}");
        assert_eq!(of_objects.into_iter().collect::<String>(), "abcdf");
        assert!(identifiers("{# tools").is_empty() && identifiers("{{ tools").contains("tools"));
    }

    #[test]
    fn generation_tags_become_a_filter_and_the_rest_stays() {
        let source = "a{%- generation -%} b {% endgeneration +%}{% if generation %}{%%}{{ '%}' }}{% generation";
        let expected = "a{%- filter generation -%} b {% endfilter +%}{% if generation %}{%%}{{ '%}' }}{% generation";
        assert_eq!(with_generation_filter(source), expected);
        assert!(has_generation(source) && !has_generation("{% if generation %}{{ generation }}{% endif %}"));
    }
}
