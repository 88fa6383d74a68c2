"""Bodies to settings and back: what is read, what is refused and by which name, what is written."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from snello.engine.request import Chunk, SamplingParams, TokenLogprob, Usage
from snello.errors import SnelloError
from snello.models import load
from snello.models.tokenizer import Tokenizer
from snello.native.core import NotFinite
from snello.serve import answers, openai
from snello.serve.errors import RequestError, request_error
from snello.serve.openai import CHAT, COMPLETIONS, EMBEDDINGS, read_request

HEAD = answers.Head(id="x", model="m")
SAY = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load("demo").tokenizer


def settings(url: str, seed: int | None = None, defaults: dict[str, Any] | None = None, **body: Any) -> SamplingParams:
    request = read_request(url, {"messages": SAY, **body} if url == CHAT else {"prompt": "x", **body})
    assert isinstance(request, openai.ChatRequest | openai.CompletionRequest)
    return openai.settings(request.sampling, defaults or {}, seed)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_every_setting_of_drawing_reaches_the_engine() -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1,
        "frequency_penalty": -1, "seed": 5, "stop": ["a", "b"], "n": 3, "max_tokens": 9, "ignore_eos": True,
        "include_stop_str_in_output": True,
    }  # fmt: skip
    for url in (CHAT, COMPLETIONS):
        params = settings(url, **given)
        assert {name: getattr(params, name) for name in given} == {**given, "stop": ("a", "b")}
        biased = settings(url, logit_bias={"3": -100, "5": 2.5}, stop_token_ids=[4])
        assert biased.logit_bias == {3: -100.0, 5: 2.5} and biased.stop_token_ids == (4,)


def test_log_probabilities_have_two_spellings() -> None:
    assert settings(CHAT, logprobs=True, top_logprobs=4).logprobs == 4
    assert settings(CHAT, logprobs=True).logprobs == 0
    assert settings(CHAT, logprobs=False).logprobs is None
    assert settings(COMPLETIONS, logprobs=2).logprobs == 2


def test_a_length_that_is_not_said_is_openais() -> None:
    assert settings(COMPLETIONS).max_tokens == 16
    assert settings(CHAT).max_tokens > 10**6
    assert settings(CHAT, max_completion_tokens=5).max_tokens == 5


def test_a_request_goes_over_the_checkpoints_defaults_and_its_seed_over_the_derived_one() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    assert settings(CHAT, defaults=defaults, top_k=3).temperature == 0.6
    assert settings(CHAT, defaults=defaults, top_k=3).top_k == 3
    assert settings(CHAT, seed=8).seed == 8
    assert openai.settings({"seed": 1}, {}, 8).seed == 1


def test_null_is_a_field_left_out() -> None:
    body = dict.fromkeys(("temperature", "stop", "tools", "seed", "logprobs", "n", "nonsense"))
    assert settings(CHAT, **body) == settings(CHAT)


@pytest.mark.parametrize(
    "fields",
    [{"user": "me"}, {"tools": []}, {"response_format": {"type": "text"}}, {"stream": False}, {"metadata": {"a": "b"}}],
)
def test_fields_that_ask_for_nothing_pass(fields: dict[str, Any]) -> None:
    assert settings(CHAT, **fields) == settings(CHAT)


def test_prompts_are_texts_or_tokens_one_or_many() -> None:
    def prompts(value: Any) -> Any:
        request = read_request(COMPLETIONS, {"prompt": value})
        assert isinstance(request, openai.CompletionRequest)
        return request.prompts

    assert prompts("a") == ("a",)
    assert prompts(["a", "b"]) == ("a", "b")
    assert prompts([1, 2]) == ((1, 2),)
    assert prompts([[1, 2], [3]]) == ((1, 2), (3,))


def test_a_template_sees_the_arguments_of_a_call_as_a_table(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0].function | tojson }}{% endfor %}"
    chatty = dataclasses.replace(tokenizer, chat_templates={"default": template})

    def rendered(arguments: Any) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = read_request(CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
        assert isinstance(asked, openai.ChatRequest)
        return tokenizer.decode(openai.chat_tokens(asked, chatty))

    assert rendered('{"town": "Rome"}') == rendered({"town": "Rome"}) == '{"name": "f", "arguments": {"town": "Rome"}}'
    assert rendered("") == '{"name": "f", "arguments": {}}' and '"no JSON"' in rendered("no JSON")


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = read_request(CHAT, {"messages": [{"role": "user", "content": parts, "name": None}]})
    assert isinstance(request, openai.ChatRequest)
    assert list(request.messages) == [{"role": "user", "content": "one\ntwo"}]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "body", "param", "said"),
    [
        ("/v1/responses", {}, "url", "there is no url '/v1/responses'"),
        (CHAT, {}, "messages", "missing"),
        (CHAT, {"messages": []}, "messages", "not empty"),
        (CHAT, {"messages": ["hi"]}, "messages[0]", "role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0]", "no content"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0]", "a string or a list"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0]", "a list of calls"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "messages[0]", "a list of calls"),
        (CHAT, {"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents", "did you mean"),
        (CHAT, {"messages": SAY, "temprature": 1}, "temprature", "did you mean temperature?"),
        (CHAT, {"messages": SAY, "temperature": "1"}, "temperature", "must be a number"),
        (CHAT, {"messages": SAY, "temperature": True}, "temperature", "must be a number"),
        (CHAT, {"messages": SAY, "temperature": -1}, "temperature", "at least 0"),
        (CHAT, {"messages": SAY, "temperature": float("inf")}, "temperature", "at most 100"),
        (CHAT, {"messages": SAY, "n": 2.5}, "n", "whole number"),
        (CHAT, {"messages": SAY, "n": 0}, "n", "at least 1"),
        (CHAT, {"messages": SAY, "top_k": 2**40}, "top_k", "whole number"),
        (CHAT, {"messages": SAY, "stop": [1]}, "stop", "list of strings"),
        (CHAT, {"messages": SAY, "stop": ""}, "stop", "a stop string is empty"),
        (CHAT, {"messages": SAY, "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        (CHAT, {"messages": SAY, "logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        (CHAT, {"messages": SAY, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": SAY, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        (CHAT, {"messages": SAY, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        (CHAT, {"messages": SAY, "tools": [{"type": "function"}]}, "tools", "not supported"),
        (CHAT, {"messages": SAY, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT, {"messages": SAY, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "may not set tools"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
        (COMPLETIONS, {"prompt": []}, "prompt", "a string, a list"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "a string, a list"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "a string, a list"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "not supported"),
        (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs", "whole number"),
        (EMBEDDINGS, {"input": "a", "dimensions": 4}, "dimensions", "not supported"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64"),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(url: str, body: Any, param: str | None, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(url, body)
    error = caught.value.body()["error"]
    assert error["param"] == param and said in error["message"]
    assert error["type"] == "invalid_request_error" and caught.value.status == 400


def test_errors_do_not_tell_of_the_batch() -> None:
    """Which row failed depends on what ran beside it."""
    one, other = request_error(NotFinite(1)), request_error(NotFinite(2))
    assert one.body() == other.body() and one.status == 500 and one.body()["error"]["type"] == "server_error"
    assert request_error(SnelloError("a", "b")).message == "a: b"


@pytest.mark.parametrize(
    ("length", "context", "answer", "fine"), [(7, 8, True, True), (8, 8, True, False), (8, 8, False, True)]
)
def test_an_answer_needs_room(length: int, context: int, answer: bool, fine: bool) -> None:
    if fine:
        openai.check_prompt(range(length), context, 100, answer=answer)
    else:
        with pytest.raises(RequestError, match="8 tokens and the context here is 8") as caught:
            openai.check_prompt(range(length), context, 100, answer=answer)
        assert caught.value.code == "context_length_exceeded"


# ---- what is written ------------------------------------------------------------------------------------------------


def spoken(tokenizer: Tokenizer, text: str) -> answers.Choice:
    """A choice that has said this text, token by token; of each the first alternative is a line end."""
    choice = answers.Choice(before=tokenizer.encode("x")[-1], logprobs=[])
    other = tokenizer.encode("\n")[0]
    for token in tokenizer.encode(text):
        drawn = TokenLogprob(token_id=token, logprob=-1.5, top=((other, -0.5), (token, -1.5)))
        choice.take(Chunk(text=tokenizer.decode([token]), token_id=token, logprob=drawn))
    usage = Usage(prompt_tokens=1, completion_tokens=3, first_token_seconds=0, seconds=0, cached_tokens=1)
    choice.take(Chunk(text="", finish_reason="length", usage=usage))
    return choice


def test_a_chat_body_is_openais(tokenizer: Tokenizer) -> None:
    choice = spoken(tokenizer, "return x")
    body = answers.chat_body(HEAD, [choice], answers.usage_body(1, 3, 1), tokenizer)
    assert body["object"] == "chat.completion" and body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "return x", "refusal": None}
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "return x"
    assert bytes(value for entry in content for value in entry["bytes"]) == b"return x"
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["\n", content[0]["token"]]
    assert body["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    json.dumps(body, allow_nan=False)


def test_a_completion_body_has_parallel_lists(tokenizer: Tokenizer) -> None:
    body = answers.completion_body(HEAD, [spoken(tokenizer, "return x")], answers.usage_body(1, 3), tokenizer)
    listed = body["choices"][0]["logprobs"]
    text = body["choices"][0]["text"]
    for token, offset in zip(listed["tokens"], listed["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token
    for token, logprob, top in zip(listed["tokens"], listed["token_logprobs"], listed["top_logprobs"], strict=True):
        assert top[token] == logprob == -1.5 and list(top) == ["\n", token]
    assert "prompt_tokens_details" not in body["usage"]


def test_part_of_a_character_has_no_bytes(tokenizer: Tokenizer) -> None:
    choice = spoken(tokenizer, "\N{SNOWMAN}")
    body = answers.chat_body(HEAD, [choice], {}, tokenizer)
    assert choice.logprobs is not None and len(choice.logprobs) > 1, "the tokenizer knows no snowman"
    assert any(entry["bytes"] is None for entry in body["choices"][0]["logprobs"]["content"])


def test_a_vector_is_the_same_in_both_forms() -> None:
    vector = np.array([0.1, -2.5, 1e-9], np.float32)
    plain = answers.embedding_body(HEAD, [vector], 3, as_base64=False)["data"][0]["embedding"]
    coded = answers.embedding_body(HEAD, [vector], 3, as_base64=True)["data"][0]["embedding"]
    assert np.array_equal(np.array(plain, np.float32), vector)
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), vector)
