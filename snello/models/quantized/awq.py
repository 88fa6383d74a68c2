"""AWQ's layout (AutoAWQ, "gemm"), 4 bits.

qweight (K, N / 8), packed along N; qzeros (K / g, N / 8); scales (K / g, N). The eight fields of a word hold columns
0, 2, 4, 6, 1, 3, 5, 7. Zeros are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    misfit,
    num_groups,
    spread,
    unpack,
    words_of,
)

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the field that holds each of eight columns
ENDINGS = (".qweight", ".qzeros", ".scales")
FLOATS = ("F16", "BF16", "F32")
HARMLESS = frozenset(
    ["do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert", "zero_point"]
)


def expand(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor], stated: str | None) -> Expanded:
    config = Config(settings)
    config.expect("quant_method", "awq")
    config.expect("bits", BITS)
    config.expect("w_bit", BITS)
    config.expect("backend", "autoawq")
    version = config.raw("version")
    if str(version or "gemm").lower() != "gemm":
        raise Unsupported(f"quantization_config: AWQ version {version!r} is not read", "supported: gemm")
    group_size = config.raw("group_size") or config.raw("q_group_size")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise SnelloError(f"quantization_config: group_size is {group_size!r}", "expected -1 or a number of columns")
    config.refuse_unread(HARMLESS, "quantized awq")
    found = Expanded({name: tensor for name, tensor in stored.items() if not name.endswith(ENDINGS)})
    for stem in sorted({name.rpartition(".")[0] for name in stored if name.endswith(ENDINGS)}):
        found.faults.extend(_module(found, stem, stored, group_size, stated))
    grouped = f"groups of {group_size}" if group_size > 0 else "one group a row"
    return Expanded(found.tensors, frozenset(), f"AWQ weights of {BITS} bits, {grouped}", faults=found.faults)


def _module(
    found: Expanded, stem: str, stored: Mapping[str, StoredTensor], group_size: int, stated: str | None
) -> list[str]:
    """Adds one module's matrix, or says what is wrong with it."""
    missing = [f"{stem}{ending} is missing" for ending in ENDINGS if stem + ending not in stored]
    if missing:
        return missing
    words, zeros, scales = (stored[stem + ending] for ending in ENDINGS)
    if words.dtype != "I32" or len(words.shape) != 2:
        return [f"{stem}.qweight is {words.dtype} {list(words.shape)}, expected I32 of two dimensions"]
    columns, rows = words.shape[0], words.shape[1] * 8
    groups = num_groups(columns, group_size if group_size > 0 else columns)
    faults = misfit(f"{stem}.scales", scales, FLOATS, (groups, rows))
    faults += misfit(f"{stem}.qzeros", zeros, ("I32",), (groups, rows // 8))
    if not faults:
        name, parts = f"{stem}.weight", partial(_parts, words, zeros, scales, group_size)
        found.tensors[name] = Matrix(name, float_dtype(stated, scales), (rows, columns), parts)
    return faults


def _parts(words: StoredTensor, zeros: StoredTensor, scales: StoredTensor, group_size: int) -> Parts:
    columns = words.shape[0]
    groups = spread(columns, group_size if group_size > 0 else columns)
    q, z = (np.ascontiguousarray(_in_order(tensor).T) for tensor in (words, zeros))
    return Parts(q, scales.float32().T, z, groups)


def _in_order(tensor: StoredTensor) -> Integers:
    """(rows, N / 8) words -> (rows, N) fields in the order of columns."""
    fields = unpack(words_of(tensor), BITS)
    return fields.reshape(len(fields), -1, 8)[:, :, PLACES].reshape(len(fields), -1)
