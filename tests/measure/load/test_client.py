"""`bench --serve` against our own server on a real socket, and against servers that are not there or misbehave."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snello.cli import main
from snello.errors import SnelloError
from snello.measure.load.client import Target, ask, model_of
from snello.measure.load.outcome import Objective, summary
from snello.measure.load.plans import Request, by_chance
from snello.serve.options import Limits, ServeOptions
from tests.serve.world import Running, serving

WORDS = range(40, 200)
BLOCKS = [[0, 1, 2, 3], [0, 1, 2, 4], [9, 5, 6, 7], [0, 1, 2, 3]]


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with serving(ServeOptions(models=("demo",), context=256)) as running_here:
        yield running_here


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["bench", *words, "--json"])
    out, error = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), error


def test_every_request_is_answered_in_full(here: Running) -> None:
    requests = by_chance(6, WORDS, prompt=20, answer=5, rate=40.0, seed=3)
    run = ask(Target(url=here.address, model="demo"), requests)
    found = summary(requests, run, Objective(first=60.0, between=60.0), open_loop=True)
    assert (found["answered"], found["good"], found["failed"], found["refused"]) == (6, 6, {}, 0)
    assert found["answer_tokens_per_second"] * found["seconds"] == pytest.approx(6 * 5)
    assert found["prompt_tokens_per_second"] * found["seconds"] == pytest.approx(6 * 20)
    assert all(answer.sent >= request.at for request, answer in zip(requests, run.answers, strict=True))
    assert 0.0 < found["client"]["share_of_a_core"] < 1.5
    assert here.idle()


def test_a_closed_loop_never_has_more_at_once(here: Running) -> None:
    requests = by_chance(7, WORDS, prompt=8, answer=4, seed=4)
    run = ask(Target(url=here.address, model="demo"), requests, streams=2)
    spans = [(answer.sent, answer.ended) for answer in run.answers]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) == 2
    assert all(answer.status == 200 for answer in run.answers)


def test_by_the_command_line(here: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--requests", "4", "--prompt", "16", "--generate", "4", "--words", "40:200", "--seed", "5")
    code, found, _ = bench(capsys, "--serve", f"{here.address}/v1/", "--rate", "50", *words)
    assert code == 0
    assert (found["model"], found["answered"], found["seed"]) == ("demo", 4, 5)
    assert found["arrivals"] == "by chance, 50 a second"
    assert set(found["first_token_seconds"]) == {"p50", "p90", "p99", "max"}


def test_prefixes_of_a_trace_are_met(here: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"timestamp": 0, "input_length": 2048, "output_length": 128, "hash_ids": row} for row in BLOCKS]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps({**row, "timestamp": 1000 * at}) for at, row in enumerate(rows)))
    words = ("--trace", str(trace), "--shrink", "16", "--longest", "200", "--rate", "2", "--words", "40:200")
    words += ("--seed", "3")  # under others two blocks may begin with the same word, which is found too
    code, found, _ = bench(capsys, "--serve", here.address, *words, "--cache-tokens", "128")
    assert (code, found["answered"]) == (0, 4)
    assert found["shared_share"] == pytest.approx((3 + 4) / 16)
    assert found["held_share"] == pytest.approx(3 / 16)  # the third request pushes the first ones out
    assert 0.25 < found["cached_share"] <= found["shared_share"]


def test_what_is_refused_is_counted_apart() -> None:
    tight = ServeOptions(models=("demo",), context=256, limits=Limits(queue_tokens=60))
    requests = [Request(at=0.0, prompt=(50 + number,) * 30, answer=20) for number in range(6)]
    with serving(tight) as narrow:
        run = ask(Target(url=narrow.address, model="demo"), requests)
    found = summary(requests, run, Objective(), open_loop=True)
    assert found["answered"] >= 1 and found["refused"] >= 1 and found["failed"] == {}
    assert found["answered"] + found["refused"] == 6
    assert found["refused_without_retry_after"] == 0


def test_a_wrong_name_fails_with_what_the_server_says(here: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--serve", here.address, "--name", "nobody", "--requests", "2", "--prompt", "4", "--generate", "2")
    code, found, error = bench(capsys, *words)
    assert code != 0 and "no request was answered" in found["error"] and "nobody" in found["error"]
    assert "Traceback" not in error


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, found, _ = bench(capsys, "--serve", address)
    assert code != 0 and found["error"].startswith(f"no server answers at {address}") and found["hint"]


@pytest.mark.parametrize("url", ["ftp://there", "http://", "http://there:port", "http://there:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SnelloError, match="no address of a server"):
        _ = Target(url=url).parts


def test_addresses_as_people_write_them() -> None:
    assert Target(url="127.0.0.1:80").parts == ("127.0.0.1", 80, False, "/v1")
    assert Target(url="https://there/api/v1/").parts == ("there", 443, True, "/api/v1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rate", "2"), "--rate goes with --serve"),
        (("--cache-tokens", "2"), "--cache-tokens goes with --serve"),
        (("--serve", "x", "--shape", "tinyllama-1.1b"), "--shape does not go with --serve"),
        (("--serve", "x", "demo"), "MODEL does not go with --serve"),
        (("--serve", "x", "--isa", "avx2"), "--isa does not go with --serve"),
        (("--serve", "x", "--cache-tokens", "64"), "--cache-tokens goes with --trace"),
        (("--serve", "x", "--streams", "4", "--rate", "2"), "--streams does not go with"),
        (("--serve", "x", "--trace", "none.csv"), "none.csv cannot be read"),
        (("--serve", "x", "--rate", "0"), "not a number above zero"),
        (("--serve", "x", "--words", "9:3"), "not a range"),
    ],
)
def test_flags_that_do_not_go_together(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, found, _ = bench(capsys, *words)
    assert code != 0 and said in found["error"]


def read_request(plug: socket.socket) -> None:
    """To its end: closing before would reset the connection, and what was answered would be lost."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += plug.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    told = re.search(rb"(?i)content-length: (\d+)", head)
    length = int(told[1]) if told else 0
    while len(body) < length:
        body += plug.recv(1 << 16)


@contextlib.contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that says the same to everybody, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def work() -> None:
            with contextlib.suppress(OSError):
                while True:
                    plug, _ = door.accept()
                    with plug:
                        read_request(plug)
                        plug.sendall(reply)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
        door.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "without sending|[Cc]losed|reset"),
        (b"no protocol at all\r\n\r\n", "illegal|line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\ndata: {}\n\n", "without sending complete|closed|reset"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {oops\n\ndata: [DONE]\n\n", "not JSON"),
        (b'HTTP/1.1 500 No\r\nConnection: close\r\n\r\n{\n "error": {\n  "message": "broken"\n }\n}\n', "^broken$"),
    ],
)
def test_a_server_that_misbehaves(reply: bytes, said: str) -> None:
    requests = [Request(at=0.0, prompt=(1, 2), answer=2)]
    with answering(reply) as address:
        run = ask(Target(url=address, timeout=5.0), requests)
    failed = summary(requests, run, Objective(), open_loop=True)["failed"]
    assert len(failed) == 1
    assert re.search(said, next(iter(failed)))


def test_a_server_that_says_nothing_is_given_up() -> None:
    requests = [Request(at=0.0, prompt=(1, 2), answer=2)]
    with socket.create_server(("127.0.0.1", 0)) as door:
        run = ask(Target(url=f"http://127.0.0.1:{door.getsockname()[1]}", timeout=0.2), requests)
    assert run.answers[0].error == "no end within 0.2 s"


def test_models_are_told_apart() -> None:
    two = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(two), two)) as address,
        pytest.raises(SnelloError, match="2 models: a, b"),
    ):
        model_of(Target(url=address))
    with answering(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n") as address, pytest.raises(SnelloError, match="key"):
        model_of(Target(url=address))
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]") as address,
        pytest.raises(SnelloError, match="200"),
    ):
        model_of(Target(url=address))
