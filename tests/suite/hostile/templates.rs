//! Chat templates that would run for ever, fill the memory or read files.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rlhf::data::schema::{Message, TemplateInputs};
use rlhf::data::template::ChatTemplate;

use super::seeds::{parquet_bytes, tables};
use crate::workbench::Workbench;

/// What the template makes of a greeting; an error is one sentence that names the template.
fn rendered(source: &str) -> Result<String, String> {
    let start = Instant::now();
    let template = ChatTemplate::from_source(source, "hostile.jinja", &BTreeMap::new());
    let result = template.and_then(|template| {
        template.apply(&[Message::user("Hi"), Message::assistant("é")], &TemplateInputs::default(), true)
    });
    assert!(start.elapsed() < Duration::from_secs(30), "{source} took {:?}", start.elapsed());
    result.map_err(|error| {
        let error = error.to_string();
        assert!(error.starts_with("hostile.jinja: the chat template") && !error.contains('\n'), "{error}");
        error
    })
}

#[test]
fn templates_without_end_or_bound_are_stopped() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(999999999999) %}a{% endfor %}",
        "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * 99999999999999999999 }}",
        "{{ ('x' * 99999 * 99999) | length }}",
        "{{ [messages] * 10 ** 9 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a'.replace('', 'b' * 999999).replace('b', 'c' * 999999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('b' * 99999).join(range(99999)) }}",
        "{{ 'a' | indent(999999999, true) }}",
        "{{ ('a\n' * 99999) | indent(99999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ messages | tojson(indent=999999999) }}",
        "{{ range(99999) | list | tojson(indent=9999) }}",
        "{{ ([range(9999) | list] * 9999) | tojson }}",
        "{% set ns = namespace(a='x') %}{% for i in range(99999) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a | tojson }}",
        "{{ 2 ** 99999999999 }}{{ 1 / 0 }}",
    ] {
        assert!(rendered(source).is_err(), "{source}");
    }
}

#[test]
fn lists_that_double_without_steps_end_the_program_with_a_sentence() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    let (_, rows) = tables().into_iter().find(|(name, _)| *name == "messages").unwrap();
    bench.put("messages.parquet", &parquet_bytes(&rows, 0));
    let doubled = |sum: &str| {
        format!("{{% set ns = namespace(a=[1]) %}}{{% for i in range(60) %}}{{% set ns.a = {sum} %}}{{% endfor %}}")
    };
    let nested = "{{ ([[1] * 99999999] * 99999999) ~ '' }}".to_string();
    for source in [doubled("ns.a + ns.a"), doubled("[ns.a, ns.a]") + "{{ ns.a }}", nested] {
        bench.put("sft/chat_template.jinja", source.as_bytes());
        let start = Instant::now();
        let output = bench.run("sft --model sft --data messages.parquet --output out --quiet");
        assert!(start.elapsed() < Duration::from_secs(60), "{source} took {:?}", start.elapsed());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.lines().count() == 1, "{source}: {error}");
        assert!(error.contains("chat_template.jinja: the chat template rejects the conversation"), "{source}: {error}");
    }
}

#[test]
fn what_is_deep_is_no_overflow_of_the_stack() {
    let nest = "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}";
    let maps = nest.replace("[ns.a]", "{'a': ns.a}");
    let fast = nest.replace("[ns.a]", &format!("{}ns.a{}", "[".repeat(20), "]".repeat(20))).replace("99999", "30000");
    let uses = [
        "",
        "{{ ns.a | tojson }}",
        "{{ ns.a }}",
        "{{ [ns.a] == [[ns.a]] }}",
        "{{ {ns.a: 1} | length }}",
        "{{ ns.a | pprint }}",
    ];
    for source in [nest, &maps, &fast] {
        for use_of_it in uses {
            let _ = rendered(&format!("{source}{use_of_it}"));
        }
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(rendered(&format!("{{{{ {deep} }}}}")).is_err());
    assert!(rendered(&"{% if true %}".repeat(100_000)).is_err());
    let not = format!("{{{{ {} true }}}}", "not ".repeat(100_000));
    let _ = rendered(&not);
    let parentheses = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(rendered(&parentheses).is_err());
}

#[test]
fn templates_read_no_files() {
    for source in [
        "{% include '/etc/hostname' %}",
        "{% include '../hostile.jinja' %}",
        "{% include ['/etc/hostname', 'chat'] %}",
        "{% import '/etc/hostname' as a %}{{ a }}",
        "{% from '/etc/hostname' import a %}",
        "{% extends '/etc/hostname' %}",
        "{{ open('/etc/hostname').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ env('PATH').x }}{{ environ.x.y }}",
    ] {
        assert!(rendered(source).is_err(), "{source}");
    }
    // Itself is the one template that there is, and does not stand in itself without end.
    assert!(rendered("{% include 'chat' %}").is_err());
}

#[test]
fn odd_tags_are_a_sentence_or_text() {
    for source in
        ["{%}", "{%}{%-%}", "{%", "{{", "{#", "{%%}", "%}{%", "\0", "{% generation %", "é{%é%}", "{%+ generation +%}"]
    {
        let _ = rendered(source);
    }
    assert_eq!(rendered("%}}").as_deref(), Ok("%}}"));
}
