"""On-policy rows: the student goes on from the beginnings of the text itself, and the teacher scores what it said.

A student that learns from text alone never sees its own mistakes, which is where it ends up when it writes. So a share
of the rows keeps only its first quarter; the rest is what the student says, drawn at temperature 1 by the engine, all
rows of a period in one batch (generalized knowledge distillation, arXiv:2306.13649). The student answers anew every
`refresh` steps, with the weights of that step. Those answers cannot be computed again later, so they lie beside the
checkpoint: a run that goes on in the middle of a period reads them, and one that goes on before it says the same again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snello.errors import SnelloError
from snello.models.model import Floats, Model
from snello.models.pack_cache import pack
from snello.models.packed import PackedWeights
from snello.models.packed_writer import PackedWriter
from snello.models.reference import Reference
from snello.models.spec import Deployment, Spec
from snello.training.checkpoint import saved_step
from snello.training.data import Rows, hash_seed, padded

if TYPE_CHECKING:
    from snello.engine.engine import Engine

Tokens: TypeAlias = npt.NDArray[np.int32]
BEGINNING = 4  # a quarter of a row is the text's
REFRESH = 50  # steps after which the student answers anew
TOGETHER = 16  # answers at a time
NOTHING = -1  # fills the ends of rows in the file


class StudentWeights:
    """The weights of a module in training, by canonical name."""

    def __init__(self, student: Reference) -> None:
        self._parameters = dict(student.named_parameters())

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def values(self, name: str) -> Floats:
        found: Floats = self._parameters[name].detach().float().cpu().numpy()
        return found


class OnPolicyRows:
    """Batches of `rows` in which a share of the rows is the student's own. `text` (B, T) is 1 on the text's tokens.

    Args:
        student: the module that is trained; read when a period begins.
        source: whose tokenizer and name it has.
        spec: of the student.
        folder: where answers are kept while training goes on.
        tell: hears what was answered.
    """

    def __init__(
        self,
        rows: Rows,
        student: Reference,
        source: Model,
        spec: Spec,
        *,
        share: float,
        refresh: int,
        folder: Path,
        threads: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.rows, self.share, self.refresh, self.folder = rows, share, refresh, folder
        self._student, self._source, self._spec = student, source, spec
        self._threads, self._tell = threads, tell
        self._period, self._answers = -1, dict[tuple[int, int], Tokens]()

    @property
    def digest(self) -> str:
        own = (self.rows.digest, self.share, self.refresh, BEGINNING, "on-policy")
        return hashlib.sha256(repr(own).encode()).hexdigest()

    @property
    def tokens_per_step(self) -> float:
        return self.rows.tokens_per_step

    def at(self, step: int) -> dict[str, Tensor]:
        """The batch of a step; the steps of a period are asked for after its first, or after an interruption."""
        if self._period != step // self.refresh:
            self._begin(step)
        chosen, own = [self.rows.rows[place] for place in self.rows.places(step)], self.own_slots(step)
        begins = [beginning(len(row)) if slot in own else len(row) for slot, row in enumerate(chosen)]
        said = [self._answers[step, slot] if slot in own else row for slot, row in enumerate(chosen)]
        batch = padded(said)
        positions = torch.arange(batch["tokens"].shape[1])
        return {**batch, "text": (positions < torch.tensor(begins)[:, None]).long()}

    def own_slots(self, step: int) -> range:
        """Which rows of a step's batch are the student's: over many steps their share is the one asked for."""
        begin, end = (int((number * self.rows.batch) * self.share + 1e-9) for number in (step, step + 1))
        return range(end - begin)

    # ---- a period

    def _begin(self, step: int) -> None:
        period = step // self.refresh
        first = period * self.refresh
        slots = [(number, slot) for number in range(first, first + self.refresh) for slot in self.own_slots(number)]
        path = self.folder / f"rollouts.{period}.npy"
        if step == first:
            self._keep(path, self._answer(slots))
        if not path.exists():
            message = f"{path} is gone, and a training cannot go on without what its student said"
            raise SnelloError(message, f"begin anew: rm -r {self.folder}")
        found = np.load(path, allow_pickle=False)
        self._answers = {key: row[row != NOTHING] for key, row in zip(slots, found, strict=True)}
        self._period = period
        self._forget(period)

    def _forget(self, period: int) -> None:
        """Answers of earlier periods, but for that of the checkpoint: a run that is killed goes on from there."""
        saved = saved_step(self.folder)
        needed = None if saved is None else saved // self.refresh
        for old in self.folder.glob("rollouts.*.npy"):
            number = int(old.name.split(".")[1])
            if number < period and number != needed:
                old.unlink()

    def _keep(self, path: Path, answers: Sequence[Tokens]) -> None:
        table = np.full((len(answers), max(map(len, answers), default=0)), NOTHING, np.int32)
        for number, row in enumerate(answers):
            table[number, : len(row)] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with beside.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        os.replace(beside, path)

    def _answer(self, slots: Sequence[tuple[int, int]]) -> list[Tokens]:
        """Whole rows: the text's beginning and what the student says to it."""
        from snello.engine.engine import Engine, EngineOptions
        from snello.engine.native import NativeExecutor

        if not slots:
            return []
        rows = [self.rows.rows[self.rows.places(step)[slot]] for step, slot in slots]
        longest = max(map(len, rows))
        deployment = Deployment(context=longest, threads=self._threads, streams=TOGETHER, max_num_seqs=TOGETHER)
        path = self.folder / f".student.{os.getpid()}.safetensors"
        try:
            with NativeExecutor(self._packed(path), deployment) as executor:
                engine = Engine(executor, self._source.tokenizer, EngineOptions(max_num_seqs=TOGETHER))
                said = continued(engine, rows, [hash_seed(self.rows.seed, *slot) for slot in slots])
        finally:
            path.unlink(missing_ok=True)
        count = sum(map(len, said)) - sum(beginning(len(row)) for row in rows)
        self._tell(f"distill: the student answered {len(said):,} beginnings with {count:,} tokens")
        return said

    def _packed(self, path: Path) -> Model:
        """The student as it is now, in its own number type."""
        source = self._source
        plain = Model(spec=self._spec, weights=StudentWeights(self._student), path=source.path, name=source.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with PackedWriter(path, self._spec) as writer:
            pack(plain, writer)
        return Model(spec=self._spec, weights=PackedWeights(path, self._spec), path=source.path, name=source.name)


def beginning(length: int) -> int:
    """How many tokens of a row the text keeps; a row of one token is all text."""
    return max(1, length // BEGINNING)


def continued(engine: Engine, rows: Sequence[Tokens], seeds: Sequence[int]) -> list[Tokens]:
    """Each row's beginning with what the model says to it, at most to the row's length."""
    from snello.engine.request import SamplingParams

    begins = [np.asarray(row[: beginning(len(row))], np.int32) for row in rows]
    said: dict[int, list[int]] = {}
    numbers: list[int | None] = []
    for row, begin, seed in zip(rows, begins, seeds, strict=True):
        if len(begin) == len(row):
            numbers.append(None)
            continue
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=len(row) - len(begin))
        number = engine.add(begin.tolist(), params)
        numbers.append(number)
        said[number] = []
    unfinished = set(said)
    while unfinished:
        for number, chunk in engine.step():
            if chunk.token_id is not None:
                said[number].append(chunk.token_id)
            if chunk.finish_reason is not None:
                unfinished.discard(number)
    ends = [np.array(said[number] if number is not None else [], np.int32) for number in numbers]
    return [np.concatenate(pair) for pair in zip(begins, ends, strict=True)]
