//! `tokenizer.json` and `tokenizer_config.json`, and what they make of some texts.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::tokenize::Tokenizer;
use rlhf_fuzz::{folder, mutate, mutate_joined, mutation, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, |input, random| {
        mutate_joined(input, random, mutation::json_text, mutation::json_text)
    })
});

fuzz_target!(|data: &[u8]| {
    let (tokenizer, config) = mutation::split(data);
    write(FOLDER.path(), "tokenizer.json", tokenizer);
    write(FOLDER.path(), "tokenizer_config.json", config);
    let Ok(tokenizer) = Tokenizer::load(FOLDER.path()) else { return };
    let long = "word ".repeat(40) + &"é\u{10ffff}".repeat(40);
    for text in ["", "Hello, world! </s>", " \0\u{feff} 😀\r\n", &long] {
        if let Ok(tokens) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&tokens, true);
            let _ = tokenizer.decode_answer(&tokens, &tokens);
        }
        let _ = tokenizer.encode_texts(text, Some("pair"), 7);
        let _ = tokenizer.encode_texts(text, None, 3);
    }
    let _ = tokenizer.model_max_length();
    let _ = tokenizer.common_tokens(10);
    let _ = tokenizer.template().apply(&[Message::user("Hi")], &TemplateInputs::default(), true);
});
