"""Calls of functions read out of what models write, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers

from snello.engine.grammar import GrammarCompiler
from snello.models import load
from snello.serve.errors import RequestError
from snello.serve.tools import Call, Format, Said, Tools, grammar_of, parser_for, read_tools

NAMES = ("weather", "time")
TOOLS = Tools(functions=[{"name": name} for name in NAMES])
ROME = Call("weather", '{"town": "Rome"}')
CALL = '{"name": "weather", "arguments": {"town": "Rome"}}'
LLAMA = '{"name": "weather", "parameters": {"town": "Rome"}}'


def read(form: Format, text: str, size: int) -> list[Said]:
    """What is said, neighbouring texts as one."""
    parser = parser_for(form, load("demo").tokenizer, TOOLS)
    said: list[Said] = []
    for at in range(0, len(text), size):
        said += parser.feed(text[at : at + size], None)
    said += parser.flush()
    joined: list[Said] = []
    for piece in said:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


CASES: list[tuple[Format, str, list[Said]]] = [
    ("hermes", "no call at all <tool", ["no call at all <tool"]),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [ROME]),
    ("hermes", f"I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", ["I look.\n", ROME, ROME]),
    ("hermes", f"<tool_call>{CALL}", [ROME]),
    ("hermes", "<tool_call>{nonsense</tool_call> x", ["<tool_call>{nonsense</tool_call> x"]),
    ("hermes", f"<tool_call>{CALL.replace('weather', 'rm')}</tool_call>", []),
    ("llama3", LLAMA, [ROME]),
    ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", [ROME, ROME]),
    ("llama3", '{"name": "a poem"}', ['{"name": "a poem"}']),
    ("llama3", "Rome is {sunny}", ["Rome is {sunny}"]),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", [ROME, ROME]),
    ("mistral", 'Yes. [TOOL_CALLS]weather[ARGS]{"town": "Rome"}', ["Yes. ", ROME]),
    ("mistral", "[1] is a reference", ["[1] is a reference"]),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("form", "text", "said"), CASES)
def test_calls_are_found_wherever_the_text_is_cut(form: Format, text: str, said: list[Said], size: int) -> None:
    assert read(form, text, size) == (said or [text])


def test_a_tag_that_is_a_special_token_has_no_text() -> None:
    tokenizer = load("demo").tokenizer
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]"])
    mark = tokenizer.token_id("[TOOL_CALLS]")
    parser = parser_for("mistral", tokenizer, TOOLS)
    assert parser.feed("Yes. ", 5) + parser.feed("", mark) + parser.feed(f"[{CALL}]", 7) == ["Yes. "]
    assert parser.flush() == [ROME]


@pytest.mark.parametrize("special", [None, False, True])
@pytest.mark.parametrize(
    ("form", "text"), [("hermes", "<tool_call>\n{}\n</tool_call>"), ("mistral", "[TOOL_CALLS][{}]")]
)
def test_a_forced_call_may_be_written_with_the_tokens_that_tags_are(
    form: Format, text: str, special: bool | None
) -> None:
    """None: the tokenizer has no token for a tag, and it is spelled out; a special one has no text of its own."""
    tokenizer = load("demo").tokenizer
    if special is not None:
        words = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
        tokenizer.backend.add_tokens([tokenizers.AddedToken(word, special=special) for word in words])
    elif form == "mistral":
        text = "[{}]"
    tools = Tools(functions=[{"name": "weather"}], choice="weather")
    grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size, [0]).compile(
        "grammar", grammar_of(tools, form, tokenizer)
    )
    matcher, parser, decoder = grammar.start(), parser_for(form, tokenizer, tools), tokenizer.stream()
    said: list[Said] = []
    for token in tokenizer.encode(text.format(CALL), add_special=False):
        matcher.accept(token)  # raises where the grammar has another token in mind
        said += parser.feed(decoder.feed(token), token)
    assert matcher.finished and said + parser.flush() == [ROME]


def takes(form: Format, functions: list[dict[str, Any]], call: str, choice: str = "required") -> bool:
    """Whether a forced call of these functions may be written so."""
    tokenizer = load("demo").tokenizer
    source = grammar_of(Tools(functions=functions, choice=choice), form, tokenizer)
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size, [0]).compile("grammar", source).start()
    for token in tokenizer.encode(call, add_special=False):
        if not np.isfinite(matcher.masked(np.zeros(tokenizer.vocab_size, np.float32))[token]):
            return False
        matcher.accept(token)
    return matcher.finished


@pytest.mark.parametrize(("form", "begin", "end"), [("hermes", "<tool_call>\n", "\n</tool_call>"), ("llama3", "", "")])
def test_a_forced_call_has_at_most_one_space_between_its_parts(form: Format, begin: str, end: str) -> None:
    functions, key = [{"name": "time"}], "parameters" if form == "llama3" else "arguments"
    assert takes(form, functions, f'{begin}{{"name": "time", "{key}": {{}}}}{end}', "time")
    assert not takes(form, functions, f'{begin}{{\n  "name": "time", "{key}": {{}}}}{end}', "time")
    assert not takes(form, functions, f'{begin}{{"name": "time", "{key}": {{  }}}}{end}', "time")


def test_a_parameter_keeps_its_name_whatever_the_model_calls_the_arguments() -> None:
    said = {"type": "object", "properties": {"arguments": {"enum": ["arguments"]}}, "required": ["arguments"]}
    function = {"name": "run", "parameters": {**said, "additionalProperties": False}}
    assert takes("llama3", [function], '{"name": "run", "parameters": {"arguments": "arguments"}}')
    assert not takes("llama3", [function], '{"name": "run", "parameters": {"parameters": "parameters"}}')


@pytest.mark.parametrize("choice", ["a", "required"])
def test_references_in_a_functions_schema_stay_inside_it(choice: str) -> None:
    """As programs write schemas of classes: `$defs`, and `#` for the class itself."""
    closed = {"type": "object", "additionalProperties": False}
    town = {"$ref": "#/$defs/Town"}
    first = {**closed, "properties": {"town": town}, "required": ["town"], "$defs": {"Town": {"enum": ["Rome"]}}}
    second = {**closed, "properties": {"town": town, "via": {"$ref": "#"}}, "$defs": {"Town": {"enum": ["Oslo"]}}}
    functions = [{"name": "a", "parameters": first}, {"name": "b", "parameters": second}]
    assert takes("llama3", functions, '{"name": "a", "parameters": {"town": "Rome"}}', choice)
    assert not takes("llama3", functions, '{"name": "a", "parameters": {"town": "Oslo"}}', choice)
    nested = '{"name": "b", "parameters": {"via": {"town": "Oslo", "via": {}}}}'
    assert takes("llama3", functions, nested, choice) == (choice == "required")


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "param"),
    [
        ([], "required", None, "tool_choice"),
            ({}, None, None, "tools"),
        ("x", None, None, "tools"),
        ([{"type": "function"}], None, None, "tools[0]"),
        ([{"type": "function", "function": {"name": "a", "colour": 1}}], None, None, "tools[0]"),
        ([{"type": "function", "function": {"name": "a"}}] * 2, None, None, "tools"),
        ([{"type": "function", "function": {"name": "a"}}], "always", None, "tool_choice"),
        ([{"type": "function", "function": {"name": "a"}}], {"type": "function", "function": {}}, None, "tool_choice"),
        ([{"type": "function", "function": {"name": "a"}}], None, False, "parallel_tool_calls"),
        ([{"type": "function", "function": {"name": "a", "strict": True}}], None, None, "tools"),
        ([{"type": "function", "function": {"name": str(i)}} for i in range(9)], None, None, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(tools: Any, choice: Any, parallel: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(tools, choice, parallel, 8)
    assert caught.value.param == param


def test_no_function_may_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "a"}}]
    assert read_tools(tools, "none", None, 8) is None
    assert read_tools([], None, None, 8) is None
    assert json.dumps(read_tools(tools, None, None, 8).listed) == json.dumps(tools)  # type: ignore[union-attr]
