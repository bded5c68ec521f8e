//! Records: what rows are read as, whatever their layout.

use std::fmt;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

/// One turn of a conversation, with all its fields.
///
/// A chat template is given the fields as they are: `role` and `content`, and whatever else the data has, such as `tool_calls`,
/// `tool_call_id`, `name` or `reasoning_content`. Fields that are null are not kept. Two turns are equal if all their fields are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `role` is among them, and a string; `content`, if it is there, is a string.
    fields: Map<String, Value>,
}

/// Fields by which data say that a turn is not to be learned.
const TRUTH_MARKS: [&str; 3] = ["train", "training", "loss"];

impl Message {
    /// A turn with no fields but these two.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let fields = [("role".to_owned(), Value::String(role.into())), ("content".to_owned(), content.into().into())];
        Self { fields: Map::from_iter(fields) }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A turn of these fields. ShareGPT's names are replaced (`from` by `role`, `value` by `content`, and the roles that go with them, see
    /// `sharegpt_role`); a content that is a list of texts is joined.
    ///
    /// # Errors
    /// Where there is no role, no content that is text, or no content at all though the turn is not one of the assistant with other fields (as
    /// `tool_calls`). The error is a part of a sentence: "has no role".
    pub fn from_fields(mut fields: Map<String, Value>) -> Result<Self, String> {
        fields.retain(|_, value| !value.is_null());
        for (from, to) in [("from", "role"), ("value", "content")] {
            if fields.contains_key(to) || !fields.contains_key(from) {
                continue;
            }
            let replace = |(name, value): (String, Value)| match (name == from, value) {
                (true, Value::String(role)) if from == "from" => (to.to_owned(), sharegpt_role(&role).into()),
                (true, value) => (to.to_owned(), value),
                (false, value) => (name, value),
            };
            fields = fields.into_iter().map(replace).collect();
        }
        let is_assistant = match fields.get("role") {
            Some(Value::String(role)) => role == "assistant",
            Some(other) => return Err(format!("has the role {other}, expected a string")),
            None => return Err("has no role".to_owned()),
        };
        Self::check_marks(&fields)?;
        // What the assistant does instead of saying something is in other fields.
        let says_nothing = is_assistant && fields.len() > 1;
        match fields.get_mut("content") {
            Some(Value::String(_)) => {}
            Some(content) => *content = Value::String(joined_parts(content)?),
            None if says_nothing => {}
            None => return Err("has no content".to_owned()),
        }
        Ok(Self { fields })
    }

    /// Who speaks: `system`, `user`, `assistant` or `tool` (templates may know more).
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said; empty for a turn without content.
    pub fn content(&self) -> &str {
        self.fields.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    /// Says something else.
    pub fn set_content(&mut self, content: impl Into<String>) {
        self.fields.insert("content".to_owned(), Value::String(content.into()));
    }

    /// All fields, in the order of the data; none is null.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// Whether the assistant speaks.
    pub fn is_assistant(&self) -> bool {
        self.role() == "assistant"
    }

    /// Whether the turn is to be learned: one of the assistant, unless the data exclude it by `weight: 0` (OpenAI's format), `train: false`
    /// (also called `training`) or `loss: false` (ms-swift's).
    pub fn is_learned(&self) -> bool {
        let is_excluded = self.fields.get("weight").and_then(Value::as_f64) == Some(0.0)
            || TRUTH_MARKS.iter().any(|name| self.fields.get(*name) == Some(&Value::Bool(false)));
        self.is_assistant() && !is_excluded
    }

    /// The turn without what says whether it is to be learned, which has no meaning where answers are compared or scored.
    pub fn without_marks(mut self) -> Self {
        self.fields.retain(|name, _| name != "weight" && !TRUTH_MARKS.contains(&name.as_str()));
        self
    }

    /// What is wrong with a mark of whether the turn is to be learned, as the end of a sentence.
    fn check_marks(fields: &Map<String, Value>) -> Result<(), String> {
        match fields.get("weight") {
            None => {}
            Some(weight) if weight.as_f64().is_some_and(|weight| weight == 0.0 || weight == 1.0) => {}
            Some(weight) => return Err(format!("has `weight` {weight}, expected 0 (not learned) or 1")),
        }
        for name in TRUTH_MARKS {
            match fields.get(name) {
                None | Some(Value::Bool(_)) => {}
                Some(other) => return Err(format!("has `{name}` {other}, expected true or false (not learned)")),
            }
        }
        Ok(())
    }

    /// Whether both turns say the same, but for white space at the ends of their contents.
    pub fn is_same_but_for_space(&self, other: &Message) -> bool {
        let others = |message: &Message| message.fields.len() - usize::from(message.fields.contains_key("content"));
        let is_same = |(name, value): (&String, &Value)| name == "content" || other.fields.get(name) == Some(value);
        self.content().trim() == other.content().trim()
            && others(self) == others(other)
            && self.fields.iter().all(is_same)
    }
}

/// The role that ShareGPT's data call by this name: `human`, `gpt` (or another model's name), `function_call` (a turn of the assistant), `observation`
/// (one of a tool). Others stay.
fn sharegpt_role(name: &str) -> &str {
    match name.to_lowercase().as_str() {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "bot" | "model" | "assistant" | "function_call" | "tool_call" => {
            "assistant"
        }
        "observation" | "tool" | "function" | "function_response" | "tool_response" => "tool",
        "system" => "system",
        _ => name,
    }
}

/// The text of a content that is a list of parts, all of which must be texts: strings, or `{type: text, text}`.
fn joined_parts(content: &Value) -> Result<String, String> {
    let Value::Array(parts) = content else {
        let found = match content {
            Value::Object(fields) => format!("an object of {}", names(fields.keys())),
            other => other.to_string(),
        };
        return Err(format!("has as content {found}, expected a string or a list of {{type, text}}"));
    };
    let mut text = String::new();
    for part in parts {
        let (kind, part) = match part {
            Value::String(part) => (None, Some(part)),
            Value::Object(fields) => (fields.get("type"), fields.get("text").and_then(as_string)),
            _ => (None, None),
        };
        match (kind.map(|kind| kind.as_str().unwrap_or_default()), part) {
            (None | Some("text" | "input_text" | "output_text"), Some(part)) => text.push_str(part),
            (Some(kind), _) => return Err(format!("holds a part of type `{kind}`, expected texts alone")),
            (None, None) => return Err("holds a part without text, expected {type, text}".to_owned()),
        }
    }
    Ok(text)
}

fn as_string(value: &Value) -> Option<&String> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// What a row gives the chat template in addition to the turns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateInputs {
    /// The descriptions of the tools that the model may call, as a list: the template's `tools`.
    pub tools: Option<Value>,
    /// Variables of the template, such as `enable_thinking`: the row's `chat_template_kwargs`.
    pub variables: Map<String, Value>,
}

impl TemplateInputs {
    /// Whether there is nothing but the turns.
    pub fn is_empty(&self) -> bool {
        self.tools.is_none() && self.variables.is_empty()
    }
}

/// Turns, with what else the chat template is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// What else the template is given. Of a prompt and its answers the prompt has it; the answers have none.
    pub inputs: Arc<TemplateInputs>,
}

impl Deref for Conversation {
    type Target = [Message];

    fn deref(&self) -> &[Message] {
        &self.messages
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, inputs: Arc::default() }
    }
}

/// A prompt, an answer or a whole document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// A string, taken as it is: no template applies.
    Plain(String),
    /// Turns of a conversation, to be rendered by the model's chat template.
    Messages(Conversation),
}

impl Text {
    /// Turns, and nothing else for the template.
    pub fn messages(messages: Vec<Message>) -> Self {
        Text::Messages(messages.into())
    }

    /// The same without what says whether turns are to be learned ([`Message::without_marks`]).
    pub fn without_marks(self) -> Self {
        match self {
            Text::Plain(text) => Text::Plain(text),
            Text::Messages(Conversation { messages, inputs }) => {
                let messages = messages.into_iter().map(Message::without_marks).collect();
                Text::Messages(Conversation { messages, inputs })
            }
        }
    }

    /// Whether there is something to learn: a string, or a turn of the assistant that the data do not exclude.
    pub fn is_learned(&self) -> bool {
        match self {
            Text::Plain(_) => true,
            Text::Messages(conversation) => conversation.messages.iter().any(Message::is_learned),
        }
    }

    /// What is said, without roles: the string, or the content of each message.
    pub fn contents(&self) -> impl Iterator<Item = &str> {
        let (text, messages) = match self {
            Text::Plain(text) => (Some(text.as_str()), &[][..]),
            Text::Messages(conversation) => (None, &conversation.messages[..]),
        };
        text.into_iter().chain(messages.iter().map(Message::content))
    }
}

/// The file and row that a record was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// The row, counted from 0.
    pub row: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: row {} (counted from 0)", self.file.display(), self.row)
    }
}

/// Text to imitate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// What is given and not learned, where the columns set it apart.
    pub prompt: Option<Text>,
    /// What is learned. Of messages, only the assistant's turns are.
    pub completion: Text,
    /// Where it was read.
    pub origin: Origin,
}

/// A prompt and two or more answers in an order of preference.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// What is answered.
    pub prompt: Text,
    /// The answers.
    pub responses: Vec<Text>,
    /// One rank an answer: lower is better, equal ranks are ties.
    pub ranks: Vec<i64>,
    /// By how much a better answer is better, where the data says so.
    pub margin: Option<f32>,
    /// How much the prompt counts beside others; 1 where the data does not say.
    pub weight: f32,
    /// The share of labellers who agree with the order, where the data says so.
    pub agreement: Option<f32>,
    /// Where it was read.
    pub origin: Origin,
}

/// A text, or a pair of texts, of a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// The text.
    pub text: String,
    /// The other text of a pair.
    pub pair: Option<String>,
    /// The class: a name, or a number as text.
    pub label: String,
    /// Where it was read.
    pub origin: Origin,
}

/// Something to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text; messages end before the answer.
    pub prompt: Text,
    /// The row's other columns as JSON, nulls left out; empty unless they were asked for
    /// ([`PROMPTS_WITH_COLUMNS`](super::schema::PROMPTS_WITH_COLUMNS)).
    pub columns: Map<String, Value>,
    /// Where it was read.
    pub origin: Origin,
}

impl Prompt {
    /// A prompt of whose row nothing else was asked for.
    pub fn new(prompt: Text, origin: Origin) -> Self {
        Prompt { prompt, columns: Map::new(), origin }
    }
}

/// A prompt and the answers to be scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// What is answered; empty for a plain `text`.
    pub prompt: Text,
    /// One answer or many, as the layout says.
    pub answers: Vec<Text>,
    /// Where it was read.
    pub origin: Origin,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(fields: Value) -> Result<Message, String> {
        let Value::Object(fields) = fields else { panic!() };
        Message::from_fields(fields)
    }

    #[test]
    fn fields_are_kept_and_compared_and_nulls_are_not() {
        let turn = message(json!({"role": "assistant", "content": "a", "name": null, "thinking": "b"})).unwrap();
        assert_eq!(turn.fields().keys().collect::<Vec<_>>(), ["role", "content", "thinking"]);
        assert_ne!(turn, Message::assistant("a"));
        let call =
            message(json!({"role": "assistant", "content": null, "tool_calls": [{"type": "function"}]})).unwrap();
        assert_eq!((call.content(), call.fields().contains_key("content")), ("", false));
        assert_eq!(message(json!({"role": "assistant", "content": null})).unwrap_err(), "has no content");
        assert_eq!(message(json!({"role": "user", "name": "b"})).unwrap_err(), "has no content");
        assert_eq!(message(json!({"content": "b"})).unwrap_err(), "has no role");
    }

    #[test]
    fn names_of_sharegpt_are_replaced_where_they_are() {
        for (name, role) in [
            ("human", "user"),
            ("gpt", "assistant"),
            ("function_call", "assistant"),
            ("observation", "tool"),
            ("tool", "tool"),
            ("system", "system"),
            ("Anna", "Anna"),
        ] {
            assert_eq!(message(json!({"from": name, "value": "x"})).unwrap(), Message::new(role, "x"));
        }
        assert_eq!(message(json!({"role": "human", "content": "x"})).unwrap().role(), "human");
        // Null fields of the other names come from data sets that were joined.
        let both = json!({"from": "gpt", "value": "x", "role": null, "content": null});
        assert_eq!(message(both).unwrap(), Message::assistant("x"));
    }

    #[test]
    fn parts_of_a_content_are_joined_if_all_are_texts() {
        let parts = |parts: Value| message(json!({"role": "user", "content": parts}));
        let text = |text: &str| json!({"type": "text", "text": text});
        assert_eq!(parts(json!([text("a\n"), text("b"), "c"])).unwrap().content(), "a\nbc");
        let error = parts(json!([text("a"), {"type": "image", "text": null}])).unwrap_err();
        assert_eq!(error, "holds a part of type `image`, expected texts alone");
        assert!(parts(json!({"a": 1})).unwrap_err().contains("an object of `a`"));
        assert!(parts(json!(3)).unwrap_err().contains("has as content 3"));
    }

    #[test]
    fn turns_that_the_data_exclude_are_not_learned() {
        let turn = |field: &str, value: Value| message(json!({"role": "assistant", "content": "a", field: value}));
        assert!(!turn("weight", json!(0)).unwrap().is_learned());
        assert!(!turn("weight", json!(0.0)).unwrap().is_learned());
        assert!(!turn("train", json!(false)).unwrap().is_learned());
        assert!(!turn("loss", json!(false)).unwrap().is_learned());
        assert!(turn("loss", json!(false)).unwrap().without_marks().is_learned());
        for (name, value) in
            [("weight", json!(0.5)), ("weight", json!("0")), ("train", json!("false")), ("loss", json!(0))]
        {
            assert!(turn(name, value).unwrap_err().contains(name));
        }
        assert!(turn("weight", json!(1)).unwrap().is_learned());
        assert!(Message::assistant("a").is_learned() && !Message::user("a").is_learned());
    }
}
