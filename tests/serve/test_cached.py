"""The caches through the server: a hit after a restart, tenants apart, replayed streams, and no-store."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from snello.serve.keys import Keys
from snello.serve.options import Limits, ServeOptions
from tests.serve.world import Running, serving, text_of

TEXTS, SOURCE = "/v1/completions", "x-snello-source"
BODY = {"prompt": "def area(r):", "max_tokens": 12, "seed": 5, "n": 2, "logprobs": 1}


def source(here: Running, body: dict[str, Any] = BODY, headers: dict[str, str] | None = None) -> tuple[str, Any]:
    response = here.post(TEXTS, body, headers=headers or {})
    assert response.status_code == 200, response.text
    return response.headers[SOURCE], response.json()["choices"]


def options(folder: Path) -> ServeOptions:
    return ServeOptions(models=("demo",), cache=folder, threads=1, context=512)


def test_an_answer_outlasts_the_server_and_replays_as_a_stream(tmp_path: Path) -> None:
    with serving(options(tmp_path)) as here:
        assert source(here, {**BODY, "seed": 6})[0] == "computed"
        first, computed = source(here)
        again, kept = source(here)
        assert (first, again) == ("computed", "exact") and computed == kept
    with serving(options(tmp_path)) as here:
        assert source(here) == ("exact", computed)
        events = here.events(TEXTS, BODY)
        assert events[-1] == "[DONE]"
        assert [text_of(events, index) for index in (0, 1)] == [choice["text"] for choice in computed]
        assert here.app.models["demo"].worker.tokens == 0, "nothing was drawn"
        assert 'snello:answers_total{model_name="demo",source="exact"} 2.0' in here.get("/metrics").text
        assert here.get("/status").json()["answers_on_disk"]["hits"] == 2
        assert "snello:exact_answers_hits_total 2.0" in here.get("/metrics").text


def test_a_client_may_want_no_cache(tmp_path: Path) -> None:
    with serving(options(tmp_path)) as here:
        assert source(here, headers={"cache-control": "no-store"})[0] == "computed"
        assert source(here)[0] == "computed", "the first was not kept"
        assert source(here, headers={"cache-control": "no-cache"})[0] == "computed"
        assert source(here)[0] == "exact"
        unsettled = {"prompt": "a", "max_tokens": 3}
        assert [source(here, unsettled)[0] for _ in range(2)] == ["computed", "computed"]


def test_a_key_never_hears_what_another_was_answered(tmp_path: Path) -> None:
    keys = Keys({hashlib.sha256(key.encode()).digest(): key for key in ("one", "two")})
    with serving(options(tmp_path), keys, "one") as here:
        assert [source(here)[0] for _ in range(2)] == ["computed", "exact"]
        assert source(here, headers={"authorization": "Bearer two"})[0] == "computed"


def test_a_prefix_is_read_from_disk_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": list(range(300, 700)), "max_tokens": 2, "temperature": 1.0}
    with serving(options(tmp_path)) as here:
        here.post(TEXTS, body)
        store = here.app.models["demo"].llm.store
        assert store is not None
    with serving(options(tmp_path)) as here:
        store = here.app.models["demo"].llm.store
        assert store is not None
        monkeypatch.setattr(store, "_ms_per_mb", 0.0)  # whatever this machine does, reading pays
        known = here.post(TEXTS, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert store.counters.hit + store.counters.audited_hits > 0
        assert known >= 128 or store.counters.audited_hits


def test_who_asks_what_runs_now_hears_the_same_generation() -> None:
    body = {"prompt": "def f(x):\n", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    with serving(ServeOptions(models=("demo",), threads=1)) as here:
        heard: list[Any] = []
        threads = [threading.Thread(target=lambda: heard.append(source(here, body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(kind for kind, _ in heard) == ["computed", "flight", "flight"]
        assert heard[0][1] == heard[1][1] == heard[2][1]
        assert here.app.models["demo"].worker.tokens == 400


def test_an_impatient_one_ends_nobody_elses_generation() -> None:
    body = {"prompt": "def f(x):\n", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    with serving(ServeOptions(models=("demo",), threads=1)) as here:
        short = threading.Thread(target=lambda: here.post(TEXTS, body, headers={"x-request-timeout": "0.15"}))
        short.start()
        while not here.app.models["demo"].worker.engine.num_running:
            pass
        kind, choices = source(here, body)
        short.join()
        assert kind == "flight" and choices[0]["finish_reason"] == "length"
        assert here.idle()


def test_a_refusal_of_a_settled_stream_has_a_status_of_its_own() -> None:
    limits = Limits(queue_tokens=200)
    body = {"prompt": "def f(x):\n", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}
    with serving(ServeOptions(models=("demo",), threads=1, limits=limits)) as here:
        with here.client.stream("POST", TEXTS, json=body):  # an idle server lets any in
            response = here.post(TEXTS, {**body, "prompt": "another"})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert here.idle()
