"""Holding every engine to the instructions of a lesser processor, as far as it can be held.

Ours has a switch (`SNELLO_ISA`); oneDNN, below OpenVINO, PyTorch and CTranslate2, has one too, as have these two;
llama.cpp is compiled for a set. oneDNN has no AVX2 products for weights that OpenVINO would multiply by INT8
activations, so there it is told to leave activations alone. What of OpenVINO is not oneDNN's has no switch and goes
on using all that the processor has: the comparison errs in its favour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from snello.errors import SnelloError
from snello.measure.peers.environments import LLAMACPP, llamacpp_for

if TYPE_CHECKING:
    from snello.measure.peers.contenders import Peer

F32_ALONE = ({"precision": "f32"},)  # its bf16 needs AVX-512
ONEDNN = {"avx512vnni": "AVX512_CORE_FP16", "avxvnni": "AVX2_VNNI", "avx2": "AVX2"}  # the most that each may hold
OTHERS = {"avx512vnni": "avx512", "avxvnni": "avx2", "avx2": "avx2"}  # who knows no name for VNNI
AVX2 = {"GGML_NATIVE": "OFF", "GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON"}

# By peer and instruction set of ours: what replaces fields of `Peer`.
HELD: dict[str, dict[str, Mapping[str, Any]]] = {
    "llama.cpp": {
        "avx512vnni": {"environment": LLAMACPP},
        "avxvnni": {"environment": llamacpp_for("avxvnni", AVX2 | {"GGML_AVX_VNNI": "ON"})},
        "avx2": {"environment": llamacpp_for("avx2", AVX2)},
    },
    "openvino": {
        "avx512vnni": {},
        "avxvnni": {"settings": F32_ALONE},
        "avx2": {"settings": F32_ALONE, "options": {"dynamic_quantization": "0"}},
    },
    "ctranslate2": {isa: {"variables": {"CT2_FORCE_CPU_ISA": other.upper()}} for isa, other in OTHERS.items()},
    "transformers": {isa: {"variables": {"ATEN_CPU_CAPABILITY": other}} for isa, other in OTHERS.items()},
}


def held(peer: Peer, isa: str | None) -> Peer:
    """The peer, kept from instructions beyond `isa`; None leaves it as it is.

    Raises:
        SnelloError: it cannot be held to this set.
    """
    if isa is None:
        return peer
    found = HELD.get(peer.name, {}).get(isa)
    if found is None:
        raise SnelloError(f"{peer.name} cannot be held to {isa}", f"choose from: {', '.join(ONEDNN)}", exit_code=2)
    variables = {"ONEDNN_MAX_CPU_ISA": ONEDNN[isa], "MKL_ENABLE_INSTRUCTIONS": OTHERS[isa].upper()}
    fields = {**found, "variables": {**variables, **found.get("variables", {})}}
    return dataclasses.replace(peer, isa=isa, **fields)
