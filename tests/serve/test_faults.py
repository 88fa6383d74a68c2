"""What goes wrong around a server: it is killed at work, its disk is full, bits of its files turn, readers do not read,
some of many answers are given up. Whatever is answered is right, and whoever did nothing wrong notices nothing."""

from __future__ import annotations

import json
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from snello.serve.options import ServeOptions
from tests.serve.world import Process, Running, raw_request, serving

TEXTS = "/v1/completions"
LONG = {"prompt": "def f(x):\n", "max_tokens": 900, "ignore_eos": True}
BEGINNING = list(range(300, 600))  # pages that all prompts share, so that prefixes are written too
BODIES: list[dict[str, Any]] = [
    {"prompt": [*BEGINNING, 600 + number], "max_tokens": 8, "temperature": 0, "seed": number} for number in range(24)
]


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with serving(ServeOptions(models=("demo",), threads=1, max_num_seqs=4)) as here:
        yield here


@pytest.fixture(scope="module")
def truth(here: Running) -> list[str]:
    """What is said where nothing is kept and nothing goes wrong."""
    return [said(here.post(TEXTS, body)) for body in BODIES]


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


# ---- some of many ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [1, 4])
def test_all_answers_of_one_request_go_between_chunks_and_a_neighbours_stays(here: Running, heard: int) -> None:
    neighbour = {"prompt": "class A:", "max_tokens": 60, "ignore_eos": True, "seed": 3}
    expected = said(here.post(TEXTS, neighbour, headers={"cache-control": "no-store"}))
    answers: list[str] = []
    other = threading.Thread(
        target=lambda: answers.append(said(here.post(TEXTS, neighbour, headers={"cache-control": "no-cache"})))
    )
    with here.client.stream("POST", TEXTS, json={**LONG, "n": 3, "stream": True}) as response:
        pieces = response.iter_bytes()
        other.start()
        for _ in range(heard):
            next(pieces)
    other.join()
    assert answers == [expected] and here.idle()


def test_a_client_that_hangs_up_whatever_it_sent_leaves_nothing(here: Running) -> None:
    """Cut at any byte of the request and after any wait: a body half sent, just sent, queued, read, drawn."""
    source, body = random.Random(5), json.dumps({**LONG, "n": 2, "stream": True}).encode()
    for turn in range(12):
        plug = raw_request(here.address, body[: source.randrange(len(body))] if turn % 3 == 0 else body)
        time.sleep(source.random() * 0.05)
        plug.close()
    assert here.idle(seconds=20)
    assert said(here.post(TEXTS, {"prompt": "a", "max_tokens": 2, "ignore_eos": True}))


# ---- the process ----------------------------------------------------------------------------------------------------


def ask_all(address: str, stopped: threading.Event, turn: int) -> None:
    """Asks for ever, until the server is gone. Each turn asks what none before has."""
    source = random.Random(threading.get_ident())
    with httpx.Client(base_url=address, timeout=600.0) as client:
        while not stopped.is_set():
            try:
                body = source.choice(BODIES)
                client.post(TEXTS, json={**body, "max_tokens": body["max_tokens"] + turn})
            except httpx.TransportError:
                return


def load(address: str, stopped: threading.Event, turn: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=ask_all, args=(address, stopped, turn), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    return threads


def answers_kept(address: str) -> bool:
    return bool(httpx.get(address + "/status", timeout=600.0).json()["answers_on_disk"]["stored"])


@pytest.mark.slow
def test_killed_under_load_its_files_are_whole_or_refused(tmp_path: Path, truth: list[str]) -> None:
    kept = 0
    for turn in range(3):
        with Process("--cache", str(tmp_path), "--threads", "1") as server:
            stopped = threading.Event()
            threads = load(server.address, stopped, turn)
            wait_for(lambda: any(tmp_path.rglob("*.kv")) and answers_kept(server.address), 60)
            time.sleep(turn / 7)
            server.process.kill()
            stopped.set()
            for thread in threads:
                thread.join(40)
        with Process("--cache", str(tmp_path), "--threads", "1") as server:
            for body, expected in zip(BODIES, truth, strict=True):
                response = httpx.post(server.address + TEXTS, json=body, timeout=600.0)
                assert said(response) == expected
                kept += response.headers["x-snello-source"] == "exact" and turn == 0
            if turn == 0:
                assert not list(tmp_path.rglob("*.damaged"))
    assert kept > 0, "what was answered before the end is kept"


@pytest.mark.slow
def test_a_full_disk_costs_no_answer(tmp_path: Path, truth: list[str]) -> None:
    """No file may grow any more: what the kernel then says to every write is a disk that is full."""
    with Process("--cache", str(tmp_path), "--threads", "1") as server:
        wait_for(lambda: any(tmp_path.rglob("answers.sqlite")))
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        for _ in range(2):
            for body, expected in zip(BODIES, truth, strict=True):
                assert said(httpx.post(server.address + TEXTS, json=body, timeout=600.0)) == expected
        status = httpx.get(server.address + "/status").json()
        assert status["answers_on_disk"]["failed"] > 0, "the disk did refuse"
        assert not list(tmp_path.rglob("*.kv")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_a_bit_turned_in_every_file_is_never_a_wrong_answer(tmp_path: Path, truth: list[str]) -> None:
    source = random.Random(7)
    options = ServeOptions(models=("demo",), cache=tmp_path, threads=1)
    for _ in range(6):
        with serving(options) as here:
            assert [said(here.post(TEXTS, body)) for body in BODIES] == truth
            store = here.app.models["demo"].llm.store
            assert store is not None
            store.files.flush()
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
        assert any(path.suffix == ".kv" for path in files)
        for path in files:
            content = bytearray(path.read_bytes())
            content[source.randrange(len(content))] ^= 1 << source.randrange(8)
            path.write_bytes(content)


@pytest.mark.slow
def test_readers_who_do_not_read_cost_bounded_memory() -> None:
    body = json.dumps({**LONG, "n": 4, "stream": True, "logprobs": 4}).encode()
    with Process("--threads", "1", "--queue-tokens", "100000") as server, ExitStack() as plugs:
        client = plugs.enter_context(httpx.Client(base_url=server.address, timeout=600.0))
        with ThreadPoolExecutor(8) as readers:  # all pages of the cache that the others need were touched once
            list(readers.map(lambda _: client.post(TEXTS, json={**LONG, "n": 4}), range(8)))
        before = resident(server.process.pid)
        for _ in range(8):
            plugs.callback(raw_request(server.address, body).close)
        assert client.post(TEXTS, json={"prompt": "a", "max_tokens": 2}).status_code == 200

        def running() -> bool:
            counts = client.get("/status").json()["models"][0]["counts"]
            return bool(counts["num_requests_running"] + counts["num_requests_waiting"])

        wait_for(lambda: not running(), 600)
        grown = resident(server.process.pid) - before
        assert grown < 100e6, f"{grown / 1e6:.0f} MB for eight who do not read"
        plugs.close()
        with httpx.Client(base_url=server.address, timeout=600.0) as client:
            wait_for(lambda: client.get("/status").json()["requests_inside"] == 0, 60)


def resident(pid: int) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
