"""Adapters by name: one listed with its parent, answered in the parent's batch, unknown names a 404, answers apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snello.engine.llm import LLM
from snello.errors import SnelloError
from snello.models import load
from snello.models.adapter import write_adapter
from snello.serve.options import ServeOptions
from tests.checkpoints import make_checkpoint
from tests.engine.test_adapters import VIRTUAL, made, prompt_of
from tests.serve.world import Running, make_chat, serving

NAMES = ("chat", "answers", "labels", "prompt")
PROMPT = "def area(r):"
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    model = load(make_chat(place / "chat"))
    for number, name in enumerate(NAMES[1:3]):
        write_adapter(place / name, made(model, rank=4, targets="q,v,gate,down", seed=number), model)
    write_adapter(place / "prompt", prompt_of(model, VIRTUAL, seed=0), model)
    return {name: place / name for name in NAMES}


@pytest.fixture(scope="module")
def here(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    adapters = tuple(f"{name}={folders[name]}" for name in NAMES[1:])
    cache = tmp_path_factory.mktemp("cache")
    options = ServeOptions(models=(f"chat={folders['chat']}",), adapters=adapters, max_num_seqs=4, cache=cache)
    with serving(options) as here:
        yield here


def said(here: Running, model: str, **more: Any) -> str:
    answer = here.post("/v1/completions", {**ASK, **more, "model": model})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model and answer.json()["usage"]["completion_tokens"] == 12
    return str(answer.json()["choices"][0]["text"])


def test_they_are_listed_with_their_parent(here: Running) -> None:
    listed = {model["id"]: model for model in here.get("/v1/models").json()["data"]}
    assert list(listed) == list(NAMES)
    assert [listed[name].get("parent") for name in listed] == [None, "chat", "chat", "chat"]
    assert here.get("/v1/models/labels").json()["parent"] == "chat"
    assert here.post("/v1/completions", {**ASK, "model": "nobody"}).status_code == 404
    unnamed = here.post("/v1/completions", ASK).json()  # a model that is alone may go unnamed, with adapters too
    assert unnamed["model"] == "chat"


def test_each_answers_as_the_engine_does_with_it(here: Running, folders: dict[str, Path]) -> None:
    adapters = {name: folders[name] for name in NAMES[1:]}
    with LLM(folders["chat"], adapters=adapters) as llm:
        for name in NAMES:
            known = None if name == "chat" else name
            (wanted,) = llm.generate([PROMPT], max_tokens=12, temperature=0.0, ignore_eos=True, adapter=known)
            assert said(here, name) == wanted.text, name
    assert len({said(here, name) for name in NAMES}) == len(NAMES)


def test_a_prompt_takes_room_and_is_not_counted(here: Running) -> None:
    lengths = {model["id"]: model["max_model_len"] for model in here.get("/v1/models").json()["data"]}
    assert lengths["chat"] == lengths["labels"] == lengths["prompt"] + VIRTUAL
    usage = [here.post("/v1/completions", {**ASK, "model": name}).json()["usage"] for name in ("chat", "prompt")]
    assert usage[0]["prompt_tokens"] == usage[1]["prompt_tokens"]
    most = {"prompt": [30] * (lengths["prompt"] - 1), "max_tokens": 1}
    assert here.post("/v1/completions", {**most, "model": "prompt"}).status_code == 200
    for name, length in lengths.items():
        answer = here.post("/v1/completions", {"prompt": [30] * (length + 1), "max_tokens": 1, "model": name})
        assert answer.status_code == 400 and f"{length:,}" in answer.json()["error"]["message"], answer.text
    assert here.idle("chat")


def test_known_answers_are_the_adapters_own(here: Running) -> None:
    first = {name: said(here, name, seed=7) for name in NAMES}
    for name, text in first.items():
        again = here.post("/v1/completions", {**ASK, "seed": 7, "model": name})
        assert again.json()["choices"][0]["text"] == text
        assert again.headers["x-snello-source"].startswith("exact"), again.headers
    assert here.idle("chat")


def test_a_stream_and_an_echo(here: Running) -> None:
    events = here.events("/v1/completions", {**ASK, "model": "labels"})
    text = "".join(event["choices"][0]["text"] for event in events if event != "[DONE]" and event["choices"])
    assert text == said(here, "labels")
    ask = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answers = [here.post("/v1/completions", {**ask, "model": name}) for name in ("chat", "labels", "prompt")]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    scores = [answer.json()["choices"][0]["logprobs"]["token_logprobs"] for answer in answers]
    assert scores[0][0] is None and scores[0][1:] != scores[1][1:] and len(scores[2]) == len(scores[0])
    assert scores[2][1:] not in (scores[0][1:], scores[1][1:])


@pytest.mark.parametrize("text", ["answers", "={}", "answers="])
def test_one_without_a_name_is_refused(text: str, folders: dict[str, Path]) -> None:
    options = ServeOptions(models=(str(folders["chat"]),), adapters=(text.format(folders["answers"]),))
    with pytest.raises(SnelloError, match="has no name"), serving(options):
        pass


def test_one_of_another_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama")
    options = ServeOptions(models=(str(other),), adapters=(f"answers={folders['answers']}",))
    with pytest.raises(SnelloError, match="base"), serving(options):
        pass
