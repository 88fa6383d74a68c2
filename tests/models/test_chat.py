"""Chat templates: the same prompt, to the character, as Transformers' `apply_chat_template`."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from snello.errors import SnelloError
from snello.models import chat
from snello.models.tokenizer import copy_tokenizer_files, load_tokenizer
from tests.checkpoints import write_tokenizer

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + strftime_now("%d %b %Y") + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ message['content'] + eos_token}}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MODERN = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {{- "<a>" }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- "<think>" + message.reasoning_content + "</think>" }}
        {%- endif %}
        {{- message.content }}
        {%- endgeneration %}
    {%- else %}
        {{- "<" ~ message.role ~ ">" ~ message.content }}
    {%- endif %}
    {%- if message.stop %}{% break %}{% endif %}
{%- endfor %}
{{- documents | tojson if documents else "" }}
{{- dict(a=1) | tojson }}
{%- if add_generation_prompt %}
    {{- "<a>" }}{% if enable_thinking is defined and not enable_thinking %}{{- "<think></think>" }}{% endif %}
{%- endif %}
"""
TEMPLATES = {"llama-3": LLAMA3, "qwen2": QWEN2, "mistral": MISTRAL, "zephyr": ZEPHYR, "modern": MODERN}
SYSTEM = {"role": "system", "content": " Be <brief> & 'kind'. "}
TALK = [
    {"role": "user", "content": "Hi!\n"},
    {"role": "assistant", "content": "Hello — 日本 😀"},
    {"role": "user", "content": "Bye {{ 7 * 7 }}"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": '<wind> & "rain" é'}}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, 307)
    return tmp_path


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str, generate: bool, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    mine, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    chats: list[list[dict[str, Any]]] = [TALK, TALK[:1]]
    if name != "mistral":
        chats.append([SYSTEM, *TALK])
    for messages in chats:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert mine.prompt(messages, add_generation_prompt=generate) == expected
        assert mine.chat(messages, generate) == mine.encode(expected, add_special=False)
        assert (
            mine.chat(messages, generate)
            == theirs.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
        )


@pytest.mark.parametrize(
    "variables",
    [
        {"tools": TOOLS},
        {"documents": [{"title": "A", "text": "<b>"}]},
        {"enable_thinking": False},
        {"unused": {"deep": [1, (2, None)]}},
    ],
)
@pytest.mark.parametrize("name", ["llama-3", "modern"])
def test_variables_reach_the_template(name: str, variables: dict[str, Any], folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    messages = [*TALK, {"role": "assistant", "content": "ok", "thinking": "hm", "stop": True}, *TALK[:1]]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    assert load_tokenizer(folder).prompt(messages, **variables) == expected


def test_what_is_null_in_a_message_is_not_there(folder: Path) -> None:
    """Clients of OpenAI's protocol say `content: null` beside calls, and `tool_calls: null` beside words."""
    written = "{% for m in messages %}{{ m.role ~ m.content }}{% if m.tool_calls is defined %}C{% endif %};{% endfor %}"
    (folder / "chat_template.jinja").write_text(written)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": None}}}]
    messages = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "user", "content": "x", "tool_calls": None},
    ]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert load_tokenizer(folder).prompt(messages) == expected == "assistantC;userx;"


def test_the_tests_above_do_reach_what_they_mean_to() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert "<think>hm</think>" in chat.render(MODERN, [{"role": "assistant", "content": "x", "thinking": "hm"}])
    assert '<wind> & \\"rain\\" é' in chat.render(LLAMA3, TALK, tools=TOOLS, special_tokens=special)
    assert datetime.now().strftime("%d %b %Y") in chat.render(LLAMA3, TALK, special_tokens=special)


def test_where_templates_are_kept(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def with_template(value: Any) -> Path:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        return folder

    assert load_tokenizer(with_template("one")).prompt(TALK) == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "tools"}]
    assert load_tokenizer(with_template(named)).prompt(TALK) == "two"
    assert load_tokenizer(folder).prompt(TALK, tools=TOOLS) == "tools"
    (folder / "chat_template.json").write_text('{"chat_template": "three"}')
    assert load_tokenizer(with_template(None)).prompt(TALK) == "three"
    (folder / "chat_template.jinja").write_text("four")
    assert load_tokenizer(with_template("one")).prompt(TALK) == "four"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SnelloError, match="named templates"):
        load_tokenizer(with_template([1]))
    with pytest.raises(SnelloError, match="not a text"):
        load_tokenizer(with_template(7))
    with pytest.raises(SnelloError, match="has no chat template"):
        load_tokenizer(with_template([{"name": "rag", "template": "x"}])).prompt(TALK)


def test_templates_with_names_of_their_own_files(folder: Path, tmp_path: Path) -> None:
    """As Transformers saves them, and copied with the other files of a tokenizer."""
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.chat_template = {"default": "one", "tool_use": "tools"}
    theirs.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    (copied := tmp_path / "copied").mkdir()
    copy_tokenizer_files(folder, copied)
    for path in (folder, copied):
        assert load_tokenizer(path).prompt(TALK) == "one"
        assert load_tokenizer(path).prompt(TALK, tools=TOOLS) == "tools"


def test_no_template_says_what_to_do(folder: Path) -> None:
    with pytest.raises(SnelloError, match="has no chat template") as caught:
        load_tokenizer(folder).chat(TALK)
    assert caught.value.hint and "Instruct" in caught.value.hint


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (MISTRAL, [SYSTEM], "Conversation roles must alternate"),
        ("{{ raise_exception('no') }}", [], "refuses these messages: no"),
        ("{% if %}", [], "not valid Jinja"),
        ("{{ messages[5].content }}", [], "the chat template"),
        ("{{ 1 + 'a' }}", [], "the chat template fails"),
        ("{{ messages.append(1) }}", [], "the chat template"),
        ("{{ ''.__class__.__mro__ }}", [], "the chat template"),
        ("{{ messages }}", ["text"], "a chat message is str"),
        ("{% for i in range(10**9) %}x{% endfor %}", [], "the chat template"),
    ],
)
def test_what_a_template_may_not_do(template: str, messages: list[Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message):
        chat.render(template, messages, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def test_members_of_enumerations_are_what_they_stand_for() -> None:
    role = StrEnum("Role", {"USER": "user"}).USER
    written = chat.render("{{ messages[0].role }} {{ x | tojson }}", [{"role": role}], x=np.float64(2.5))
    assert written == "user 2.5"


def test_objects_do_not_reach_the_template() -> None:
    assert chat.render("{{ x }}", [], x=Path("/etc")) == "<PosixPath>"
