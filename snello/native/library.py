"""The shared library: found beside this file, its C structures and signatures declared once.

Mirrors `csrc/snello.h` field by field; the ABI version is checked before anything else is called.
"""

from __future__ import annotations

import ctypes as c
from functools import cache
from pathlib import Path
from typing import Any

from snello.errors import SnelloError

ABI_VERSION = 12
NAMES = ("libsnello.so", "libsnello.dylib")

I32, U64, F32, PTR = c.c_int32, c.c_uint64, c.c_float, c.c_void_p


class CTensor(c.Structure):
    _fields_ = [("data", PTR), ("bytes", U64), ("format", I32), ("rows", I32), ("columns", I32), ("group_size", I32)]


class CCacheLayer(c.Structure):
    _fields_ = [("num_kv_heads", I32), ("head_dim", I32), ("format", I32), ("state_rows", I32)]


class CRegister(c.Structure):
    _fields_ = [("width", I32), ("rows", I32)]


class COp(c.Structure):
    _fields_ = [("kind", I32), ("inputs", I32 * 3), ("out", I32), ("tensor", I32 * 3), ("i", I32 * 8), ("f", F32 * 4)]


class CBatch(c.Structure):
    _fields_ = [
        ("num_rows", I32),
        ("num_sequences", I32),
        ("pages_per_sequence", I32),
        ("num_outputs", I32),
        ("tokens", PTR),
        ("types", PTR),
        ("positions", PTR),
        ("sequences", PTR),
        ("page_tables", PTR),
        ("lengths", PTR),
        ("output_rows", PTR),
        ("adapters", PTR),
    ]


class CSampling(c.Structure):
    _fields_ = [
        ("temperature", F32),
        ("top_p", F32),
        ("min_p", F32),
        ("repetition_penalty", F32),
        ("presence_penalty", F32),
        ("frequency_penalty", F32),
        ("top_k", I32),
        ("num_biases", I32),
        ("bias_tokens", PTR),
        ("bias_values", PTR),
        ("seed", U64),
    ]


# name -> (result, arguments)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "snello_abi_version": (I32, []),
    "snello_last_error": (c.c_char_p, []),
    "snello_isa_select": (c.c_char_p, [c.c_char_p]),
    "snello_isa_available": (c.c_char_p, []),
    "snello_amx": (c.c_char_p, []),
    "snello_multiplies_bf16": (I32, []),
    "snello_packed_bytes": (U64, [I32, I32, I32, I32]),
    "snello_pack_float": (I32, [I32, I32, PTR, I32, I32, PTR]),
    "snello_pack_int8": (I32, [PTR, PTR, I32, I32, PTR]),
    "snello_pack_int4": (I32, [PTR, PTR, PTR, I32, I32, I32, PTR]),
    "snello_pack_int3": (I32, [PTR, PTR, PTR, I32, I32, I32, PTR]),
    "snello_unpack": (I32, [c.POINTER(CTensor), PTR, PTR, PTR, PTR, PTR]),
    "snello_to_channels": (I32, [c.POINTER(CTensor), PTR]),
    "snello_from_channels": (I32, [c.POINTER(CTensor), PTR]),
    "snello_pool_create": (PTR, [I32]),
    "snello_pool_destroy": (None, [PTR]),
    "snello_cache_create": (PTR, [c.POINTER(CCacheLayer), I32, I32]),
    "snello_cache_destroy": (None, [PTR]),
    "snello_cache_page_bytes": (U64, [c.POINTER(CCacheLayer), I32]),
    "snello_cache_copy_page": (I32, [PTR, I32, I32]),
    "snello_cache_page": (PTR, [PTR, I32]),
    "snello_program_create": (
        PTR,
        [PTR, c.POINTER(COp), I32, c.POINTER(CTensor), I32, c.POINTER(CRegister), I32, PTR, I32, I32],
    ),
    "snello_program_destroy": (None, [PTR]),
    "snello_program_output_width": (I32, [PTR]),
    "snello_program_arena_bytes": (U64, [PTR]),
    "snello_step": (I32, [PTR, c.POINTER(CBatch), PTR]),
    "snello_score": (I32, [PTR, c.POINTER(CBatch), PTR, PTR, PTR]),
    "snello_one_row": (I32, [PTR, PTR]),
    "snello_profile": (I32, [PTR, I32, PTR]),
    "snello_sample": (I32, [PTR, I32, c.POINTER(CSampling), PTR, I32, I32, c.c_int64, PTR]),
    "snello_top": (I32, [PTR, I32, I32, PTR, PTR]),
    "snello_compare": (I32, [PTR, PTR, I32, I32, PTR, PTR, PTR, PTR, PTR, PTR]),
    "snello_probe_bandwidth": (c.c_double, [PTR, U64, I32]),
    "snello_probe_compute": (c.c_double, [PTR, I32, I32]),
}


@cache
def library() -> c.CDLL:
    """The loaded library, its best instruction set selected.

    Raises:
        SnelloError: it is missing, of another version, or SNELLO_ISA names a set that this CPU cannot run.
    """
    path = next((p for name in NAMES if (p := Path(__file__).parent / name).exists()), None)
    if path is None:
        hint = "install the package with `pip install .` (needs a C++ compiler)"
        raise SnelloError("the native core is not built", hint)
    loaded = c.CDLL(str(path))
    found = loaded.snello_abi_version()  # first: another version may lack a function
    if found != ABI_VERSION:
        raise SnelloError(f"{path.name} has ABI {found}, expected {ABI_VERSION}", "install the package again")
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    if loaded.snello_isa_select(None) is None:
        raise SnelloError(loaded.snello_last_error().decode(), "unset SNELLO_ISA, or give it one that `doctor` lists")
    return loaded


def last_error() -> str:
    return library().snello_last_error().decode()  # type: ignore[no-any-return]
