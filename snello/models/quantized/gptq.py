"""GPTQ's layout (AutoGPTQ, GPTQModel, Optimum), 4 and 8 bits.

qweight (K bits / 32, N), packed along K; qzeros (G, N bits / 32), along N; scales (G, N); g_idx (K), the group of each
column where columns were quantized out of order. Format v1 stores zeros less one, as words: v2 stores them as they
are. Files are known to say "gptq" and hold v2, so where zeros are symmetric they are looked at.
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

ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")
FLOATS = ("F16", "BF16", "F32")
ONES = {4: 0x11111111, 8: 0x01010101}
# what says how a checkpoint was made or is run elsewhere, not what its numbers mean
HARMLESS = frozenset([
    "act_group_aware", "autotune", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config", "failsafe",
    "lm_head", "max_input_length", "meta", "mock_quantization", "model_file_base_name", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "offload_to_disk",
    "offload_to_disk_path", "pack_impl", "pad_token_id", "parallel_packing", "static_groups", "tokenizer",
    "true_sequential", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha", "v2_memory_device", "vram_strategy",
])  # fmt: skip


def expand(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor], stated: str | None) -> Expanded:
    config = Config(settings)
    config.expect("quant_method", "gptq")
    config.expect("method", "gptq")
    config.expect("pack_dtype", "int32")
    config.expect("bits", 4, 8)
    bits, group_size = config.integer("bits"), _group_size(config)
    symmetric = config.flag("sym", True)
    version = _version(config)
    ordered = config.flag("desc_act", False) and group_size > 0
    _check_overrides(config)
    config.refuse_unread(HARMLESS, "quantized gptq")
    found = Expanded({name: tensor for name, tensor in stored.items() if not name.endswith(ENDINGS)})
    needed = ENDINGS if ordered else ENDINGS[:3]
    stems = sorted({name.rpartition(".")[0] for name in stored if name.endswith(ENDINGS)})
    for stem in stems:
        missing = [f"{stem}{ending} is missing" for ending in needed if stem + ending not in stored]
        found.faults.extend(missing or _module(found, stem, stored, bits, group_size, symmetric, version, stated))
    grouped = f"groups of {group_size}" if group_size > 0 else "one group a row"
    note = f"GPTQ weights of {bits} bits, {grouped}{'' if symmetric else ', asymmetric'}"
    grid = 0 if ordered else grid_of(bits, symmetric, group_size)
    return Expanded(found.tensors, _empty_biases(stored, stems), note, grid, found.faults)


def _group_size(config: Config) -> int:
    value = config.raw("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise SnelloError(f"quantization_config: group_size is {value!r}", "expected -1 or a number of columns")
    return value


def _version(config: Config) -> int:
    for key in ("checkpoint_format", "format"):
        config.expect(key, "gptq", "gptq_v2")
    stated = {config.raw("checkpoint_format"), config.raw("format")} - {None}
    if len(stated) > 1:
        raise SnelloError("quantization_config: format and checkpoint_format differ", "keep the right one")
    return 2 if "gptq_v2" in stated else 1


def _check_overrides(config: Config) -> None:
    """A pattern "-:..." only says what was left alone; others change bits or groups by module."""
    overrides = config.raw("dynamic") or {}
    changed = [name for name, value in overrides.items() if not name.startswith("-:") and value]
    if changed:
        raise Unsupported(
            f"quantization_config: {changed[0]} is quantized in another way than the rest (dynamic)",
            "give the original checkpoint",
        )


def _module(
    found: Expanded,
    stem: str,
    stored: Mapping[str, StoredTensor],
    bits: int,
    group_size: int,
    symmetric: bool,
    version: int,
    stated: str | None,
) -> list[str]:
    """Adds one module's matrix, or says what is wrong with it."""
    words, zeros, scales = (stored[stem + ending] for ending in ENDINGS[:3])
    if words.dtype != "I32" or len(words.shape) != 2:
        return [f"{stem}.qweight is {words.dtype} {list(words.shape)}, expected I32 of two dimensions"]
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    groups = num_groups(columns, group_size if group_size > 0 else columns)
    order = stored.get(f"{stem}.g_idx")
    faults = misfit(f"{stem}.scales", scales, FLOATS, (groups, rows))
    faults += misfit(f"{stem}.qzeros", zeros, ("I32",), (groups, rows * bits // 32))
    faults += misfit(f"{stem}.g_idx", order, ("I32",), (columns,)) if order is not None else []
    if not faults and order is not None and words_of(order).max(initial=0) >= groups:
        faults = [f"{stem}.g_idx names a group beyond the {groups} that there are"]
    if faults:
        return faults
    offset = _zero_offset(zeros, bits, version, symmetric)
    if offset is None:
        return [f"{stem}.qzeros is neither of the constants that symmetric zeros have"]
    parts = partial(_parts, words, zeros, scales, order, bits, group_size, offset)
    name = f"{stem}.weight"
    found.tensors[name] = Matrix(name, float_dtype(stated, scales), (rows, columns), parts)
    return []


def _zero_offset(zeros: StoredTensor, bits: int, version: int, symmetric: bool) -> int | None:
    """What is added to a word of zeros. Symmetric ones tell it themselves, whatever the config says."""
    if not symmetric:
        return ONES[bits] if version == 1 else 0
    words, middle = words_of(zeros), ONES[bits] << (bits - 1)
    if (words == middle).all():
        return 0
    return ONES[bits] if (words == middle - ONES[bits]).all() else None


def _parts(
    words: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    order: StoredTensor | None,
    bits: int,
    group_size: int,
    offset: int,
) -> Parts:
    q = unpack(np.ascontiguousarray(words_of(words).T), bits)  # (N, K)
    z = unpack(words_of(zeros) + np.uint32(offset), bits)  # (G, N); one is added to whole words, as it was taken
    groups = spread(q.shape[1], group_size if group_size > 0 else q.shape[1])
    if order is not None:
        groups = words_of(order).astype(np.intp)
    return Parts(q, scales.float32().T, z.T, groups)


def _empty_biases(stored: Mapping[str, StoredTensor], stems: list[str]) -> frozenset[str]:
    """AutoGPTQ once gave every linear a bias of zeros; where the model has none, they say nothing."""
    biases = [f"{stem}.bias" for stem in stems if f"{stem}.bias" in stored]
    return frozenset(name for name in biases if not stored[name].float32().any())
