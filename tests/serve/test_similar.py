"""Similar questions through the server: whole and streamed, who never gets one, audits, and a restart."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from snello.errors import SnelloError
from snello.serve.caches.proof import SimilarSettings
from snello.serve.keys import Keys
from snello.serve.options import ServeOptions
from tests.serve.caches.test_proof import write_pairs
from tests.serve.world import Running, make_chat, serving, text_of

CHAT, SOURCE = "/v1/chat/completions", "x-snello-source"
ONE, OTHER = "What is the horse river stone?", "Please tell: what's a horse river stone"
SETTINGS = SimilarSettings(encoder="words", bound=0.05, audit=1e-9)


def body(question: str = OTHER, **more: Any) -> dict[str, Any]:
    """An answer of some 20 tokens that ends by itself."""
    messages = [*more.pop("before", ()), {"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": 60, "temperature": 0, "stop": ["e"], **more}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ServeOptions]:
    base = tmp_path_factory.mktemp("similar")
    chat, labelled = make_chat(base / "chat"), write_pairs(base / "pairs.json", count=300)

    def make(folder: Path, **more: Any) -> ServeOptions:
        similar = replace(SETTINGS, pairs=labelled, **more)
        return ServeOptions(models=(f"demo={chat}",), cache=folder, threads=1, context=512, similar=similar)

    return make


def ask(here: Running, asked: dict[str, Any], **headers: str) -> tuple[str, dict[str, Any]]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    response = here.post(CHAT, asked, headers=names)
    assert response.status_code == 200, response.text
    return response.headers[SOURCE], response.json()


def soon(told: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not told() and time.monotonic() < until:
        time.sleep(0.01)
    return told()


def test_a_hit_whole_and_streamed(options: Any, tmp_path: Path) -> None:
    with serving(options(tmp_path)) as here:
        source, first = ask(here, body(ONE))
        assert source == "computed" and first["choices"][0]["finish_reason"] == "stop"
        drawn = here.app.models["demo"].worker.tokens
        source, second = ask(here, body())
        assert source.startswith("similar; source=") and "similarity=0." in source and "hits<=0.05" in source
        assert second["choices"] == first["choices"]
        usage = second["usage"]
        assert usage["completion_tokens"] == first["usage"]["completion_tokens"]
        assert (
            usage["prompt_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] != first["usage"]["prompt_tokens"]
        )
        response = here.client.post(CHAT, json={**body(), "stream": True})
        assert response.headers[SOURCE].startswith("similar; ")
        events = here.events(CHAT, body(stream_options={"include_usage": True}))
        assert text_of(events) == first["choices"][0]["message"]["content"]
        assert events[-1] == "[DONE]" and events[-2]["usage"] == usage
        assert here.app.models["demo"].worker.tokens == drawn, "nothing was drawn"
        assert 'snello:answers_total{model_name="demo",source="similar"} 3.0' in here.get("/metrics").text
        assert "snello:similar_questions_serves 1.0" in here.get("/metrics").text
        told = here.get("/status").json()["similar_questions"]
        assert told["serves"] and told["entries"] == 1 and told["counts"]["hits"] == 3 == told["counts"]["asked"] - 1
        assert ONE not in str(told)
        assert ask(here, body(ONE))[0] == "exact"


def test_who_never_gets_one(options: Any, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    others = (
        body(seed=3, temperature=0.7),
        body(temperature=0.7),
        body(max_tokens=61),
        body(stop=["e", "q"]),
        body(n=2, seed=1),
        body(logprobs=True),
        body(logit_bias={"5": 1}),
        body(tools=[tool]),
        body(response_format={"type": "json_object"}),
        body(chat_template_kwargs={"mood": "dark"}),
        body(before=[{"role": "system", "content": "be brief"}]),
        body(ONE.replace("What is", "What is not")),
        body(ONE.replace("stone", "cloud")),
        body(ONE + " today"),
    )
    with serving(options(tmp_path)) as here:
        ask(here, body(ONE))
        for other in others:
            assert ask(here, other)[0] == "computed", other
        assert ask(here, body(), cache_control="no-cache")[0] == "computed"
        prompt = {"prompt": OTHER, "max_tokens": 5, "temperature": 0}
        assert here.post("/v1/completions", prompt).headers[SOURCE] == "computed"
        assert here.idle()


def test_nothing_is_learned_of_who_wants_nothing_kept_and_tenants_are_apart(options: Any, tmp_path: Path) -> None:
    keys = Keys({hashlib.sha256(key.encode()).digest(): key for key in ("one", "two")})
    with serving(options(tmp_path), keys, "one") as here:
        ask(here, body(ONE), cache_control="no-store")
        assert ask(here, body(), cache_control="no-store")[0] == "computed"
        ask(here, body(ONE))
        assert ask(here, body(), cache_control="no-store")[0].startswith("similar; ")
        assert ask(here, body(), authorization="Bearer two")[0] == "computed"


def test_the_same_conversation_before_it(options: Any, tmp_path: Path) -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with serving(options(tmp_path)) as here:
        ask(here, body(ONE, before=before))
        assert ask(here, body())[0] == "computed"
        assert ask(here, body(OTHER + "?", before=before))[0].startswith("similar; ")


def test_audits_demote_it_and_a_restart_changes_nothing(options: Any, tmp_path: Path) -> None:
    """By a judge who finds everything wrong; the answers are the model's."""
    with serving(options(tmp_path, audit=1.0)) as here:
        similar, caches = here.app.models.similar.similar, here.app.models["demo"].caches  # type: ignore[union-attr]
        assert caches is not None
        caches._judge = lambda *_: False
        ask(here, body(ONE))
        drawn = here.app.models["demo"].worker.tokens
        while similar.serves and similar.counters.asked < 40:
            assert ask(here, body(), cache_control="no-store")[0].startswith("similar; ")
            assert soon(lambda: not caches._audits)
        assert here.app.models["demo"].worker.tokens > drawn, "the model was asked"
        assert not similar.serves and 1 < similar.counters.audited_wrong < 30
        assert "snello:similar_questions_serves 0.0" in here.get("/metrics").text
        assert here.idle()
    with serving(options(tmp_path)) as here:
        ask(here, body(ONE))
        assert ask(here, body())[0] == "computed"
        assert here.get("/status").json()["similar_questions"]["certificate"]["revoked"]


def test_it_needs_a_place_for_its_answers_and_a_proof(options: Any, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="--cache keeps"):
        ServeOptions(models=("demo",), similar=SETTINGS)
    with (
        pytest.raises(SnelloError, match="nothing is certified"),
        serving(replace(options(tmp_path), similar=SETTINGS)),
    ):
        pass


def test_killed_in_the_middle(options: Any, tmp_path: Path) -> None:
    """kill -9 while it answers and learns: the certificate and the answers are whole, and the questions are gone."""
    made = options(tmp_path / "cache")
    pairs = str(made.similar.pairs)
    command = ["serve", *made.models, "--port", "0", "--threads", "1", "--context", "512", "--cache", str(made.cache)]
    command += ["--similar", "words", "--similar-bound", "5%", "--similar-pairs", pairs, "--json"]
    command += ["--similar-audit", "0.0001%"]  # an audit, by chance, would leave an exact answer behind
    with subprocess.Popen([sys.executable, "-m", "snello", *command], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with httpx.Client(base_url=address, timeout=30.0) as client:
            answer = client.post(CHAT, json=body(ONE)).json()["choices"]
            assert client.post(CHAT, json=body()).headers[SOURCE].startswith("similar; ")
            with client.stream("POST", CHAT, json=body("What is a cloud?", stream=True)):
                server.kill()
    with serving(replace(made, similar=replace(made.similar, pairs=None))) as here:
        source, again = ask(here, body(ONE))
        assert source == "exact" and again["choices"] == answer
        assert ask(here, body())[0] == "computed" and here.app.models.similar.similar.serves  # type: ignore[union-attr]
