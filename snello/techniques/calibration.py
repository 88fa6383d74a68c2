"""Calibration text streamed through the model, one block's weights in memory at a time; shared by the techniques.

The hidden rows of all windows wait between blocks. A block is walked half by half and, within a half, input by input:
`statistic` (or `energy`) looks at an input, the caller changes the linears that read it and puts them back with
`replace`, and so everything later sees the model as it will be. Peak memory: the hidden rows, one block, one Gram
matrix.

Experts see the rows that the router sends them, and text reaches them unevenly. One that is sent fewer rows than its
input has channels could not be calibrated (its Gram matrix would be of low rank), so it gets as many rows as channels:
those sent, then the ones that came nearest to being sent, by the router's share. No expert is left out or to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.errors import SnelloError
from snello.models.model import Model
from snello.models.plain_folder import check_free, shaped_config
from snello.models.reference import Block, build_block, build_embedding, build_head
from snello.models.reference_layers import Expert, ExpertsHalf, Half
from snello.models.spec import Spec
from snello.techniques.base import Context

Windows = Sequence[npt.NDArray[np.int32]]

MAX_TOKENS = 32_768  # more calibration text than this changes nothing measurable
SAMPLED_ROWS = 512
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Statistic:
    """What was seen at one input: `gram` = X^T X / rows (K, K), `peaks` the largest (K), some `rows` (M, K)."""

    gram: Tensor
    peaks: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Routing:
    """Where the router of one layer sends all rows: `sent` (N, X), and the `shares` (N, X) that it gave."""

    position: int
    sent: Tensor
    shares: Tensor

    def rows(self, expert: int, least: int) -> Tensor:
        """Which rows (N) this expert is calibrated on: those sent, and more up to `least`, the nearest first."""
        sent = self.sent[:, expert]
        missing = min(least, len(sent)) - int(sent.sum())
        if missing <= 0:
            return sent
        nearest = torch.where(sent, -1.0, self.shares[:, expert]).sort(descending=True, stable=True).indices
        return sent.index_fill(0, nearest[:missing], True)


class Calibrator:
    """Asked for inputs in the order of computation; remembers how far it has walked.

    Inputs have their canonical names; `layers.{i}.ffn.experts.{e}.in` is the part of `layers.{i}.ffn.in` that one
    expert is calibrated on.
    """

    def __init__(self, model: Model, windows: Windows, textless: str | None = None) -> None:
        self.model = model
        self.windows = check_windows(model, windows, textless)
        embedding = build_embedding(model.spec, model.weights)
        self.hidden = [embedding(tokens) for tokens in together(self.windows)]  # (B, T, D) each
        self.position = 0  # halves walked: block position // 2, its attention or its feed-forward
        self.block: Block | None = None
        self.routing: Routing | None = None

    def statistic(self, name: str) -> Statistic:
        """Of an input by its name, with everything before it as it is now."""
        sample = RowSample(self._count(name))
        gram: Tensor | None = None
        peaks: list[Tensor] = []
        for x in self._inputs(name):
            sample.add(x)
            peaks.append(x.abs().amax(0))
            gram = x.T @ x if gram is None else gram.addmm_(x.T, x)
        assert gram is not None
        return Statistic(gram / sample.seen, torch.stack(peaks).amax(0), torch.cat(sample.rows))

    def sample(self, name: str, count: int) -> Tensor:
        """About so many rows of an input (M, K), spread evenly over all text."""
        sample = RowSample(self._count(name), count)
        for x in self._inputs(name):
            sample.add(x)
        return torch.cat(sample.rows)

    def largest(self, name: str, prepare: Callable[[Tensor], Tensor]) -> float:
        """The largest magnitude at an input, prepared so, of all text."""
        return max(prepare(x).abs().max().item() for x in self._inputs(name))

    def energy(self, name: str) -> Tensor:
        """Mean square of each channel of an input (K), in double: the diagonal of `gram`, without the rest."""
        total, seen = torch.zeros(1, dtype=torch.float64), 0
        for x in self._inputs(name):
            total, seen = total + x.double().square().sum(0), seen + len(x)
        return total / seen

    def replace(self, linear: str, weight: Tensor) -> None:
        """Give a linear of the current block its effective weights."""
        if linear.startswith("layers."):
            _, index, half, part = linear.split(".", 3)
            assert self.block is not None and int(index) == self.position // 2
            self.block.get_submodule(f"{half}.{part}").weight = nn.Parameter(weight, requires_grad=False)

    def _inputs(self, name: str) -> Iterator[Tensor]:
        """Rows (B T, K) of this input, batch by batch."""
        if not name.startswith("layers."):
            yield from self._head_inputs()
            return
        _, index, half_name, *expert, last = name.split(".")
        self._walk_to(2 * int(index) + (half_name == "ffn"))
        half = self._half()
        if expert:
            yield from self._expert_inputs(cast(ExpertsHalf, half), int(expert[1]), last)
            return
        for x in self.hidden:
            y = half.prepare(x)
            yield (y if last == "in" else half.inner(y, None)).flatten(0, 1)

    def sent(self, expert: str, rows: Tensor) -> Tensor:
        """Those of some rows (M, K) of `layers.{i}.ffn.in` that the router sends to `layers.{i}.ffn.experts.{e}`."""
        _, index, _, _, number = expert.split(".")
        self._walk_to(2 * int(index) + 1)
        chosen, _ = cast(ExpertsHalf, self._half()).route(rows)
        return rows[(chosen == int(number)).any(-1)]

    def num_sent(self, layer: int) -> list[int]:
        """How many rows of all text the router of this layer sends to each expert."""
        self._walk_to(2 * layer + 1)
        return [int(count) for count in self._routing(cast(ExpertsHalf, self._half())).sent.sum(0)]

    def _expert_inputs(self, half: ExpertsHalf, number: int, last: str) -> Iterator[Tensor]:
        expert, rows = cast(Expert, half.experts[number]), self._rows(half, number, last)
        for x, chosen in zip(self.hidden, torch.split(rows, [x[..., 0].numel() for x in self.hidden]), strict=True):
            if bool(chosen.any()):
                y = half.prepare(x.flatten(0, 1)[chosen])
                yield y if last == "in" else expert.inner(y)

    def _rows(self, half: ExpertsHalf, number: int, last: str) -> Tensor:
        linear = cast(Expert, half.experts[number]).up if last == "in" else cast(Expert, half.experts[number]).down
        return self._routing(half).rows(number, linear.in_features)

    def _routing(self, half: ExpertsHalf) -> Routing:
        """Of the layer at hand: its router is not rewritten, so this stays as it is while the layer is worked on."""
        if self.routing is None or self.routing.position != self.position:
            shares = torch.cat([half.shares(half.prepare(x.flatten(0, 1))) for x in self.hidden])
            chosen = shares.topk(half.mixture.num_active).indices
            sent = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, chosen, True)
            self.routing = Routing(self.position, sent, shares)
        return self.routing

    def _count(self, name: str) -> int:
        """How many rows this input has."""
        if ".experts." not in name:
            return sum(len(w) for w in self.windows)
        _, index, _, _, number, last = name.split(".")
        self._walk_to(2 * int(index) + 1)
        return int(self._rows(cast(ExpertsHalf, self._half()), int(number), last).sum())

    def _head_inputs(self) -> Iterator[Tensor]:
        self._walk_to(2 * len(self.model.spec.layers))
        tail = build_head(self.model.spec, self.model.weights)
        for x in self.hidden:
            yield tail.head.features(tail.normed(x)).flatten(0, 1)

    def _walk_to(self, position: int) -> None:
        while self.position < position:
            half, block = self._half(), self._block()
            if not block.parallel:
                self.hidden = [half(x) for x in self.hidden]
            elif self.position % 2:  # both halves of a parallel block read its input: it stays until both are done
                self.hidden = [block(x) for x in self.hidden]
            self.position += 1
            self.block = self.block if self.position % 2 else None

    def _half(self) -> Half:
        return self._block().ffn if self.position % 2 else self._block().attention

    def _block(self) -> Block:
        if self.block is None:
            self.block = build_block(self.model.spec, self.position // 2, self.model.weights)
        return self.block


def together(windows: Windows) -> list[Tensor]:
    """Windows of one length as one batch (B, T), up to `BATCH_TOKENS`: sentences are not walked one by one.

    Longer windows stay alone and in their order.
    """
    lengths: dict[int, list[npt.NDArray[np.int32]]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    batches: list[Tensor] = []
    for length, group in lengths.items():
        size = max(1, BATCH_TOKENS // length)
        stacked = np.stack(group).astype(np.int64)
        batches += [torch.from_numpy(stacked[start : start + size]) for start in range(0, len(group), size)]
    return batches


def block_influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """1 - the mean cosine of a row before and after."""
    cosines = torch.cat([F.cosine_similarity(x, y, dim=-1).flatten() for x, y in zip(before, after, strict=True)])
    return 1.0 - float(cosines.double().mean())


class RowSample:
    """Every n-th row of all that pass, so that about `count` remain, spread evenly."""

    def __init__(self, total: int, count: int = SAMPLED_ROWS) -> None:
        self.stride = max(1, total // count)
        self.seen = 0
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        first = -self.seen % self.stride
        self.rows.append(x[first :: self.stride].clone())
        self.seen += len(x)


def begin(model: Model, planned: Spec, context: Context) -> Windows:
    """The text to look at, for a technique that writes a plain checkpoint; what would fail fails before time is spent.

    Raises:
        SnelloError: no text, a folder that is taken, or a shape that no config says.
    """
    windows = check_windows(model, context.windows)
    check_free(context.output)
    shaped_config(model, planned)
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    return windows


def check_windows(model: Model, windows: Windows, textless: str | None = None) -> Windows:
    """As many windows as are useful, evenly spread; an error where there is none or one does not fit the model.

    `textless` says in the hint what can be used where there is no text, if anything can.
    """
    check_fit(model, windows, textless)
    tokens = sum(len(w) for w in windows)
    keep = max(1, min(len(windows), len(windows) * MAX_TOKENS // tokens))
    return [windows[i * len(windows) // keep] for i in range(keep)]


def check_fit(model: Model, windows: Windows, textless: str | None = None, *, use: str = "calibrate") -> None:
    """Refuses text that is not there, or that this model cannot read."""
    if not windows:
        hint = f"give text, or use {textless}" if textless else "give text like the model's work: --text yours.txt"
        raise SnelloError(f"this {use}s on text, and none was given", hint)
    longest, largest = max(len(w) for w in windows), max(int(w.max()) for w in windows)
    if longest > model.spec.max_positions:
        raise SnelloError(
            f"a window of {longest} tokens, the model has {model.spec.max_positions} positions",
            "cut the text into shorter windows",
        )
    if largest >= model.spec.vocab_size:
        raise SnelloError(
            f"token {largest} in the text, the vocabulary has {model.spec.vocab_size}",
            "tokenize the text with this model's own tokenizer",
        )
