"""Makes chat_templates.json: conversations as Hugging Face transformers renders them.

The templates are those of models under Apache-2.0 (Qwen, SmolVLM) and MIT (Phi, DeepSeek), most as TRL keeps them, and six written here
in the forms that are widespread: ChatML, ChatML with a standard system message, and those of the Llama 2, 3 and 3.1 and Zephyr lines
(the rules for roles, trimming and special tokens are theirs). Where a template writes the present day, `text` has `<TODAY>` in its place
(in the form `26 Jul 2024`) and the template stands in `dated_templates`.
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
    result.append({"name": name, "template": source, "cases": list(cases(source, CONVERSATIONS)), "learned": list(learned(source))})
for name, source in WIDESPREAD.items():
    result.append({"name": name, "template": source, "cases": list(cases(source, MORE_CONVERSATIONS)), "learned": []})
dated = [{"name": name, "template": source, "cases": list(cases(source, MORE_CONVERSATIONS, dated=True))} for name, source in DATED.items()]
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text(json.dumps({"special_tokens": SPECIAL_TOKENS, "templates": result, "dated_templates": dated}, ensure_ascii=False, indent=1) + "\n")
