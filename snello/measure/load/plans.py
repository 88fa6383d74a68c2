"""What a load asks, and when: requests of a service's trace, by chance, or as fast as so many people can.

Lengths and arrivals come from the trace; the words do not exist, so prompts are random token ids. Two trace forms are
read: Azure's (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's (JSON lines: timestamp in milliseconds,
input_length, output_length, hash_ids, one for each 512 tokens of the prompt and all before them). Where the trace names
blocks, two prompts share tokens exactly as far as they shared blocks, so that a prefix cache meets the reuse that was
really there.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snello.errors import SnelloError
from snello.measure.load.reuse import known_blocks

BLOCK = 512  # prompt tokens under one hash of a Mooncake trace


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request of a trace. `blocks`: its hashes, none where the trace has none."""

    at: float
    prompt: int
    answer: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """To be sent `at` seconds after the start; in a closed loop as soon as somebody is free. `shared`: tokens at the
    start of its prompt that an earlier prompt started with too, by the trace. `held`: those of them that a cache of a
    given size would still know; None where no size was given.
    """

    at: float
    prompt: tuple[int, ...]
    answer: int
    shared: int = 0
    held: int | None = None


def read_trace(path: Path) -> Iterator[Row]:
    """Requests in the order of their times, which start at 0.

    Raises:
        SnelloError: no such file, or a line that is no request.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.read(1)
            file.seek(0)
            yield from _mooncake(path, file) if first == "{" else _azure(path, file)
    except OSError as error:
        raise SnelloError(f"the trace {path} cannot be read: {error.strerror}", "give a CSV or JSONL file") from error
    except UnicodeDecodeError as error:
        raise SnelloError(f"the trace {path} is not text", "give a CSV or JSONL file") from error


def _azure(path: Path, file: Iterable[str]) -> Iterator[Row]:
    start: datetime.datetime | None = None
    for number, row in enumerate(csv.DictReader(file), start=2):
        try:
            moment = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
            start = start or moment
            at = (moment - start).total_seconds()
            yield _row(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _no_request(path, number) from error


def _mooncake(path: Path, file: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        try:
            found = json.loads(line)
            blocks = tuple(int(block) for block in found["hash_ids"])
            if len(blocks) != -(-int(found["input_length"]) // BLOCK):
                raise ValueError("blocks")
            yield _row(found["timestamp"] / 1000, int(found["input_length"]), int(found["output_length"]), blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_request(path, number) from error


def _row(at: float, prompt: int, answer: int, blocks: tuple[int, ...] = ()) -> Row:
    if at < 0 or prompt < 1 or answer < 0:
        raise ValueError("negative")
    return Row(at=at, prompt=prompt, answer=answer, blocks=blocks)


def _no_request(path: Path, line: int) -> SnelloError:
    return SnelloError(
        f"line {line} of {path} is no request of a trace",
        "a CSV with TIMESTAMP, ContextTokens, GeneratedTokens in order of time, or JSON lines with timestamp (ms), "
        "input_length, output_length, hash_ids",
    )


def chosen(rows: Iterable[Row], count: int, *, skip: int = 0, longest: int, shrink: int = 1) -> list[Row]:
    """The next `count` requests that fit into `longest` tokens once lengths are divided by `shrink`; time from 0."""
    found = list(itertools.islice((row for row in rows if _fits(row, longest, shrink)), skip, skip + count))
    if not found:
        raise SnelloError("the trace has no request that fits", "raise --longest or --shrink, or lower --skip")
    return [Row(at=row.at - found[0].at, prompt=row.prompt, answer=row.answer, blocks=row.blocks) for row in found]


def _fits(row: Row, longest: int, shrink: int) -> bool:
    return row.answer >= 2 and _shrunk(row.prompt, shrink) + _shrunk(row.answer, shrink) <= longest


def _shrunk(tokens: int, shrink: int) -> int:
    return max(2, tokens // shrink)


def from_trace(
    rows: Sequence[Row],
    words: range,
    *,
    rate: float | None = None,
    shrink: int = 1,
    seed: int = 0,
    cache_tokens: int | None = None,
) -> list[Request]:
    """`rate`: requests a second on average, to which the gaps are scaled; None: the trace's own. `cache_tokens`: of the
    server's prefix cache, for the bound at its size.
    """
    span = rows[-1].at
    scale = 1.0 if rate is None or span == 0 else (len(rows) - 1) / rate / span
    size, blocks = _block(shrink), [row.blocks for row in rows]
    shared = known_blocks(blocks)
    held = [None] * len(rows) if cache_tokens is None else known_blocks(blocks, cache_tokens // size)
    requests = []
    for number, row in enumerate(rows):
        prompt = _prompt(row, number, words, shrink, seed)
        known, kept = min(shared[number] * size, len(prompt)), held[number]
        requests.append(
            Request(
                at=row.at * scale,
                prompt=prompt,
                answer=_shrunk(row.answer, shrink),
                shared=known,
                held=None if kept is None else min(kept * size, len(prompt)),
            )
        )
    return requests


def _block(shrink: int) -> int:
    """Tokens under one hash once lengths are divided."""
    return max(1, BLOCK // shrink)


def _prompt(row: Row, number: int, words: range, shrink: int, seed: int) -> tuple[int, ...]:
    """Random ids: of each block by its hash, else of the request by its number."""
    length = _shrunk(row.prompt, shrink)
    if not row.blocks:
        return _ids([seed, 1, number], length, words)
    pieces = (_ids([seed, 2, block], _block(shrink), words) for block in row.blocks)
    return tuple(itertools.chain.from_iterable(pieces))[:length]


def by_chance(
    count: int, words: range, *, prompt: int, answer: int, rate: float | None = None, seed: int = 0
) -> list[Request]:
    """Prompts all different. `rate`: requests a second, arriving as a Poisson process; None: all at once."""
    gaps = np.random.default_rng([seed, 0]).exponential(1 / rate, count) if rate else np.zeros(count)
    moments = np.cumsum(gaps) - gaps[0]
    return [
        Request(at=float(at), prompt=_ids([seed, 1, number], prompt, words), answer=answer)
        for number, at in enumerate(moments)
    ]


def _ids(seed: list[int], count: int, words: range) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(words.start, words.stop, count).tolist())
