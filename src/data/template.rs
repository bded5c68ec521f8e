//! Chat templates: a conversation as the text that a model was trained to read.
//!
//! A template is the Jinja program that a model's folder holds (`chat_template.jinja`, or `chat_template` in
//! `tokenizer_config.json`, or `additional_chat_templates/default.jinja`), run as Hugging Face `transformers` runs it: blocks trimmed,
//! `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, Python's methods on strings, and a limit on its steps.

mod dates;
mod engine;
mod json;
mod marks;
mod python;
mod said;
mod turns;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use minijinja::Environment;
use minijinja::value::{Serde, Value};
use serde_json::{Map, json};

pub use self::said::{is_open, not_written};
pub use self::turns::{LearnFrom, Rendered};
use super::notes;
use super::record::{Message, TemplateInputs};
use super::tokenizer_files::TokenizerFiles;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// The folder of templates that have names, within that of a model.
pub(crate) const ADDITIONAL_FOLDER: &str = "additional_chat_templates";

/// The format for models without a template: the one of HH-RLHF's transcripts.
const TRANSCRIPT: &str = "{% set names = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'} %}
{% for message in messages %}
{{ '\n\n' ~ names.get(message.role, message.role | capitalize) ~ ': ' ~ message.content }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '\n\nAssistant:' }}
{%- endif %}";

/// The names by which data sets and templates know what was thought before an answer.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A part of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// Whether it is to be learned: the assistant wrote it.
    pub learned: bool,
}

/// In which form a template wants the content of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentForm {
    /// As a string.
    Text,
    /// As a list of `{type: "text", text}`.
    Parts,
}

/// A model's chat template.
pub struct ChatTemplate {
    program: Program,
    /// The one for conversations with tools, where the folder names one for them (`tool_use`).
    with_tools: Option<Program>,
    special_tokens: BTreeMap<String, String>,
    content: ContentForm,
}

/// A template that was read.
#[derive(Clone)]
struct Program {
    environment: Arc<Environment<'static>>,
    /// Where it was read, for messages.
    origin: String,
    /// The names that it reads: of variables, fields and keys.
    names: Arc<BTreeSet<String>>,
    /// Whether it has blocks `{% generation %}`.
    has_generation: bool,
}

impl Program {
    fn new(source: &str, origin: &str) -> Result<Self> {
        if source.len() as u64 > limits::TEMPLATE_FILE {
            bail!(
                "{origin}: the chat template is {} bytes long, expected at most {}",
                source.len(),
                limits::TEMPLATE_FILE
            );
        }
        let environment = engine::environment(source, origin)?;
        let has_generation = engine::has_generation(source);
        Ok(Self { environment, origin: origin.to_owned(), names: engine::identifiers(source).into(), has_generation })
    }
}

/// What a template is applied to.
#[derive(Debug, Clone, Copy)]
struct Chat<'c> {
    messages: &'c [Message],
    inputs: &'c TemplateInputs,
}

impl ChatTemplate {
    /// The template in a model's folder, if it holds one. As in `transformers` `additional_chat_templates/default.jinja` counts before
    /// `chat_template.jinja`, and this before `chat_template` in `tokenizer_config.json` (a string, or a list of `{name, template}` of which `default`
    /// counts); a template of the name `tool_use` is the one for conversations with tools. A template that writes no string as the content of a message,
    /// but lists of parts, is given such.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        Self::find(&TokenizerFiles::read(&[folder.to_path_buf()])?)
    }

    pub(super) fn find(files: &TokenizerFiles) -> Result<Option<Self>> {
        let mut named = sources(files)?;
        let Some((source, origin)) = named.remove("default") else { return Ok(None) };
        let mut template = Self::from_source(&source, &origin, &files.special_tokens()?)?;
        template.with_tools = named.get("tool_use").map(|(source, origin)| Program::new(source, origin)).transpose()?;
        template.content = template.wanted_form();
        Ok(Some(template))
    }

    /// A template from its source; `origin` names it in errors, and `special_tokens` are what it sees as `bos_token`,
    /// `eos_token` and so on. It is given contents as strings.
    pub fn from_source(source: &str, origin: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        Ok(Self {
            program: Program::new(source, origin)?,
            with_tools: None,
            special_tokens: special_tokens.clone(),
            content: ContentForm::Text,
        })
    }

    /// The format for models that have no template of their own, HH-RLHF's: each turn is a line
    /// `\n\nHuman: …` or `\n\nAssistant: …`, and a prompt ends with `\n\nAssistant:`.
    pub fn plain() -> Result<Self> {
        Self::from_transcript(&Self::transcript(None))
    }

    /// The source of [`plain`](Self::plain), with the text of a token that begins every text.
    pub(super) fn transcript(bos: Option<String>) -> String {
        let bos = bos.map(|bos| format!("{{{{ {} }}}}", serde_json::Value::from(bos)));
        bos.unwrap_or_default() + TRANSCRIPT
    }

    pub(super) fn from_transcript(source: &str) -> Result<Self> {
        Self::from_source(source, "the plain chat template", &BTreeMap::new())
    }

    /// The conversation as text; with `add_generation_prompt`, followed by what comes before the assistant's next turn.
    pub fn apply(&self, messages: &[Message], inputs: &TemplateInputs, add_generation_prompt: bool) -> Result<String> {
        self.run(Chat { messages, inputs }, add_generation_prompt, None)
    }

    /// The template for a conversation.
    fn program(&self, chat: Chat) -> &Program {
        self.with_tools.as_ref().filter(|_| chat.inputs.tools.is_some()).unwrap_or(&self.program)
    }

    /// The same as [`apply`](Self::apply), with `marks` around what the template's blocks `{% generation %}` write.
    fn run(&self, chat: Chat, add_generation_prompt: bool, marks: Option<[char; 2]>) -> Result<String> {
        let Program { environment, origin, .. } = self.program(chat);
        let context = self.context(chat, add_generation_prompt);
        let text = engine::render(environment, Value::from_pairs(context), marks).map_err(|reason| {
            Error::input(format!("{origin}: the chat template rejects the conversation: {reason}"))
        })?;
        self.note_unread(chat, &text);
        Ok(text)
    }

    /// What the template sees: the special tokens, the row's variables, which count over these, and messages with all their fields.
    fn context(&self, chat: Chat, add_generation_prompt: bool) -> BTreeMap<String, Value> {
        let Chat { messages, inputs } = chat;
        let mut context: BTreeMap<String, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token))).collect();
        context.insert("documents".into(), ().into());
        let variables = inputs.variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        context.extend(variables);
        let fields = messages.iter().map(|message| Value::from(Serde(self.fields(message))));
        context.insert("messages".into(), fields.collect::<Vec<_>>().into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("tools".into(), inputs.tools.as_ref().map_or_else(|| ().into(), |tools| Serde(tools).into()));
        context
    }

    /// Notes what a conversation says that the template never reads: it is not a part of `text`.
    fn note_unread(&self, chat: Chat, text: &str) {
        let Chat { messages, inputs } = chat;
        let has = |name: &str| messages.iter().any(|message| said::says(message, name));
        // Reasoning is given under each of its names.
        let said: [(&str, &[&str]); 3] =
            [("tool_calls", &["tool_calls"]), ("function_call", &["function_call"]), ("reasoning_content", &REASONING)];
        let said = said.into_iter().filter(|(_, names)| names.iter().any(|name| has(name)));
        let tools = inputs.tools.iter().filter(|tools| tools.as_array().is_none_or(|tools| !tools.is_empty()));
        let given = inputs.variables.keys().map(String::as_str).chain(tools.map(|_| "tools"));
        let program = self.program(chat);
        let reads = |name: &str| program.names.contains(name);
        // A template may write whole messages as JSON, with the names of their fields.
        let is_written = |name: &str| text.contains(&format!("\"{name}\""));
        let unread = said.filter(|(_, names)| !names.iter().any(|name| reads(name) || is_written(name)));
        let unread = unread.map(|(name, _)| name);
        for name in unread.chain(given.filter(|name| !reads(name))) {
            notes::add(format!(
                "{}: the chat template does not read `{name}`, which conversations of the data have: what it says is not in the text",
                program.origin
            ));
        }
    }

    /// The fields of a message as the template wants them: the content in its form, and reasoning under each of the names by which templates know it, as
    /// `transformers` gives it.
    fn fields(&self, message: &Message) -> Map<String, serde_json::Value> {
        let mut fields = message.fields().clone();
        if self.content == ContentForm::Parts
            && let Some(content) = fields.get_mut("content")
        {
            *content = json!([{ "type": "text", "text": content.take() }]);
        }
        let reasoning = REASONING.iter().find_map(|name| fields.get(*name)).cloned();
        if let Some(reasoning) = reasoning {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
        fields
    }

    /// The form in which the template writes the content of a message: as a string, unless it writes nothing of one, but writes that of a list of parts.
    fn wanted_form(&self) -> ContentForm {
        const CONTENT: &str = "What is written?";
        let writes = |content: ContentForm| {
            let (program, special_tokens) = (self.program.clone(), self.special_tokens.clone());
            let template = Self { program, with_tools: None, special_tokens, content };
            let text = template.apply(&[Message::user(CONTENT)], &TemplateInputs::default(), false);
            text.is_ok_and(|text| text.contains(CONTENT))
        };
        match !writes(ContentForm::Text) && writes(ContentForm::Parts) {
            true => ContentForm::Parts,
            false => ContentForm::Text,
        }
    }
}

/// The sources of the templates in a model's folder by name, each with where it is. Those in files of their own replace those in `tokenizer_config.json`.
fn sources(files: &TokenizerFiles) -> Result<BTreeMap<String, (String, String)>> {
    let mut found = BTreeMap::new();
    if let Some(source) = files.text("chat_template.jinja")? {
        found.insert("default".to_owned(), (source.to_owned(), files.path("chat_template.jinja")));
    }
    for name in files.additional_templates() {
        if let (Some(source), Some(template)) = (files.text(&name)?, name_of_additional(&name)) {
            found.insert(template.to_owned(), (source.to_owned(), files.path(&name)));
        }
    }
    if found.contains_key("default") {
        return Ok(found);
    }
    let origin = files.path("tokenizer_config.json");
    let config = files.json("tokenizer_config.json")?;
    match config.as_ref().and_then(|config| config.get("chat_template")) {
        None | Some(serde_json::Value::Null) => {}
        Some(serde_json::Value::String(source)) => {
            found.insert("default".to_owned(), (source.to_owned(), origin));
        }
        Some(serde_json::Value::Array(named)) => {
            let text = |entry: &serde_json::Value, field: &str| entry.get(field)?.as_str().map(str::to_owned);
            let pairs = named.iter().filter_map(|entry| Some((text(entry, "name")?, text(entry, "template")?)));
            for (name, source) in pairs {
                found.entry(name).or_insert((source, origin.clone()));
            }
            if !found.contains_key("default") {
                bail!("{origin}: `chat_template` is a list without an entry named `default`; add one");
            }
        }
        Some(_) => bail!("{origin}: `chat_template` is neither a string nor a list of {{name, template}}"),
    }
    Ok(found)
}

/// The name of a template of the folder of additional ones, by its path.
fn name_of_additional(path: &str) -> Option<&str> {
    path.strip_prefix(ADDITIONAL_FOLDER)?.strip_prefix('/')?.strip_suffix(".jinja")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excluded_and_empty_answers_are_counted_apart() {
        let turn = |fields: serde_json::Value| match fields {
            serde_json::Value::Object(fields) => Message::from_fields(fields).unwrap(),
            _ => panic!("no object"),
        };
        let messages = [
            Message::user("a"),
            turn(json!({"role": "assistant", "content": "b", "weight": 0})),
            Message::user("c"),
            Message::assistant(" "),
            Message::user("d"),
            turn(json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]})),
        ];
        let source = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if message.tool_calls %}f{% endif %}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let template = ChatTemplate::from_source(source, "short.jinja", &BTreeMap::new()).unwrap();
        let rendered =
            |messages: &[Message], from| template.render(messages, &TemplateInputs::default(), from, &[]).unwrap();
        let all = rendered(&messages, LearnFrom::default());
        assert_eq!((all.answers, all.excluded, all.empty), (2, 1, 1));
        // What the prompt gives of an answer is not said by it.
        let given = rendered(&[Message::user("a"), Message::assistant("Yes")], LearnFrom { message: 1, byte: 3 });
        assert_eq!((given.answers, given.excluded, given.empty), (1, 0, 1));
        assert!(
            said::says_nothing(&Message::assistant("ab \n"), 2) && !said::says_nothing(&Message::assistant("ab"), 1)
        );
    }

    #[test]
    fn calls_that_a_template_does_not_write_are_noted_unless_it_writes_whole_messages() {
        let calls = json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]});
        let serde_json::Value::Object(fields) = calls else { panic!("no object") };
        let messages = [Message::user("a"), Message::from_fields(fields).unwrap()];
        let notes = |messages: &[Message], source: &str, name: &str| {
            let source = format!("{{% for message in messages %}}{{{{ {source} }}}}{{% endfor %}}");
            let template = ChatTemplate::from_source(&source, name, &BTreeMap::new()).unwrap();
            template.apply(messages, &TemplateInputs::default(), false).unwrap();
            notes::was_added(&format!("{name}: the chat template does not read `tool_calls`"))
        };
        assert!(notes(&messages, "message.content", "contents.jinja"));
        assert!(!notes(&messages, "message | tojson", "messages.jinja"));
        let mut fields = messages[1].fields().clone();
        fields.insert("tool_calls".to_owned(), json!([]));
        assert!(!notes(&[Message::from_fields(fields).unwrap()], "message.content", "none.jinja"));
    }

    #[test]
    fn an_endless_template_is_stopped() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::from_source(source, "loop.jinja", &BTreeMap::new()).unwrap();
        let error = template.apply(&[Message::user("Hi")], &TemplateInputs::default(), false).unwrap_err().to_string();
        assert!(error.starts_with("loop.jinja: the chat template rejects"), "{error}");
    }
}
