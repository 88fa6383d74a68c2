"""Writes Hugging Face checkpoints of well-known shapes with random weights, for measuring speed.

Decode speed depends on shapes and bytes, not on what the weights say, so every engine can be measured on a model
that nobody has to download.  All engines are then fed from the *same* folder.  Tensors are drawn and written one at
a time, each from a seed of its own, so a checkpoint needs little memory and is the same bytes on every run.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from snello.errors import SnelloError
from snello.models.shapes import SHAPES

STANDARD_DEVIATION = 0.02
DRAW = 1 << 22  # numbers drawn at a time
BOS, EOS = 256, 257
ARCHITECTURES = {  # model_type -> what it is loaded as
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama, Qwen3 (which also norms each head's queries and keys) or Mixtral model as numbers, named as in
    `config.json`; `experts` 0: dense.
    """

    name: str
    kind: str = "llama"
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    context: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    experts: int = 0
    experts_per_token: int = 0

    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        mixture = {"num_local_experts": self.experts, "num_experts_per_tok": self.experts_per_token}
        return {
            **(mixture if self.experts else {}),
            "architectures": [ARCHITECTURES[self.kind]],
            "model_type": self.kind,
            **({} if self.experts else {"attention_bias": False}),
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": STANDARD_DEVIATION,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            **({} if self.experts else {"mlp_bias": False}),
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order they are written."""
        hidden = self.hidden_size
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "self_attn.q_proj.weight"] = (query, hidden)
            shapes[prefix + "self_attn.k_proj.weight"] = (key_value, hidden)
            shapes[prefix + "self_attn.v_proj.weight"] = (key_value, hidden)
            shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
            if self.kind == "qwen3":
                shapes[prefix + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[prefix + "self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            shapes |= self._feed_forward(prefix)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _feed_forward(self, prefix: str) -> dict[str, tuple[int, ...]]:
        outer, inner = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        if not self.experts:
            parts = {"gate_proj": outer, "up_proj": outer, "down_proj": inner}
            return {f"{prefix}mlp.{part}.weight": shape for part, shape in parts.items()}
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}block_sparse_moe.gate.weight": (self.experts, self.hidden_size)}
        for number in range(self.experts):
            stem = f"{prefix}block_sparse_moe.experts.{number}"
            shapes |= {f"{stem}.w1.weight": outer, f"{stem}.w2.weight": inner, f"{stem}.w3.weight": outer}
        return shapes


def shape_of(name: str) -> Shape:
    """A published shape as a checkpoint.

    Raises:
        SnelloError: there is no such shape, or its architecture is not written here.
    """
    if name not in shapes():
        raise SnelloError(
            f"there is no checkpoint of the shape {name} for peers", f"choose from: {', '.join(shapes())}"
        )
    config = SHAPES[name]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Shape(
        name=name,
        kind=config["model_type"],
        hidden_size=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim", hidden // heads),
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rope_scaling=config.get("rope_scaling"),
        experts=config.get("num_local_experts", 0),
        experts_per_token=config.get("num_experts_per_tok", 0),
    )


def shapes() -> tuple[str, ...]:
    """The shapes that have checkpoints."""
    return tuple(name for name, config in SHAPES.items() if config["model_type"] in ARCHITECTURES)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds to nearest, ties to even; the bits of bfloat16 as integers."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def draw(name: str, shape: tuple[int, ...], seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """One tensor's bfloat16 bits in pieces: ones for a norm, otherwise gaussian."""
    count = math.prod(shape)
    if len(shape) == 1:
        yield to_bfloat16(np.ones(count, dtype=np.float32))
        return
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for start in range(0, count, DRAW):
        values = generator.standard_normal(min(DRAW, count - start), dtype=np.float32)
        yield to_bfloat16(values * np.float32(STANDARD_DEVIATION))


def write_header(file: BinaryIO, tensors: dict[str, tuple[int, ...]]) -> None:
    """The safetensors header: eight bytes of length, then padded JSON with each tensor's place."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_weights(path: Path, shape: Shape, seed: int) -> None:
    """The whole `model.safetensors`, one tensor at a time."""
    tensors = shape.tensors()
    with path.open("wb") as file:
        write_header(file, tensors)
        for name, tensor_shape in tensors.items():
            for piece in draw(name, tensor_shape, seed):
                file.write(piece.tobytes())


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer: 256 bytes, begin and end, and one merge so that no list is empty."""
    vocabulary = {character: index for index, character in enumerate(byte_characters())}
    special = ["<s>", "</s>"]
    vocabulary.update({token: BOS + index for index, token in enumerate(special)})
    vocabulary["th"] = EOS + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["t", "h"]],
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(shape: Shape, folder: Path, seed: int = 0) -> None:
    """The whole folder; it takes its final name only when complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "config.json", shape.config())
    write_json(partial / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_json(partial / "tokenizer.json", tokenizer())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(partial / "tokenizer_config.json", settings)
    write_weights(partial / "model.safetensors", shape, seed)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
