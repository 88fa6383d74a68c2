"""llama2.c files: a small trained Llama in one flat file, its tokenizer in another.

The layout is seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, context; a negative vocabulary: an
untied head), then FP32 matrices, each kind for all layers together. Its rotary pairs are interleaved; rows of queries
and keys are read in the order of Transformers' Llama, where a pair's halves stand half a head apart, so that what a
technique makes of it is a checkpoint that Transformers opens (`config_of`). All else is used as it lies.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from snello.errors import SnelloError
from snello.models.checkpoint import CheckpointWeights
from snello.models.model import Bytes, Loadable, Model, StoredTensor
from snello.models.spec import (
    Attention,
    Embedding,
    FeedForward,
    Format,
    Head,
    Layer,
    Norm,
    Rope,
    Spec,
)
from snello.models.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")
BOS, EOS = 1, 2
ROPE_BASE = 10_000.0
FIRST_BYTE_TOKEN = 3  # after unk, bos, eos come the 256 bytes


@dataclass(frozen=True)
class Header:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int

    @property
    def tied(self) -> bool:
        return self.vocabulary > 0

    @property
    def words(self) -> int:
        return abs(self.vocabulary)

    @property
    def kv_dim(self) -> int:
        return self.dim // self.heads * self.kv_heads

    def plausible(self) -> bool:
        positive = min(self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.words, self.context) > 0
        return positive and self.dim % self.heads == 0 and self.heads % self.kv_heads == 0

    def blocks(self) -> list[tuple[str, tuple[int, ...]]]:
        """(template of the canonical name, shape) in file order; names with {i} repeat for every layer."""
        square, narrow, wide = (self.dim, self.dim), (self.kv_dim, self.dim), (self.hidden, self.dim)
        blocks: list[tuple[str, tuple[int, ...]]] = [
            ("embedding.tokens.weight", (self.words, self.dim)),
            ("layers.{i}.attention.norm.weight", (self.dim,)),
            ("layers.{i}.attention.q.weight", square),
            ("layers.{i}.attention.k.weight", narrow),
            ("layers.{i}.attention.v.weight", narrow),
            ("layers.{i}.attention.o.weight", square),
            ("layers.{i}.ffn.norm.weight", (self.dim,)),
            ("layers.{i}.ffn.gate.weight", wide),
            ("layers.{i}.ffn.down.weight", (self.dim, self.hidden)),
            ("layers.{i}.ffn.up.weight", wide),
            ("norm.weight", (self.dim,)),
            ("rotary", (2, self.context, self.dim // self.heads // 2)),  # cosines and sines: recomputed
        ]
        return blocks if self.tied else [*blocks, ("head.weight", (self.words, self.dim))]

    def file_bytes(self) -> int:
        repeats = {True: self.layers, False: 1}
        return HEADER.size + 4 * sum(math.prod(shape) * repeats["{i}" in name] for name, shape in self.blocks())


def is_stories_file(path: Path) -> bool:
    """Whether the first bytes are a llama2.c header."""
    return path.suffix == ".bin" and path.stat().st_size > HEADER.size and _header(path).plausible()


def load_stories(path: Path) -> Model:
    """A llama2.c file as a `Model`; weights are views of the mapped file, but for queries and keys."""
    header, size = _header(path), path.stat().st_size
    if size != header.file_bytes():
        raise SnelloError(
            f"{path}: its header describes a llama2.c file of {header.file_bytes():,} bytes, it has {size:,}",
            "if it is a llama2.c file, download it again; a pickled file is not read",
        )
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    return Model(
        spec=_spec(header),
        weights=CheckpointWeights(_tensors(header, mapped)),
        path=path,
        name=path.stem,
        files=(path,),
    )


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        return Header(*HEADER.unpack(file.read(HEADER.size)))


@dataclass(frozen=True)
class Halved:
    """A matrix of heads whose rows 2 i and 2 i + 1 stand half a head apart: (i, i + head_dim / 2)."""

    tensor: StoredTensor
    heads: int

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def load(self) -> StoredTensor:
        pairs = self.tensor.float32().reshape(self.heads, -1, 2, self.shape[1])
        return StoredTensor.of(pairs.swapaxes(1, 2).reshape(self.shape))


def config_of(spec: Spec) -> dict[str, Any]:
    """The config.json that Transformers would have for such a file."""
    layer = spec.layers[0]
    assert isinstance(layer.mixer, Attention)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.feed_forward.width,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": layer.mixer.num_heads,
        "num_key_value_heads": layer.mixer.num_kv_heads,
        "head_dim": layer.mixer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm.epsilon,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": spec.head.tied,
        "bos_token_id": spec.bos_token,
        "eos_token_id": list(spec.eos_tokens),
    }


def _tensors(header: Header, mapped: Bytes) -> dict[str, Loadable]:
    tensors, offset = dict[str, Loadable](), HEADER.size
    heads = {"q": header.heads, "k": header.kv_heads}
    for template, shape in header.blocks():
        for index in range(header.layers if "{i}" in template else 1):
            end = offset + 4 * math.prod(shape)
            tensor, name = StoredTensor("F32", shape, mapped[offset:end]), template.replace("{i}", str(index))
            part = name.split(".")[-2] if "." in name else ""
            tensors[name] = Halved(tensor, heads[part]) if part in heads else tensor
            offset = end
    del tensors["rotary"]
    return tensors


def _spec(header: Header) -> Spec:
    head_dim = header.dim // header.heads
    rope = Rope(base=ROPE_BASE, dims=head_dim)
    attention = Attention(num_heads=header.heads, num_kv_heads=header.kv_heads, head_dim=head_dim, rope=rope)
    layer = Layer(mixer=attention, feed_forward=FeedForward(width=header.hidden, activation="silu"))
    return Spec(
        family="llama",
        task="causal-lm",
        vocab_size=header.words,
        hidden_size=header.dim,
        max_positions=header.context,
        layers=(layer,) * header.layers,
        norm=Norm(kind="rms", epsilon=1e-5),
        embedding=Embedding(),
        head=Head(kind="lm", tied=header.tied),
        default_format=Format(weights="fp32"),
        cache_format="fp32",
        bos_token=BOS,
        eos_tokens=tuple(token for token in (BOS, EOS) if token < header.words),  # stories end where the next begins
    )


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def load_stories_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside a llama2.c file: `NAME.tok*.bin`, or `tokenizer.bin`."""
    beside = sorted(path.parent.glob(f"{path.stem}.tok*.bin")) or sorted(path.parent.glob("tokenizer.bin"))
    if not beside:
        hint = f"put {path.stem}.tok512.bin (or tokenizer.bin) into {path.parent}"
        raise SnelloError(f"{path} has no tokenizer beside it", hint)
    return build_tokenizer(_read_pieces(beside[0], _header(path).words), path.stem)


def _read_pieces(path: Path, words: int) -> list[tuple[bytes, float]]:
    """(text, score) of every token."""
    raw, offset, pieces = path.read_bytes(), 4, []
    try:
        for _ in range(words):
            score, length = struct.unpack_from("<fi", raw, offset)
            if length < 0 or offset + 8 + length > len(raw):
                raise struct.error
            pieces.append((raw[offset + 8 : offset + 8 + length], score))
            offset += 8 + length
    except struct.error:
        raise SnelloError(f"{path} ends before token {len(pieces):,} of {words:,}", "download it again") from None
    return pieces


def build_tokenizer(pieces: list[tuple[bytes, float]], name: str) -> Tokenizer:
    """A byte-pair tokenizer in which the pair with the best score is merged first, bytes stand for unknown
    characters."""
    from tokenizers import decoders, models, normalizers, processors

    specials = ["<unk>", "<s>", "</s>"]
    texts = specials + [f"<0x{value:02X}>" for value in range(256)]
    texts += [piece.decode("utf-8", "replace").replace(" ", "▁") for piece, _ in pieces[len(texts) :]]
    vocabulary = {text: index for index, text in enumerate(texts)}
    if len(vocabulary) != len(pieces):
        raise SnelloError(f"{name}: its tokenizer names a token twice", "download it again")
    model = models.BPE(vocabulary, _merges(texts, pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>:0", "$A:0"], pair=["<s>:0", "$A:0", "<s>:1", "$B:1"], special_tokens=[("<s>", BOS)]
    )
    backend.add_special_tokens(specials)
    return Tokenizer(backend, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, {}, name)


def _merges(texts: list[str], pieces: list[tuple[bytes, float]]) -> list[tuple[str, str]]:
    """Every way to split a token into two others, best score first, then by id."""
    first = FIRST_BYTE_TOKEN + 256
    known = set(texts[first:])
    ranked = sorted(range(first, len(texts)), key=lambda index: (-pieces[index][1], index))
    return [
        (texts[index][:cut], texts[index][cut:])
        for index in ranked
        for cut in range(1, len(texts[index]))
        if texts[index][:cut] in known and texts[index][cut:] in known
    ]
