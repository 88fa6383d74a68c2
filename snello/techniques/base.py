"""The one shape of every technique that changes what a model is.

A technique is a frozen, keyword-only dataclass: its fields are the options, each with a `help` sentence in the field's
metadata, from which command-line flags, recipe keys, `explain` and the documentation are made. `plan` says how much
(cheap, no weights), `apply` does it. No torch here: a plan is made before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from snello.models.spec import Spec

if TYPE_CHECKING:
    from snello.models.model import Model

Progress = Callable[[str, float], None]


def silent(message: str, fraction: float) -> None:
    """The progress callback that says nothing."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What `apply` is given besides the model: where to write, what to look at, and how.

    `windows` are token ids of the calibration text, which training trains on. The same windows, seed and threads give
    the same bytes. `original` is the model that the ladder began with; `held_out` is text that judges the result, and
    must not be trained on. What a technique keeps in `work_dir` lets it go on after an interruption.
    """

    output: Path
    windows: Sequence[npt.NDArray[np.int32]] = ()
    held_out: Sequence[npt.NDArray[np.int32]] = ()
    original: Model | None = None
    seed: int = 0
    threads: int | None = None
    work_dir: Path | None = None
    progress: Progress = field(default=silent, repr=False)


class Technique(Protocol):
    """`plan` gives the spec that `apply` will stay within: the same skeleton, total bytes no more."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def plan(self, spec: Spec) -> Spec:
        """How much. Raises `Unsupported` with a hint where the technique has nothing to offer this model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Writes a new folder at `context.output` and loads it. Never edits its input."""


@runtime_checkable
class Trains(Protocol):
    """A technique that trains says how much text it wants, and what stands beside it as its control (law 10).

    The control is applied to the original: the same tokens, schedule and seed without what the technique is about.
    """

    @property
    def tokens(self) -> int: ...
    def control(self, spec: Spec) -> Technique | None: ...


def wanted_tokens(technique: Technique) -> int:
    """How many tokens of text a technique would use; 0 where a sample is enough."""
    return technique.tokens if isinstance(technique, Trains) else 0
