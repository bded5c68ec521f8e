"""Makes chat_templates.json: conversations as Hugging Face transformers renders them.

The templates are those of models under Apache-2.0 (Qwen, SmolVLM) and MIT (Phi, DeepSeek), as TRL keeps them.
Run: pip install transformers jinja2 trl --no-deps; python chat_templates.py
"""

import json
import pathlib
from importlib.util import find_spec

from transformers.utils.chat_template_utils import render_jinja_template

NAMES = ["qwen2_5", "qwen3", "qwen3_training", "phi3", "phi3_training", "deepseekv3", "smolvlm"]
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


def render(source, messages, **options):
    return render_jinja_template([messages], chat_template=source, tools=None, documents=None, **options, **SPECIAL_TOKENS)


def cases(source):
    for messages in CONVERSATIONS:
        for add_generation_prompt in (False, True):
            case = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                texts, _ = render(source, messages, add_generation_prompt=add_generation_prompt)
                case["text"] = texts[0]
            except Exception:  # The template refuses the conversation.
                case["text"] = None
            yield case


def learned(source):
    """What {% generation %} marks as the assistant's."""
    if "{% generation" not in source.replace("{%-", "{%"):
        return
    for messages in CONVERSATIONS[1:3]:
        texts, spans = render(source, messages, return_assistant_tokens_mask=True)
        yield {"messages": messages, "learned": [texts[0][start:end] for start, end in spans[0]]}


folder = pathlib.Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
result = []
for name in NAMES:
    source = (folder / f"{name}.jinja").read_text()
    result.append({"name": name, "template": source, "cases": list(cases(source)), "learned": list(learned(source))})
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text(json.dumps({"special_tokens": SPECIAL_TOKENS, "templates": result}, ensure_ascii=False, indent=1) + "\n")
