"""What came of a load, from answers whose times are known: percentiles, what was in time, refused, broken, cached."""

from __future__ import annotations

import json
from typing import Any

import pytest

from snello.measure.load.client import Answer, Run
from snello.measure.load.outcome import Objective, read, summary
from snello.measure.load.plans import Request


def piece(text: str, reason: str | None = None) -> bytes:
    return json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode()


def usage(prompt: int, answer: int, cached: int | None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return json.dumps(
        {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": answer, **details}}
    ).encode()


def whole(sent: float, times: list[float], cached: int | None = None) -> Answer:
    end = times[-1] + 0.001
    lines = [*(piece("w") for _ in times), piece("", "length"), usage(100, len(times), cached), b"[DONE]"]
    return Answer(sent=sent, status=200, times=[*times, end, end, end], lines=lines, ended=end)


def asked(at: float = 0.0, **more: Any) -> Request:
    return Request(at=at, prompt=(1,) * 100, answer=3, **more)


def test_a_last_piece_without_text_is_no_token() -> None:
    assert read(whole(0.0, [1.0, 1.1, 1.2])).times == [1.0, 1.1, 1.2]
    ends = Answer(status=200, times=[1.0, 2.0], lines=[piece("w", "length"), b"[DONE]"])
    assert read(ends).times == [1.0]


def test_times_count_from_when_a_request_was_due() -> None:
    run = Run([whole(0.3, [1.0, 1.1, 1.2]), whole(2.0, [2.5, 2.6, 2.7])], 3.0, 0.02)
    found = summary([asked(0.0), asked(2.0)], run, Objective(), open_loop=True)
    assert found["first_token_seconds"]["max"] == pytest.approx(1.0)  # not 0.7: who came waited
    assert found["first_token_seconds"]["p50"] == pytest.approx(0.75)
    assert found["between_tokens_seconds"]["p99"] == pytest.approx(0.1)
    assert found["whole_answer_seconds"]["max"] == pytest.approx(1.201)
    assert found["client"] == {"late_seconds_p99": pytest.approx(0.297), "share_of_a_core": 0.02}
    assert found["answer_tokens_per_second"] == pytest.approx(2.0)
    assert found["prompt_tokens_per_second"] == pytest.approx(200 / 3)
    closed = summary([asked(), asked()], run, Objective(), open_loop=False)
    assert closed["first_token_seconds"]["max"] == pytest.approx(0.7)


@pytest.mark.parametrize(("first", "between", "good"), [(1.0, 0.2, 2), (0.6, 0.2, 1), (1.0, 0.05, 0), (1.0, 0.1001, 2)])
def test_goodput_asks_for_both(first: float, between: float, good: int) -> None:
    run = Run([whole(0.0, [1.0, 1.1, 1.2]), whole(0.0, [0.5, 0.6, 0.7])], 4.0, 0.0)
    found = summary([asked(), asked()], run, Objective(first=first, between=between), open_loop=True)
    assert (found["good"], found["goodput_requests_per_second"]) == (good, good / 4)


def test_refused_and_failed_are_counted_apart() -> None:
    broken = whole(0.0, [1.0])
    broken.lines, broken.times = broken.lines[:-1], broken.times[:-1]
    said = Answer(status=200, times=[1.0], lines=[b'{"error": {"message": "no"}}'])
    answers = [
        whole(0.0, [1.0, 1.1]),
        Answer(status=429, error="slow down", retry_after=True),
        Answer(status=503, error="full"),
        Answer(status=404, error="no such model"),
        Answer(error="Connection refused"),
        broken,
        said,
        Answer(status=200, times=[1.0], lines=[b"[DONE]"]),
    ]
    found = summary([asked() for _ in answers], Run(answers, 2.0, 0.0), Objective(), open_loop=True)
    assert (found["answered"], found["refused"], found["refused_without_retry_after"]) == (1, 2, 1)
    assert found["failed"].pop("{'message': 'no'}") == 1
    assert found["failed"] == {
        "no such model": 1,
        "Connection refused": 1,
        "the stream broke off": 1,
        "an answer without a token": 1,
    }


def test_nothing_answered_has_no_percentiles() -> None:
    found = summary([asked()], Run([Answer(error="gone")], 1.0, 0.0), Objective(), open_loop=True)
    assert found["first_token_seconds"] is None and found["between_tokens_seconds"] is None
    assert (found["answered"], found["good"], found["cached_share"]) == (0, 0, None)


def test_known_prompt_tokens_stand_beside_both_bounds() -> None:
    run = Run([whole(0.0, [1.0, 1.1], cached=0), whole(0.0, [1.0, 1.1], cached=40)], 2.0, 0.0)
    found = summary([asked(held=0), asked(shared=80, held=60)], run, Objective(), open_loop=True)
    assert (found["cached_share"], found["shared_share"], found["held_share"]) == (0.2, 0.4, 0.3)
    silent = Run([whole(0.0, [1.0, 1.1])], 2.0, 0.0)
    assert summary([asked(shared=80)], silent, Objective(), open_loop=True)["cached_share"] is None
