"""From text to batches: packing documents into rows, and the batch of any step without those before it.

A position in the data is nothing but the number of a step, so a run that goes on needs no other memory of it. A batch
is a table of tensors: `tokens` (B, T) and, where rows are padded, `mask` (B, T), 1 on real tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snello.errors import SnelloError

Batch: TypeAlias = Mapping[str, Tensor]
Tokens: TypeAlias = npt.NDArray[np.int32]
POOL = 50  # batches whose rows are sorted by length together


class Batches(Protocol):
    """Data that can be asked for the batch of any step. `digest` names it: the same digest, the same batches."""

    @property
    def digest(self) -> str: ...
    @property
    def tokens_per_step(self) -> float: ...
    def at(self, step: int) -> Batch: ...


def pack(documents: Sequence[Sequence[int] | Tokens], *, length: int, separator: int | None, seed: int) -> list[Tokens]:
    """Documents in a seeded order, end to end with the separator before each, cut into rows of `length`.

    Nothing is padded. The end that fills no row is left out; a text shorter than one row is one short row.

    Raises:
        SnelloError: there is no text.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    gap = [] if separator is None else [np.array([separator], np.int32)]
    pieces = [piece for i in order for piece in (*gap, np.asarray(documents[i], np.int32))]
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if not any(map(len, documents)):
        raise SnelloError("there is no text to train on", "give text: --text yours.txt")
    whole = range(0, len(stream) - length + 1, length)
    return [stream[start : start + length] for start in whole] or [stream]


def padded(rows: Sequence[Tokens]) -> dict[str, Tensor]:
    """Tokens (B, T), and a mask where the rows differ in length."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[number, : len(row)] = 1
    return {"tokens": tokens} if bool(mask.all()) else {"tokens": tokens, "mask": mask}


@dataclass(frozen=True)
class Rows:
    """`batch` rows a step, in an order that is drawn anew for every pass over them.

    Rows that follow each other in a document are far apart in the order: left in place, whole batches would be about
    one document. Rows of different lengths are padded at the end and masked.
    """

    rows: Sequence[Tokens]
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rows or min(map(len, self.rows)) < 1:
            raise SnelloError("there is no text to train on", "give text: --text yours.txt")
        if self.batch < 1:
            raise SnelloError(f"a batch of {self.batch} rows", "give at least one row a step")

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256(f"{self.batch} {self.seed} {[len(row) for row in self.rows]}".encode())
        for row in self.rows:
            total.update(np.asarray(row, np.int32).tobytes())
        return total.hexdigest()

    @property
    def tokens_per_step(self) -> float:
        return self.batch * sum(map(len, self.rows)) / len(self.rows)

    def at(self, step: int) -> dict[str, Tensor]:
        """Tokens (B, T), and a mask where the rows differ in length."""
        return padded([self.rows[i] for i in self.places(step)])

    def places(self, step: int) -> list[int]:
        """Which rows a step sees."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        count = len(self.rows)
        return [int(_order(self.seed, position // count, count)[position % count]) for position in positions]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class LikeLengths(Rows):
    """Rows whose batches hold rows of about one length, so that little is padded.

    Of every pass, in an order that is drawn anew, each run of `POOL` batches is sorted by length and cut; then batches
    are drawn in any order. The rows that fill no batch are left out of that pass.
    """

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{Rows(self.rows, self.batch, self.seed).digest} of like lengths".encode()).hexdigest()

    def places(self, step: int) -> list[int]:
        a_pass = max(1, len(self.rows) // self.batch)
        return self._cut(step // a_pass)[step % a_pass]

    def _cut(self, epoch: int) -> list[list[int]]:
        """The batches of a pass; the last one that was asked for is kept."""
        if self._kept.get("epoch") != epoch:
            order = _order(self.seed, epoch, len(self.rows))
            batches: list[list[int]] = []
            for start in range(0, len(order), POOL * self.batch):
                run = sorted(
                    map(int, order[start : start + POOL * self.batch]), key=lambda place: len(self.rows[place])
                )
                batches += [run[cut : cut + self.batch] for cut in range(0, len(run), self.batch)]
            batches = [rows for rows in batches if len(rows) == self.batch] or batches
            drawn = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
            self._kept.update(epoch=epoch, batches=[batches[number] for number in drawn])
        found: list[list[int]] = self._kept["batches"]
        return found

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class MaskedRows(Rows):
    """Rows for masked-word models: `targets` (B, T) holds the true token where one was chosen, else -100.

    Words are chosen anew at every step (RoBERTa, arXiv:1907.11692). Of the chosen 15%, eight of ten become the mask
    token, one a random token and one stays (BERT, arXiv:1810.04805). `keep` are tokens that are never chosen.
    """

    mask_token: int = 0
    vocab_size: int = 1
    keep: frozenset[int] = frozenset()
    share: float = 0.15

    @cached_property
    def digest(self) -> str:
        own = (Rows(self.rows, self.batch, self.seed).digest, self.mask_token, self.vocab_size, sorted(self.keep))
        return hashlib.sha256(f"{own} {self.share}".encode()).hexdigest()

    def at(self, step: int) -> dict[str, Tensor]:
        batch = super().at(step)
        tokens = batch["tokens"]
        generator = torch.Generator().manual_seed(hash_seed(self.seed, step))
        free = ~torch.isin(tokens, torch.tensor(sorted(self.keep), dtype=torch.long))
        if "mask" in batch:
            free &= batch["mask"].bool()
        chosen = (torch.rand(tokens.shape, generator=generator) < self.share) & free
        fate = torch.rand(tokens.shape, generator=generator)
        random = torch.randint(self.vocab_size, tokens.shape, generator=generator)
        changed = torch.where(fate < 0.8, self.mask_token, torch.where(fate < 0.9, random, tokens))
        return {**batch, "tokens": torch.where(chosen, changed, tokens), "targets": tokens.masked_fill(~chosen, -100)}


def hash_seed(*parts: int) -> int:
    """One seed of several numbers; neighbours give seeds that have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
