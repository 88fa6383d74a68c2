"""What a load asks and when: traces, scaled in time and length, with the reuse that was there; arrivals by chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.measure.load.plans import BLOCK, Row, by_chance, chosen, from_trace, read_trace
from snello.measure.load.reuse import known_blocks

TRAFFIC = Path(__file__).parents[4] / "shared/data/traffic"
WORDS = range(300, 4000)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)


def mooncake(*rows: tuple[int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "hash_ids")
    return "".join(json.dumps({**dict(zip(names, row, strict=True)), "output_length": 20}) + "\n" for row in rows)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_azure_rows_start_at_zero(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.at, first.prompt, first.answer, first.blocks) == (0.0, 374, 44, ())
    assert second.at == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_rows_keep_their_blocks(tmp_path: Path) -> None:
    rows = list(read_trace(written(tmp_path, mooncake((0, 600, [4, 7]), (1500, 512, [4])))))
    assert [(row.at, row.prompt, row.blocks) for row in rows] == [(0.0, 600, (4, 7)), (1.5, 512, (4,))]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (AZURE + "2023-11-16 18:15:51.0,many,3\n", 4),
        (AZURE + "2023-11-16 18:15:51.0,3\n", 4),
        (AZURE + "2023-11-16 18:15:40.0,3,3\n", 4),
        (AZURE + "2023-11-16 18:15:51.0,0,3\n", 4),
        ("a,b\n1,2\n", 2),
        (mooncake((0, 600, [4, 7]), (1, 600, [4])), 2),
        (mooncake((0, 600, [4, 7])) + '{"timestamp": 3}\n', 2),
        (mooncake((0, 600, [4, 7])) + "{broken\n", 2),
        (mooncake((-5, 512, [4])), 1),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(SnelloError, match=f"line {line} of .* is no request") as caught:
        list(read_trace(written(tmp_path, text)))
    assert "TIMESTAMP" in str(caught.value.hint)


def test_no_trace_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="cannot be read: No such file"):
        list(read_trace(tmp_path / "none"))
    with pytest.raises(SnelloError, match="is not text"):
        list(read_trace(written(tmp_path, b"\xff\xfe\x00PK")))
    with pytest.raises(SnelloError, match="no request that fits"):
        chosen(read_trace(written(tmp_path, "")), 3, longest=100)


def test_chosen_leaves_out_what_does_not_fit() -> None:
    sizes = [(90, 20), (10, 10), (10, 1), (20, 20), (30, 30)]
    rows = [Row(at=float(at), prompt=prompt, answer=answer) for at, (prompt, answer) in enumerate(sizes)]
    assert [row.prompt for row in chosen(rows, 9, longest=100)] == [10, 20, 30]  # one token has no gap to measure
    later = chosen(rows, 1, skip=1, longest=100)
    assert [(row.at, row.prompt) for row in later] == [(0.0, 20)]
    assert [row.prompt for row in chosen(rows, 9, longest=55, shrink=2)] == [90, 10, 20, 30]


def test_a_trace_is_scaled_in_time_and_length() -> None:
    rows = [Row(at=at, prompt=400, answer=40) for at in (0.0, 1.0, 10.0)]
    requests = from_trace(rows, WORDS, rate=4.0, shrink=4)
    assert [request.at for request in requests] == pytest.approx([0.0, 0.05, 0.5])
    assert {(len(request.prompt), request.answer, request.shared) for request in requests} == {(100, 10, 0)}
    assert len({request.prompt for request in requests}) == 3
    assert all(token in WORDS for request in requests for token in request.prompt)
    alone = from_trace(rows[:1], WORDS, rate=4.0)
    assert [request.at for request in alone] == [0.0]


@pytest.mark.parametrize("shrink", [1, 32, 3, 1000])
def test_prompts_share_exactly_what_their_blocks_shared(shrink: int) -> None:
    blocks = [(1, 2, 3), (1, 2, 9), (8, 2, 3), (1, 2, 3)]
    requests = from_trace(
        [Row(at=0.0, prompt=3 * BLOCK, answer=64, blocks=row) for row in blocks], WORDS, shrink=shrink
    )
    for number, request in enumerate(requests):
        alike = [common(request.prompt, earlier.prompt) for earlier in requests[:number]]
        assert request.shared == max(alike, default=0)


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def test_a_small_cache_forgets_the_oldest_and_ends_first() -> None:
    prompts = [(1, 2, 3), (1, 4), (1, 2, 3)]
    assert known_blocks(prompts) == [0, 1, 3]
    assert known_blocks(prompts, capacity=4) == [0, 1, 3]
    assert known_blocks(prompts, capacity=3) == [0, 1, 2]  # 3, an end, made room for 4
    assert known_blocks(prompts, capacity=2) == [0, 1, 1]
    assert known_blocks(prompts, capacity=0) == [0, 0, 0]
    assert known_blocks([]) == []


def test_a_bound_at_a_size_is_at_most_the_endless_one() -> None:
    random = np.random.default_rng(0)
    rows = [Row(at=0.0, prompt=4 * BLOCK, answer=9, blocks=tuple(random.integers(0, 6, 4).tolist())) for _ in range(50)]
    requests = from_trace(rows, WORDS, shrink=32, cache_tokens=5 * 16)
    assert all(request.held is not None and request.held <= request.shared for request in requests)
    assert 0 < sum(request.held or 0 for request in requests) < sum(request.shared for request in requests)
    assert from_trace(rows, WORDS, shrink=32)[0].held is None


def test_arrivals_by_chance_have_the_rate() -> None:
    requests = by_chance(4000, WORDS, prompt=3, answer=2, rate=5.0, seed=1)
    gaps = np.diff([request.at for request in requests])
    assert requests[0].at == 0.0 and gaps.min() >= 0.0
    assert gaps.mean() == pytest.approx(0.2, rel=0.06) and gaps.std() == pytest.approx(0.2, rel=0.1)
    assert requests == by_chance(4000, WORDS, prompt=3, answer=2, rate=5.0, seed=1)
    assert requests[0].prompt != by_chance(1, WORDS, prompt=3, answer=2, rate=5.0, seed=2)[0].prompt
    assert {request.at for request in by_chance(5, WORDS, prompt=3, answer=2)} == {0.0}


@pytest.mark.skipif(not TRAFFIC.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_conv.csv", "mooncake_conversation_trace.jsonl"])
def test_real_traces_are_read_whole(name: str) -> None:
    rows = list(read_trace(TRAFFIC / name))
    assert len(rows) == (19366 if name.endswith("csv") else 12031)
    assert all(row.at >= 0.0 and row.prompt >= 1 for row in rows)
