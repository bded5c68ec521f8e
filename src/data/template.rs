//! Chat templates: a conversation as the text that a model was trained to read.
//!
//! A template is the Jinja program that a model's folder holds (`chat_template.jinja`, or `chat_template` in
//! `tokenizer_config.json`), run as Hugging Face `transformers` runs it: blocks trimmed, `raise_exception`,
//! `strftime_now`, `tojson` without HTML escapes, loop controls, Python's methods on strings, and a limit on its steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind};

use super::record::{Message, TemplateInputs};
use super::tokenizer_files::TokenizerFiles;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// Steps after which a template is stopped; one step is an instruction or 64 bytes of text, so that it holds 128 MB at most.
const STEP_LIMIT: u64 = 2_000_000;
/// How deep the values may be that a template writes as JSON, and the most spaces that it may indent them by.
const JSON_LIMITS: [usize; 2] = [100, 64];
/// The stack of a template, of which only what it uses takes memory: values in values as deep as its steps allow can be written and dropped.
const STACK: usize = 1 << 30;
/// How long a template may take, and by how many bytes memory may grow meanwhile: not every operation on lists is counted as the steps that it takes.
const TIME: Duration = Duration::from_secs(10);
const MEMORY: usize = 1 << 30;

/// The format for models without a template: the one of HH-RLHF's transcripts.
const PLAIN_TEMPLATE: &str = "{% set names = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'} %}
{% for message in messages %}
{{ '\n\n' ~ names.get(message.role, message.role | capitalize) ~ ': ' ~ message.content }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '\n\nAssistant:' }}
{%- endif %}";

/// A part of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// Whether it is to be learned: the assistant wrote it.
    pub learned: bool,
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: BTreeMap<String, String>,
    origin: String,
}

/// Runs a step of the template engine on a stack of its own; the error is a reason. Where a bound is reached the step goes on by itself until the program ends.
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

impl ChatTemplate {
    /// The template in a model's folder, if it holds one: `chat_template.jinja` before `chat_template` in
    /// `tokenizer_config.json` (a string, or a list of `{name, template}` of which `default` counts).
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        Self::find(&TokenizerFiles::read(&[folder.to_path_buf()])?)
    }

    pub(super) fn find(files: &TokenizerFiles) -> Result<Option<Self>> {
        let special_tokens = files.special_tokens()?;
        if let Some(source) = files.text("chat_template.jinja")? {
            return Self::from_source(source, &files.path("chat_template.jinja"), &special_tokens).map(Some);
        }
        let origin = files.path("tokenizer_config.json");
        let Some(config) = files.json("tokenizer_config.json")? else { return Ok(None) };
        let source = match config.get("chat_template") {
            None | Some(serde_json::Value::Null) => return Ok(None),
            Some(serde_json::Value::String(source)) => source,
            Some(serde_json::Value::Array(named)) => {
                let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
                match default.and_then(|entry| entry.get("template")).and_then(|source| source.as_str()) {
                    Some(source) => source,
                    None => bail!("{origin}: `chat_template` is a list without an entry named `default`; add one"),
                }
            }
            Some(_) => bail!("{origin}: `chat_template` is neither a string nor a list of {{name, template}}"),
        };
        Self::from_source(source, &origin, &special_tokens).map(Some)
    }

    /// A template from its source; `origin` names it in errors, and `special_tokens` are what it sees as `bos_token`,
    /// `eos_token` and so on.
    pub fn from_source(source: &str, origin: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        if source.len() as u64 > limits::TEMPLATE_FILE {
            bail!(
                "{origin}: the chat template is {} bytes long, expected at most {}",
                source.len(),
                limits::TEMPLATE_FILE
            );
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| Error::input(format!("{origin}: {error}")))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(format_as_python);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(STEP_LIMIT));
        // They indent a deep value in time that grows with the square of its depth, and jinja2's own do something else.
        environment.remove_filter("pprint");
        environment.remove_global("debug");
        environment.add_filter("tojson", to_json);
        // Python's `None` cannot be iterated over; minijinja's can.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        let source = without_generation_tags(source);
        let read = move || {
            let added = environment.add_template_owned("chat", source);
            added.map_err(|error| error.to_string()).map(|()| Arc::new(environment))
        };
        let environment = within_bounds(read)
            .map_err(|reason| Error::input(format!("{origin}: the chat template cannot be read: {reason}")))?;
        Ok(Self { environment, special_tokens: special_tokens.clone(), origin: origin.to_owned() })
    }

    /// The format for models that have no template of their own, HH-RLHF's: each turn is a line
    /// `\n\nHuman: …` or `\n\nAssistant: …`, and a prompt ends with `\n\nAssistant:`.
    pub fn plain() -> Result<Self> {
        Self::from_source(PLAIN_TEMPLATE, "the plain chat template", &BTreeMap::new())
    }

    /// The conversation as text; with `add_generation_prompt`, followed by what comes before the assistant's next turn.
    pub fn apply(&self, messages: &[Message], inputs: &TemplateInputs, add_generation_prompt: bool) -> Result<String> {
        let context = self.context(messages, inputs, add_generation_prompt);
        let environment = self.environment.clone();
        let rendered = within_bounds(move || {
            let template = environment.get_template("chat");
            template
                .and_then(|template| template.render(Value::from_pairs(context)))
                .map_err(|error| error.detail().map_or_else(|| error.to_string(), str::to_owned))
        });
        rendered.map_err(|reason| {
            Error::input(format!("{}: the chat template rejects the conversation: {reason}", self.origin))
        })
    }

    /// What the template sees: the special tokens, the row's variables, which count over these, and messages with all their fields.
    fn context(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        add_generation_prompt: bool,
    ) -> BTreeMap<String, Value> {
        let mut context: BTreeMap<String, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token))).collect();
        context.insert("documents".into(), ().into());
        let variables = inputs.variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        context.extend(variables);
        let fields = messages.iter().map(|message| Value::from(Serde(message.fields())));
        context.insert("messages".into(), fields.collect::<Vec<_>>().into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("tools".into(), inputs.tools.as_ref().map_or_else(|| ().into(), |tools| Serde(tools).into()));
        context
    }

    /// The conversation in pieces that together are its text up to the end of the last learned turn. Learned are the
    /// assistant's turns among `messages[first_learned..]`, each from the end of the generation prompt to the end of the turn.
    ///
    /// Where a turn lies is found by rendering the conversation up to it. Some templates write an earlier turn otherwise
    /// once another follows (they drop its reasoning): such a turn is not learned, only those the model would write as
    /// they stand.
    ///
    /// # Errors
    /// Where the template fails, or the last of the assistant's turns cannot be found in the whole.
    pub fn render(&self, messages: &[Message], inputs: &TemplateInputs, first_learned: usize) -> Result<Vec<Piece>> {
        let is_learned = |&index: &usize| index >= first_learned && messages[index].is_learned();
        let turns: Vec<usize> = (0..messages.len()).filter(is_learned).collect();
        let Some(&last) = turns.last() else {
            bail!("the conversation has no message of the assistant where the answer should be");
        };
        let whole = self.apply(&messages[..=last], inputs, false)?;
        let mut pieces = Vec::new();
        let mut end_of_previous = 0;
        for &turn in &turns {
            let found = self.find_turn(&messages[..=turn], inputs, &whole, turn == last)?;
            let found = found.map(|(start, end)| (start.max(end_of_previous), end)).filter(|(start, end)| start <= end);
            let Some((start, end)) = found else {
                if turn == last {
                    bail!(
                        "{}: the chat template does not write the conversation before the last answer as it does when \
                         the answer is to follow, so the answer cannot be told apart; give prompt and completion as \
                         strings instead",
                        self.origin
                    );
                }
                continue;
            };
            pieces.push(Piece { text: whole[end_of_previous..start].to_owned(), learned: false });
            pieces.push(Piece { text: whole[start..end].to_owned(), learned: true });
            end_of_previous = end;
        }
        pieces.retain(|piece| !piece.text.is_empty());
        Ok(pieces)
    }

    /// The bytes of `whole` that are the last of `messages`, if `whole` begins with these messages as they are rendered alone.
    fn find_turn(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        whole: &str,
        is_last: bool,
    ) -> Result<Option<(usize, usize)>> {
        let before = &messages[..messages.len() - 1];
        let end = if is_last {
            whole.len()
        } else {
            let text = self.apply(messages, inputs, false)?;
            // Some templates end every conversation with EOS, which then does not follow this turn.
            let without_eos = self.special_tokens.get("eos_token").and_then(|eos| text.strip_suffix(eos.as_str()));
            let candidates = [Some(text.as_str()), without_eos];
            match candidates.into_iter().flatten().find(|text| whole.starts_with(text)) {
                Some(text) => text.len(),
                None => return Ok(None),
            }
        };
        if before.is_empty() {
            // Many templates reject an empty conversation; then the turn begins where the text does.
            let prompt = self.apply(before, inputs, true).unwrap_or_default();
            return Ok(Some((shared_bytes(&prompt, whole), end)));
        }
        let prompt = self.apply(before, inputs, true)?;
        if whole.starts_with(&prompt) {
            return Ok(Some((prompt.len(), end)));
        }
        // The generation prompt may hold more than a finished turn shows (an opened <think>): its common part counts.
        let context = self.apply(before, inputs, false)?;
        Ok(whole.starts_with(&context).then(|| (shared_bytes(&prompt, whole).max(context.len()), end)))
    }
}

/// The length of the longest common start of two texts, at a boundary of characters.
fn shared_bytes(left: &str, right: &str) -> usize {
    let pairs = left.chars().zip(right.chars());
    pairs.take_while(|(left, right)| left == right).map(|(character, _)| character.len_utf8()).sum()
}

/// `{% generation %}` marks the assistant's text for training in `transformers`; it writes nothing. Turns are found by
/// rendering here, so the tags become an `if` that always holds, which trims white space just as they do.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let inside = start + 2;
        let Some(length) = rest[inside..].find("%}") else { break };
        let tag = &rest[inside..inside + length];
        let replaced = match tag.trim_matches(['-', '+', ' ', '\n', '\t']) {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        result.push_str(&rest[..inside]);
        result.push_str(&replaced);
        rest = &rest[inside + length..];
    }
    result + rest
}

/// Writes values as Jinja2 in Python does: `True`, `False` and `None`.
fn format_as_python(
    output: &mut minijinja::Output,
    state: &mut minijinja::State,
    value: &Value,
) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::Bool => Ok(output.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(output.write_str("None")?),
        _ => minijinja::escape_formatter(output, state, value),
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(state: &minijinja::State, value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let mut json = Json { state, indent: options.get("indent")?, text: String::new() };
    if json.indent.is_some_and(|indent| indent > JSON_LIMITS[1]) {
        return Err(unwritable(format!("JSON is indented by at most {} spaces", JSON_LIMITS[1])));
    }
    json.write(value, 0)?;
    Ok(json.text)
}

fn unwritable(reason: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, reason)
}

/// JSON as it is written.
struct Json<'a, 'b, 'c> {
    state: &'a minijinja::State<'b, 'c>,
    indent: Option<usize>,
    text: String,
}

impl Json<'_, '_, '_> {
    /// Begins a line where there are lines, and pays for the text since the last time.
    fn line(&mut self, depth: usize) -> Result<(), minijinja::Error> {
        self.state.consume_fuel(1)?;
        if let Some(indent) = self.indent {
            self.state.consume_fuel((indent * depth / 64) as u64)?;
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), minijinja::Error> {
        self.state.consume_fuel((text.len() / 64) as u64)?;
        self.text.push_str(&serde_json::Value::from(text).to_string());
        Ok(())
    }

    fn write(&mut self, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
        if depth > JSON_LIMITS[0] {
            return Err(unwritable(format!(
                "a value that is more than {} deep cannot be written as JSON",
                JSON_LIMITS[0]
            )));
        }
        let separator = if self.indent.is_some() { "," } else { ", " };
        let is_map = value.kind() == ValueKind::Map;
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool | ValueKind::Number => self.text.push_str(&value.to_string()),
            ValueKind::String => self.string(&value.to_string())?,
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
                let (open, close) = if is_map { ('{', '}') } else { ('[', ']') };
                self.text.push(open);
                let mut is_empty = true;
                for item in value.try_iter()? {
                    self.text.push_str(if is_empty { "" } else { separator });
                    is_empty = false;
                    self.line(depth + 1)?;
                    if is_map {
                        self.string(&item.to_string())?;
                        self.text.push_str(": ");
                        self.write(&value.get_item(&item)?, depth + 1)?;
                    } else {
                        self.write(&item, depth + 1)?;
                    }
                }
                if !is_empty {
                    self.line(depth)?;
                }
                self.text.push(close);
            }
            kind => return Err(unwritable(format!("a value of type {kind} cannot be written as JSON"))),
        }
        Ok(())
    }
}

/// Seconds since 1970, or what the environment variable `SOURCE_DATE_EPOCH` says: with it, a template that writes the
/// day's date gives the same text on any day.
fn now() -> i64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    fixed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64))
}

/// `strftime` in universal time, for the directives that chat templates use; others stay as they are.
fn strftime(format: &str, seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds.div_euclid(86_400);
    let second = seconds.rem_euclid(86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let hour = second / 3600;
    let mut result = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            result.push(character);
            continue;
        }
        let directive = characters.next().unwrap_or('%');
        let unpadded = directive == '-';
        let directive = if unpadded { characters.next().unwrap_or('-') } else { directive };
        let number = |value: i64| if unpadded { value.to_string() } else { format!("{value:02}") };
        match directive {
            'Y' => result.push_str(&year.to_string()),
            'y' => result.push_str(&number(year.rem_euclid(100))),
            'm' => result.push_str(&number(month)),
            'd' => result.push_str(&number(day)),
            'H' => result.push_str(&number(hour)),
            'I' => result.push_str(&number((hour + 11) % 12 + 1)),
            'p' => result.push_str(if hour < 12 { "AM" } else { "PM" }),
            'M' => result.push_str(&number(second / 60 % 60)),
            'S' => result.push_str(&number(second % 60)),
            'B' => result.push_str(month_name),
            'b' => result.push_str(&month_name[..3]),
            'A' => result.push_str(weekday),
            'a' => result.push_str(&weekday[..3]),
            '%' => result.push('%'),
            other => result.extend(['%', other]),
        }
    }
    result
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar (Hinnant, "chrono-compatible low-level date
/// algorithms"): years begin in March, so that the leap day is the last of its year.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S", 951_782_400 + 3661), "29 Feb 2000, Tuesday 01:01:01");
        assert_eq!(strftime("%-d %B %y %I%p %%", 1_735_689_600), "1 January 25 12AM %");
    }

    #[test]
    fn an_endless_template_is_stopped() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::from_source(source, "loop.jinja", &BTreeMap::new()).unwrap();
        let error = template.apply(&[Message::user("Hi")], &TemplateInputs::default(), false).unwrap_err().to_string();
        assert!(error.starts_with("loop.jinja: the chat template rejects"), "{error}");
    }
}
