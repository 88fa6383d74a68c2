"""Published shapes without their weights: for measuring speed at real sizes.

Random weights in the shape of a published model take the same time as its own. Scales are chosen so that
activations stay finite and of ordinary size; what such a model says means nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError
from snello.models.families.resolve import spec_from_config
from snello.models.model import Floats, Model, StoredTensor
from snello.models.pack_cache import cached
from snello.models.packed import VECTOR, Layout, PackedWeights, layouts
from snello.models.packed_writer import PackedWriter
from snello.models.spec import CacheFormat, Format, Spec, is_router, linear_names

RandomWeights = Literal["bf16", "int8", "int4", "int4-all", "int3"]  # int4, int3: an INT8 head; int4-all: an INT4 head
PRESETS: tuple[RandomWeights, ...] = ("bf16", "int8", "int4", "int4-all", "int3")
GROUP_SIZE: Literal[128] = 128


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, width: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **more,
    }


_LLAMA_3_2: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(
        576, 30, 9, 3, 1536, 49152,
        max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0, bos_token_id=0, eos_token_id=0,
    ),
    "qwen3-0.6b": {
        **_llama(1024, 28, 16, 8, 3072, 151936),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "tinyllama-1.1b": _llama(
        2048, 22, 32, 4, 5632, 32000,
        max_position_embeddings=2048, tie_word_embeddings=False, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
    ),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, head_dim=64, **_LLAMA_3_2),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, head_dim=128, **_LLAMA_3_2),
    "dart-v2-moe": {
        **_llama(768, 4, 8, 1, 3072, 30649),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "rope_theta": 1000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}  # fmt: skip


def spec_of_shape(name: str, weights: RandomWeights = "bf16") -> Spec:
    """The `Spec` of a published shape, as `quantize` would leave it: INT8 activations, embedding and, mostly, head."""
    if name not in SHAPES:
        raise SnelloError(f"no shape is named {name}", f"choose from: {', '.join(SHAPES)}")
    if weights not in PRESETS:
        raise SnelloError(f"no random weights of type {weights}", f"choose from: {', '.join(PRESETS)}")
    spec = spec_from_config(SHAPES[name])
    if weights == "bf16":
        return spec
    int8 = Format(weights="int8", activations="int8", rotate=True, equalize=True)
    int4 = dataclasses.replace(int8, weights="int4", group_size=GROUP_SIZE)
    head = int4 if weights == "int4-all" else int8
    body = {"int8": int8, "int3": dataclasses.replace(int4, weights="int3")}.get(weights, int4)
    formats = {linear: head if linear == "head" else body for linear in linear_names(spec) if not is_router(linear)}
    return spec.with_formats(formats if spec.head.tied else {**formats, "embedding": Format(weights="int8")})


def random_model(
    name: str,
    weights: RandomWeights = "int4",
    seed: int = 0,
    positions: int = 0,
    cache: CacheFormat | None = None,
) -> Model:
    """A model of this shape with random packed weights, kept in the pack cache; it has no tokenizer.

    Args:
        positions: it is as if made for so many, if the shape was made for fewer: random weights know no position.
        cache: the type of keys and values; None: the shape's own.
    """
    spec = spec_of_shape(name, weights)
    key = f"random-{name}-{weights}-{seed}-{spec.digest[:16]}"
    filled = cached(key, spec, lambda writer: _fill(writer, spec, np.random.default_rng(seed)))
    model = model_of_packed(filled, f"{name} (random {weights})")
    spec = dataclasses.replace(
        spec, max_positions=max(spec.max_positions, positions), cache_format=cache or spec.cache_format
    )
    return dataclasses.replace(model, spec=spec)


def model_of_packed(weights: PackedWeights, name: str) -> Model:
    return Model(spec=weights.spec, weights=weights, path=weights.path.parent, name=name, files=(weights.path,))


def _fill(writer: PackedWriter, spec: Spec, random: np.random.Generator) -> None:
    for name, layout in layouts(spec).items():
        if layout.format == VECTOR:
            # norms and input scales near one; biases, if any, are as harmless
            writer.add_vector(name, np.exp2(random.integers(-1, 2, layout.shape)).astype(np.float32))
        elif layout.format == "int8":
            q = np.maximum(_integers(random, layout).view(np.int8), -127)
            writer.add_int8(name, q, _row_scale(random, layout, 73.0))
        elif layout.format == "int4" or layout.format == "int3":
            groups = (layout.shape[0], -(-layout.columns // layout.group_size))
            group_scale = random.integers(6, 16, groups, np.uint8)
            q = _integers(random, layout) & np.uint8(15 if layout.format == "int4" else 7)
            row_scale = _row_scale(random, layout, 50.0 if layout.format == "int4" else 25.0)
            writer.add_grouped(name, layout.format, q, group_scale, row_scale, layout.group_size)
        else:
            writer.add_float(name, _floats(random, layout), "bf16")


def _integers(random: np.random.Generator, layout: Layout) -> npt.NDArray[np.uint8]:
    return np.frombuffer(random.bytes(layout.shape[0] * layout.shape[1]), np.uint8).reshape(layout.shape)


def _row_scale(random: np.random.Generator, layout: Layout, spread: float) -> Floats:
    """Rows of weights with a standard deviation near 1 / sqrt(K), where the integers have `spread`; 7 significant
    bits."""
    wanted = random.uniform(0.75, 1.25, layout.shape[0]) / (spread * np.sqrt(layout.shape[1]))
    mantissa, exponent = np.frexp(wanted)
    scale: Floats = np.ldexp(np.round(mantissa * 128) / 128, exponent).astype(np.float32)
    return scale


def _floats(random: np.random.Generator, layout: Layout) -> StoredTensor:
    """BF16 of random sign and mantissa with one exponent, the power of two next to 1 / sqrt(K)."""
    exponent = 127 - round(np.log2(1.5 * np.sqrt(layout.shape[1])))
    bits = np.frombuffer(random.bytes(2 * layout.shape[0] * layout.shape[1]), np.uint16)
    values = (bits & np.uint16(0x807F)) | np.uint16(exponent << 7)
    return StoredTensor("BF16", layout.shape, values.view(np.uint8))
