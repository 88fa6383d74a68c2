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
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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

    `windows` are token ids of the calibration text. The same windows, seed and threads give the same bytes.
    """

    output: Path
    windows: Sequence[npt.NDArray[np.int32]] = ()
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
