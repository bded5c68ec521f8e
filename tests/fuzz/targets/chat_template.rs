//! A chat template, over conversations with odd roles and texts.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::template::ChatTemplate;
use rlhf_fuzz::{mutate, mutation};

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::text)
});

fuzz_target!(|data: &[u8]| {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let special = BTreeMap::from([("eos_token".to_string(), "</s>".to_string())]);
    let Ok(template) = ChatTemplate::from_source(source, "template.jinja", &special) else { return };
    let system = Message::new("system", "\0 é {{ 1 }}");
    let turns = [Message::user("Hi </s>"), Message::assistant("Hello"), Message::user(""), Message::assistant("é ")];
    let messages = [&[system], &turns[..]].concat();
    let _ = template.apply(&messages, &TemplateInputs::default(), true);
    let _ = template.apply(&[], &TemplateInputs::default(), false);
    if let Ok(pieces) = template.render(&messages, &TemplateInputs::default(), 0) {
        let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        let whole = template.apply(&messages, &TemplateInputs::default(), false).expect("it has been rendered before");
        assert!(whole.starts_with(&text), "pieces are the text");
    }
});
