"""Checkpoints that others quantized, read as what they stand for: GPTQ, AWQ and compressed-tensors.

A module whose matrix is kept as packed integers, scales and zeros becomes one tensor of floats in the checkpoint's own
number type, computed when it is asked for, as stock engines compute it. From there on it is a checkpoint like any
other. Its scales have eleven bits for every group; our two-level INT4 keeps one for a row and four bits for a group, so
the integers are not taken over (docs/models.md has what that would lose): fewer bits again is a step that is judged.

Each file here reads one layout; `EXPANDERS` is the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models.files import read_json_if_there
from snello.models.model import StoredTensor
from snello.models.quantized import awq, compressed, gptq
from snello.models.quantized.matrix import Expanded, Matrix

__all__ = ["Expanded", "Matrix", "expand", "scheme_of"]

EXPANDERS = {"gptq": gptq.expand, "awq": awq.expand, "compressed-tensors": compressed.expand}
KEYS = ("quantization_config", "compression_config", "quantization")
BESIDE = "quantize_config.json"  # where AutoGPTQ wrote what config.json did not say
LISTED_FAULTS = 6


def scheme_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of its quantized weights; None where it says nothing.

    Raises:
        Unsupported: a method that is not read here, by its name.
    """
    for key in KEYS:
        settings = values.get(key)
        if settings:
            table = dict(settings) if isinstance(settings, dict) else {}
            method = table.get("quant_method")
            if not isinstance(method, str) or method not in EXPANDERS:
                raise Unsupported(
                    f"this checkpoint is quantized in a way that is not read here ({_described(key, table)})",
                    f"give the original FP32, FP16 or BF16 checkpoint; of others' formats: {', '.join(EXPANDERS)}",
                )
            return table
    return None


def expand(values: Mapping[str, Any], folder: Path, stored: Mapping[str, StoredTensor]) -> Expanded:
    """The tensors of a checkpoint with every quantized module as one `.weight`; all of them, if none is quantized.

    Raises:
        Unsupported: a layout or setting that is not read.
        SnelloError: parts of a module are missing or do not fit; the tensors are named.
    """
    settings = scheme_of(values)
    if settings is None and any(name.endswith(".qweight") for name in stored):
        beside = read_json_if_there(folder / BESIDE)
        if not beside:
            message = f"{folder} holds packed integers (.qweight), and config.json says nothing of how to read them"
            raise SnelloError(message, f"copy quantization_config or {BESIDE} from where the checkpoint came from")
        settings = scheme_of({"quantization_config": {"quant_method": "gptq", **beside}})
    if settings is None:
        return Expanded(dict(stored))
    found = EXPANDERS[settings["quant_method"]](settings, stored, stated_dtype(values))
    if found.faults:
        listed = "; ".join(found.faults[:LISTED_FAULTS])
        more = len(found.faults) - LISTED_FAULTS
        raise SnelloError(
            f"{folder}: quantized weights are not whole: {listed}" + (f" and {more} more" if more > 0 else ""),
            "download the checkpoint again, with the config.json that belongs to it",
        )
    return found


def stated_dtype(values: Mapping[str, Any]) -> str | None:
    """The number type that config.json states, by its safetensors name."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return names.get(str(values.get("dtype") or values.get("torch_dtype")))


def _described(key: str, table: Mapping[str, Any]) -> str:
    method = table.get("quant_method") or table.get("quant_algo") or table.get("format") or key
    bits = table.get("bits") or table.get("w_bit") or (4 if table.get("load_in_4bit") else None)
    bits = bits or (8 if table.get("load_in_8bit") else None)
    return f"{method}{f', {bits} bits' if bits else ''}"
