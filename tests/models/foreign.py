"""Other tools' layouts, written from their definition one field at a time: nothing is shared with what reads them.

`pack` puts numbers into words with Python's integers; `quantize` chooses integers as anybody would; `rewrite` turns a
checkpoint's linears into modules of a layout and gives the weights that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
Tensors = dict[str, torch.Tensor]
Module = tuple[dict[str, Array], Array]  # tensors by ending, and w[n, k] by definition


def pack(values: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Unsigned numbers (R, C) along C into int32 words; field j of a word holds number order[j] of its row of them."""
    per_word = 32 // bits
    words = np.zeros((len(values), -(-values.shape[1] // per_word)), np.uint32)
    for row in range(len(values)):
        for word in range(words.shape[1]):
            total = 0
            for j in range(per_word):
                place = word * per_word + (order[j] if order else j)
                if place < values.shape[1]:
                    total |= int(values[row, place]) << (bits * j)
            words[row, word] = total
    return words.view(np.int32)


def quantize(w: Array, bits: int, groups: Array, symmetric: bool) -> tuple[Array, Array, Array]:
    """Unsigned q (N, K), zeros (N, G) and FP16 scales (N, G), column k in group groups[k]."""
    top, count = (1 << bits) - 1, int(groups.max()) + 1
    scales, zeros = np.zeros((len(w), count), np.float16), np.zeros((len(w), count), np.int64)
    for group in range(count):
        part = w[:, groups == group]
        if symmetric:
            scales[:, group], zeros[:, group] = 2 * np.abs(part).max(1) / top, 1 << (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.round(-low / scales[:, group].astype(np.float32)), 1, top)
    step = scales[:, groups].astype(np.float32)
    return np.clip(np.round(w / step) + zeros[:, groups], 0, top).astype(np.int64), zeros, scales


def defined(q: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """w[n, k] = (q[n, k] - z) * s in double, rounded to FP16."""
    return ((q - zeros[:, groups]) * scales[:, groups].astype(np.float64)).astype(np.float16)


def groups_of(columns: int, size: int, shuffled: bool) -> Array:
    groups = np.arange(columns) // (size if size > 0 else columns)
    return np.random.default_rng(0).permutation(groups) if shuffled else groups


def gptq(w: Array, *, bits: int, size: int, symmetric: bool, shuffled: bool, version: int) -> Module:
    groups = groups_of(w.shape[1], size, shuffled)
    q, zeros, scales = quantize(w, bits, groups, symmetric)
    stored = {
        "qweight": pack(q, bits).T,
        "qzeros": pack(zeros.T - (version == 1), bits),
        "scales": scales.T,
        "g_idx": groups.astype(np.int32),
    }
    return stored, defined(q, zeros, scales, groups)


def awq(w: Array, *, size: int) -> Module:
    groups, order = groups_of(w.shape[1], size, False), (0, 2, 4, 6, 1, 3, 5, 7)
    q, zeros, scales = quantize(w, 4, groups, False)
    stored = {"qweight": pack(q.T, 4, order), "qzeros": pack(zeros.T, 4, order), "scales": scales.T}
    return stored, defined(q, zeros, scales, groups)


def compressed(
    w: Array, *, bits: int, size: int, symmetric: bool, packed: bool = True, shuffled: bool = False
) -> Module:
    groups = groups_of(w.shape[1], size, shuffled)
    q, zeros, scales = quantize(w, bits, groups, symmetric)
    if packed:
        stored = {"weight_packed": pack(q, bits), "weight_shape": np.array(w.shape, np.int64)}
    else:
        stored = {"weight": (q - (1 << (bits - 1))).astype(np.int8)}
    stored["weight_scale"] = scales
    if not symmetric:
        signed = (zeros - (1 << (bits - 1))).astype(np.int8)
        stored["weight_zero_point"] = pack(zeros.T, bits).T if packed else signed
    if shuffled:
        stored["weight_g_idx"] = groups.astype(np.int32)
    return stored, defined(q, zeros, scales, groups)


def rewrite(
    folder: Path, settings: dict[str, Any], module: Callable[[Array], Module], *, bias: bool = False
) -> dict[str, Array]:
    """Every projection of an FP16 checkpoint in this layout; returns what each `.weight` must read as."""
    tensors, kept, expected = load_file(folder / "model.safetensors"), Tensors(), dict[str, Array]()
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            kept[name] = tensor
            continue
        stored, expected[name] = module(tensor.float().numpy())
        stem = name.removesuffix("weight")
        kept |= {stem + key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in stored.items()}
        if bias and f"{stem}bias" not in tensors:
            kept[f"{stem}bias"] = torch.zeros(len(tensor), dtype=torch.float16)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected
