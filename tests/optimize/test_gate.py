"""Every way that the gate can decide, from numbers alone; and what is written to disk is whole."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.measure.timing import Ratio
from snello.optimize import files, receipts, sentence
from snello.optimize.events import LadderRow, plain
from snello.optimize.gate import judge_cost, judge_equal, judge_quality
from snello.optimize.plain import revive
from snello.optimize.receipts import Passage

FINE = Interval(0.001, 0.002, 0.004)


def ratio(low: float, mid: float, high: float, steady: bool = True) -> Ratio:
    return Ratio(Interval(low, mid, high), steady, ((1.0, mid),))


def test_quality_within_budget_leaves_the_verdict_to_cost() -> None:
    assert judge_quality(FINE, 0.01) is None


@pytest.mark.parametrize(
    ("loss", "options", "verdict", "reason"),
    [
        (Interval(0.02, 0.023, 0.026), {}, "dropped", "over 1%"),
        (Interval(0.0, 0.009, 0.012), {}, "dropped", "at most 1.2% is over 1%"),
        (Interval(0.0, 0.009, 0.01004), {}, "dropped", "at most 1.004% is over 1%"),
        (Interval(-math.inf, 0.0, math.inf), {}, "cannot tell", "too few documents to bound the loss"),
        (Interval(-math.inf, math.inf, math.inf), {}, "dropped", "its loss is not finite"),
        (FINE, {"metric": Interval(0, 0.01, 0.02)}, "dropped", "your metric loses up to 2%, over 1%"),
        (FINE, {"strict_failures": ("loops in 9% of answers",)}, "dropped", "strict: loops in 9% of answers"),
    ],
)
def test_quality_decides(loss: Interval, options: dict[str, object], verdict: str, reason: str) -> None:
    found = judge_quality(loss, 0.01, **options)  # type: ignore[arg-type]
    assert found is not None
    assert (found.verdict, found.reason) == (verdict, reason)
    assert "budget 1%" in found.margin


def test_at_equal_cost_only_a_measurably_smaller_loss_decides() -> None:
    less = judge_equal("int4, rtn", Interval(-0.005, -0.004, -0.001))
    assert (less.verdict, less.reason) == ("kept", "loses less at the same cost")
    assert less.margin == "loss -0.40% over int4, rtn's, at most -0.10%; taken below 0"
    for change in (Interval(-0.005, -0.002, 0.001), Interval.exact(0.0), Interval(-math.inf, -0.1, math.inf)):
        assert judge_equal("int4, rtn", change).verdict == "dropped"


def test_a_perplexity_gain_is_no_budget_for_later() -> None:
    assert judge_quality(Interval(-0.05, -0.04, -0.03), 0.01) is None


@pytest.mark.parametrize(
    ("gain", "others", "verdict", "reason"),
    [
        (ratio(0.5, 0.51, 0.52), {}, "kept", ""),
        (ratio(0.96, 0.965, 0.97), {}, "kept", ""),
        (ratio(0.96, 0.97, 0.98), {}, "dropped", "gains 3%, surely 2%, needs 3%"),
        (ratio(0.99, 0.997, 1.004), {}, "dropped", "gains 0.3%, needs 3%"),
        (ratio(1.09, 1.1, 1.11), {}, "dropped", "latency is 10% worse"),
        (ratio(0.5, 0.51, 0.52), {"memory": 1.2}, "dropped", "memory is 20% worse"),
        (ratio(0.5, 0.51, 0.52), {"memory": 1.09}, "kept", ""),
        (ratio(0.7, 0.9, 1.1, steady=False), {}, "cannot tell", "latency: too noisy to say"),
        (ratio(0.4, 0.5, 0.6, steady=False), {}, "kept", ""),
        (ratio(1.2, 1.5, 1.9, steady=False), {}, "dropped", "latency is 50% worse"),
    ],
)
def test_cost_decides(gain: Ratio, others: dict[str, float], verdict: str, reason: str) -> None:
    found = judge_cost("latency", gain, others)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert "pays at 0.97" in found.margin


# ---- files ----


def test_write_atomically_keeps_the_old_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")

    def fails(descriptor: int) -> None:
        raise OSError("power")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="power"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_publish_replaces_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for name in ("old", "new"):
        staged = tmp_path / "staged"
        staged.mkdir()
        (staged / name).write_text(name)
        files.publish_folder(staged, tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["new"]
    assert not (tmp_path / "staged").exists()


def test_recover_a_folder_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "a").write_text("a")
    files.recover_folder(tmp_path / "out")
    assert (tmp_path / "out" / "a").exists()


# ---- receipts ----


def test_revive_is_the_inverse_of_plain() -> None:
    row = LadderRow(index=1, name="x", kind="stage", verdict="kept", reason="", loss=FINE, weights_bytes=5)
    assert revive(LadderRow, plain(row)) == row
    passage = Passage(source="s", document="d", start=1, tokens=("a",), original=(1.0,), lean=(2.0,), difference=1.0)
    assert revive(Passage, plain(passage)) == passage


def test_unknown_fields_and_schemas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown field 'extra'"):
        revive(Interval, {"low": 0, "mid": 0, "high": 0, "extra": 1})
    folder = tmp_path / "receipts"
    folder.mkdir()
    (folder / "00-run.json").write_text('{"kind": "run", "schema": 99}')
    with pytest.raises(SnelloError, match="has schema 99"):
        receipts.read(tmp_path)
    (folder / "00-run.json").write_text('{"kind": "walk"}')
    with pytest.raises(SnelloError, match="is not a receipt"):
        receipts.read(tmp_path)
    (folder / "00-run.json").unlink()
    with pytest.raises(SnelloError, match="no receipts"):
        receipts.read(tmp_path)


# ---- the sentence ----


def test_the_sentence() -> None:
    found = sentence.proved(
        goal="latency",
        found=Interval(1.8, 1.9, 2.0),
        size_ratio=1.84,
        loss=Interval(0.001, 0.004, 0.0075),
        measure="loss",
        agreement=0.969,
        tokens=61_000,
        unit="tokens",
        self_written=False,
    )
    assert found == (
        "1.9x faster (1.8-2.0), 1.8x smaller; on your text at most 0.8% worse (95%); "
        "97% of next words the same; proved on 61,000 unseen tokens"
    )


def test_bounds_are_rounded_up() -> None:
    assert sentence.at_most(0.0071) == "0.8%"
    assert sentence.at_most(0.0005) == "0.05%"
    assert sentence.at_most(-0.1) == "0.0%"
