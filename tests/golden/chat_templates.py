"""Makes chat_templates.json: conversations as Hugging Face transformers renders them.

The templates are those of models under Apache-2.0 (Qwen, SmolVLM) and MIT (Phi, DeepSeek), most as TRL keeps them, and six written here
in the forms that are widespread: ChatML, ChatML with a standard system message, and those of the Llama 2, 3 and 3.1 and Zephyr lines
(the rules for roles, trimming and special tokens are theirs). Where a template writes the present day, `text` has `<TODAY>` in its place
(in the form `26 Jul 2024`) and the template stands in `dated_templates`. `continued` are conversations that end in a turn of the assistant which an
answer is to continue, `parts` conversations whose contents are lists of parts, and `values` small templates about what values look like in a text: numbers,
`tojson`, strings' methods, filters and tests. Where `text` is null, transformers refuses the template.
Run: pip install transformers jinja2 trl --no-deps; python chat_templates.py
"""

import json
import pathlib
import re
from importlib.util import find_spec

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

NAMES = ["qwen2_5", "qwen3", "qwen3_training", "phi3", "phi3_training", "deepseekv3"]

# Written for messages that are lists of parts; transformers keeps it with the model, TRL 1.12 does not.
SMOLVLM = """\
<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}\
{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_WITH_SYSTEM = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt and messages and messages[-1]['role'] != 'assistant' %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

LLAMA_3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA_3_1 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{#- A system message is taken out of the conversation, so that the date can stand before it. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("Tools are not for this conversation!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

WIDESPREAD = {"chatml": CHATML, "chatml_with_system": CHATML_WITH_SYSTEM, "llama_2": LLAMA_2, "llama_3": LLAMA_3, "zephyr": ZEPHYR}
DATED = {"llama_3_1": LLAMA_3_1}

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = [
    turns("Hi"),
    turns(" Hi  there\n", '  Hello "x" <b>é</b> 🐔\n'),
    turns("a", "b", "c", "<think>\nwhy\n</think>\n\nd", system="Be kind."),
    turns("a", "<think>x</think>b", "c"),
    [],
]
# For the templates written here also: no turn of the user, two turns in a row, a lone system message, and other characters' white space.
MORE_CONVERSATIONS = CONVERSATIONS + [
    [{"role": "assistant", "content": "I begin."}],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "system", "content": " Only rules.\n"}],
    turns("\u00a0\u2003wide\t\n", "{{ bos_token }} {% if %} \\n 'quoted'", "日本語 👩‍👩‍👧", system=""),
]


CONTINUED = [
    turns("Hi", "It is"),
    turns("Hi", "It is "),
    turns(" Hi\n", "\n  <think>\nwhy\n</think>\n\nIt is é", system="Be kind."),
    turns("a", "b", "c", "d\n\n"),
    turns("Hi", ""),
]

VALUE_MESSAGES = turns(" a,b ", "é\u2028\x7f\t\"\\")
# What stands between {{ and }}, in lists by subject.
EXPRESSIONS = [
    # numbers
    "1.0", "1e16", "1e-7", "0.0001", "1.5e300", "-0.0", "100000000000000000000", "2 ** 70", "7 / 2", "7 // 2", "-7 // 2", "-7 % 3", "7.5 // 2",
    "2 ** 0.5", "2 ** 3", "1 / 3", "3 * 1.0", "10 ** 20 * 1.0", "true + 1", "1_000", "0.1 + 0.2", "[1e16, 1e-7]",
    "{'a': 1e22}", "3 | float", "'1e3' | float", "'12' | int", "'a' | int", "3.9 | int", "2.5 | round", "3.14159 | round(2)", "1.0 == 1", "7 % 2.5",
    "1e3 | int", "'%.2f' | format(3.14159)", "'%s-%s' | format('a', 1)", "'{}-{}'.format(1, true)", "'{:.2f}'.format(3.14159)", "(1, 2)", "(1,)", "()",
    "5 | abs", "-5 | abs", "[3, 1, 2] | sum", "[0.1, 0.2] | sum", "[3, 1, 2] | max", "range(3) | list", "loop is defined",
    # truth values, none and undefined
    "true", "false", "none", "None", "True", "[true, none, false]", "{'a': none, 'b': true}", "undefined_name", "undefined_name is defined", "true ~ none",
    "none | string", "true | string", "[true, none] | join(',')", "undefined_name | default('x')", "none | default('x')", "none | default('x', true)",
    "'' | default('x')", "'' or 'x'", "none or false", "not none", "1 and 'a'", "'a' in none_name", "messages[5].content", "messages[0].nothing",
    "messages[0].nothing.more", "messages[0]['nothing'] is none", "messages | first is mapping", "'x' if false", "1 if false else none", "none == false", "1 == true",
    "1 is sameas true", "true is boolean", "1 is number", "1.0 is integer", "true is number", "true is integer", "'a' is string", "[] is sequence", "{} is mapping", "'a' is sequence",
    "{} is sequence", "{} is iterable", "1 is iterable", "none is none", "1 is none", "'A' is upper", "'a' is lower", "4 is divisibleby 2", "3 is odd", "x is undefined",
    "'a' is in 'abc'", "'a' is eq 'a'", "1 is lt 2", "messages is iterable", "messages is sequence", "'trim' is filter",
    # strings
    "'a' * 3", "'a' ~ 1 ~ 1.5", "'a' + 'b'", "'a' + 1", "'abc'[1]", "'abc'[-1]", "'abc'[1:]", "'abc'[::-1]", "'abc'[:-1]", "'abc'[5:]", "'日本語'[1:]", "'a\\nb'", "'it\\'s'", '"a\\"b"',
    "['it\\'s', 'a\"b', 'both\\'\"']", "['a\\nb\\t', 'é', '\\u00e9']", "'abc' | reverse", "'a b  c'.split()", "'a b  c'.split(' ')", "'a,b,c'.split(',', 1)", "'a,b,c'.rsplit(',', 1)",
    "' a b '.split()", "''.split()", "''.split(',')", "'a  b c'.rsplit(none, 1)", "'abc'.removeprefix('a')", "'abc'.removesuffix('c')", "'a=b=c'.partition('=')", "'a=b=c'.rpartition('=')", "'abc'.partition('x')",
    "'7'.zfill(3)", "'-7'.zfill(4)", "'ab'.ljust(4, '.')", "'ab'.rjust(4)", "'ab'.center(5, '*')", "'abc'.center(6, '*')", "'  x '.strip()", "'xxaxx'.strip('x')", "'xyaxy'.lstrip('xy')", "'axy'.rstrip('yx')",
    "'a\\n\\n'.rstrip('\\n')", "'abcabc'.replace('b', 'x')", "'abcabc'.replace('b', 'x', 1)", "'aaa'.count('a')", "'abc'.find('c')", "'abc'.find('x')", "'abcb'.rfind('b')", "'abc'.index('b')", "'abc'.startswith('a')",
    "'abc'.startswith(('x', 'a'))", "'abc'.endswith('bc')", "'aBc'.upper()", "'aBc'.lower()", "'hello wORLD'.title()", "'hello wORLD'.capitalize()", "'it\\'s a dog'.title()", "'a\\nb\\r\\nc'.splitlines()",
    "'a\\nb'.splitlines(true)", "'12'.isdigit()", "'a1'.isalnum()", "'ab'.isalpha()", "' '.isspace()", "''.isdigit()", "','.join(['a', 'b'])", "','.join([1, 2])", "'aBc'.swapcase()", "'ß'.casefold()", "'abc' | length", "'é' | length",
    "'a b' | wordcount", "' a ' | trim", "'xax' | trim('x')", "'hello wORLD' | title", "'hello wORLD' | capitalize", "'it\\'s' | title", "'a' | upper", "'A' | lower", "'abc' | replace('b', '')", "'a\\nb' | indent(2)",
    "'a\\n\\nb' | indent(2, true)", "'a\\nb' | indent(2, blank=true)", "'a<b' | e", "'a<b' | escape", "'a<b' | safe", "'abc' | first", "'abc' | last", "'abc' | list", "'a' | center(5)", "'a' < 'b'", "'b' in 'abc'",
    "'abc' | string | upper", "1 | string + 'a'", "'a' 'b'", "'tab\\there'", "'\\\\'", "'\\x41'", "'\\u00e9'",
    # lists and maps
    "[1, 'a', [2, 'b'], {'k': 'v'}]", "{'b': 1, 'a': [1, 2]}", "{1: 'a', 'b': 2}", "[1, 2] + [3]", "[1, 2] * 2", "[1, 2, 3][1:]", "[1, 2, 3][::-1]", "[1, 2, 3][-1]", "[1, 2, 3][::2]", "[] | first", "[1, 2] | last", "[1, 2] | length",
    "[3, 1, 2] | sort", "[3, 1, 2] | sort(reverse=true)", "['b', 'A', 'c'] | sort", "['b', 'A', 'c'] | sort(case_sensitive=true)", "[1, 1, 2] | unique | list", "['a', 'A'] | unique | list", "[1, 2, 3] | select('odd') | list", "[1, 2, 3] | reject('odd') | list",
    "messages | map(attribute='role') | list", "messages | map(attribute='role') | join(', ')", "messages | selectattr('role', 'equalto', 'user') | list | length", "messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | list",
    "messages | selectattr('role', '==', 'user') | map(attribute='content') | first", "messages | selectattr('tools') | list", "['a', 'b'] | map('upper') | list", "['a', 'b'] | map('replace', 'a', 'x') | list", "messages | groupby('role') | length",
    "{'a': 1}.items() | list", "{'a': 1}.keys() | list", "{'a': 1}.values() | list", "{'a': 1}.get('b')", "{'a': 1}.get('b', 2)", "{'a': 1} | items | list", "{'b': 1, 'a': 2} | dictsort", "{'b': 1, 'a': 2} | dictsort(reverse=true)", "{'a': 1} | length", "'a' in {'a': 1}",
    "{'a': {'b': 1}}.a.b", "{'a': 1}['b'] is defined", "dict(a=1, b='x')", "dict({'a': 1})", "[1, 2] | batch(1) | list", "[1, 2, 3] | slice(2) | list", "[[1, 2], [3]] | sum(start=[])", "[1, 2] == [1, 2]", "{'a': 1} == {'a': 1}", "1 in [1, 2]", "1 not in [1, 2]",
    "[1, 2] | join", "[1, 2] | join('-')", "messages | map('string') | first", "messages[-1].content", "messages[0:1] | length", "[1, 2, 3] | reverse | list", "namespace(a=1).a", "[1, none] | map('default', 'x') | list", "[{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | list",
    "[[1, 'a'], [2, 'b']] | map('first') | list", "['x'].index('x')", "['x'].count('x')", "['a', 'b'] | string", "(1, 'a') ~ ''", "messages[0]",
    # tojson
    "1e-7 | tojson", "1e16 | tojson", "[1.0, 2.50, 100] | tojson", "[messages is defined, 1 == 2] | tojson", "true | tojson", "none | tojson", "'é<>&\\'\"' | tojson", "messages | tojson", "messages[1] | tojson(ensure_ascii=true)", "'🐔' | tojson(ensure_ascii=true)",
    "{'b': 1, 'a': none} | tojson", "{'b': 1, 'a': none} | tojson(sort_keys=true)", "{'b': [1, {}], 'a': []} | tojson(indent=2)", "{'b': [1, {}], 'a': []} | tojson(indent='\\t')", "{'b': 1} | tojson(indent=0)", "[1, [2]] | tojson(indent=-1)", "[1, 2] | tojson(separators=(',', ':'))",
    "{'a': [1, 2]} | tojson(separators=(',', ': '), indent=1)", "{'a': 1} | tojson(separators=[';', '='])", "{1: 2, 'a': true} | tojson", "{true: 1, none: 2, 1.5: 3} | tojson", "{2: 1, 10: 2} | tojson(sort_keys=true)", "{'b': 1, 2: 1} | tojson(sort_keys=true)", "(1, 2) | tojson", "'a' | tojson(false, 2)",
    "[1] | tojson(true, 2)", "{'a': 1} | tojson(nothing=1)", "{'a': 1} | tojson(indent=none)", "{'a': 1} | tojson(indent=true)", "{'a': 1} | tojson(separators=none, sort_keys=false)", "undefined_name | tojson", "{'b': {'d': 1, 'c': 2}, 'a': [{'z': 1, 'y': 2}]} | tojson(sort_keys=true, indent=4)",
    "'\\x00\\x1f\\x7f\\u2028' | tojson", "10 ** 20 | tojson", "(2 ** 0.5) | tojson", "-0.0 | tojson", "1e400 | tojson", "'a' | tojson | length", "{'a': 1} | tojson == '{\"a\": 1}'", "{'b': 1, 'a': 2} | tojson | replace(' ', '')", "[1, 2] | map('tojson') | join", "{'B': 1, 'a': 2, 'é': 3} | tojson(sort_keys=true)",
]
STATEMENTS = [
    "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }};{% endfor %}",
    "{% for a in [1, 2, 3] %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}",
    "{% for a in [] %}x{% else %}none{% endfor %}",
    "{% for a in [1, 2, 3, 4] if a is odd %}{{ a }}{{ loop.index }}{% endfor %}",
    "{% set x = 1 %}{% for a in [1] %}{% set x = 2 %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for a in [1] %}{% set ns.x = 2 %}{% endfor %}{{ ns.x }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{{ x is string }}",
    "{% macro m(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}{{ m('a') | upper }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}in{% endcall %}",
    "{% filter upper %}abc{% endfilter %}",
    "{% if 0 %}a{% elif '' %}b{% elif [] %}c{% else %}d{% endif %}",
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}",
    "{% for a in messages recursive %}{{ a.role }}{% endfor %}",
    "  {% if true %}\n  a\n  {% endif %}\n b \n",
    "{%- if true -%}\n  a\n  {%- endif -%}\n b \n\n",
    "{{ 'a' -}}  b  {{- 'c' }}",
    "{# a comment #}a{#- b -#} c",
    "{% raw %}{{ a }}{% endraw %}",
    "{% with a = 1 %}{{ a }}{% endwith %}{{ a }}",
    "{% for a in 'é日' %}{{ a }};{% endfor %}",
    "{% for a in {'x': 1} %}{{ a }}{% endfor %}",
    "{% for a in undefined_name %}{{ a }}{% endfor %}-",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% set x = messages | map(attribute='content') | list %}{{ x | length }}{{ x[1][0] }}",
    "{% if messages[0]['role'] == 'user' and messages[0].content is string %}yes{% endif %}",
    "{{ raise_exception('no') }}",
    "{% set x = [] %}{% set x = x + [1] %}{{ x }}",
    "{% do messages.append(1) %}",
    "{{ messages.append(1) }}",
    "{% set x = {'a': 1} %}{{ x.update({'b': 2}) }}",
    "{{ [1, 2].pop() }}",
    "{% set _ = none %}{{ _ }}",
    "{{ '%s' | format(none) }}{{ '%5.1f|%-4d|%03d' | format(2.25, 3, 7) }}",
    "{% generation %}a{{ 1 }}{% endgeneration %}b",
    "{%- for m in messages -%}\n{{- m.role -}}\n{%- generation -%}\n {{ m.content }}\n{%- endgeneration %}\n{% endfor %}",
]
# What our template engine does not know, and so refuses by name.
REFUSED = ["'%d' % 3", "'%s' % 'x'", "'%r' | format('a')", "'long text here' | truncate(8)", "'a b' | urlencode", "'abc'.expandtabs()", "'abc'.translate({})"]
VALUES = ["{{ " + expression + " }}" for expression in EXPRESSIONS] + STATEMENTS


def render(source, messages, **options):
    return render_jinja_template([messages], chat_template=source, tools=None, documents=None, **options, **SPECIAL_TOKENS)


def check_apply_chat_template(source, messages, add_generation_prompt, text):
    """What a tokenizer's own method gives is the same."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), **SPECIAL_TOKENS)
    options = dict(chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert tokenizer.apply_chat_template(messages, **options) == text


def cases(source, conversations, dated=False):
    for messages in conversations:
        for add_generation_prompt in (False, True):
            case = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                texts, _ = render(source, messages, add_generation_prompt=add_generation_prompt)
                case["text"] = texts[0]
            except Exception as refusal:  # The template refuses the conversation.
                assert isinstance(refusal, TemplateError | TypeError), refusal
                case["text"] = None
            if messages and case["text"] is not None:
                check_apply_chat_template(source, messages, add_generation_prompt, case["text"])
            if dated and case["text"] is not None:
                case["text"], count = re.subn(r"(?<=Date: )\d\d [A-Z][a-z][a-z] \d{4}", "<TODAY>", case["text"])
                assert count == 1
            yield case


def continued(source):
    """What a prompt that ends in a turn of the assistant is, where that turn is to be continued."""
    for messages in CONTINUED:
        try:
            texts, _ = render(source, messages, continue_final_message=True)
            yield {"messages": messages, "text": texts[0]}
        except Exception as refusal:
            assert isinstance(refusal, TemplateError | TypeError | ValueError), refusal
            yield {"messages": messages, "text": None}


def parts(source):
    for messages in CONVERSATIONS[:4]:
        listed = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        texts, _ = render(source, listed, add_generation_prompt=True)
        yield {"messages": messages, "text": texts[0]}


def values():
    for source in VALUES:
        try:
            texts, _ = render(source, VALUE_MESSAGES, add_generation_prompt=False)
            yield {"source": source, "text": texts[0]}
        except Exception as refusal:
            assert isinstance(refusal, TemplateError | TypeError | ValueError | AttributeError), (source, refusal)
            yield {"source": source, "text": None}
    for expression in REFUSED:
        yield {"source": "{{ " + expression + " }}", "text": None}


def learned(source):
    """What {% generation %} marks as the assistant's."""
    if "{% generation" not in source.replace("{%-", "{%"):
        return
    for messages in CONVERSATIONS[1:3]:
        texts, spans = render(source, messages, return_assistant_tokens_mask=True)
        yield {"messages": messages, "learned": [texts[0][start:end] for start, end in spans[0]]}


folder = pathlib.Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
kept = {name: (folder / f"{name}.jinja").read_text() for name in NAMES} | {"smolvlm": SMOLVLM}
result = []
for name, source in kept.items():
    entry = {"name": name, "template": source, "cases": list(cases(source, CONVERSATIONS)), "learned": list(learned(source))}
    result.append(entry | {"continued": list(continued(source))} | ({"parts": list(parts(source))} if name == "smolvlm" else {}))
for name, source in WIDESPREAD.items():
    result.append({"name": name, "template": source, "cases": list(cases(source, MORE_CONVERSATIONS)), "learned": [], "continued": list(continued(source))})
dated = [{"name": name, "template": source, "cases": list(cases(source, MORE_CONVERSATIONS, dated=True))} for name, source in DATED.items()]
path = pathlib.Path(__file__).with_suffix(".json")
golden = {"special_tokens": SPECIAL_TOKENS, "templates": result, "dated_templates": dated, "value_messages": VALUE_MESSAGES, "values": list(values())}
path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
