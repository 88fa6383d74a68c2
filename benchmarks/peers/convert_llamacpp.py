"""Turns a checkpoint into GGUF files for llama.cpp: in one type throughout, and as its own quantizer mixes them.

A file in one type (embedding and output head like the rest: `q4_0-all`, `q8_0`) reads the fewest bytes per token that
the type allows.  What people run is `q4_0`, made from `q8_0` by llama.cpp itself, with the head in six bits.  Norms and
RoPE factors stay float32.  Runs in the peer's environment, one tensor at a time.

    build/peers/llamacpp/bin/python -m benchmarks.peers.convert_llamacpp tinyllama-1.1b q8_0 q4_0 q4_0-all
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.peers.checkpoint import CHECKPOINTS, SHAPES
from benchmarks.peers.setup import PEERS

MODELS = PEERS / "models" / "llamacpp"
TYPES = {
    "q4_0-all": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
MIXED = "q4_0"
Array = npt.NDArray[Any]


class Safetensors:
    """The tensors of one bfloat16 safetensors file, read as float32 when asked for."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.entries: dict[str, dict[str, Any]] = header
        self.data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        entry = self.entries[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name}: {entry['dtype']}, only BF16 is read")
        start, end = entry["data_offsets"]
        bits = self.data[start:end].view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(entry["shape"])


def permute(weights: Array, heads: int) -> Array:
    """Rows of a query or key projection from halves (Hugging Face) to neighbouring pairs (ggml's RoPE)."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Llama 3's slowing of the long wavelengths, one divisor per rotated pair; none without such scaling."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_type {scaling['rope_type']!r} is not handled")
    trained = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    dimension = config["head_dim"]
    frequencies = config["rope_theta"] ** (-np.arange(0, dimension, 2, dtype=np.float64) / dimension)
    turns = trained * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), dtype=np.float32)


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: gguf.LlamaFileType) -> None:
    """What the model is, in GGUF's words."""
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """The byte-level tokenizer, filled up with unused entries to the size of the embedding."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = [f"<unused_{index}>" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index] = token
        types[index] = gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def rename(config: dict[str, Any]) -> Callable[[str], str]:
    """From a Hugging Face tensor name to GGUF's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])

    def to_gguf(name: str) -> str:
        renamed: str | None = names.get_name(name, try_suffixes=(".weight",))
        if renamed is None:
            raise ValueError(f"{name}: no such tensor in GGUF's llama architecture")
        return renamed

    return to_gguf


def reorder(name: str, weights: Array, config: dict[str, Any]) -> Array:
    if name.endswith("q_proj.weight"):
        return permute(weights, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return permute(weights, config["num_key_value_heads"])
    return weights


class OneByOne:
    """Adds tensors to a writer twice over: first their shapes, then, once the header is out, their bytes.

    `GGUFWriter` would otherwise hold the whole model in memory before it writes the first byte.
    """

    def __init__(self, writer: gguf.GGUFWriter, matrices: gguf.GGMLQuantizationType) -> None:
        self.writer = writer
        self.matrices = matrices

    def kind(self, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        return self.matrices if len(shape) == 2 else gguf.GGMLQuantizationType.F32

    def announce(self, name: str, shape: tuple[int, ...]) -> None:
        kind = self.kind(shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        self.writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)

    def write(self, weights: Array) -> None:
        self.writer.write_tensor_data(gguf.quantize(weights, self.kind(weights.shape)))


def convert(shape: str, type_name: str, path: Path) -> None:
    """One GGUF file; it takes its final name only when complete."""
    folder = CHECKPOINTS / shape
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = Safetensors(folder / "model.safetensors")
    to_gguf, factors = rename(config), rope_factors(config)
    matrices, file_type = TYPES[type_name]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    add_settings(writer, config, file_type)
    add_tokenizer(writer, folder, config)
    tensors = OneByOne(writer, matrices)
    if factors is not None:
        tensors.announce("rope_freqs.weight", factors.shape)
    for name, entry in source.entries.items():
        tensors.announce(to_gguf(name), tuple(entry["shape"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        tensors.write(factors)
    for name in source.entries:
        tensors.write(reorder(name, source.read(name), config))
    writer.close()
    partial.rename(path)


def quantize(shape: str, path: Path) -> None:
    """llama.cpp's own Q4_0 of the shape's `q8_0` file, which is made first if need be."""
    source = MODELS / f"{shape}-q8_0.gguf"
    if not source.exists():
        convert(shape, "q8_0", source)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.allow_requantize = True  # random weights: only their types matter here
    partial = path.with_suffix(".partial")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), settings)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize failed with {status}")
    partial.rename(path)


def main() -> None:
    known = [*TYPES, MIXED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("types", nargs="*", default=known, help=f"of: {', '.join(known)}")
    parser.add_argument("--force", action="store_true", help="convert again what is there already")
    options = parser.parse_args()
    if unknown := set(options.types) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for type_name in options.types:
        path = MODELS / f"{options.shape}-{type_name}.gguf"
        if path.exists() and not options.force:
            print(f"{path}: there already", flush=True)
            continue
        if type_name == MIXED:
            quantize(options.shape, path)
        else:
            convert(options.shape, type_name, path)
        print(f"{path}: written", flush=True)


if __name__ == "__main__":
    main()
