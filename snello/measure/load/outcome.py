"""What came of a load: throughput, what people waited, what was refused, and what of it was good enough.

Times are in seconds: to the first token, from when the request should have been sent; between tokens, of each gap
between two pieces of an answer; to the end. An answer is good where both its first token and the mean gap of its tokens
came in time; goodput counts only those (Zhong et al., DistServe, arXiv:2401.09670).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snello.measure.load.client import Answer, Run
from snello.measure.load.plans import Request

PERCENTILES = (50, 90, 99)
REFUSALS = (429, 503)
LATE = 0.05  # seconds that a request may be sent late before the generator is said to be too slow


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Seconds: to the first token, and of each further one on average."""

    first: float = 1.0
    between: float = 0.1


@dataclass(frozen=True)
class Reading:
    """An answer as read from its stream. `times`: of the pieces with content."""

    times: list[float]
    prompt: int
    answer: int
    cached: int | None
    problem: str


def read(answer: Answer) -> Reading:
    """`problem`: why this is no whole answer; empty where it is."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    problem = answer.error or ("" if answer.status == 200 else f"status {answer.status}")
    ended = False
    for moment, line in zip(answer.times, answer.lines, strict=True):
        if line == b"[DONE]":
            ended = True
            continue
        try:
            found = json.loads(line)
        except ValueError:
            problem = problem or "a line of the stream is not JSON"
            continue
        if "error" in found:
            problem = problem or str(found["error"])[:200]
        times += [moment] * _says_something(found)
        usage = found.get("usage") or usage
    if not problem and not ended:
        problem = "the stream broke off"
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    return Reading(times, usage.get("prompt_tokens", 0), usage.get("completion_tokens", len(times)), cached, problem)


def _says_something(found: dict[str, Any]) -> bool:
    """Whether a piece holds tokens: some servers send a last one that says only why the answer ended."""
    choices = found.get("choices") or []
    return any(choice.get("text") or choice.get("finish_reason") is None for choice in choices)


def summary(requests: Sequence[Request], run: Run, objective: Objective, *, open_loop: bool) -> dict[str, Any]:
    """One document; `None` where there is nothing to tell it from."""
    readings = [read(answer) for answer in run.answers]
    whole = [i for i, reading in enumerate(readings) if not reading.problem and reading.times]
    due = [request.at if open_loop else answer.sent for request, answer in zip(requests, run.answers, strict=True)]
    first = {i: readings[i].times[0] - due[i] for i in whole}
    gaps = [np.diff(readings[i].times) for i in whole]
    mean = {i: _mean_gap(readings[i]) for i in whole}
    good = [i for i in whole if first[i] <= objective.first and mean[i] <= objective.between]
    tokens = sum(readings[i].answer for i in whole)
    return {
        "requests": len(requests),
        "answered": len(whole),
        "refused": sum(answer.status in REFUSALS for answer in run.answers),
        "refused_without_retry_after": sum(
            answer.status in REFUSALS and not answer.retry_after for answer in run.answers
        ),
        "failed": _failures(readings, run.answers),
        "seconds": run.seconds,
        "requests_per_second": len(whole) / run.seconds,
        "prompt_tokens_per_second": sum(readings[i].prompt for i in whole) / run.seconds,
        "answer_tokens_per_second": tokens / run.seconds,
        "first_token_seconds": _percentiles(list(first.values())),
        "between_tokens_seconds": _percentiles(np.concatenate(gaps) if gaps else []),
        "whole_answer_seconds": _percentiles([run.answers[i].ended - due[i] for i in whole]),
        "objective_seconds": {"first": objective.first, "between": objective.between},
        "good": len(good),
        "goodput_requests_per_second": len(good) / run.seconds,
        **_cached(requests, readings, whole),
        "client": _client(due, run),
    }


def _mean_gap(reading: Reading) -> float:
    return (reading.times[-1] - reading.times[0]) / max(1, reading.answer - 1)


def _failures(readings: Sequence[Reading], answers: Sequence[Answer]) -> dict[str, int]:
    found: dict[str, int] = {}
    for reading, answer in zip(readings, answers, strict=True):
        problem = reading.problem or ("" if reading.times else "an answer without a token")
        if problem and answer.status not in REFUSALS:
            found[problem] = found.get(problem, 0) + 1
    return found


def _cached(requests: Sequence[Request], readings: Sequence[Reading], whole: Sequence[int]) -> dict[str, Any]:
    """Shares of prompt tokens: those that the server says it knew, those that an endless cache could have known, and
    those that one of the given size could.
    """
    told = [i for i in whole if readings[i].cached is not None]
    prompts = sum(readings[i].prompt for i in told)
    if not prompts:
        return {"cached_share": None, "shared_share": None, "held_share": None}
    held = [requests[i].held for i in told]
    return {
        "cached_share": sum(readings[i].cached or 0 for i in told) / prompts,
        "shared_share": sum(requests[i].shared for i in told) / prompts,
        "held_share": None if None in held else sum(tokens or 0 for tokens in held) / prompts,
    }


def _client(due: Sequence[float], run: Run) -> dict[str, float]:
    late = [answer.sent - moment for answer, moment in zip(run.answers, due, strict=True)]
    return {"late_seconds_p99": float(np.percentile(late, 99)), "share_of_a_core": run.busy}


def _percentiles(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    found = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {**found, "max": float(np.max(values))}
