"""The OpenAPI document: every route is in it, its bodies are what the reader takes, and its answers are what is said.

Its kinds are held to the reader by values that nobody would write; schemathesis, in an environment of its own, asks a
server ten thousand requests made from it (`make test-clients`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snello.serve import fields, openai, responses
from snello.serve.errors import RequestError
from snello.serve.fields import Kind
from snello.serve.keys import Keys
from snello.serve.openapi import RANGES, document
from snello.serve.options import Limits, ServeOptions
from snello.serve.reading import read_chat, read_completion
from snello.serve.routes import ROUTES
from tests.serve.test_foreign_clients import CLIENTS
from tests.serve.test_fuzz import anything
from tests.serve.test_server import SAY
from tests.serve.world import WEATHER, Running, make_chat, make_encoder, serving

KINDS = {name: kind for name, kind in {**vars(fields), **vars(responses)}.items() if isinstance(kind, Kind)}
PAGE = ("/", "/page/{name}")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance,ignored_auth"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    chat, encoder = make_chat(folder / "chat"), make_encoder(folder / "bert")
    with serving(ServeOptions(models=(f"chat={chat}", f"bert={encoder}"), threads=1, context=256)) as here:
        yield here


def whole_numbers_are_written_whole(value: Any) -> bool:
    """JSON schema takes 1.0 for an integer, the reader does not."""
    return not any(isinstance(item, float) and item.is_integer() for item in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for item in inner:
            yield from _leaves(item)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(
    value=anything()
    | st.lists(st.integers(-(2**33), 2**33) | st.text(max_size=3), max_size=3)
    | st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3)
    | st.integers(-(2**64), 2**64)
    | st.dictionaries(st.from_regex("[0-9]{1,11}|-?[0-9a]{1,2}", fullmatch=True), st.floats(-200, 200), max_size=2)
)
def test_a_kind_is_its_schema(value: Any) -> None:
    if not whole_numbers_are_written_whole(value):
        return
    for name, kind in KINDS.items():
        said = jsonschema.Draft202012Validator(kind.schema).is_valid(value)
        if name == "ITEMS" or name == "TOOLS":  # lists: what is in them is read one by one
            assert kind.holds(value) or not said, (name, value)
        else:
            assert kind.holds(value) == said, (name, value)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_range_is_that_of_the_reader(name: str) -> None:
    """At its ends a value is taken, and beyond them refused."""
    kind, range_ = {**openai.CHAT_FIELDS, **responses.FIELDS}[name], RANGES[name]
    step = 1 if kind is fields.INTEGER else 1e-6
    taken = [range_[end] for end in ("minimum", "maximum") if end in range_]
    refused = [range_[end] + sign * step for end, sign in (("minimum", -1), ("maximum", 1)) if end in range_]
    if "exclusiveMinimum" in range_:
        taken, refused = [*taken, range_["exclusiveMinimum"] + step], [*refused, range_["exclusiveMinimum"]]
    for value in taken:
        read(name, value)
    for value in refused:
        with pytest.raises(RequestError, match=r"must be|max_tokens"):
            read(name, value)


def read(name: str, value: float) -> None:
    more: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    if name in responses.FIELDS:
        responses.read_response({"input": "a", name: value}, Limits())
    else:
        read_chat({"messages": SAY, name: value, **more}, Limits())
    if name in openai.COMPLETION_FIELDS:
        read_completion({"prompt": "a", name: value}, Limits())


def test_every_route_is_in_it(here: Running) -> None:
    told = here.get("/openapi.json").json()
    paths = {(method.upper(), path) for path, operations in told["paths"].items() for method in operations}
    assert paths == {(method, path.replace(":path", "")) for method, path, _ in ROUTES if path not in PAGE}
    names = [operation["operationId"] for operations in told["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)


SOUND: list[tuple[str, dict[str, Any]]] = [
    (openai.CHAT, {"messages": SAY}),
    (openai.CHAT, {"messages": SAY, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": ["x"], "user": "me"}),
    (openai.CHAT, {"messages": SAY, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}),
    (openai.CHAT, {"messages": SAY, "response_format": {"type": "json_object"}, "unheard_of": None}),
    (openai.COMPLETIONS, {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 1}),
    (openai.COMPLETIONS, {"prompt": "a", "logit_bias": {"5": -100}, "structured_outputs": {"choice": ["yes", "no"]}}),
    (openai.EMBEDDINGS, {"input": ["a", "b"], "model": "bert"}),
    (openai.EMBEDDINGS, {"input": "a", "encoding_format": "base64", "model": "bert"}),
    (openai.RESPONSES, {"input": "a", "instructions": "b", "text": {"format": {"type": "text"}}}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/tokenize", {"messages": SAY}),
    ("/detokenize", {"tokens": [1, 2]}),
]


@pytest.mark.parametrize(("path", "asked"), SOUND)
def test_what_is_taken_and_said_is_in_it(here: Running, path: str, asked: dict[str, Any]) -> None:
    asked = {"model": "chat", **asked}
    if path in (openai.CHAT, openai.COMPLETIONS):
        asked = {"max_tokens": 4, **asked}
    operation = document(Limits(), here.app.models, keys=False)["paths"][path]["post"]
    jsonschema.validate(asked, operation["requestBody"]["content"]["application/json"]["schema"])
    response = here.post(path, asked)
    assert response.status_code == 200, response.text
    jsonschema.validate(response.json(), operation["responses"]["200"]["content"]["application/json"]["schema"])
    refused = here.post(path, {**asked, "not_a_field": 1})
    jsonschema.validate(refused.json(), operation["responses"]["400"]["content"]["application/json"]["schema"])


@pytest.mark.parametrize("path", ["/v1/models", "/health/live", "/health/ready", "/status"])
def test_what_is_told_is_in_it(here: Running, path: str) -> None:
    told = document(Limits(), here.app.models, keys=False)["paths"][path]["get"]["responses"]["200"]["content"]
    jsonschema.validate(here.get(path).json(), told["application/json"]["schema"])


def test_a_method_that_is_not_taken_is_told_which_are(here: Running) -> None:
    refused = here.client.request("PUT", openai.CHAT)
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_keys_are_in_it() -> None:
    with serving(ServeOptions(models=("demo",), threads=1), Keys({b"0" * 32: "me"}), key="none") as closed:
        assert closed.get("/openapi.json").status_code == 401
        told = document(Limits(), closed.app.models, keys=True)
    assert told["paths"]["/status"]["get"]["security"] == [{"key": []}]
    assert "security" not in told["paths"]["/health/live"]["get"]
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_ten_thousand_requests(tmp_path: Path) -> None:
    program, seen = CLIENTS / "schemathesis" / "bin" / "st", tmp_path / "seen.json"
    if not program.exists():
        pytest.skip("schemathesis is not installed: make test-clients")
    with serving(ServeOptions(models=("demo",), threads=1, context=64)) as here:
        command = [program, "run", f"{here.address}/openapi.json", "--checks", CHECKS, "--continue-on-failure"]
        command += ["--phases", "coverage,fuzzing", "--max-examples", "1500", "--seed", "1", "--request-timeout", "300"]
        command += ["--report", "json", "--report-json-path", seen]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
        assert here.idle() and here.app.models["demo"].worker.failures == 0
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads(seen.read_text())["test_cases"]["generated"] >= 10_000, done.stdout[-2000:]
