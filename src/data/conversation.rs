//! What belongs to a row's conversation apart from its texts, and how a prompt and its answers become one
//! conversation.

use std::sync::Arc;

use arrow::array::{Array, LargeStringArray};
use serde_json::{Map, Value};

use super::json_column::JsonColumn;
use super::record::{Conversation, Message, TemplateInputs, Text};
use super::table::Rows;
use crate::error::Result;

/// Names of `chat_template_kwargs` that are no variables of a template: arguments of `apply_chat_template` in
/// transformers, and what is set here.
const RESERVED: [&str; 14] = [
    "messages",
    "conversation",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// The columns `system` (the first turn, unless there is one), `tools` and `chat_template_kwargs` (what the
/// chat template is given).
pub(super) struct ConversationColumns<'a> {
    rows: &'a Rows,
    system: Option<LargeStringArray>,
    tools: Option<JsonColumn>,
    variables: Option<JsonColumn>,
}

impl<'a> ConversationColumns<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self> {
        let json = |name: &str| rows.has(name).then(|| rows.json(name)).transpose();
        Ok(Self {
            rows,
            system: rows.has("system").then(|| rows.strings("system")).transpose()?,
            tools: json("tools")?,
            variables: json("chat_template_kwargs")?,
        })
    }

    /// Adds to a row's conversation what the columns hold. It begins with `first`, or where this is empty
    /// with each of `others`.
    ///
    /// # Errors
    /// Where the columns hold something and `first` is a string, to which no template applies; where there is
    /// another system turn already; and where a value is not what its column promises.
    pub(super) fn complete(&self, row: usize, first: &mut Text, others: &[Text]) -> Result<()> {
        let inputs = self.inputs(row)?;
        let system = self.system.as_ref().filter(|system| system.is_valid(row)).map(|system| system.value(row));
        let system = system.filter(|system| !system.trim().is_empty());
        let conversation = match first {
            Text::Messages(conversation) => conversation,
            Text::Plain(_) => {
                let held = |name| {
                    let fault = "is not empty, but the row's texts are strings, to which no chat template applies; give them as \
                                 messages {role, content}, or remove the column";
                    Err(self.rows.fault(row, name, fault))
                };
                return match (system, inputs) {
                    (Some(_), _) => held("system"),
                    (None, inputs) if inputs.tools.as_ref().is_some_and(|tools| *tools != Value::Array(Vec::new())) => {
                        held("tools")
                    }
                    (None, inputs) if !inputs.variables.is_empty() => held("chat_template_kwargs"),
                    _ => Ok(()),
                };
            }
        };
        if let Some(system) = system {
            self.begin_with(row, system, conversation, others)?;
        }
        if !inputs.is_empty() {
            conversation.inputs = Arc::new(inputs);
        }
        Ok(())
    }

    fn begin_with(&self, row: usize, system: &str, conversation: &mut Conversation, others: &[Text]) -> Result<()> {
        let others = others.iter().filter_map(|text| match text {
            Text::Messages(messages) => messages.first(),
            Text::Plain(_) => None,
        });
        let mut first: Vec<&Message> = match conversation.first() {
            Some(first) => vec![first],
            None => others.collect(),
        };
        first.retain(|message| message.role() == "system");
        if first.iter().any(|message| message.content().trim() != system.trim()) {
            let fault = "differs from the system turn that the conversation begins with; keep one of the two";
            return Err(self.rows.fault(row, "system", fault));
        }
        if first.is_empty() {
            conversation.messages.insert(0, Message::new("system", system));
        }
        Ok(())
    }

    fn inputs(&self, row: usize) -> Result<TemplateInputs> {
        let value = |name: &str, column: &Option<JsonColumn>| match column {
            None => Ok(Value::Null),
            Some(column) => column.get(row).and_then(decoded).map_err(|fault| self.rows.fault(row, name, fault)),
        };
        let tools = match value("tools", &self.tools)? {
            Value::Null => None,
            Value::Array(tools) => {
                let tools = tools.into_iter().map(decoded).collect::<Result<_, _>>();
                Some(Value::Array(tools.map_err(|fault| self.rows.fault(row, "tools", fault))?))
            }
            other => {
                return Err(self.rows.fault(row, "tools", format!("is {}, expected a list of tools", shown(&other))));
            }
        };
        let variables = match value("chat_template_kwargs", &self.variables)? {
            Value::Null => Map::new(),
            Value::Object(variables) => variables,
            other => {
                let fault = format!("is {}, expected a struct of the template's variables", shown(&other));
                return Err(self.rows.fault(row, "chat_template_kwargs", fault));
            }
        };
        if let Some(name) = variables.keys().find(|name| RESERVED.contains(&name.as_str())) {
            let fault =
                format!("holds `{name}`, which is no variable of a chat template that a row can set; remove it");
            return Err(self.rows.fault(row, "chat_template_kwargs", fault));
        }
        Ok(TemplateInputs { tools, variables })
    }
}

/// What a text that should be JSON holds; an empty one is null, and other values are what they are.
fn decoded(value: Value) -> Result<Value, String> {
    match value {
        Value::String(text) if text.trim().is_empty() => Ok(Value::Null),
        Value::String(text) => serde_json::from_str(&text).map_err(|error| format!("cannot be read as JSON ({error})")),
        other => Ok(other),
    }
}

fn shown(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

/// The column `history` of Alpaca's layout: pairs of a question and its answer, which come before the
/// instruction.
pub(super) struct History<'a> {
    rows: &'a Rows,
    pairs: Option<JsonColumn>,
}

impl<'a> History<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self> {
        Ok(Self { rows, pairs: rows.has("history").then(|| rows.json("history")).transpose()? })
    }

    /// The turns before the instruction.
    pub(super) fn get(&self, row: usize) -> Result<Vec<Message>> {
        let Some(pairs) = &self.pairs else { return Ok(Vec::new()) };
        let fault = |fault: String| self.rows.fault(row, "history", fault);
        let pairs = match pairs.get(row).and_then(decoded).map_err(fault)? {
            Value::Null => return Ok(Vec::new()),
            Value::Array(pairs) => pairs,
            other => return Err(fault(format!("is {}, expected a list of [question, answer]", shown(&other)))),
        };
        let mut turns = Vec::with_capacity(2 * pairs.len());
        for (number, pair) in pairs.iter().enumerate() {
            let texts: Option<Vec<&str>> = pair.as_array().and_then(|pair| pair.iter().map(Value::as_str).collect());
            let Some([question, answer]) = texts.as_deref() else {
                return Err(fault(format!(
                    "item {number} (counted from 0) is {}, expected [question, answer]",
                    shown(pair)
                )));
            };
            turns.extend([Message::user(*question), Message::assistant(*answer)]);
        }
        Ok(turns)
    }
}

/// A prompt and its answers in one form: all strings or all messages.
#[derive(Debug, PartialEq)]
pub(super) enum OneForm {
    /// The prompt, and the answers without it.
    Apart(Text, Vec<Text>),
    /// The answers are whole conversations, of which the prompt is a part.
    Whole(Vec<Vec<Message>>),
}

impl OneForm {
    /// The prompt and the answers. Of whole conversations the prompt is their common beginning.
    pub(super) fn apart(self) -> (Text, Vec<Text>) {
        match self {
            OneForm::Apart(prompt, answers) => (prompt, answers),
            OneForm::Whole(conversations) => {
                let (prompt, answers) = common_beginning(conversations);
                (Text::messages(prompt), answers.into_iter().map(Text::messages).collect())
            }
        }
    }
}

/// Makes a prompt and its answers all strings or all messages: where one is a list of messages, a string
/// becomes a turn of the user (prompt) or of the assistant (answer).
///
/// Answers may hold the prompt already. Beside a prompt that is a string, answers with a turn of the user
/// before their last are whole conversations, and the string is not used. Those that begin with the messages
/// of the prompt lose them. White space at the ends of a content does not matter there.
///
/// # Errors
/// Where an answer begins with a turn of the user or the system that is not the prompt's. The error is a part
/// of a sentence with the answer's number.
pub(super) fn one_form(prompt: Text, answers: Vec<Text>) -> Result<OneForm, (usize, String)> {
    if matches!(prompt, Text::Plain(_)) && answers.iter().all(|answer| matches!(answer, Text::Plain(_))) {
        return Ok(OneForm::Apart(prompt, answers));
    }
    let as_turns = |answer| match answer {
        Text::Plain(answer) => vec![Message::assistant(answer)],
        Text::Messages(conversation) => conversation.messages,
    };
    let answers: Vec<Vec<Message>> = answers.into_iter().map(as_turns).collect();
    match prompt {
        Text::Plain(prompt) => beside_a_string(&prompt, answers),
        Text::Messages(prompt) => beside_messages(prompt, answers),
    }
}

fn beside_messages(prompt: Conversation, mut answers: Vec<Vec<Message>>) -> Result<OneForm, (usize, String)> {
    for (number, answer) in answers.iter_mut().enumerate() {
        let same = prompt.iter().zip(&*answer).take_while(|(left, right)| left.is_same_but_for_space(right)).count();
        if same == prompt.len() && answer.len() > same {
            answer.drain(..same);
        } else if begins_a_conversation(answer) {
            let role = answer[0].role().to_owned();
            let fault = format!(
                "begins with a turn of the {role}, but not with the messages of `prompt`; leave the prompt out of the answers, or begin them with all of it"
            );
            return Err((number, fault));
        }
    }
    Ok(OneForm::Apart(Text::Messages(prompt), answers.into_iter().map(Text::messages).collect()))
}

fn beside_a_string(prompt: &str, mut answers: Vec<Vec<Message>>) -> Result<OneForm, (usize, String)> {
    let asks = |message: &Message| message.role() == "user" && message.content().trim() == prompt.trim();
    let is_whole = |answer: &Vec<Message>| {
        let before_last = before_last_answer(answer);
        let begins = begins_a_conversation(answer) && before_last.iter().any(|message| message.role() == "user");
        begins || before_last.iter().any(asks)
    };
    let whole = answers.iter().filter(|answer| is_whole(answer)).count();
    if whole > 0 && whole == answers.len() {
        return Ok(OneForm::Whole(answers));
    }
    let mut turns = if prompt.is_empty() { Vec::new() } else { vec![Message::user(prompt)] };
    if whole > 0 {
        // Only some of the answers hold the prompt: then it must be the string's.
        let conversations = answers.iter().filter(|answer| is_whole(answer)).cloned().collect();
        let (shared, rest) = common_beginning(conversations);
        if !shared.last().is_some_and(asks) {
            let number = answers.iter().position(|answer| !is_whole(answer)).unwrap_or(0);
            let fault = "is an answer without its prompt, while others are conversations that ask something else than `prompt`; give all answers in one form";
            return Err((number, fault.to_owned()));
        }
        let mut rest = rest.into_iter();
        answers = answers
            .into_iter()
            .map(|answer| if is_whole(&answer) { rest.next().unwrap_or(answer) } else { answer })
            .collect();
        turns = shared;
    }
    // A system turn comes before the question, wherever it is written.
    if let Some(number) = answers.iter().position(|answer| begins_a_conversation(answer)) {
        let (shared, rest) = common_beginning(answers);
        if !shared.iter().all(|message| message.role() == "system") || shared.is_empty() {
            return Err((
                number,
                "begins with a turn that the other answers do not have; give all answers in one form".to_owned(),
            ));
        }
        return Ok(apart([shared, turns].concat(), rest));
    }
    Ok(apart(turns, answers))
}

fn apart(prompt: Vec<Message>, answers: Vec<Vec<Message>>) -> OneForm {
    OneForm::Apart(Text::messages(prompt), answers.into_iter().map(Text::messages).collect())
}

/// Whether there is a turn of the user or the system before the first of the assistant.
fn begins_a_conversation(answer: &[Message]) -> bool {
    let before = answer.iter().take_while(|message| !message.is_assistant());
    before.into_iter().any(|message| ["user", "system"].contains(&message.role()))
}

fn before_last_answer(answer: &[Message]) -> &[Message] {
    &answer[..answer.iter().rposition(Message::is_assistant).unwrap_or(0)]
}

/// What conversations begin with in common, but for white space, and the rest of each, which is its last
/// message at least.
pub(super) fn common_beginning(mut conversations: Vec<Vec<Message>>) -> (Vec<Message>, Vec<Vec<Message>>) {
    let Some((first, others)) = conversations.split_first() else { return (Vec::new(), Vec::new()) };
    let mut shared = first.len().saturating_sub(1);
    for other in others {
        let pairs = first.iter().zip(other).take(shared.min(other.len().saturating_sub(1)));
        shared = pairs.take_while(|(left, right)| left.is_same_but_for_space(right)).count();
    }
    // Two turns of the assistant are two: a prompt that ends in the first would be continued by the second.
    while shared > 0
        && first[shared - 1].is_assistant()
        && conversations.iter().any(|turns| turns[shared].is_assistant())
    {
        shared -= 1;
    }
    let beginnings: Vec<Vec<Message>> =
        conversations.iter_mut().map(|conversation| conversation.drain(..shared).collect()).collect();
    (beginnings.into_iter().next().unwrap_or_default(), conversations)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(text: &str) -> Vec<Message> {
        let role = |letter| match letter {
            "s" => "system",
            "u" => "user",
            "a" => "assistant",
            _ => "tool",
        };
        text.split_whitespace().map(|turn| Message::new(role(&turn[..1]), turn)).collect()
    }

    fn messages(text: &str) -> Text {
        Text::messages(turns(text))
    }

    fn plain(text: &str) -> Text {
        Text::Plain(text.to_owned())
    }

    fn apart(prompt: Text, answers: &[Text]) -> (Text, Vec<Text>) {
        one_form(prompt, answers.to_vec()).unwrap().apart()
    }

    #[test]
    fn answers_that_hold_the_conversation_are_not_put_behind_the_prompt_again() {
        let whole = [messages("s u a1"), messages("s u a2")];
        let expected = (messages("s u"), vec![messages("a1"), messages("a2")]);
        for prompt in ["u", " u\n", "something else", ""] {
            assert_eq!(apart(plain(prompt), &whole), expected, "{prompt:?}");
        }
        assert_eq!(apart(messages("s u"), &whole), expected);
        // Earlier turns are a part of the conversation.
        assert_eq!(apart(plain("u2"), &[messages("u1 a u2 a3")]), (messages("u1 a u2"), vec![messages("a3")]));
        // One that begins with a greeting is a whole conversation if it asks what the prompt asks, and goes
        // on from the prompt if it does not.
        let greeting = messages("a1 u a2");
        assert_eq!(apart(plain("u"), std::slice::from_ref(&greeting)).0, messages("a1 u"));
        assert_eq!(apart(plain("u0"), std::slice::from_ref(&greeting)), (messages("u0"), vec![greeting]));
        // Calls of tools are a part of the answer.
        assert_eq!(apart(plain("u"), &[messages("a1 t a2")]), (messages("u"), vec![messages("a1 t a2")]));
    }

    #[test]
    fn white_space_at_the_ends_does_not_matter_where_the_prompt_is_repeated() {
        let prompt = Text::messages(vec![Message::user("u\n")]);
        assert_eq!(
            apart(prompt.clone(), &[messages("u a1"), messages("a2")]),
            (prompt, vec![messages("a1"), messages("a2")])
        );
    }

    #[test]
    fn one_answer_that_repeats_the_prompt_loses_it() {
        let expected = (messages("s u"), vec![messages("a1"), plain("a2")]);
        let found = apart(plain("u"), &[messages("s u a1"), plain("a2")]);
        assert_eq!((found.0, &found.1[0], found.1[1].contents().next()), (expected.0, &expected.1[0], Some("a2")));
        let (number, fault) = one_form(plain("u"), vec![messages("a2"), messages("s u0 a1")]).unwrap_err();
        assert!(number == 0 && fault.contains("without its prompt"), "{fault}");
    }

    #[test]
    fn answers_that_begin_otherwise_than_the_prompt_contradict_it() {
        for answer in ["u a", "s u a", "u0 a"] {
            let (number, fault) = one_form(messages("s u0"), vec![messages("a"), messages(answer)]).unwrap_err();
            assert!(number == 1 && fault.contains("not with the messages of `prompt`"), "{answer}: {fault}");
        }
        assert!(one_form(messages("s u"), vec![messages("a1 u a2")]).is_ok());
    }

    #[test]
    fn a_system_turn_of_the_answers_comes_before_the_question() {
        assert_eq!(apart(plain("u"), &[messages("s a1"), messages("s a2")]).0, messages("s u"));
        assert!(one_form(plain("u"), vec![messages("s a1"), messages("s2 a2")]).is_err());
    }

    #[test]
    fn strings_beside_messages_become_messages() {
        assert_eq!(apart(plain("u"), &[plain("a")]), (plain("u"), vec![plain("a")]));
        let (prompt, answers) = apart(messages("u"), &[plain("a")]);
        assert_eq!((prompt, answers), (messages("u"), vec![messages("a")]));
    }
}
