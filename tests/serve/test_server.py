"""The server on a real socket: streams and whole answers, what is refused, and who hangs up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from snello.engine.llm import LLM
from snello.engine.sequence import Step
from snello.native.core import NotFinite
from snello.serve.openai import CHAT_FIELDS, COMPLETION_FIELDS
from snello.serve.options import Limits, ServeOptions
from snello.serve.responses import FIELDS
from tests.serve.world import (
    WEATHER,
    Running,
    make_chat,
    make_encoder,
    make_pooled,
    parse,
    raw_request,
    serving,
    text_of,
)

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
SAY = [{"role": "user", "content": "def area(r):"}]
LONG = {"prompt": "def f(x):\n", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    chat, encoder = make_chat(folder / "chat"), make_encoder(folder / "bert")
    limits = Limits(body_bytes=200_000, stops=3, n=4, choices=6, prompts=5, inputs=4, biases=3, schema_bytes=2000)
    with serving(
        ServeOptions(models=("demo", f"chat={chat}", f"bert={encoder}"), max_num_seqs=4, limits=limits)
    ) as here:
        yield here


def ask(here: Running, path: str = TEXTS, **body: Any) -> dict[str, Any]:
    response = here.post(path, {"model": "chat" if path == CHAT else "demo", **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_engines(here: Running) -> None:
    body = ask(here, prompt="def area(r):", max_tokens=12, seed=5)
    with LLM("demo") as llm:
        alone = llm.generate("def area(r):", max_tokens=12, seed=5)
    assert body["choices"][0]["text"] == alone.text and body["choices"][0]["finish_reason"] == alone.finish_reason
    assert body["usage"]["prompt_tokens"] == len(alone.prompt_token_ids)
    assert body["usage"]["completion_tokens"] == alone.usage.completion_tokens
    assert body["object"] == "text_completion" and body["model"] == "demo" and body["id"].startswith("cmpl-")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 3},
        {"prompt": ["a = ", "b = "], "n": 2},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 1},
        {"prompt": ["a = ", "b = "], "n": 2, "max_tokens": 0, "echo": True, "logprobs": 1},
        {"stop": ["\n", ")"]},
        {"prompt": [65, 314, 271]},
        {"frequency_penalty": 1.5, "logit_bias": {"199": -100}, "top_p": 0.8},
        {"structured_outputs": {"regex": "[a-c]{3,9}"}, "logprobs": 1},
    ],
)
def test_a_stream_laid_together_is_the_whole_answer(here: Running, more: dict[str, Any]) -> None:
    body = {"model": "demo", "prompt": "def area(r):", "max_tokens": 14, "seed": 3, **more}
    whole, events = ask(here, **body), here.events(TEXTS, {**body, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == [] and events[-2]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(event["usage"] is None for event in events[:-2])
    for choice in whole["choices"]:
        rows = [row for event in events[:-2] for row in event["choices"] if row["index"] == choice["index"]]
        assert "".join(row["text"] for row in rows) == choice["text"]
        assert [row["finish_reason"] for row in rows if row["finish_reason"]] == [choice["finish_reason"]]
        assert rows[-1]["finish_reason"], "the reason comes last"
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                assert [value for row in rows if row["logprobs"] for value in row["logprobs"][name]] == values


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"tools": [WEATHER]}])
def test_a_chat_streams_its_role_first_and_says_the_same(here: Running, more: dict[str, Any]) -> None:
    body = {"model": "chat", "messages": SAY, "max_tokens": 12, "seed": 3, **more}
    whole, events = ask(here, CHAT, **body), here.events(CHAT, body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in events[0] and events[0]["object"] == "chat.completion.chunk"
    assert len({event["id"] for event in events[:-1]}) == 1
    for choice in whole["choices"]:
        assert text_of(events, choice["index"]) == choice["message"]["content"]
        rows = [row for event in events[:-1] for row in event["choices"] if row["index"] == choice["index"]]
        assert [row["finish_reason"] for row in rows if row["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            said = [entry for row in rows if row["logprobs"] for entry in row["logprobs"]["content"]]
            assert said == choice["logprobs"]["content"] and len(said) == 12


def test_a_prompt_that_was_computed_before_is_counted_as_known(here: Running) -> None:
    prompt = "class Shape:\n    def area(self):\n        return 0\n" * 3
    first, second = (ask(here, prompt=prompt, max_tokens=2)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 16
    assert second["prompt_tokens_details"]["cached_tokens"] > second["prompt_tokens"] - 32


def test_echoed_log_probabilities_are_those_of_the_model(here: Running) -> None:
    """What lm-eval's `local-completions` reads."""
    with LLM("demo") as llm:
        ids = llm.encode("def area(r):\n    return 3.14 * r * r\n" * 5)
        scores = llm.score(ids)
    choice = ask(here, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"][0]["logprobs"]
    assert choice["token_logprobs"][0] is None
    assert np.array_equal(np.array(choice["token_logprobs"][1 : len(ids)], np.float32), scores.log_probabilities)
    for place, top1 in enumerate(scores.top1):
        likeliest = max(choice["top_logprobs"][place + 1].values())
        assert (choice["token_logprobs"][place + 1] == likeliest) == (top1 == ids[place + 1])


def test_a_prompt_alone_is_echoed_and_nothing_is_drawn(here: Running) -> None:
    body = {"prompt": [[65, 314, 271, 9], [65, 314, 271]], "n": 2, "echo": True, "logprobs": 2}
    alone, longer = (ask(here, **body, max_tokens=most, temperature=0) for most in (0, 1))
    assert [choice["finish_reason"] for choice in alone["choices"]] == ["length"] * 4
    assert alone["usage"]["completion_tokens"] == 0
    assert alone["usage"]["prompt_tokens"] == longer["usage"]["prompt_tokens"]
    for choice, other in zip(alone["choices"], longer["choices"], strict=True):
        assert other["text"].startswith(choice["text"])
        for name, values in choice["logprobs"].items():
            assert values == other["logprobs"][name][:-1]
    plain = ask(here, prompt="def area(r):", echo=True, max_tokens=0)["choices"][0]
    assert plain["text"] == "def area(r):" and plain["logprobs"] is None


@pytest.mark.parametrize("more", [{}, {"echo": False}, {"echo": None}])
def test_no_tokens_and_no_echo_ask_for_nothing(here: Running, more: dict[str, Any]) -> None:
    answer = here.post(TEXTS, {"model": "demo", "prompt": "a", "max_tokens": 0, **more})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_tokens"


def test_a_server_may_forget_the_middle_of_a_text(here: Running, tmp_path: Path) -> None:
    prompt = "".join(f"def f{place}(x):\n    return x + {place}\n" for place in range(12))
    body = {"prompt": prompt, "max_tokens": 24, "seed": 3, "ignore_eos": True}
    encoder = f"encoder={make_encoder(tmp_path / 'encoder')}"  # sees whole texts all the same
    options = ServeOptions(models=("demo", encoder), port=0, keep_first=2, keep_last=6, cache=tmp_path / "cache")
    with serving(options) as other:
        found = ask(other, **body)["choices"][0]["text"]
    with LLM("demo", keep_first=2, keep_last=6) as llm:
        assert found == llm.generate(prompt, max_tokens=24, seed=3, ignore_eos=True).text
    assert found != ask(here, **body)["choices"][0]["text"]


def test_embeddings_are_those_of_the_encoder(here: Running) -> None:
    body = ask(here, "/v1/embeddings", model="bert", input=["the rain", "here"])
    llm = here.app.models["bert"].llm
    assert np.allclose([row["embedding"] for row in body["data"]], llm.embed(["the rain", "here"]), atol=1e-6)
    assert body["usage"]["prompt_tokens"] == len(llm.encode("the rain")) + len(llm.encode("here"))


def test_embeddings_of_a_pooled_decoder_are_those_of_transformers(tmp_path: Path) -> None:
    """The last row of a causal model, as Qwen3-Embedding has it; in a batch of its own and with others."""
    folder = make_pooled(tmp_path / "pooled")
    stock, texts = transformers.AutoModel.from_pretrained(folder).eval(), ["the rain", "here it is", "a"]
    with serving(ServeOptions(models=(f"pooled={folder}",), threads=1)) as here:
        body = ask(here, "/v1/embeddings", model="pooled", input=texts)
        alone = [ask(here, "/v1/embeddings", model="pooled", input=text)["data"][0]["embedding"] for text in texts]
        tokens = [here.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
        refused = here.post(TEXTS, {"model": "pooled", "prompt": "a"})
    with torch.inference_mode():
        rows = [stock(torch.tensor([ids])).last_hidden_state[0, -1] for ids in tokens]
    expected = [torch.nn.functional.normalize(row, dim=-1).numpy() for row in rows]
    assert np.allclose([row["embedding"] for row in body["data"]], expected, atol=1e-5)
    assert alone == [row["embedding"] for row in body["data"]]
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsupported_url"


def test_an_answer_on_a_kept_connection_waits_for_no_acknowledgement(here: Running) -> None:
    """Nagle's algorithm with delayed acknowledgements would hold each answer, the quickest too, for 40 ms."""
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        here.get("/v1/models")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds[1:]) < 0.03


def test_models_tokens_and_status(here: Running) -> None:
    assert [model["id"] for model in here.get("/v1/models").json()["data"]] == ["demo", "chat", "bert"]
    assert here.get("/v1/models/chat").json()["max_model_len"] == 1024
    assert here.get("/v1/models/other").status_code == 404
    told = here.post("/tokenize", {"model": "demo", "prompt": "def f"}).json()
    assert told["count"] == len(told["tokens"]) > 0
    assert here.post("/detokenize", {"model": "demo", "tokens": told["tokens"]}).json()["prompt"] == "def f"
    chat = here.post("/tokenize", {"model": "chat", "messages": SAY}).json()
    assert chat["tokens"] == here.app.models["chat"].llm.tokenizer.chat(SAY)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    calling = [
        *SAY,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
    ]
    counted = here.post("/tokenize", {"model": "chat", "messages": calling}).json()["count"]
    assert counted == ask(here, CHAT, messages=calling, max_tokens=1)["usage"]["prompt_tokens"]
    status = here.get("/status").json()
    assert status["ready"] and [model["name"] for model in status["models"]] == ["demo", "chat", "bert"]
    assert here.get("/health/live").status_code == here.get("/health/ready").status_code == 200


def test_metrics_count_under_both_names(here: Running) -> None:
    def count(name: str) -> float:
        lines = [line for line in here.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    before = count('vllm:generation_tokens_total{model_name="demo"}')
    secret = "a prompt that nobody may see"
    ask(here, prompt=secret, max_tokens=7, ignore_eos=True)
    assert count('vllm:generation_tokens_total{model_name="demo"}') == before + 7
    assert count('snello:generation_tokens_total{model_name="demo"}') == before + 7
    assert count('vllm:request_success_total{finished_reason="length",model_name="demo"}') >= 1
    here.get("/wp-login.php?x=" + secret)
    text = here.get("/metrics").text
    assert "secret" not in text and "wp-login" not in text and secret not in text


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (TEXTS, {"prompt": "a", "model": "nobody"}, 404, "model", "model_not_found"),
        (TEXTS, {"prompt": "a", "model": None}, 400, "model", "missing_required_parameter"),
        (TEXTS, {"prompt": "a", "temprature": 1}, 400, "temprature", "unknown_parameter"),
        (TEXTS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
        (TEXTS, {"prompt": "a", "n": 5}, 400, "n", "limit_exceeded"),
        (TEXTS, {"prompt": ["a", "b"], "n": 4}, 400, "n", "limit_exceeded"),
        (TEXTS, {"prompt": ["a"] * 6}, 400, "prompt", "limit_exceeded"),
        (TEXTS, {"prompt": "a", "stop": list("abcd")}, 400, "stop", "limit_exceeded"),
        (TEXTS, {"prompt": "a", "stop": "a" * 300}, 400, "stop", "limit_exceeded"),
        (TEXTS, {"prompt": "a", "logit_bias": {"1": 1, "2": 1, "3": 1, "4": 1}}, 400, "logit_bias", "limit_exceeded"),
        (TEXTS, {"prompt": "a", "logit_bias": {"999999": 1}}, 400, None, None),
        (TEXTS, {"prompt": "a b " * 2000}, 400, "prompt", "context_length_exceeded"),
        (TEXTS, {"prompt": [99999]}, 400, "prompt", "invalid_value"),
        (TEXTS, {"prompt": [-1], "echo": True}, 400, "prompt", "invalid_value"),
        (TEXTS, {"prompt": [99999], "echo": True, "max_tokens": 0}, 400, "prompt", "invalid_value"),
        ("/v1/embeddings", {"input": [[5, -1]], "model": "bert"}, 400, "input", "invalid_value"),
        (TEXTS, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        (TEXTS, {"prompt": "a", "structured_outputs": {"regex": "["}}, 400, "structured_outputs", "invalid_value"),
        (TEXTS, {"prompt": "a", "structured_outputs": {"regex": "(a{1000}){1000}"}}, 400, "structured_outputs",
         "invalid_value"),
        (TEXTS, {"prompt": "a", "structured_outputs": {"regex": "x" * 3000}}, 400, "structured_outputs",
         "limit_exceeded"),
        (CHAT, {"messages": SAY, "model": "demo"}, 400, "model", "unsupported_url"),
        (CHAT, {"messages": SAY, "tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
        (CHAT, {"messages": SAY, "tools": [{"type": "web"}]}, 400, "tools[0]", "unsupported_tool"),
        (CHAT, {"messages": SAY, "response_format": {"type": "xml"}}, 400, "response_format", "invalid_value"),
        (CHAT, {"messages": SAY, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, 400,
         "structured_outputs", "invalid_value"),
        (CHAT, {"messages": SAY, "reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter"),
        ("/v1/embeddings", {"input": ["a"] * 5, "model": "bert"}, 400, "input", "limit_exceeded"),
        ("/v1/responses", {"input": [{"role": [], "content": "a"}]}, 400, "input[0]", "unsupported_content"),
        ("/v1/responses", {"input": [{"role": "user", "content": None}]}, 400, "input", "invalid_value"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens", "invalid_value"),
        ("/v1/responses", {"input": "a", "max_tokens": 2}, 400, "max_tokens", "unknown_parameter"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "xml"}}}, 400, "text.format", "invalid_value"),
        ("/v1/responses", {"input": "a b " * 2000, "model": "chat"}, 400, "input", "context_length_exceeded"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, "dimensions", "unsupported_parameter"),
        ("/v1/embeddings", {"input": "a", "model": "demo"}, 400, "model", "unsupported_url"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "invalid_value"),
        ("/tokenize", {"prompt": "a", "messages": SAY}, 400, "prompt", "missing_required_parameter"),
        ("/tokenize", {"messages": SAY, "add_special_tokens": True}, 400, "add_special_tokens",
         "unsupported_parameter"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs",
         "unsupported_parameter"),
        ("/v1/audio", {}, 404, None, "not_found"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_said(
    here: Running, path: str, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    response = here.post(path, {"model": "chat" if path == CHAT else "demo", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), response.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"json": True}, "structured_outputs.json must be a table that is a JSON schema"),
        ({"json": "{}"}, "structured_outputs.json must be a table that is a JSON schema"),
        ({"regex": 1}, "structured_outputs.regex must be a string: a regular expression"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be a list of strings, none of them empty"),
        ({"grammar": {}, "json": None}, "structured_outputs.grammar must be a string: a grammar in Lark's form"),
    ],
)
def test_rules_of_another_type_are_said_by_their_field(here: Running, given: dict[str, Any], said: str) -> None:
    error = here.post(TEXTS, {"model": "demo", "prompt": "a", "structured_outputs": given}).json()["error"]
    assert error == {
        "message": said, "type": "invalid_request_error", "param": "structured_outputs", "code": "invalid_type"
    }  # fmt: skip


@pytest.mark.parametrize("schema", [True, False, [], "{}", 1])
def test_a_schema_of_another_type_is_said_by_its_field(here: Running, schema: Any) -> None:
    described = {"name": "x", "schema": schema}
    form = {"type": "json_schema", "json_schema": described}
    for path, body, param in (
        (CHAT, {"messages": SAY, "response_format": form}, "response_format"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", **described}}}, "text.format"),
    ):
        response = here.post(path, {"model": "chat", **body})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_type")
        assert error["message"] == f"the schema of {param} must be a table that is a JSON schema"


@pytest.mark.parametrize("keyword", ["not", "uniqueItems", "patternProperties2", "unevaluatedProperties"])
def test_a_schema_keyword_that_would_be_ignored_is_refused(here: Running, keyword: str) -> None:
    value: Any = {"type": "string"} if keyword == "not" else True
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", keyword: value}}}
    response = here.post(CHAT, {"model": "chat", "messages": SAY, "response_format": form, "max_tokens": 1})
    known_word = keyword != "patternProperties2"  # what no standard knows is an annotation
    assert response.status_code == (400 if known_word else 200), response.text
    assert not known_word or keyword in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b'{"a":NaN}',
        b'{"prompt":"a","user":1e999}',
        b"\xff\xfe",
        b'{"prompt":"' + b"a" * 10,
        b'{"a":' * 100 + b"1" + b"}" * 100,
    ],
)
def test_what_is_no_json_table_is_refused(here: Running, raw: bytes) -> None:
    response = here.client.post(TEXTS, content=raw)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_a_body_that_is_too_large_is_refused_said_or_not(here: Running) -> None:
    large = b'{"prompt":"' + b"a" * 300_000 + b'"}'
    assert here.client.post(TEXTS, content=large).status_code == 413
    pieces = (large[at : at + 50_000] for at in range(0, len(large), 50_000))  # no Content-Length
    assert here.client.post(TEXTS, content=pieces).status_code == 413


def test_another_host_is_refused_without_keys(here: Running) -> None:
    for name, status in (
        ("evil.example", 403),
        ("localhost:8080", 200),
        ("[::1]:80", 200),
        ("127.0.0.1.evil.example", 403),
    ):
        assert here.get("/v1/models", headers={"host": name}).status_code == status, name


def test_a_page_of_another_host_may_not_call(here: Running) -> None:
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost:3000", 200)):
        assert here.get("/v1/models", headers={"origin": origin}).status_code == status, origin


def test_a_request_keeps_its_id_if_it_is_fit_for_a_log(here: Running) -> None:
    assert here.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert here.get("/v1/models", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_a_deadline_ends_a_request_wherever_it_is(here: Running) -> None:
    response = here.post(TEXTS, {"model": "demo", **LONG}, headers={"x-request-timeout": "0.1"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    events = here.events(TEXTS, {"model": "demo", **LONG}, headers={"x-request-timeout": "0.1"})
    assert events[-1]["error"]["code"] == "deadline_exceeded", (
        "an error after 200 is told in the stream, without [DONE]"
    )
    assert here.idle()
    assert here.post(TEXTS, {"model": "demo", "prompt": "a"}, headers={"x-request-timeout": "-1"}).status_code == 400


# ---- who hangs up ---------------------------------------------------------------------------------------------------


def wait_for(what: Any, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.002)


def steps(here: Running, name: str = "demo") -> int:
    return here.app.models[name].worker.engine.counters.steps


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_while_an_answer_is_drawn_frees_its_pages(here: Running, stream: bool) -> None:
    engine = here.app.models["demo"].worker.engine
    plug = raw_request(here.address, json.dumps({"model": "demo", **LONG, "n": 2, "stream": stream}).encode())
    wait_for(lambda: engine.num_running == 2)
    plug.close()
    before = here.app.models["demo"].worker.tokens
    assert here.idle()
    drawn = here.app.models["demo"].worker.tokens - before
    assert drawn < 1000, f"{drawn} of 1,800 tokens were drawn for nobody"
    assert ask(here, prompt="a", max_tokens=2)["choices"]


def test_who_hangs_up_in_the_queue_never_runs(here: Running) -> None:
    engine = here.app.models["demo"].worker.engine
    busy = [raw_request(here.address, json.dumps({"model": "demo", **LONG}).encode()) for _ in range(4)]
    wait_for(lambda: engine.num_running == 4)
    prompts = engine.counters.prompt_tokens
    waiting = [
        raw_request(here.address, json.dumps({"model": "demo", **LONG, "stream": stream}).encode())
        for stream in (True, False)
    ]
    wait_for(lambda: engine.num_waiting == 2)
    for plug in waiting:
        plug.close()
    wait_for(lambda: engine.num_waiting == 0)
    assert engine.counters.prompt_tokens == prompts and engine.num_running == 4
    for plug in busy:
        plug.close()
    assert here.idle()


def test_who_hangs_up_while_the_prompt_is_read_frees_its_pages(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = here.app.models["demo"].llm.executor
    run, prefill = executor.run, threading.Event()

    def slow(step: Any) -> Any:
        if step.num_rows > 100:
            prefill.set()
            time.sleep(0.2)
        return run(step)

    monkeypatch.setattr(executor, "run", slow)
    plug = raw_request(
        here.address, json.dumps({"model": "demo", "prompt": list(range(700)), "max_tokens": 300}).encode()
    )
    assert prefill.wait(5)
    plug.close()
    before = here.app.models["demo"].worker.tokens
    assert here.idle()
    assert here.app.models["demo"].worker.tokens - before <= 1


def test_who_hangs_up_in_the_middle_of_a_body_harms_nobody(here: Running) -> None:
    plug = raw_request(here.address, b'{"prompt":')
    plug.close()
    assert ask(here, prompt="a", max_tokens=2)["choices"]


def test_a_reader_who_does_not_read_holds_up_nobody(here: Running) -> None:
    body = {"model": "demo", **LONG, "max_tokens": 150, "n": 4, "stream": True, "logprobs": 4}
    plug = raw_request(here.address, json.dumps(body).encode())
    engine = here.app.models["demo"].worker.engine
    wait_for(lambda: engine.num_running == 4)
    assert ask(here, prompt="a", max_tokens=2)["choices"]
    wait_for(lambda: not engine.has_work, 20)
    plug.close()
    assert here.idle()


# ---- one request's failure ------------------------------------------------------------------------------------------


def test_a_failure_touches_no_other_request(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = here.app.models["demo"].llm.executor
    run = executor.run

    def poisoned(step: Any) -> Any:
        row = 0
        for piece in step.pieces:
            if piece.sequence.tokens[0] == 666 and piece.start > 3:
                raise NotFinite(row)
            row += len(piece.tokens)
        return run(step)

    expected = ask(here, prompt="def f(x):\n", max_tokens=60, seed=1)["choices"][0]["text"]
    monkeypatch.setattr(executor, "run", poisoned)
    heard: list[Any] = []
    other = threading.Thread(target=lambda: heard.append(ask(here, prompt="def f(x):\n", max_tokens=60, seed=1)))
    other.start()
    bad = here.post(TEXTS, {"model": "demo", "prompt": [666, 1], "max_tokens": 50, "ignore_eos": True})
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "not_finite")
    streamed = parse(
        here.client.post(
            TEXTS, json={"model": "demo", "prompt": [666, 1], "max_tokens": 50, "ignore_eos": True, "stream": True}
        ).content
    )
    other.join()
    assert streamed[-1]["error"]["code"] == "not_finite" and "[DONE]" not in streamed
    assert heard[0]["choices"][0]["text"] == expected
    assert here.idle()


def test_a_bug_in_a_step_ends_its_requests_and_the_next_one_runs(
    here: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = here.app.models["demo"].llm.executor
    with monkeypatch.context() as patch:
        patch.setattr(executor, "run", lambda step: 1 / 0)
        response = here.post(TEXTS, {"model": "demo", "prompt": "a"})
        assert response.status_code == 500 and "ZeroDivision" not in response.text
    assert ask(here, prompt="a", max_tokens=2)["choices"] and here.idle()


def test_who_comes_after_a_failed_step_is_not_ended_with_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new engine counts its requests from one again."""
    with serving(ServeOptions(models=("demo",), threads=1)) as here:
        served = here.app.models["demo"]
        run, failed = served.llm.executor.run, threading.Event()

        def fail_once(step: Step) -> Any:
            if not failed.is_set():
                until = time.monotonic() + 10
                while not served.worker._asked and time.monotonic() < until:
                    time.sleep(0.001)  # the other one is there
                failed.set()
                raise ZeroDivisionError
            time.sleep(0.05)  # what is to be ended now has time to be
            return run(step)

        monkeypatch.setattr(served.llm.executor, "run", fail_once)
        with ThreadPoolExecutor(1) as aside:
            first = aside.submit(here.post, TEXTS, {"prompt": "a"})
            while not served.worker.engine.has_work:
                time.sleep(0.001)
            second = here.post(TEXTS, {"prompt": "b", "ignore_eos": True}, headers={"x-request-timeout": "5"})
        assert (first.result().status_code, second.status_code) == (500, 200), second.text


def test_a_bug_while_a_request_is_given_up_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ServeOptions(models=("demo",), threads=1)) as here:
        worker = here.app.models["demo"].worker
        engine = worker.engine
        monkeypatch.setattr(engine, "cancel", lambda number: 1 / 0)
        body = {"prompt": "a", "ignore_eos": True, "max_tokens": 500}
        late = here.post(TEXTS, body, headers={"x-request-timeout": "0.1"})
        assert late.status_code in (500, 504)
        assert ask(here, prompt="a", max_tokens=2)["choices"]
        assert worker.engine is not engine and worker.failures == 1


# ---- nonsense -------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -0.5, 1e300, "", "a", "\U0001f600", "auto", "required", [], {},
    [1], ["a"], [[1], [2]], [None], [{}], {"a": 1}, {"1": 5}, {"type": "json_object"}, {"type": "text"}, {"json": True},
    {"regex": "a+"}, {"choice": ["a"]}, {"choice": [1]}, {"grammar": "start: /a/"}, {"include_usage": True}, [WEATHER],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}, [{"role": "user"}], [{"role": 1}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": "assistant", "tool_calls": [1]}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"type": "function_call"}],
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXTS, "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize"])
def test_nonsense_is_refused_and_never_a_bug(here: Running, path: str) -> None:
    """Random values in random fields: 200, or an error in OpenAI's form that names what is wrong."""
    generator = random.Random(path)
    fields = sorted(
        CHAT_FIELDS | COMPLETION_FIELDS | FIELDS | {"stream_options": 0, "structured_outputs": 0, "tokens": 0}
    )
    fields += ["response_format", "tools", "tool_choice", "input", "messages", "prompt", "parallel_tool_calls"]
    sound = {"messages": SAY, "prompt": "a", "input": "a", "tokens": [1], "max_tokens": 2, "max_output_tokens": 2}
    needed = {
        CHAT: ("messages", "max_tokens"),
        TEXTS: ("prompt", "max_tokens"),
        "/v1/embeddings": ("input",),
        "/v1/responses": ("input", "max_output_tokens"),
        "/tokenize": ("prompt",),
        "/detokenize": ("tokens",),
    }
    seen = set()
    for _ in range(60):
        body = {"model": "bert" if path == "/v1/embeddings" else "chat"} | {name: sound[name] for name in needed[path]}
        for name in generator.sample(fields, generator.randint(1, 2)):
            body[name] = generator.choice(VALUES)
        if body.get("max_tokens") in (10**9, None) or body.get("max_output_tokens") in (10**9, None):
            body |= {name: 2 for name in ("max_tokens", "max_output_tokens") if name in body}
        response = here.post(path, body)
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            assert response.json()["error"]["message"], body
    assert {200, 400} <= seen
    assert here.idle("chat")
