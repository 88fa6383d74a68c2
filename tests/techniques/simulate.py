"""Quantized models inside the reference, for tests: a writer that records, and 8-bit activations by hooks.

The recorded matrices come back to the plain basis by formulas of their own (a Hadamard matrix from popcounts of
indices), so that a mistake in the library's basis does not cancel out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Format, Spec, input_name, linear_names
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.twins import DictWeights


class RecordingWriter:
    """Keeps what `PackedWriter` would be given."""

    def __init__(self) -> None:
        self.plain: dict[str, np.ndarray] = {}
        self.int8: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.grouped: dict[str, tuple[str, np.ndarray, np.ndarray, np.ndarray, int]] = {}
        self.order: list[str] = []

    def add_float(self, name: str, tensor: Any, format: str) -> None:
        self._note(name)
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format]
        self.plain[name] = torch.from_numpy(tensor).to(kind).float().numpy()

    def add_vector(self, name: str, values: np.ndarray) -> None:
        self._note(name)
        assert values.dtype == np.float32
        self.plain[name] = values

    def add_int8(self, name: str, q: np.ndarray, row_scale: np.ndarray) -> None:
        self._note(name)
        assert q.dtype == np.int8 and q.shape[1] % 64 == 0 and row_scale.dtype == np.float32
        self.int8[name] = (q, row_scale)

    def add_grouped(
        self, name: str, format: str, q: np.ndarray, group_scale: np.ndarray, row_scale: np.ndarray, group_size: int
    ) -> None:
        self._note(name)
        assert q.dtype == np.uint8 and row_scale.dtype == np.float32
        assert q.shape[1] % 64 == 0 and group_scale.shape[1] == -(-q.shape[1] // group_size)
        self.grouped[name] = (format, q, group_scale, row_scale, group_size)

    def stored(self, name: str) -> np.ndarray:
        """A matrix as stored: integers times scales, still in its basis."""
        if name in self.int8:
            q, row_scale = self.int8[name]
            return q.astype(np.float32) * row_scale[:, None]
        format, q, group_scale, row_scale, group_size = self.grouped[name]
        steps = np.repeat(group_scale.astype(np.float32), group_size, axis=1)[:, : q.shape[1]] * row_scale[:, None]
        return (q.astype(np.float32) - (8 if format == "int4" else 4)) * steps

    def _note(self, name: str) -> None:
        assert name not in self.order, f"{name} written twice"
        self.order.append(name)


def hadamard(columns: int) -> np.ndarray:
    """The block-diagonal orthonormal matrix of docs/numerics.md."""
    block = 128 if columns % 128 == 0 else 64
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return np.kron(np.eye(columns // block), np.array(signs)).astype(np.float32) / np.float32(block**0.5)


def plain_model(recorded: RecordingWriter, spec: Spec, source: Model) -> Model:
    """The recorded model with effective weights in the plain basis."""
    arrays = dict(recorded.plain)
    for linear in linear_names(spec):
        name = "embedding.tokens.weight" if linear == "head" and spec.head.tied else f"{linear}.weight"
        if name in recorded.int8 or name in recorded.grouped:
            stored, format = recorded.stored(name), spec.format(linear)
            stored = stored @ hadamard(stored.shape[1]) if format.rotate else stored
            stored = stored / recorded.plain[f"inputs.{input_name(linear)}.scale"] if format.equalize else stored
            arrays[name] = stored[:, : source.weights.shape(name)[1]]
    if "embedding.tokens.weight" not in arrays:
        arrays["embedding.tokens.weight"] = recorded.stored("embedding.tokens.weight")[:, : spec.hidden_size]
    kept = {name: arrays[name] for name in source.weights.names()}
    return Model(spec=spec, weights=DictWeights(kept), path=source.path, name=f"{source.name} quantized")


def quantized_reference(
    options: Quantize, source: Model, windows: Sequence[np.ndarray] = (), activations: bool = True
) -> Reference:
    """The quantized model as a reference that behaves as the executor will, 8-bit activations included."""
    from snello.techniques.quantize.apply import decide, fill

    context = Context(output=Path("unused"), windows=windows)
    spec, _ = decide(options, source, context)
    recorded = RecordingWriter()
    fill(recorded, options, source, spec, context)
    reference = Reference.from_model(plain_model(recorded, spec, source))
    if activations:
        hook_activations(reference, spec, recorded)
    return reference


def hook_activations(reference: Reference, spec: Spec, recorded: RecordingWriter) -> None:
    """Every linear of a block sees its input as 8-bit activations in the stored basis would give it."""
    for linear in linear_names(spec):
        format = spec.format(linear)
        if format.activations != "float" and linear.startswith("layers."):
            scale, step = (recorded.plain.get(f"inputs.{input_name(linear)}.{part}") for part in ("scale", "step"))
            assert (step is not None) == (format.activations == "int8-static")
            reference.get_submodule(linear).register_forward_pre_hook(_rounding_hook(format, scale, step))


def _rounding_hook(format: Format, scale: np.ndarray | None, static: np.ndarray | None) -> Any:
    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = arguments[0]
        columns, padded = x.shape[-1], -(-x.shape[-1] // 64) * 64
        divisor = torch.ones(padded) if scale is None else torch.from_numpy(scale)
        h = torch.from_numpy(hadamard(padded)) if format.rotate else torch.eye(padded)
        y = (torch.nn.functional.pad(x, (0, padded - columns)) / divisor) @ h
        step = (y.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30) if static is None else torch.from_numpy(static)
        return (((y / step).round().clamp(-127, 127) * step) @ h * divisor)[..., :columns]

    return hook
