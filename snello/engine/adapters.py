"""Adapters that run beside a model: which there are, and the matrices that the core takes for each linear.

A row of a batch names at most one of them, and its linears give `W x + B (A x)`; the scale is inside B. Rows of several
adapters share a batch and the reading of W (Chen et al. 2023, Punica, arXiv 2310.18547; Sheng et al. 2023, S-LoRA,
arXiv 2311.03285). A, B and what is between them are float: FP32, or BF16 where that loses nothing. An adapter that is a
learned prompt changes no linear: its rows stand behind ids past the vocabulary, which come before each text. Shapes: K
inputs, N outputs, R rank, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.adapter import Adapter, read_adapter
from snello.models.model import Floats, Model
from snello.native import core

NONE = -1  # the number of no adapter
PARTS = {"attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}
NOTHING = core.Tensor(np.empty(0, np.uint8), "fp32", 0, 0)


class Adapters:
    """The adapters of one model, in the order in which they were given.

    Args:
        given: by name: a folder, or an adapter that is read already.

    Raises:
        SnelloError: a folder holds none, or one of another base; or it changes what is not changed here.
    """

    def __init__(self, model: Model, given: Mapping[str, str | Path | Adapter]) -> None:
        if given and not model.spec.causal:
            raise Unsupported(
                f"{model.name} is no decoder ({model.spec.task})", "adapters are for models that continue text"
            )
        self.names = tuple(given)
        self._vocabulary = model.spec.vocab_size
        self._prompts: dict[int, Floats] = {}  # rows (N, D), by number
        self._factors: dict[str, list[tuple[core.Tensor, core.Tensor]]] = {}
        self._digests: list[str] = []
        self.rank = 0  # the largest
        for name, source in given.items():
            if not name:
                raise SnelloError("an adapter has no name", "give one: NAME=FOLDER")
            self._take(name, source if isinstance(source, Adapter) else read_adapter(Path(source), model))

    def _take(self, name: str, adapter: Adapter) -> None:
        number, digest = len(self._digests), hashlib.sha256()
        if adapter.magnitudes:
            raise Unsupported(f"the adapter {name} changes the lengths of weights (DoRA)", "merge it to use it here")
        if adapter.prompt is not None:
            if not np.isfinite(adapter.prompt).all():
                raise SnelloError(f"the adapter {name} holds numbers that are not finite", "train or copy it again")
            digest.update(f"prompt {adapter.prompt.shape}".encode() + adapter.prompt.tobytes())
            self._prompts[number] = adapter.prompt
        for linear in sorted(adapter.factors):
            if not _supported(linear):
                raise Unsupported(f"the adapter {name} changes {linear}", "merge it into its base to use it here")
            a, b = adapter.factors[linear]
            b = b * np.float32(adapter.scale)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise SnelloError(f"the adapter {name} holds numbers that are not finite", "train or copy it again")
            digest.update(f"{linear} {a.shape} {b.shape}".encode() + a.tobytes() + b.tobytes())
            pairs = self._factors.setdefault(linear, [])
            pairs += [(NOTHING, NOTHING)] * (number - len(pairs))
            pairs.append((_packed(a), _packed(b)))
        self.rank = max(self.rank, adapter.rank)
        self._digests.append(digest.hexdigest())

    def __len__(self) -> int:
        return len(self.names)

    def number(self, name: str | None) -> int:
        """The number of an adapter, which its rows carry; NONE for None.

        Raises:
            SnelloError: there is none of this name.
        """
        if name is None:
            return NONE
        if name not in self.names:
            known = f"there are: {', '.join(self.names)}" if self.names else "none were given when the model was opened"
            raise SnelloError(f"there is no adapter {name!r}", known)
        return self.names.index(name)

    def digest(self, number: int) -> str:
        """Of what an adapter computes; empty for NONE."""
        return "" if number == NONE else self._digests[number]

    def salt(self, number: int, salt: str) -> str:
        """What keeps pages of one adapter apart from those of others and of the model itself."""
        return salt if number == NONE else f"adapter {self._digests[number]} {salt}"

    def pairs(self, linear: str) -> list[tuple[core.Tensor, core.Tensor]] | None:
        """(A [R, K], scaled B [N, R]) of every adapter, NOTHING where one leaves this linear alone; None: all do."""
        pairs = self._factors.get(linear)
        return None if pairs is None else pairs + [(NOTHING, NOTHING)] * (len(self) - len(pairs))

    def prompt(self, number: int) -> list[int]:
        """Ids that stand before every text of this adapter: past the vocabulary, none for most."""
        if number not in self._prompts:
            return []
        first = self._vocabulary + sum(len(rows) for other, rows in self._prompts.items() if other < number)
        return list(range(first, first + len(self._prompts[number])))

    def row_number(self, number: int) -> int:
        """What its rows carry: NONE where its prompt is all there is."""
        return NONE if number in self._prompts else number

    @property
    def prompts(self) -> core.Tensor | None:
        """The rows of all prompts, in the order of their ids."""
        return _packed(np.concatenate(list(self._prompts.values()))) if self._prompts else None

    @property
    def num_bytes(self) -> int:
        """Of all matrices and prompts."""
        prompts = sum(rows.nbytes for rows in self._prompts.values())
        pairs = [pair for found in self._factors.values() for pair in found]
        return prompts + sum(tensor.data.nbytes for pair in pairs for tensor in pair)


def _supported(linear: str) -> bool:
    """Whether it is one of the plain linears of a block: layers.N.half.part."""
    words = linear.split(".")
    return len(words) == 4 and words[0] == "layers" and words[3] in PARTS.get(words[2], ())


def _packed(values: Floats) -> core.Tensor:
    """Half as many bytes where every value is one of BF16: nothing is rounded."""
    values = np.ascontiguousarray(values, np.float32)
    exact = not (values.view(np.uint32) & 0xFFFF).any()
    return core.pack_float("bf16" if exact else "fp32", values, "fp32")
