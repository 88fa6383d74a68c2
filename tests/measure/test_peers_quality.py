"""Faster, and no worse? Every engine is given the same answers, and its logits are compared with the original's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from snello.cli import main
from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.measure.peers.contenders import (
    PEERS,
    Peer,
    contenders,
)
from snello.measure.peers.quality import Quality, pieces_of, verdict
from snello.models import load
from tests.measure.fake_peer import demo_subject


class Sayer:
    """An engine that always says the same, whatever it is given."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def score(self, prompt: Sequence[int], answer: Sequence[int], logits: Path) -> None:
        np.save(logits, np.repeat(self.logits[None], len(answer), axis=0))


def test_divergence_is_that_of_the_original_from_the_engine() -> None:
    original, other = np.log(np.array([0.5, 0.5])), np.log(np.array([0.25, 0.75]))
    read = Quality([np.arange(6)] * 3, 4, [np.repeat(original[None], 2, axis=0)] * 3)
    assert read.positions == 6
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    for found in read.divergences(Sayer(other)):
        np.testing.assert_allclose(found, [expected] * 2, rtol=1e-6)
    padded = np.concatenate([original, [100.0]])  # a vocabulary that an engine has padded
    assert not np.concatenate(read.divergences(Sayer(padded))).any()


def test_pieces_are_spread_over_the_text_and_too_few_are_refused(tmp_path: Path) -> None:
    demo, text = load("demo"), tmp_path / "text.txt"
    text.write_text("def area(radius):\n    return 3.14 * radius ** 2\n" * 400)
    pieces, prompt = pieces_of(demo, text, 40, 8)
    assert prompt == 40 and len(pieces) == 24 and {len(piece) for piece in pieces} == {48}
    ids = demo.tokenizer.encode(text.read_text())
    assert list(pieces[0]) == ids[:48] and list(pieces[-1]) == ids[-48:]
    text.write_text("too short")
    with pytest.raises(SnelloError, match="too few to compare answers on") as found:
        pieces_of(demo, text, 40, 8)
    assert "at least 384 tokens" in str(found.value.hint)
    with pytest.raises(SnelloError, match="cannot read"):
        pieces_of(demo, tmp_path / "absent.txt", 40, 8)


@pytest.mark.parametrize(
    ("speed", "divergence", "said"),
    [
        ((1.1, 1.2, 1.3), (-0.3, -0.2, -0.1), "ahead"),
        ((1.1, 1.2, 1.3), (-0.1, 0.0, 0.1), "faster, KL not told apart"),
        ((1.1, 1.2, 1.3), (0.1, 0.2, 0.3), "faster, at a worse KL"),
        ((0.9, 1.2, 1.3), (-0.3, -0.2, -0.1), "not shown faster"),
    ],
)
def test_ahead_is_faster_at_a_divergence_no_worse(
    speed: tuple[float, float, float], divergence: tuple[float, float, float], said: str
) -> None:
    assert verdict(Interval(*speed), Interval(*divergence)) == said


def test_the_command_line_says_what_each_engine_s_arithmetic_costs(
    fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_subject(fake)
    monkeypatch.setitem(PEERS, "fake", fake)
    (name,) = (one.name for one in contenders([fake], "bf16")[1:])
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def area_{i}(radius):\n    return {i} * radius ** 2\n" for i in range(100)))
    command = ["bench", "demo", "--against", "fake", "--prompt", "32", "--generate", "6", "--repeats", "1"]
    assert main([*command, "--text", str(text), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kl_positions"] == 24 * 6
    ours, theirs = document["rows"]["snello-bf16"]["kl"], document["rows"][name]["kl"]
    assert 0 <= ours["mean"] < 0.01 < 1 < theirs["mean"]
    assert theirs["ours_less_this_90"][1] < 0 and document["rows"][name]["verdict"] in ("ahead", "not shown faster")
    assert main([*command, "--text", str(text)]) == 0
    assert "KL from the original in FP32" in capsys.readouterr().out
    assert main(["bench", "--shape", "tinyllama-1.1b", "--against", "fake", "--text", str(text)]) != 0
