"""The log never holds up an answer."""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import httpx2 as httpx
import pytest

from snello.serve.logs import Aside, JsonLines
from tests.serve.world import Process

PIPE_BYTES = 65_536  # that Linux holds for a reader who does not come
MANY = 2 * PIPE_BYTES // 1000


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("snello.serve", logging.INFO, "", 0, message, (), None)


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def test_lines_arrive_in_order_and_the_last_before_the_end(pipe: tuple[int, int]) -> None:
    handler = Aside(pipe[1])
    handler.setFormatter(JsonLines())
    for number in range(100):
        handler.handle(record(f"line {number}"))
    handler.close()
    os.close(pipe[1])
    with os.fdopen(pipe[0], encoding="utf-8") as reader:
        assert [json.loads(line)["message"] for line in reader] == [f"line {number}" for number in range(100)]


def test_lines_that_nobody_reads_are_counted(pipe: tuple[int, int]) -> None:
    handler = Aside(pipe[1], most=4)
    handler.setFormatter(JsonLines())
    begin = time.monotonic()
    for _ in range(50):
        handler.handle(record("x" * PIPE_BYTES))
    handler.close()
    assert time.monotonic() - begin < 10
    told, seen = "", 0
    with os.fdopen(pipe[0], encoding="utf-8") as reader:
        while "missing" not in told:
            told = json.loads(reader.readline())["message"]
            seen += told.startswith("x")
    assert seen >= 1 and told == f"{told.split()[0]} lines are missing here: nobody read the log"
    assert int(told.split()[0]) >= 50 - 4 - 2
    os.close(pipe[1])


def test_a_line_never_goes_to_a_file_that_took_its_descriptor_s_number(pipe: tuple[int, int]) -> None:
    handler = Aside(pipe[1])
    handler.setFormatter(JsonLines())
    for number in range(MANY):  # more than the pipe holds: the rest is written after the close
        handler.handle(record(f"{number} " + "x" * 1000))
    handler.close()
    other = os.pipe()
    os.dup2(other[1], pipe[1])  # which closes it, and gives its number to another pipe
    with os.fdopen(pipe[0], encoding="utf-8") as reader:
        assert [json.loads(line)["message"].split()[0] for line in reader] == [str(n) for n in range(MANY)]
    os.close(other[1])
    os.close(pipe[1])
    with os.fdopen(other[0], "rb") as stranger:
        assert stranger.read() == b""


def test_a_reader_who_has_gone_costs_nothing(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    handler = Aside(pipe[1])
    handler.setFormatter(JsonLines())
    handler.handle(record("nobody hears this"))
    handler.close()
    os.close(pipe[1])


def test_a_server_whose_log_nobody_reads_goes_on_and_ends() -> None:
    with Process("--threads", "1") as server, httpx.Client(base_url=server.address, timeout=60.0) as client:
        longest = {"x-request-id": "r" * 100}
        for _ in range(PIPE_BYTES // 100):
            assert client.get("/v1/models", headers=longest).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
