"""Turns a checkpoint into a GGUF file for llama.cpp: in one type throughout, or as its own quantizer mixes them.

A file in one type (embedding and output head like the rest: `q4_0-all`, `q8_0`) reads the fewest bytes per token that
the type allows.  What people run is `q4_0`, made from `bf16` by llama.cpp itself, with the head in six bits.  Norms and
RoPE factors stay float32.  Runs in the peer's environment, one tensor at a time.  Tokens are spelled as the checkpoint
spells them, but how a text becomes tokens is left out: the file is for measuring with token ids, not for talking.

    PYTHON convert_llamacpp.py CHECKPOINT q4_0 model-q4_0.gguf
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

TYPES = {
    "q4_0-all": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
MIXED = "q4_0"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's
NUMPY = {"F32": np.float32, "F16": np.float16}
Array = npt.NDArray[Any]


class Safetensors:
    """The tensors of a checkpoint's safetensors files, read as float32 when asked for."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, tuple[dict[str, Any], Any]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
            self.entries |= {name: (entry, data) for name, entry in header.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, (entry, _) in self.entries.items()}

    def read(self, name: str) -> Array:
        entry, data = self.entries[name]
        start, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            bits = data[start:end].view(np.uint16).astype(np.uint32) << np.uint32(16)
            return np.asarray(bits.view(np.float32).reshape(entry["shape"]))
        if entry["dtype"] not in NUMPY:
            raise SystemExit(f"{name}: numbers of type {entry['dtype']} are not read")
        values = data[start:end].view(NUMPY[entry["dtype"]])
        return np.asarray(values.astype(np.float32).reshape(entry["shape"]))


def permute(weights: Array, heads: int) -> Array:
    """Rows of a query or key projection from halves (Hugging Face) to neighbouring pairs (ggml's RoPE)."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings, where old and new configs keep them."""
    theta = config.get("rope_theta", 10000.0)
    return {"rope_theta": theta, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def architecture(config: dict[str, Any]) -> str:
    """What GGUF calls it."""
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise SystemExit(f"models of type {kind} are not converted; these are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Llama 3's slowing of the long wavelengths, one divisor per rotated pair; none without such scaling."""
    scaling = rope(config)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise SystemExit(f"rope_type {kind!r} is not handled")
    trained = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    dimension = head_dim(config)
    frequencies = scaling["rope_theta"] ** (-np.arange(0, dimension, 2, dtype=np.float64) / dimension)
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
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))


def spellings(folder: Path) -> dict[int, str]:
    """Every token of the checkpoint's tokenizer.json, by number; none where it has no such file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    numbered = ((word, number) for number, (word, _) in enumerate(words)) if isinstance(words, list) else words.items()
    known = {number: word for word, number in numbered}
    return known | {added["id"]: added["content"] for added in content.get("added_tokens", [])}


def add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], known: dict[int, str]) -> None:
    """As many words as the embedding has rows, made up where none is known; one merge, so that no list is empty."""
    tokens = [known.get(number, f"<unused_{number}>") for number in range(config["vocab_size"])]
    types = [gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED for number in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])


def rename(config: dict[str, Any]) -> Callable[[str], str]:
    """From a Hugging Face tensor name to GGUF's."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(config))
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])

    def to_gguf(name: str) -> str:
        renamed: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ValueError(f"{name}: no such tensor in GGUF's {architecture(config)} architecture")
        return renamed

    return to_gguf


def reorder(name: str, weights: Array, config: dict[str, Any]) -> Array:
    """Llama's query and key rows; the others of these architectures keep Hugging Face's order."""
    if architecture(config) != "llama":
        return weights
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


def convert(folder: Path, type_name: str, path: Path) -> None:
    """One GGUF file in one type."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = Safetensors(folder)
    to_gguf, factors = rename(config), rope_factors(config)
    matrices, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, architecture(config))
    add_settings(writer, config, file_type)
    add_tokenizer(writer, config, spellings(folder))
    tensors = OneByOne(writer, matrices)
    if factors is not None:
        tensors.announce("rope_freqs.weight", factors.shape)
    for name, shape in source.shapes().items():
        tensors.announce(to_gguf(name), shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        tensors.write(factors)
    for name in source.entries:
        tensors.write(reorder(name, source.read(name), config))
    writer.close()


def quantize(folder: Path, path: Path) -> None:
    """llama.cpp's own Q4_0, of a BF16 file that is made for it."""
    source = path.with_suffix(".bf16")
    convert(folder, "bf16", source)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings)
    source.unlink()
    if status != 0:
        raise SystemExit(f"llama_model_quantize failed with {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("type", choices=[*TYPES, MIXED])
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.type == MIXED:
        quantize(options.checkpoint, options.output)
    else:
        convert(options.checkpoint, options.type, options.output)


if __name__ == "__main__":
    main()
