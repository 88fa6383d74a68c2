"""Teaching answers: only the tokens of an answer count, in the loss as in the score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.models.reference import Reference
from snello.techniques.adapt import Adapt
from snello.techniques.base import Progress
from snello.training.data import Batch, Rows
from snello.training.loop import Trained, train
from snello.training.options import TrainOptions

WARMUP_SHARE = 0.05
SCORED = 16  # rows that are scored together
NO_ANSWER = -100


@dataclass(frozen=True)
class Answer:
    """`tokens` of a prompt and its answer, which begins at `start`; at least one token stands before it."""

    tokens: npt.NDArray[np.int32]
    start: int


@dataclass(frozen=True)
class AnswerRows(Rows):
    """Rows with `targets` (B, T): the token of an answer at its place, else -100.

    `past` names what else decides a run: the frozen base and the options, which no checkpoint holds.
    """

    starts: tuple[int, ...] = ()
    past: str = ""

    @cached_property
    def digest(self) -> str:
        rows = Rows(self.rows, self.batch, self.seed).digest
        return hashlib.sha256(f"{rows} {self.starts} {self.past}".encode()).hexdigest()

    def at(self, step: int) -> dict[str, Tensor]:
        return _batch([Answer(self.rows[place], self.starts[place]) for place in self.places(step)])


def _batch(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Padded at the end, where causal rows do not look: no mask is needed."""
    longest = max(len(answer.tokens) for answer in answers)
    tokens = torch.zeros(len(answers), longest, dtype=torch.long)
    targets = torch.full((len(answers), longest), NO_ANSWER, dtype=torch.long)
    for number, answer in enumerate(answers):
        row = torch.from_numpy(answer.tokens.astype(np.int64))
        tokens[number, : len(row)] = row
        targets[number, answer.start : len(row)] = row[answer.start :]
    return {"tokens": tokens, "targets": targets}


def token_losses(module: Reference, batch: Batch) -> Tensor:
    """Of all answers' tokens, row after row (N). Logits are made where an answer is, and nowhere else."""
    wanted = batch["targets"][:, 1:] != NO_ANSWER
    rows = module.hidden(batch["tokens"])[:, :-1][wanted]  # (N, D)
    tied = module.embedding.tokens.weight if module.spec.head.tied else None
    logits = module.head(rows[None], None, tied)[0]  # (N, V)
    return F.cross_entropy(logits.float(), batch["targets"][:, 1:][wanted], reduction="none")


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    return token_losses(cast(Reference, module), batch).mean()


def score(module: Reference, answers: Sequence[Answer]) -> list[npt.NDArray[np.float32]]:
    """Loss of each token of each answer, in nats."""
    found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(answers)
    order = sorted(range(len(answers)), key=lambda place: len(answers[place].tokens))
    module.eval()
    for first in range(0, len(order), SCORED):
        places = order[first : first + SCORED]
        with torch.no_grad():
            losses = token_losses(module, _batch([answers[place] for place in places])).numpy()
        ends = np.cumsum([len(answers[place].tokens) - answers[place].start for place in places])
        for place, part in zip(places, np.split(losses, ends[:-1]), strict=True):
            found[place] = part
    return found


def teach(
    module: Reference,
    answers: Sequence[Answer],
    options: Adapt,
    *,
    base: str,
    seed: int,
    threads: int | None,
    progress: Progress,
    work_dir: Path,
) -> Trained:
    """Trains the corrections of `module`; `work_dir` keeps what an interrupted run goes on from."""
    batch = min(options.batch, len(answers))
    rows = AnswerRows(
        [answer.tokens for answer in answers],
        batch,
        seed,
        starts=tuple(answer.start for answer in answers),
        past=f"{base} {options}",
    )
    how = loop_options(options, len(answers), seed=seed, threads=threads)
    return train(module, rows, _loss, how, progress=progress, checkpoint_dir=work_dir)


def loop_options(options: Adapt, examples: int, *, seed: int, threads: int | None) -> TrainOptions:
    """So many passes over so many examples."""
    steps = max(1, math.ceil(options.epochs * examples / min(options.batch, examples)))
    warm = round(WARMUP_SHARE * steps)
    return TrainOptions(steps=steps, rate=options.largest_rate, warmup_steps=warm, seed=seed, threads=threads)
