"""OpenAI's own Python client, as it comes: what it expects is what real programs expect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from snello.serve.keys import Keys
from snello.serve.options import ServeOptions
from tests.serve.world import WEATHER, Running, make_chat, make_encoder, serving

KEY = "sk-local-0123456789"
SAY: Any = [{"role": "user", "content": "def area(r):"}]
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "kind": {"enum": ["a", "b"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    chat, encoder = make_chat(folder / "chat"), make_encoder(folder / "bert")
    keys = Keys({hashlib.sha256(KEY.encode()).digest(): "tests"})
    with serving(ServeOptions(models=(f"chat={chat}", f"bert={encoder}"), max_num_seqs=4), keys, KEY) as here:
        yield here


@pytest.fixture(scope="module")
def client(here: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=here.address + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    ask: Any = {"model": "chat", "messages": SAY, "max_completion_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    text, usage = "", None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens


def test_completions_embeddings_and_models(client: openai.OpenAI) -> None:
    said = client.completions.create(model="chat", prompt="def area(r):", max_tokens=5, logprobs=2, seed=1)
    assert "".join(said.choices[0].logprobs.tokens) == said.choices[0].text
    vectors = client.embeddings.create(model="bert", input=["a", "b"])  # asks for base64 by itself
    plain = client.embeddings.create(model="bert", input=["a", "b"], encoding_format="float")
    for one, other in zip(vectors.data, plain.data, strict=True):
        assert np.allclose(one.embedding, other.embedding) and len(one.embedding) == 96
    assert [model.id for model in client.models.list()] == ["chat", "bert"]
    assert client.models.retrieve("chat").id == "chat"


def test_a_function_that_must_be_called_is_called_with_arguments_that_fit(client: openai.OpenAI) -> None:
    ask: Any = {"model": "chat", "messages": SAY, "tools": [WEATHER], "tool_choice": "required", "seed": 2}
    ask["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**ask)
    (call,) = whole.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and arguments["town"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content is None
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    told: Any = [
        *SAY,
        {"role": "assistant", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    again = client.chat.completions.create(model="chat", messages=told, tools=[WEATHER], max_tokens=3)
    assert again.choices[0].finish_reason == "length"


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        said = client.chat.completions.create(model="chat", messages=SAY, response_format=form, seed=seed)
        value = json.loads(said.choices[0].message.content)
        assert set(value) == {"x", "kind"} and value["x"] in range(10) and value["kind"] in ("a", "b")
        assert said.choices[0].finish_reason == "stop"


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    ask: Any = {"model": "chat", "input": "def area(r):", "instructions": "be brief", "max_output_tokens": 9}
    whole = client.responses.create(**ask, temperature=0)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 9 and whole.instructions == "be brief"
    kinds, text, last = list[str](), "", None
    for number, event in enumerate(client.responses.create(**ask, temperature=0, stream=True)):
        assert event.sequence_number == number
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    assert text == whole.output_text == last.response.output_text
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1


def test_responses_call_functions_and_follow_schemas(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"], "strict": True}
    said = client.responses.create(
        model="chat", input="x", tools=[tool], tool_choice={"type": "function", "name": "weather"}, temperature=0
    )
    (call,) = said.output
    assert call.type == "function_call" and json.loads(call.arguments)["town"] in ("Rome", "Oslo")
    told: Any = ["x", call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    told[0] = {"role": "user", "content": [{"type": "input_text", "text": "x"}]}
    again = client.responses.create(model="chat", input=told, tools=[tool | {"strict": False}], max_output_tokens=2)
    assert again.output_text
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    assert json.loads(client.responses.create(model="chat", input="x", text=form).output_text)["kind"] in ("a", "b")


def test_errors_are_the_clients_own(client: openai.OpenAI, here: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=SAY)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="chat", messages=SAY, modalities=["audio"])
    assert wrong.value.param == "modalities"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="chat", input="x", previous_response_id="resp_1")
    with (
        openai.OpenAI(base_url=here.address + "/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    late = client.with_options(default_headers={"x-request-timeout": "0.2"})
    with pytest.raises(openai.APIError, match="longer"):
        for _ in late.chat.completions.create(
            model="chat", messages=SAY, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
        ):
            pass
