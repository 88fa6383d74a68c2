"""Writes safetensors, sharded, one tensor in memory at a time.

The header is written first from shapes alone; then tensors stream in its order. No package is needed to write the
format, and none is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError

DType = Literal["fp32", "bf16", "fp16"]
NAMES: Mapping[DType, tuple[str, int]] = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "fp16": ("F16", 2)}
LARGEST_FP16 = 65504.0

Shapes = Mapping[str, tuple[int, ...]]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shard:
    name: str
    tensors: tuple[str, ...]


def plan_shards(shapes: Shapes, dtype: DType | Mapping[str, DType], shard_bytes: int) -> list[Shard]:
    """Tensors in their order, in files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * NAMES[_of(name, dtype)][1]
        if groups[-1] and filled + num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def write_shards(
    folder: Path,
    shapes: Shapes,
    values: Callable[[str], Floats],
    dtype: DType | Mapping[str, DType],
    shard_bytes: int,
) -> int:
    """Writes all tensors, and the index where there are several files; returns the bytes of the weights.

    `dtype` is one for all, or each tensor's own by name.
    """
    shards = plan_shards(shapes, dtype, shard_bytes)
    for shard in shards:
        _write_file(folder / shard.name, {name: shapes[name] for name in shard.tensors}, values, dtype)
    total = sum(math.prod(shape) * NAMES[_of(name, dtype)][1] for name, shape in shapes.items())
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _of(name: str, dtype: DType | Mapping[str, DType]) -> DType:
    return dtype if isinstance(dtype, str) else dtype[name]


def _write_file(
    path: Path, shapes: Shapes, values: Callable[[str], Floats], dtype: DType | Mapping[str, DType]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind, width = NAMES[_of(name, dtype)]
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = values(name)
            assert tensor.shape == shape, f"{name}: {tensor.shape} is not {shape}"
            file.write(narrow(name, tensor, _of(name, dtype)).tobytes())


def narrow(name: str, values: Floats, dtype: DType) -> npt.NDArray[np.generic]:
    """FP32 to the file's numbers, to nearest even; BF16 as its 16 bits.

    Raises:
        SnelloError: a number is not finite, or outside the range of FP16.
    """
    if not np.isfinite(values).all():
        raise SnelloError(f"{name} holds numbers that are not finite", "the model is damaged; start from the original")
    if dtype == "fp32":
        return values
    if dtype == "fp16":
        largest = float(np.abs(values).max(initial=0.0))
        if largest > LARGEST_FP16:
            message = f"{name} holds {largest:.4g}, over the {LARGEST_FP16:,.0f} of fp16"
            raise SnelloError(message, "--dtype bf16 or fp32")
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def widen(values: npt.NDArray[np.generic], dtype: DType) -> Floats:
    """The inverse of `narrow`, exactly."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
