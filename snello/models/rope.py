"""Rotary tables: the cosines and sines that the reference and the native executor both use.

One function for both, so that they cannot drift. Angles are computed as Transformers does (inverse frequencies and
`position * frequency` in FP32); cosine and sine themselves are taken in double and rounded once, so that they do not
depend on a maths library. No torch: the native executor runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from snello.errors import Unsupported
from snello.models.spec import Rope

Array = npt.NDArray[np.float32]

IGNORED = {"rope_theta", "partial_rotary_factor"}  # said by `Rope.base` and `Rope.dims`


def rope_tables(rope: Rope, max_positions: int) -> tuple[Array, Array]:
    """Cosines and sines, FP32, for positions 0 .. max_positions - 1."""
    frequencies = inverse_frequencies(rope)
    positions = np.arange(max_positions, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)  # (positions, dims / 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def inverse_frequencies(rope: Rope) -> Array:
    """One FP32 frequency per rotated pair, scaled as the configuration says."""
    scaling = {name: value for name, value in rope.scaling if name not in IGNORED}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    powers = np.power(np.float64(rope.base), exponents.astype(np.float64)).astype(np.float32)
    frequencies: Array = np.float32(1.0) / powers
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(_number(scaling, "factor"))
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise Unsupported(f"RoPE scaling of type {kind!r}", "supported: default, linear, llama3")


def _llama3(frequencies: Array, scaling: Mapping[str, float | str]) -> Array:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    factor, trained = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = np.where(wavelengths > trained / low, frequencies / np.float32(factor), frequencies)
    smooth = (np.float32(trained) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * stretched / np.float32(factor) + smooth * stretched
    between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return np.where(between, blended, stretched).astype(np.float32)


def _number(scaling: Mapping[str, float | str], name: str) -> float:
    if name not in scaling:
        raise Unsupported(f"RoPE scaling without {name!r}", "check rope_scaling / rope_parameters in config.json")
    return float(scaling[name])
