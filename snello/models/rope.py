"""Rotary tables: the cosines and sines that the reference and the native executor both use.

One function for both, so that they cannot drift. Angles are computed as Transformers does (inverse frequencies and
`position * frequency` in FP32); cosine and sine themselves are taken in double and rounded once, so that they do not
depend on a maths library. No torch: the native executor runs without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError, Unsupported
from snello.models.spec import Rope

Array = npt.NDArray[np.float32]

IGNORED = {"rope_theta", "partial_rotary_factor"}  # said by `Rope.base` and `Rope.dims`
KEYS: Mapping[str, frozenset[str]] = {  # what each kind may say; linear scaling is the same from any length on
    "default": frozenset(),
    "linear": frozenset(["factor", "original_max_position_embeddings"]),
    "llama3": frozenset(["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
    "longrope": frozenset(
        ["factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"]
    ),
}
CHECK = "check rope_scaling / rope_parameters in config.json"


def rope_tables(rope: Rope, max_positions: int) -> tuple[Array, Array]:
    """Cosines and sines, FP32, for positions 0 .. max_positions - 1.

    Raises:
        Unsupported: a kind of scaling that is not known, or positions that it serves only with other frequencies.
    """
    frequencies, factor = inverse_frequencies(rope), np.float32(1)
    if _kind(rope) == "longrope":
        factor = _longrope_factor(dict(rope.scaling), max_positions)
    positions = np.arange(max_positions, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)  # (positions, dims / 2)
    return np.cos(angles).astype(np.float32) * factor, np.sin(angles).astype(np.float32) * factor


def inverse_frequencies(rope: Rope) -> Array:
    """One FP32 frequency per rotated pair, scaled as the configuration says.

    Raises:
        Unsupported: a kind of scaling that is not known, or a setting that means nothing to its kind.
        SnelloError: a setting that cannot be meant.
    """
    scaling = {name: value for name, value in rope.scaling if name not in IGNORED}
    kind = _kind(rope)
    _check_keys(kind, scaling)
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    powers = np.power(np.float64(rope.base), exponents.astype(np.float64)).astype(np.float32)
    frequencies: Array = np.float32(1.0) / powers
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(_number(scaling, "factor"))
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "longrope":
        return np.float32(1.0) / (_short_factors(scaling, len(powers)) * powers)
    raise AssertionError(kind)


def _kind(rope: Rope) -> str:
    scaling = dict(rope.scaling)
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _check_keys(kind: str, scaling: Mapping[str, float | str]) -> None:
    if kind not in KEYS:
        raise Unsupported(f"RoPE scaling of type {kind!r}", f"supported: {', '.join(KEYS)}")
    unknown = sorted(scaling.keys() - KEYS[kind] - {"rope_type", "type"})
    if unknown:
        known = ", ".join(sorted(KEYS[kind])) or "nothing"
        raise Unsupported(
            f"RoPE scaling of type {kind} says {', '.join(unknown)}, which means nothing to it",
            f"it reads {known}; {CHECK}",
        )


def _llama3(frequencies: Array, scaling: Mapping[str, float | str]) -> Array:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    factor, trained = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if high <= low:
        raise SnelloError(
            f"RoPE scaling by high_freq_factor {high:g}, which must be above low_freq_factor {low:g}", CHECK
        )
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = np.where(wavelengths > trained / low, frequencies / np.float32(factor), frequencies)
    smooth = (np.float32(trained) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * stretched / np.float32(factor) + smooth * stretched
    between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return np.where(between, blended, stretched).astype(np.float32)


def _short_factors(scaling: Mapping[str, float | str], pairs: int) -> Array:
    """LongRoPE's factors of texts up to the original length, one per rotated pair (arXiv:2402.13753)."""
    factors = json.loads(str(scaling.get("short_factor", "null")))
    if not isinstance(factors, list) or [type(x) in (int, float) for x in factors] != [True] * pairs:
        raise SnelloError(f"LongRoPE's short_factor must be {pairs} numbers", "check rope_scaling in config.json")
    return np.array(factors, np.float32)


def _longrope_factor(scaling: Mapping[str, float | str], max_positions: int) -> np.float32:
    """What cosines and sines are multiplied by, so that attention stays as sharp over the longer text."""
    original = _number(scaling, "original_max_position_embeddings")
    if max_positions > original:
        raise Unsupported(
            f"{max_positions:,} positions by LongRoPE, whose frequencies change at {original:,.0f} for the whole text",
            f"use --context {original:.0f} or less",
        )
    if "attention_factor" in scaling:
        return np.float32(_number(scaling, "attention_factor"))
    factor = _number(scaling, "factor")
    return np.float32(1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))


def _number(scaling: Mapping[str, float | str], name: str) -> float:
    if name not in scaling:
        raise Unsupported(f"RoPE scaling without {name!r}", CHECK)
    value = scaling[name]
    if isinstance(value, str) or not 0 < value < math.inf:
        raise SnelloError(f"RoPE scaling by {name} {value}, which must be a number above zero", CHECK)
    return value
