"""compressed-tensors (LLM Compressor, vLLM): `pack-quantized` and `int-quantized`, 4 and 8 bits.

pack-quantized: weight_packed (N, K bits / 32) words of q + 2^(bits - 1); weight_scale (N, G); weight_shape (2); where
asymmetric weight_zero_point, packed along N; weight_g_idx (K) where columns were quantized out of order.
int-quantized: weight (N, K) bytes as they are, weight_scale, weight_zero_point. The config groups say which modules
have which of them; what they say of activations belongs to a run, and here inputs stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.families.config import Config
from snello.models.model import StoredTensor
from snello.models.quantized.matrix import (
    Expanded,
    Integers,
    Matrix,
    Parts,
    float_dtype,
    grid_of,
    misfit,
    num_groups,
    spread,
    unpack,
    words_of,
)

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
CLASS = "Linear"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
ENDINGS = tuple(f".{part}" for part in PARTS)
FLOATS = ("F16", "BF16", "F32")
ORDERED = ("group", "dynamic", True)  # columns that each say their group
HARMLESS = frozenset(["global_compression_ratio", "ignore", "version"])
WEIGHT_HARMLESS = frozenset(["observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mx"])


@dataclass(frozen=True)
class Scheme:
    """How the modules of one config group keep their weights. `group_size` 0: one scale a row, or for all."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    group_size: int
    strategy: str
    symmetric: bool
    ordered: bool  # columns were quantized out of order, and each says its group
    quantized_inputs: bool

    @property
    def described(self) -> str:
        grouped = f"groups of {self.group_size}" if self.group_size else f"one scale a {self.strategy}"
        return f"{self.bits} bits, {grouped}{'' if self.symmetric else ', asymmetric'}"


def expand(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor], stated: str | None) -> Expanded:
    schemes = _schemes(settings)
    own = {name for name in stored if name.endswith(ENDINGS)}
    stems = sorted({name.rpartition(".")[0] for name in own})
    own |= {f"{stem}.weight" for stem in stems}
    found = Expanded({name: tensor for name, tensor in stored.items() if name not in own})
    for stem in stems:
        scheme = _scheme_of(stem, schemes)
        fault = [f"{stem} is quantized and in no config group"]
        found.faults.extend(_module(found, stem, stored, scheme, stated) if scheme else fault)
    note = f"compressed-tensors weights of {' and '.join(dict.fromkeys(scheme.described for scheme in schemes))}"
    if any(scheme.quantized_inputs for scheme in schemes):
        note += "; its 8-bit inputs are a matter of the run and stay unrounded here"
    grids = {0 if s.ordered else grid_of(s.bits, s.symmetric, s.group_size) for s in schemes}
    return Expanded(found.tensors, frozenset(), note, grids.pop() if len(grids) == 1 else 0, found.faults)


# ---- config groups --------------------------------------------------------------------------------------------------


def _schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    config = Config(settings)
    config.expect("quant_method", "compressed-tensors")
    config.expect("quantization_status", "compressed")
    overall = config.raw("format")
    groups = config.raw("config_groups")
    sparsity = _table("sparsity_config", config.raw("sparsity_config"))
    if sparsity.get("format", "dense") != "dense":
        message = f"compressed-tensors: sparse weights ({sparsity['format']}) are not read"
        raise Unsupported(message, "give the original checkpoint, or one that is only quantized")
    config.refuse_unread(HARMLESS, "quantized compressed-tensors")  # kv_cache_scheme, transform_config among them
    if not isinstance(groups, dict) or not groups:
        raise SnelloError("compressed-tensors: config_groups is empty", "copy config.json from where it came from")
    return [_scheme(_table(name, group), overall) for name, group in groups.items()]


def _table(name: str, value: Any) -> dict[str, Any]:
    """Settings of their own inside the config; empty where there are none."""
    if value and not isinstance(value, dict):
        message = f"compressed-tensors: {name} is {json.dumps(value)[:80]}, expected a table"
        raise SnelloError(message, "copy config.json from where it came from")
    return value or {}


def _scheme(group: Mapping[str, Any], overall: Any) -> Scheme:
    settings = Config(group)
    format = settings.raw("format") or overall
    if format not in FORMATS:
        raise Unsupported(
            f"compressed-tensors: format {str(format)[:40]} is not read", f"supported: {', '.join(FORMATS[:2])}"
        )
    if settings.raw("output_activations"):
        raise Unsupported("compressed-tensors: quantized outputs are not read", "give the original checkpoint")
    weights = Config(_table("weights", settings.raw("weights")))
    weights.expect("num_bits", 4, 8)
    weights.expect("type", "int")
    weights.expect("dynamic", False)
    weights.expect("strategy", "group", "channel", "tensor")
    bits, strategy = weights.integer("num_bits"), str(weights.raw("strategy") or "tensor")
    group_size = weights.integer("group_size") if strategy == "group" else 0
    weights.raw("group_size")
    weights.expect("block_structure")
    symmetric = weights.flag("symmetric", True)
    weights.expect("actorder", *ORDERED, False, "weight", "static")
    ordered = weights.raw("actorder") in ORDERED
    weights.refuse_unread(WEIGHT_HARMLESS, "quantized compressed-tensors")
    targets = settings.raw("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        message = f"compressed-tensors: targets are {json.dumps(targets)[:80]}, expected a list of names"
        raise SnelloError(message, "copy config.json from where it came from")
    inputs = _check_inputs(_table("input_activations", settings.raw("input_activations")))
    settings.refuse_unread(frozenset(), "quantized compressed-tensors")
    return Scheme(tuple(targets), format == "pack-quantized", bits, group_size, strategy, symmetric, ordered, inputs)


def _check_inputs(inputs: Mapping[str, Any]) -> bool:
    """Whether the run that it was made for rounds inputs; scales that were measured before cannot be left out."""
    if not inputs:
        return False
    if inputs.get("dynamic") not in (True, "local") or inputs.get("type", "int") != "int":
        raise Unsupported(
            "compressed-tensors: static or float-8 input activations are not read",
            "give a checkpoint with dynamic 8-bit activations or none, or the original",
        )
    return True


def _scheme_of(stem: str, schemes: list[Scheme]) -> Scheme | None:
    """A name or pattern counts more than a class."""
    for scheme in schemes:
        if any(_names(target, stem) for target in scheme.targets):
            return scheme
    return next((scheme for scheme in schemes if CLASS in scheme.targets), None)


def _names(target: str, stem: str) -> bool:
    try:
        return re.match(target[3:], stem) is not None if target.startswith("re:") else target == stem
    except re.error:
        raise SnelloError(f"compressed-tensors: target {target} is no pattern", "is config.json damaged?") from None


# ---- modules --------------------------------------------------------------------------------------------------------


def _module(
    found: Expanded, stem: str, stored: Mapping[str, StoredTensor], scheme: Scheme, stated: str | None
) -> list[str]:
    """Adds one module's matrix, or says what is wrong with it."""
    body = "weight_packed" if scheme.packed else "weight"
    needed = [body, "weight_scale"] + ["weight_shape"] * scheme.packed + ["weight_zero_point"] * (not scheme.symmetric)
    needed += ["weight_g_idx"] * scheme.ordered
    missing = [f"{stem}.{part} is missing" for part in needed if f"{stem}.{part}" not in stored]
    if missing:
        return missing
    words, scales = stored[f"{stem}.{body}"], stored[f"{stem}.weight_scale"]
    shape = tuple(stored[f"{stem}.weight_shape"].float32().astype(int).tolist()) if scheme.packed else words.shape
    if len(shape) != 2 or min(shape) < 1:
        return [f"{stem} has shape {list(shape)}, expected two dimensions"]
    rows, columns = shape
    groups = num_groups(columns, scheme.group_size or columns)
    height = 1 if scheme.strategy == "tensor" else rows
    faults = misfit(f"{stem}.{body}", words, *_expected(scheme, rows, columns))
    if scales.shape not in {(height, groups), (height,) if groups == 1 else (height, groups)}:
        faults.append(f"{stem}.weight_scale has shape {list(scales.shape)}, expected {[height, groups]}")
    faults += [] if scales.dtype in FLOATS else [f"{stem}.weight_scale holds {scales.dtype} numbers, not floats"]
    zeros = None if scheme.symmetric else stored[f"{stem}.weight_zero_point"]
    faults += _zero_faults(stem, zeros, scheme, height, groups)
    order = stored.get(f"{stem}.weight_g_idx")
    faults += _order_faults(stem, order, columns, groups)
    if not faults:
        name, parts = f"{stem}.weight", partial(_parts, words, zeros, scales, order, scheme, (rows, columns))
        found.tensors[name] = Matrix(name, float_dtype(stated, scales), (rows, columns), parts)
    return faults


def _expected(scheme: Scheme, rows: int, columns: int) -> tuple[tuple[str, ...], tuple[int, int]]:
    return (("I32",), (rows, _num_words(columns, scheme.bits))) if scheme.packed else (("I8",), (rows, columns))


def _num_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _zero_faults(stem: str, zeros: StoredTensor | None, scheme: Scheme, height: int, groups: int) -> list[str]:
    if zeros is None:
        return []
    packed = scheme.packed and scheme.strategy != "tensor"
    name = f"{stem}.weight_zero_point"
    if packed:
        return misfit(name, zeros, ("I32",), (_num_words(height, scheme.bits), groups))
    flat = StoredTensor(zeros.dtype, (height, groups), zeros.data) if zeros.shape == (height,) else zeros
    return misfit(name, flat, ("I8",), (height, groups))


def _order_faults(stem: str, order: StoredTensor | None, columns: int, groups: int) -> list[str]:
    if order is None:
        return []
    name = f"{stem}.weight_g_idx"
    faults = misfit(name, order, ("I32",), (columns,))
    largest = words_of(order).view(np.int32).max(initial=0) if not faults else 0
    return faults or ([f"{name} names a group beyond the {groups} that there are"] if largest >= groups else [])


def _parts(
    words: StoredTensor,
    zeros: StoredTensor | None,
    scales: StoredTensor,
    order: StoredTensor | None,
    scheme: Scheme,
    shape: tuple[int, int],
) -> Parts:
    rows, columns = shape
    groups = spread(columns, scheme.group_size or columns)
    if order is not None and (words_of(order).view(np.int32) >= 0).all():  # -1 throughout: never set
        groups = words_of(order).astype(np.intp)
    q = _signed(words_of(words), scheme.bits, columns) if scheme.packed else _bytes(words)
    z = None if zeros is None else _zeros(zeros, scheme, rows)
    s = scales.float32().reshape(-1, num_groups(columns, scheme.group_size or columns))
    return Parts(q, np.broadcast_to(s, (rows, s.shape[1])), None if z is None else _tall(z, rows), groups)


def _zeros(zeros: StoredTensor, scheme: Scheme, rows: int) -> Integers:
    """(N or 1, G) signed."""
    if not scheme.packed or scheme.strategy == "tensor":
        return _bytes(zeros).reshape(zeros.shape[0], -1)
    return np.ascontiguousarray(_signed(np.ascontiguousarray(words_of(zeros).T), scheme.bits, rows).T)


def _signed(words: Any, bits: int, count: int) -> Integers:
    """(.., W) words -> (.., count) numbers around zero."""
    return unpack(words, bits)[..., :count] - np.int16(1 << (bits - 1))


def _bytes(tensor: StoredTensor) -> Integers:
    return tensor.data.view(np.int8).astype(np.int16).reshape(tensor.shape)


def _tall(values: Integers, rows: int) -> Integers:
    return np.broadcast_to(values, (rows, values.shape[1]))
