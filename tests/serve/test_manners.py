"""Keys, the queue, and how the server ends: on a real socket, the end as a process of its own."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from snello.cli import main
from snello.errors import SnelloError
from snello.serve.errors import RequestError
from snello.serve.gate import Gate
from snello.serve.keys import Caller, Keys, check_host, read_keys
from snello.serve.logs import JsonLines
from snello.serve.options import Limits, ServeOptions
from snello.serve.routes import ROUTES
from snello.serve.server import bind
from snello.serve.worker import Turns
from tests.serve.world import Process, Running, parse, raw_request, serving

TEXTS = "/v1/completions"
LONG = {"prompt": "def f(x):\n", "max_tokens": 900, "ignore_eos": True}


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_every_route_is_closed_without_a_key_but_health_and_the_page(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# of the team\n{hashed('one')} first\n\n{hashed('two').upper()}\n")
    keys = read_keys(file)
    assert keys.caller("Bearer one") == Caller("first", hashed("one"))
    assert keys.caller("bearer  two ").name == "key-4"
    with serving(ServeOptions(models=("demo",)), keys) as here:
        paths = [(method, path.replace("{name:path}", "demo")) for method, path, _ in ROUTES]
        for method, path in [*paths, ("GET", "/nothing")]:
            for header in (
                {},
                {"authorization": "Bearer onE"},
                {"authorization": "one"},
                {"authorization": "Basic one"},
            ):
                response = here.client.request(method, path, headers=header)
                assert response.status_code == (200 if path == "/" or path.startswith("/health/") else 401), path
            assert "demo" not in response.text
        assert here.get("/v1/models", headers={"authorization": "Bearer two"}).status_code == 200
        assert here.get("/v1/models", headers={"authorization": "Bearer two", "host": "any.example"}).status_code == 200


def test_what_one_key_computed_is_not_known_to_another() -> None:
    keys = Keys({bytes.fromhex(hashed(key)): key for key in ("one", "two")})
    body = {"prompt": "class Shape:\n    def area(self):\n        return 0\n" * 3, "max_tokens": 1}
    with serving(ServeOptions(models=("demo",)), keys) as here:

        def cached(key: str) -> int:
            response = here.post(TEXTS, body, headers={"authorization": f"Bearer {key}"})
            return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert (cached("one"), cached("two")) == (0, 0)
        assert cached("one") > 16 and cached("two") > 16


@pytest.mark.parametrize("text", ["", "# none\n", "the key itself\n", "ab" * 31 + "\n", "zz" * 32 + "\n"])
def test_a_file_of_keys_holds_hashes_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SnelloError) as caught:
        read_keys(tmp_path / "keys")
    assert "sha256sum" in str(caught.value.hint) and "the key itself" not in caught.value.message
    with pytest.raises(SnelloError, match="cannot read"):
        read_keys(tmp_path / "absent")


def test_other_machines_need_a_key_or_a_word() -> None:
    with pytest.raises(SnelloError, match="no key"):
        ServeOptions(models=("demo",), host="0.0.0.0")
    assert not ServeOptions(models=("demo",), host="0.0.0.0", open=True).on_loopback
    assert not ServeOptions(models=("demo",), host="0.0.0.0", keys=Path("k")).on_loopback


@pytest.mark.parametrize("host", [None, "", "localhost.evil.example", "evil.example:80", "127.0.0.1evil", "[::2]"])
def test_only_this_machines_names_pass(host: str | None) -> None:
    with pytest.raises(RequestError):
        check_host(host)


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_the_gate_counts_tokens_and_says_when_to_come_again() -> None:
    gate, one, two = Gate(1000, 0.5), Caller("one", "1"), Caller("two", "2")
    with gate.admitted(one, 5000):  # alone: any size
        with pytest.raises(RequestError) as full:
            gate.admitted(two, 10).__enter__()
        assert full.value.status == 503 and 1 <= (full.value.retry_after or 0) <= 60
    with gate.admitted(one, 400):
        with pytest.raises(RequestError) as share, gate.admitted(one, 200):
            pass
        assert share.value.status == 429 and share.value.kind == "rate_limit_error"
        with gate.admitted(two, 500):
            assert gate.inside == 900
    assert gate.inside == gate.requests == 0 and gate.refused == {"full": 1, "key": 1}
    gate.closed = True
    with pytest.raises(RequestError, match="shutting down"), gate.admitted(one, 1):
        pass


def test_who_is_refused_is_told_when_enough_has_left_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the rate of what was answered: here 100 tokens a second."""
    now = [0.0]
    monkeypatch.setattr("snello.serve.gate.time.monotonic", lambda: now[0])
    gate, callers = Gate(10_000, 0.5), [Caller(name, name) for name in "abc"]

    def told(caller: Caller, tokens: int) -> tuple[int, int | None]:
        with pytest.raises(RequestError) as refused:
            gate.admitted(caller, tokens).__enter__()
        return refused.value.status, refused.value.retry_after

    for _ in range(3):
        with gate.admitted(callers[0], 200):
            now[0] += 2.0
    with pytest.raises(ZeroDivisionError), gate.admitted(callers[0], 5000):  # given up at once
        now[0] += 0.001
        raise ZeroDivisionError
    with gate.admitted(callers[0], 4500), gate.admitted(callers[1], 4500):
        assert told(callers[2], 1001) == (503, 1)
        assert told(callers[2], 2500) == (503, 15), "1,500 tokens have to leave"
        assert told(callers[0], 900) == (429, 8), "400 of its own, which are half of what leaves"
        assert told(callers[1], 1200) == (503, 14), "of its own 700: they take longer than 200 of all"
        assert told(callers[2], 50_000) == (503, 60), "all of it, and at most a minute is told"
    with gate.admitted(callers[0], 3000):
        assert told(callers[1], 50_000) == (503, 30), "all that is inside: it fits alone"


def test_a_full_queue_is_said_at_once() -> None:
    with serving(ServeOptions(models=("demo",), max_num_seqs=1, limits=Limits(queue_tokens=1000))) as here:
        plug = raw_request(here.address, json.dumps({**LONG, "stream": True}).encode())
        plug.recv(100)
        for stream in (False, True):
            response = here.post(TEXTS, {"prompt": "a", "max_tokens": 500, "stream": stream})
            assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
        assert here.post(TEXTS, {"prompt": "a", "max_tokens": 2}).status_code == 200
        plug.close()
        assert here.idle()
        assert 'snello:rejections_total{model_name="demo",reason="full"} 2.0' in here.get("/metrics").text


# ---- the end --------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_runs_and_lets_nobody_in() -> None:
    with Process() as here:
        with httpx.stream("POST", here.address + TEXTS, json={**LONG, "stream": True}) as response:
            pieces = response.iter_bytes()
            first = next(pieces)
            here.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            assert httpx.get(here.address + "/health/ready").status_code == 503
            assert httpx.get(here.address + "/health/live").status_code == 200
            refused = httpx.post(here.address + TEXTS, json={"prompt": "a"})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            events = parse(first + b"".join(pieces))
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        code, log = here.end()
    assert code == 0
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    done = next(line for line in lines if line.get("completion_tokens") == 900)
    assert done["status"] == 200 and done["request"] and done["caller"] == "local" and done["finish"] == ["length"]
    assert "def f" not in log, "prompts are not in the log"


def test_a_second_signal_ends_it_now_and_a_short_drain_says_why() -> None:
    slow = {**LONG, "n": 16, "stream": True}
    with Process("--max-num-seqs", "2") as here, httpx.stream("POST", here.address + TEXTS, json=slow) as response:
        next(response.iter_bytes())
        for _ in range(2):
            here.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        started = time.monotonic()
        assert here.end()[0] == 1 and time.monotonic() - started < 5
    with Process("--drain", "0.2s", "--max-num-seqs", "2") as here:
        with httpx.stream("POST", here.address + TEXTS, json=slow) as response:
            pieces = response.iter_bytes()
            first = next(pieces)
            here.process.send_signal(signal.SIGTERM)
            events = parse(first + b"".join(pieces))
        assert events[-1]["error"]["code"] == "shutting_down"
        assert here.end()[0] == 1


def test_whose_request_is_still_coming_at_the_end_hears_that_the_server_was_stopped() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    with Process("--drain", "0.1s", "--threads", "1") as here:
        host, port = here.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as plug:
            plug.sendall(head + b'{"prompt": ')
            while httpx.get(here.address + "/status").json()["requests_inside"] == 0:
                time.sleep(0.01)
            here.process.send_signal(signal.SIGTERM)
            said = plug.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 503") and b'"code":"shutting_down"' in said, said
        code, log = here.end()
    assert code == 1 and "Traceback" not in log


def test_a_port_in_use_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 1
        error = capsys.readouterr().err.splitlines()
        assert error[0] == f"error: port {port} of 127.0.0.1 is in use" and error[1].startswith("hint:")
    with pytest.raises(SnelloError, match="cannot listen"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve"], "MODEL"),
        (["serve", "demo", "demo"], "two models are named demo"),
        (["serve", "demo", "--host", "0.0.0.0"], "no key is asked for"),
        (["serve", "demo", "--keys", "/nowhere"], "cannot read the keys"),
        (["serve", "no-such-model", "--port", "0"], "no-such-model"),
    ],
)
def test_what_cannot_be_served_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--port", "0"] if "--port" not in words else words) in (1, 2)
    assert said in capsys.readouterr().err.splitlines()[0]


def test_the_loop_is_not_held_up_by_a_step() -> None:
    """A health check is answered while a step runs."""
    with serving(ServeOptions(models=("demo",))) as here:
        executor = here.app.models["demo"].llm.executor
        run = executor.run

        def slow(step: Any) -> Any:
            time.sleep(0.5)
            return run(step)

        executor.run = slow  # type: ignore[method-assign]
        plug = raw_request(here.address, json.dumps(LONG).encode())
        time.sleep(0.1)
        started = time.monotonic()
        assert here.get("/health/live").status_code == 200
        assert time.monotonic() - started < 0.3
        executor.run = run  # type: ignore[method-assign]
        plug.close()
        assert here.idle()


def slow_down(here: Running, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Each step of the model takes so much longer."""
    executor = here.app.models["demo"].llm.executor
    run = executor.run

    def slow(step: Any) -> Any:
        time.sleep(seconds)
        return run(step)

    monkeypatch.setattr(executor, "run", slow)


def test_a_silent_stream_gets_comments_and_its_role_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ServeOptions(models=("demo",), keep_alive_seconds=0.05)) as here:
        slow_down(here, monkeypatch, seconds=0.3)
        with here.client.stream("POST", TEXTS, json={"prompt": "a", "max_tokens": 2, "stream": True}) as response:
            raw = response.read()
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        assert raw.count(b": the model is at work\n\n") >= 4 and raw.endswith(b"data: [DONE]\n\n")
        assert [event for event in parse(raw) if event != "[DONE]"][-1]["choices"][0]["finish_reason"]


def test_models_take_turns_at_the_cores() -> None:
    turns, order = Turns(), list[str]()

    def run(name: str) -> None:
        for _ in range(20):
            with turns:
                order.append(name)
                time.sleep(0.001)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 60
    middle = "".join(order[6:-6])
    assert "aa" not in middle and "bb" not in middle and "cc" not in middle, middle


def test_the_log_holds_prompts_only_where_it_was_told_so(caplog: pytest.LogCaptureFixture) -> None:
    for told in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "snello.serve"), serving(ServeOptions(models=("demo",), log_prompts=told)) as here:
            here.post(TEXTS, {"prompt": "a secret of mine", "max_tokens": 1})
        lines = [JsonLines().format(record) for record in caplog.records if record.getMessage() == "request"]
        assert len(lines) == 1 and ("a secret of mine" in lines[0]) == told
        assert json.loads(lines[0])["completion_tokens"] == 1


def test_whatever_becomes_of_a_request_its_prompt_is_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, timeout = [5, 6, 7], {"x-request-timeout": "0.4"}
    with caplog.at_level("INFO", "snello.serve"), serving(ServeOptions(models=("demo",))) as here:
        slow_down(here, monkeypatch, seconds=0.25)
        for body in (
            {"structured_outputs": {"regex": "["}},
            {"stream": True, "ignore_eos": True},
            {"ignore_eos": True},
        ):
            here.post(TEXTS, {"prompt": prompt, "max_tokens": 9, **body}, headers=timeout)
        here.post(TEXTS, {"prompt": prompt * 2000})
        plug = raw_request(here.address, json.dumps({"prompt": prompt, "max_tokens": 9}).encode())
        time.sleep(0.1)
        plug.close()
        assert here.idle()
        here.post(TEXTS, {"prompt": prompt, "max_tokens": 1, "stream": True})
        texts = here.get("/metrics").text
    # A stream's line is written after its last byte was read: when the server has ended, all are there.
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.msg == "request"]
    counts = [(line["status"], line["prompt_tokens"]) for line in lines]
    assert counts == [(400, 3), (200, 3), (504, 3), (400, 6000), (499, 3), (200, 3)], lines
    assert [line.get("code") for line in lines[1:3]] == ["deadline_exceeded"] * 2
    assert [line.get("ended") for line in lines] == [None, "failed", None, None, "disconnected", None]
    asked = [line for line in texts.splitlines() if line.startswith("snello:request_prompt_tokens")]
    assert 'snello:request_prompt_tokens_bucket{le="1.0",model_name="demo"} 0.0' in asked, asked


def test_a_signal_while_models_are_read_ends_it_at_once() -> None:
    """As the first process of a container has to do it: by a handler of its own."""
    program = """
import os, signal, time
from snello.serve import served
from snello.serve.options import ServeOptions
from snello.serve.server import serve

def open_models(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

served.open_models = open_models
serve(ServeOptions(models=("demo",), port=0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
