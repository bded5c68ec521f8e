//! Chat templates of real models, rendered as `transformers` renders them (`golden/chat_templates.py`).

use std::collections::BTreeMap;

use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::template::ChatTemplate;
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
            let pieces = template.render(&messages(case), &TemplateInputs::default(), 0).unwrap();
            let learned = pieces.iter().filter(|piece| piece.learned).map(|piece| piece.text.as_str());
            let marked = case["learned"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
            // A template may mark one stretch of text in two parts.
            assert_eq!(learned.collect::<String>(), marked.collect::<String>(), "{}", entry["name"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 4);
}
