"""The real model and text that tests of quality use; absent data skips a test and says so."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from snello.models import Model, load
from snello.models.reference import Reference

DATA = Path(__file__).parents[3] / "shared/data"


@lru_cache
def novels() -> Model:
    path = DATA / "models/novels-16m"
    if not path.exists():
        pytest.skip(f"test data is absent: {path}")
    return load(path)


@lru_cache
def windows(split: str, count: int, length: int = 256) -> tuple[np.ndarray, ...]:
    path = DATA / f"text/english_novels_{split}.txt"
    if not path.exists():
        pytest.skip(f"test data is absent: {path}")
    with path.open(encoding="utf-8") as file:
        file.seek(200_000)
        file.readline()
        text = file.read(count * length * 8)
    ids = np.array(novels().tokenizer.encode(text), dtype=np.int32)
    return tuple(ids[i * length : (i + 1) * length] for i in range(count))


@torch.inference_mode()
def loss(reference: Reference, texts: tuple[np.ndarray, ...]) -> float:
    """Nats a token."""
    total = 0.0
    for window in texts:
        tokens = torch.from_numpy(window.astype(np.int64))[None]
        total += float(torch.nn.functional.cross_entropy(reference(tokens)[0, :-1], tokens[0, 1:]))
    return total / len(texts)
