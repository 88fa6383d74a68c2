"""Prompt tuning in torch: a frozen model, and rows before every text that learn (Lester et al. 2021, arXiv:2104.08691).

The rows stand behind ids past the vocabulary, so a text with its prompt is a text, and all that reads texts reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from snello.errors import SnelloError
from snello.models.model import Floats, Model
from snello.models.reference import Reference
from snello.models.spec import Spec
from snello.techniques.adapt import Adapt
from snello.techniques.adapt.train import Answer


def with_prompt(model: Model, options: Adapt, answers: Sequence[Answer], seed: int) -> Reference:
    """The model, frozen, with rows that may learn. Texts without their ids are read as the model itself reads them.

    They begin as the embeddings of `options.beginning`, again and again until there are enough, or of tokens drawn
    from `answers`.

    Raises:
        SnelloError: the text they are to begin as has no tokens.
    """
    module = Reference.from_model(model)
    module.requires_grad_(False)
    count, embedding = options.virtual_tokens, module.embedding
    if options.beginning:
        known = np.array(model.tokenizer.encode(options.beginning, add_special=False), np.int64)
        if not len(known):
            raise SnelloError(f"beginning={options.beginning!r} has no tokens", "leave it out")
        ids = np.resize(known, count)
    else:
        ids = np.random.default_rng(seed).choice(np.concatenate([answer.tokens for answer in answers]), count)
    rows = embedding.tokens.weight[torch.from_numpy(ids.astype(np.int64))] * embedding.embedding.scale
    embedding.prompt = nn.Parameter(rows.detach().clone())
    return module


def ids_of(spec: Spec, count: int) -> npt.NDArray[np.int32]:
    """The ids of so many rows."""
    return np.arange(spec.vocab_size, spec.vocab_size + count, dtype=np.int32)


def behind(ids: npt.NDArray[np.int32], answers: Sequence[Answer]) -> list[Answer]:
    """The answers with the rows of these ids before each."""
    return [
        dataclasses.replace(one, tokens=np.concatenate([ids, one.tokens]), start=one.start + len(ids))
        for one in answers
    ]


def rows_of(module: Reference) -> Floats:
    """What was learned (N, D)."""
    assert module.embedding.prompt is not None
    return module.embedding.prompt.detach().numpy().copy()
