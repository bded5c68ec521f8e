//! Chat templates of real models, rendered as `transformers` renders them (`golden/chat_templates.py`).

use std::collections::BTreeMap;

use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::template::{ChatTemplate, LearnFrom};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/chat_templates.json")).unwrap()
}

fn template(golden: &Value, template: &Value) -> ChatTemplate {
    let tokens = golden["special_tokens"].as_object().unwrap().iter();
    let special: BTreeMap<String, String> =
        tokens.map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned())).collect();
    ChatTemplate::from_source(template["template"].as_str().unwrap(), template["name"].as_str().unwrap(), &special)
        .unwrap()
}

fn messages(case: &Value) -> Vec<Message> {
    let text = |message: &Value, field: &str| message[field].as_str().unwrap().to_owned();
    let messages = case["messages"].as_array().unwrap().iter();
    messages.map(|message| Message::new(text(message, "role"), text(message, "content"))).collect()
}

#[test]
fn conversations_are_rendered_and_refused_as_by_transformers() {
    let golden = golden();
    for entry in golden["templates"].as_array().unwrap() {
        let template = template(&golden, entry);
        for case in entry["cases"].as_array().unwrap() {
            let rendered = template.apply(
                &messages(case),
                &TemplateInputs::default(),
                case["add_generation_prompt"].as_bool().unwrap(),
            );
            assert_eq!(rendered.as_deref().ok(), case["text"].as_str(), "{} {}", entry["name"], case["messages"]);
        }
    }
}

#[test]
fn what_is_learned_is_what_training_templates_mark() {
    let golden = golden();
    let mut compared = 0;
    for entry in golden["templates"].as_array().unwrap() {
        let template = template(&golden, entry);
        for case in entry["learned"].as_array().unwrap() {
            let pieces =
                template.render(&messages(case), &TemplateInputs::default(), LearnFrom::default(), &[]).unwrap().pieces;
            let learned = pieces.iter().filter(|piece| piece.learned).map(|piece| piece.text.as_str());
            let marked = case["learned"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
            // A template may mark one stretch of text in two parts.
            assert_eq!(learned.collect::<String>(), marked.collect::<String>(), "{}", entry["name"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 4);
}

#[test]
fn a_turn_that_is_to_be_continued_is_cut_behind_its_content_as_by_transformers() {
    let golden = golden();
    let mut compared = 0;
    for entry in golden["templates"].as_array().unwrap() {
        let template = template(&golden, entry);
        for case in entry["continued"].as_array().unwrap() {
            let prompt = template.prompt(&messages(case), &TemplateInputs::default());
            assert_eq!(prompt.as_deref().ok(), case["text"].as_str(), "{} {}", entry["name"], case["messages"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 60);
}

#[test]
fn a_template_that_writes_lists_of_parts_alone_is_given_them() {
    let golden = golden();
    let smolvlm = golden["templates"].as_array().unwrap().iter().find(|entry| entry["name"] == "smolvlm").unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), smolvlm["template"].as_str().unwrap()).unwrap();
    let template = ChatTemplate::load(folder.path()).unwrap().unwrap();
    for case in smolvlm["parts"].as_array().unwrap() {
        let text = template.apply(&messages(case), &TemplateInputs::default(), true).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
    }
}

#[test]
fn additional_templates_count_as_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let text = |tools: Option<Value>| {
        let inputs = TemplateInputs { tools, ..TemplateInputs::default() };
        ChatTemplate::load(folder.path()).unwrap().unwrap().apply(&[Message::user("a")], &inputs, false).unwrap()
    };
    let tools = || Some(serde_json::json!([{ "name": "height" }]));
    put("tokenizer_config.json", r#"{"chat_template": "config {{ messages[0].content }}"}"#);
    put("additional_chat_templates/tool_use.jinja", "tools {{ messages[0].content }}");
    assert_eq!((text(None).as_str(), text(tools()).as_str()), ("config a", "tools a"));
    put("chat_template.jinja", "file {{ messages[0].content }}");
    assert_eq!(text(None), "file a");
    put("additional_chat_templates/default.jinja", "default {{ messages[0].content }}");
    assert_eq!((text(None).as_str(), text(tools()).as_str()), ("default a", "tools a"));
}

#[test]
fn values_are_written_and_refused_as_by_transformers() {
    let golden = golden();
    let messages = messages(&serde_json::json!({ "messages": golden["value_messages"] }));
    let mut differ = Vec::new();
    for case in golden["values"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let template = ChatTemplate::from_source(source, "value.jinja", &BTreeMap::new());
        let text = template.and_then(|template| template.apply(&messages, &TemplateInputs::default(), false));
        if text.as_deref().ok() != case["text"].as_str() {
            differ.push(format!("{source}\n  ours   {text:?}\n  theirs {}", case["text"]));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}
