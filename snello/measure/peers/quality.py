"""What each engine's own arithmetic costs: KL divergence from the original in FP32, at the settings that were timed.

A faster answer is worth something only where it is no worse. So every engine is given the same pieces of real text: it
reads a piece's beginning as a prompt and then the rest as if it had chosen it, token by token, through the kernels,
cache and types that it was timed with. The logits that it would have chosen from are compared with those of the plain
torch reference of the original checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from snello.engine.resources import free_memory_bytes
from snello.errors import SnelloError
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.guards import kl
from snello.measure.interval import Interval
from snello.measure.peers.turns import Told
from snello.measure.reference import why_not
from snello.models.model import Model

PIECES = 24
MOST_PROMPT, MOST_ANSWER = 256, 64  # of a piece
LEAST_PIECES = 8  # fewer bound nothing


class Scored(Protocol):
    """Something that can be given an answer. `Worker` is one."""

    def score(self, prompt: Sequence[int], answer: Sequence[int], logits: Path) -> None: ...


@dataclass(frozen=True)
class Quality:
    """Pieces of a text and what the original says of them.

    Attributes:
        pieces: token ids, each the prompt and the answer.
        prompt: tokens of each that are read as the prompt.
        original: logits (answer, V) of each piece, FP32.
    """

    pieces: list[np.ndarray]
    prompt: int
    original: list[np.ndarray] = field(repr=False)

    @property
    def positions(self) -> int:
        return sum(len(logits) for logits in self.original)

    def divergences(self, engine: Scored) -> list[np.ndarray]:
        """KL(original || engine) of every position, in nats, by piece."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logits.npy"
            for piece, original in zip(self.pieces, self.original, strict=True):
                engine.score(piece[: self.prompt].tolist(), piece[self.prompt :].tolist(), path)
                found.append(kl(original, np.load(path)[:, : original.shape[1]]))
        return found


def pieces_of(model: Model, text: Path, prompt: int, generate: int) -> tuple[list[np.ndarray], int]:
    """Pieces spread evenly over the text, and how long their prompt is: at most what was timed.

    Raises:
        SnelloError: the text cannot be read, or is too short.
    """
    prompt, answer = min(prompt, MOST_PROMPT), min(generate, MOST_ANSWER)
    try:
        ids = np.array(model.tokenizer.encode(text.read_text(encoding="utf-8")), np.int64)
    except (OSError, UnicodeDecodeError) as error:
        raise SnelloError(f"cannot read {text}: {error}", "give a text file in UTF-8") from None
    length = prompt + answer
    count = min(PIECES, len(ids) // length)
    if count < LEAST_PIECES:
        hint = f"give a text of at least {LEAST_PIECES * length:,} tokens, or a smaller --prompt"
        raise SnelloError(f"{text} has {len(ids):,} tokens, too few to compare answers on", hint)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[start : start + length] for start in starts], prompt


def quality(original: Model, text: Path, prompt: int, generate: int, told: Told) -> Quality:
    """What the original says of the text, computed before any engine is loaded.

    Raises:
        SnelloError: the text is too short, or the FP32 reference cannot run here.
    """
    import torch

    from snello.models.reference import streamed

    pieces, prompt = pieces_of(original, text, prompt, generate)
    if reason := why_not(original, free_memory_bytes()):
        raise SnelloError(f"{original.name} cannot be run in FP32: {reason}", "leave out --text")
    told(f"reading {len(pieces)} pieces of {text.name} with the original in FP32")
    with torch.inference_mode():
        read = streamed(original, [torch.from_numpy(piece)[None] for piece in pieces])
        logits = [found[0, prompt - 1 : -1].float().numpy().copy() for found in read]
    return Quality(pieces, prompt, logits)


def compared(rows: Mapping[str, dict[str, Any]], divergences: Mapping[str, list[np.ndarray]]) -> None:
    """Adds to each row its divergence, ours less its own with the paired interval, and who is ahead."""
    for name, row in rows.items():
        row["kl"] = {"mean": float(np.concatenate(divergences[name]).mean())}
        low, _, high = _bounds(divergences[name])
        row["kl"] |= {"low": low, "high": high}
        if "ours" in row:
            differences = [a - b for a, b in zip(divergences[row["ours"]], divergences[name], strict=True)]
            less, middle, more = _bounds(differences)
            row["kl"] |= {"ours_less_this": middle, "ours_less_this_90": [less, more]}
            slowest, fastest = row["ours_over_this_95"]
            speed = Interval(slowest, row["ours_over_this"], fastest)
            row["verdict"] = verdict(speed, Interval(less, middle, more))


def verdict(speed: Interval, divergence: Interval) -> str:
    """Ahead is faster at a KL that is shown to be no worse.

    Args:
        speed: ours over theirs.
        divergence: ours less theirs, in nats.
    """
    if speed.low <= 1.0:
        return "not shown faster"
    if divergence.high <= 0.0:
        return "ahead"
    return "faster, at a worse KL" if divergence.low > 0.0 else "faster, KL not told apart"


def _bounds(values: list[np.ndarray]) -> tuple[float, float, float]:
    found = mean_interval(Clusters.of(values, list(range(len(values)))), seed=0)
    return found.low, found.mid, found.high
