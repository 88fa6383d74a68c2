"""Teaching an encoder labels: by corrections of low rank, by its head alone, or with all weights.

The head is what `models.classifier` put there. With corrections the last linear learns whole, and a pooler that nobody
has trained; one that the checkpoint holds is corrected like any other linear. Where only the head learns, each text is
read once and its first row kept: the frozen rest says the same at every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.models.classifier import HEAD, POOLER, Classifier
from snello.models.model import Floats
from snello.models.reference import Reference
from snello.techniques.adapt.lora import LowRank, with_corrections
from snello.techniques.adapt.train import loop_options
from snello.training.data import Batch, LikeLengths, Rows, padded
from snello.training.loop import Trained, attention_for, train

if TYPE_CHECKING:
    from snello.techniques.adapt import Adapt
    from snello.techniques.base import Progress

READ = 64  # texts that are read together


@dataclass(frozen=True)
class Labelled:
    """`tokens` of a text (T,), and the number of its label."""

    tokens: npt.NDArray[np.int32]
    label: int


@dataclass(frozen=True)
class LabelledRows(LikeLengths):
    """Rows with `targets` (B,). `past` names what else decides a run: the frozen base and the options."""

    labels: tuple[int, ...] = ()
    past: str = ""

    @cached_property
    def digest(self) -> str:
        rows = LikeLengths(self.rows, self.batch, self.seed).digest
        return hashlib.sha256(f"{rows} {self.labels} {self.past}".encode()).hexdigest()

    def at(self, step: int) -> dict[str, Tensor]:
        places = self.places(step)
        targets = torch.tensor([self.labels[place] for place in places])
        return padded([self.rows[place] for place in places]) | {"targets": targets}


@dataclass(frozen=True)
class FirstRows(Rows):
    """What a frozen encoder says of each text, `first` (B, 1, D), with `targets` (B,)."""

    labels: tuple[int, ...] = ()
    first: Tensor | None = None
    past: str = ""

    @cached_property
    def digest(self) -> str:
        rows = Rows(self.rows, self.batch, self.seed).digest
        return hashlib.sha256(f"{rows} {self.labels} {self.past}".encode()).hexdigest()

    def at(self, step: int) -> dict[str, Tensor]:
        places = self.places(step)
        assert self.first is not None
        return {"first": self.first[places][:, None], "targets": torch.tensor([self.labels[place] for place in places])}


def learner(classifier: Classifier, options: Adapt, seed: int) -> Reference:
    """The classifier with what is to learn left trainable, and everything else frozen."""
    if options.method == "lora":
        module = with_corrections(classifier.model, options, seed, whole=frozenset(classifier.fresh & set(POOLER)))
        whole = {*HEAD, *(classifier.fresh & set(POOLER))}
    else:
        module = Reference.from_model(classifier.model)
        whole = {*HEAD, *POOLER} if options.method == "head" else {name for name, _ in module.named_parameters()}
        module.requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name in whole:
            parameter.requires_grad_(True)
    return module


def teach(
    module: Reference,
    texts: Sequence[Labelled],
    options: Adapt,
    *,
    base: str,
    seed: int,
    threads: int | None,
    progress: Progress,
    work_dir: Path | None,
) -> Trained:
    """Trains what is trainable in `module`; `work_dir` keeps what an interrupted run goes on from."""
    batch, labels = min(options.batch, len(texts)), tuple(text.label for text in texts)
    how = loop_options(options, len(texts), seed=seed, threads=threads)
    rows, past = [text.tokens for text in texts], f"{base} {options}"
    if options.method != "head":
        batches = LabelledRows(rows, batch, seed, labels=labels, past=past)
        with attention_for(max(map(len, rows))):
            return train(module, batches, _loss, how, progress=progress, checkpoint_dir=work_dir)
    if threads is not None:
        torch.set_num_threads(threads)
    progress(f"read {len(texts):,} texts, each once: the encoder stays as it is", 0.0)
    first = torch.from_numpy(_by_length(lambda batch: _first(module, batch), texts))
    seen = FirstRows(rows, batch, seed, labels=labels, first=first, past=past)
    return train(module.head, seen, _head_loss, how, progress=progress, checkpoint_dir=work_dir)


def score(module: Reference, texts: Sequence[Labelled]) -> Floats:
    """Logits (N, L) of each text, in FP32."""
    module.eval()
    return _by_length(lambda batch: cast(Tensor, module(batch["tokens"], mask=batch.get("mask"))), texts)


def learned(module: Reference) -> dict[str, Floats]:
    """What was trained whole, by canonical name; corrections are in `lora.factors`."""
    factors = {id(p) for part in module.modules() if isinstance(part, LowRank) for p in (part.a, part.b)}
    return {
        name: parameter.detach().numpy().copy()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in factors
    }


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    logits = cast(Reference, module)(batch["tokens"], mask=batch.get("mask"))  # (B, L)
    return F.cross_entropy(logits.float(), batch["targets"])


def _head_loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch["first"]).float(), batch["targets"])


def _first(module: Reference, batch: Batch) -> Tensor:
    return module.hidden(batch["tokens"], mask=batch.get("mask"))[:, 0]


def _by_length(answer: Callable[[Batch], Tensor], texts: Sequence[Labelled]) -> Floats:
    """(N, ...): what is answered to each text, read in batches of like lengths."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].tokens))
    found: list[Floats] = []
    for start in range(0, len(order), READ):
        with torch.no_grad():
            batch = padded([texts[place].tokens for place in order[start : start + READ]])
            found.append(answer(batch).float().numpy())
    sorted_rows = np.concatenate(found)
    rows = np.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return rows
