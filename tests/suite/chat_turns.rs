//! What is learned of conversations whose template writes turns in its own way.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::template::{ChatTemplate, LearnFrom, Rendered};

const STOP: &str = "<|end|>";

/// A template of turns `<|role|>`, content, `<|end|>` and a line break; `content` says how the content is written.
fn turns(content: &str) -> String {
    format!(
        "{{% for m in messages %}}{{{{ '<|' + m.role + '|>\n' }}}}{content}{{{{ '<|end|>\n' }}}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{{{{ '<|assistant|>\n' }}}}{{% endif %}}"
    )
}

fn template(source: &str) -> ChatTemplate {
    let special = BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]);
    ChatTemplate::from_source(source, "t.jinja", &special).unwrap()
}

fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

fn render_from(source: &str, turns: &[Message], from: LearnFrom) -> Rendered {
    let inputs = TemplateInputs::default();
    let rendered = template(source).render(turns, &inputs, from, &[STOP.to_owned()]).unwrap();
    let last = turns.iter().rposition(Message::is_assistant).unwrap();
    let whole = template(source).apply(&turns[..=last], &inputs, false).unwrap();
    let text: String = rendered.pieces.iter().map(|piece| piece.text.as_str()).collect();
    assert!(whole.starts_with(&text), "{text:?} is no beginning of {whole:?}");
    rendered
}

fn learned(source: &str, turns: &[(&str, &str)]) -> (Vec<String>, usize) {
    let rendered = render_from(source, &messages(turns), LearnFrom::default());
    let pieces = rendered.pieces.into_iter().filter(|piece| piece.learned).map(|piece| piece.text);
    (pieces.collect(), rendered.not_learned)
}

const LONG: [(&str, &str); 6] = [
    ("user", "A?"),
    ("assistant", " Aye. "),
    ("user", " B?"),
    ("assistant", "Bee.\n"),
    ("user", "C?"),
    ("assistant", "Sea."),
];

#[test]
fn turns_are_learned_as_they_are_written_in_the_whole() {
    let of = |content: &str| learned(&turns(content), &LONG);
    let ended = |contents: [&str; 3]| (contents.map(|content| format!("{content}<|end|>")).to_vec(), 0);
    assert_eq!(of("{{ m.content }}"), ended([" Aye. ", "Bee.\n", "Sea."]));
    assert_eq!(of("{{ m.content | trim }}"), ended(["Aye.", "Bee.", "Sea."]));
    assert_eq!(of("{{ m.content | upper }}"), ended([" AYE. ", "BEE.\n", "SEA."]));
    assert_eq!(of("{{ m.content.strip() | capitalize }}"), ended(["Aye.", "Bee.", "Sea."]));
    // Only the last turn has a thought.
    let thought = "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}";
    assert_eq!(
        of(&format!("{thought}{{{{ m.content }}}}")),
        ended([" Aye. ", "Bee.\n", "<think>\n\n</think>\n\nSea."])
    );
    // Only the earlier ones have.
    let earlier = thought.replace("loop.last", "not loop.last");
    let expected = ended(["<think>\n\n</think>\n\n Aye. ", "<think>\n\n</think>\n\nBee.\n", "Sea."]);
    assert_eq!(of(&format!("{earlier}{{{{ m.content }}}}")), expected);
    // How many turns there are is written first, so that no beginning is rendered as the whole is.
    let counted = format!("{{{{ messages | length }}}}{}", turns("{{ m.content }}"));
    assert_eq!(learned(&counted, &LONG), ended([" Aye. ", "Bee.\n", "Sea."]));
}

#[test]
fn a_generation_prompt_with_more_than_a_turn_shows_counts_as_far_as_it_is_written() {
    let source = turns("{{ m.content }}").replace("'<|assistant|>\n'", "'<|assistant|>\n<think>\n'");
    let (turns, _) =
        learned(&source, &[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>\nd\n</think>e")]);
    assert_eq!(turns, ["b<|end|>", "d\n</think>e<|end|>"]);
}

#[test]
fn thoughts_that_the_template_drops_are_counted_and_the_rest_is_learned() {
    let content = "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}\
                   {% else %}{{ m.content }}{% endif %}";
    let conversation = messages(&[
        ("user", "a"),
        ("assistant", "<think>\nwhy\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\nhow\n</think>\n\nd"),
    ]);
    let rendered = render_from(&turns(content), &conversation, LearnFrom::default());
    let learned: Vec<&str> =
        rendered.pieces.iter().filter(|piece| piece.learned).map(|piece| piece.text.as_str()).collect();
    assert_eq!(learned, ["b<|end|>", "<think>\nhow\n</think>\n\nd<|end|>"]);
    assert_eq!((rendered.answers, rendered.not_learned, &rendered.not_written[..]), (2, 0, &[1][..]));
}

#[test]
fn an_answer_that_is_not_written_is_counted() {
    let content = "{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}{% endif %}";
    assert_eq!(learned(&turns(content), &LONG), (vec!["Sea.<|end|>".to_owned()], 2));
}

#[test]
fn a_conversation_that_the_assistant_opens_is_learned_from_its_content_on() {
    let opened = [("assistant", "Welcome."), ("user", "Is it open?"), ("assistant", "Aye.")];
    let expected = (vec!["Welcome.<|end|>".to_owned(), "Aye.<|end|>".to_owned()], 0);
    let system = format!("{{{{ '<s>You are kind.<|end|>' }}}}{}", turns("{{ m.content }}"));
    assert_eq!(learned(&system, &opened), expected);
    let needs_user =
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no') }}{% endif %}";
    assert_eq!(learned(&format!("{needs_user}{}", turns("{{ m.content }}")), &opened), expected);
    let alone = learned(&system, &[("assistant", " Welcome.")]);
    assert_eq!(alone, (vec!["Welcome.<|end|>".to_owned()], 0));
}

#[test]
fn blocks_of_generation_say_what_is_learned() {
    let content = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}";
    let expected = vec![" Aye. ".to_owned(), "Bee.\n".to_owned(), "Sea.".to_owned()];
    assert_eq!(learned(&turns(content), &LONG), (expected, 0));
    let only_last = content.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last");
    assert_eq!(learned(&turns(&only_last), &LONG), (vec!["Sea.".to_owned()], 2));
    // A template that marks nothing in a conversation is one without blocks.
    let none = content.replace("m.role == 'assistant'", "m.role == 'nobody'");
    assert_eq!(learned(&turns(&none), &LONG).0[0], " Aye. <|end|>");
    // What a prompt holds is not learned.
    let prompted = render_from(&turns(content), &messages(&LONG), LearnFrom { message: 4, byte: 0 });
    assert_eq!(prompted.pieces.iter().filter(|piece| piece.learned).count(), 1);
}

#[test]
fn an_answer_that_the_prompt_begins_is_learned_from_there_on() {
    let conversation = messages(&[("user", "a"), ("assistant", " It is ten."), ("user", "c"), ("assistant", "d")]);
    for content in ["{{ m.content }}", "{{ m.content | trim }}"] {
        let rendered = render_from(&turns(content), &conversation, LearnFrom { message: 1, byte: " It is".len() });
        let learned: Vec<&str> =
            rendered.pieces.iter().filter(|piece| piece.learned).map(|piece| piece.text.as_str()).collect();
        assert_eq!(learned, [" ten.<|end|>", "d<|end|>"]);
    }
}

#[test]
fn calls_of_tools_are_a_part_of_their_turn() {
    let content =
        "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ '<call>' ~ call.name ~ '</call>' }}{% endfor %}";
    let fields = serde_json::json!({ "role": "assistant", "tool_calls": [{ "name": "height" }] });
    let call = Message::from_fields(fields.as_object().unwrap().clone()).unwrap();
    let conversation = vec![Message::user("a"), call, Message::new("tool", "10"), Message::assistant("Ten.")];
    let rendered = render_from(&turns(content), &conversation, LearnFrom::default());
    let learned: Vec<&str> =
        rendered.pieces.iter().filter(|piece| piece.learned).map(|piece| piece.text.as_str()).collect();
    assert_eq!(learned, ["<call>height</call><|end|>", "Ten.<|end|>"]);
    assert!(rendered.not_written.is_empty());
    let without_calls = render_from(&turns("{{ m.content or '' }}"), &conversation, LearnFrom::default());
    assert_eq!(without_calls.not_written, [1]);
}

#[test]
fn without_stop_tokens_a_turn_ends_with_what_ends_the_last_one() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endfor %}{{ eos_token }}\
                  {% if add_generation_prompt %}[assistant]{% endif %}";
    let (learned, _) = learned(source, &LONG);
    assert_eq!(learned, [" Aye. [/assistant]", "Bee.\n[/assistant]", "Sea.[/assistant]</s>"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is said, each answer is learned whole and nothing of what others say is.
    #[test]
    fn every_answer_is_learned_and_nothing_else(contents in prop::collection::vec(".{0,12}", 2..9), trims in any::<bool>()) {
        let roles = ["user", "assistant"];
        let conversation: Vec<(&str, &str)> =
            contents.iter().enumerate().map(|(index, content)| (roles[index % 2], content.as_str())).collect();
        let source = turns(if trims { "{{ m.content | trim }}" } else { "{{ m.content }}" });
        let (found, not_learned) = learned(&source, &conversation);
        let expected: Vec<String> = contents.iter().skip(1).step_by(2).map(|content| {
            format!("{}<|end|>", if trims { content.trim() } else { content })
        }).collect();
        prop_assert_eq!(not_learned, 0);
        prop_assert_eq!(found, expected);
    }
}
