"""The model in plain torch: the truth for tests, the body for calibration and training.

Slow and clear on purpose. `Reference` is the whole model in memory; `build_embedding`, `build_block` and `build_head`
make one part at a time, for work that must not hold them all, and `streamed` reads text so. Parameter names are the
canonical ones of `spec.py`, so filling a module is a loop over its own names. Held to Hugging Face Transformers by
tests, family by family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.errors import SnelloError
from snello.models.reference_layers import AnswerHead, Block, NormLayer, TokenEmbedding, check
from snello.models.reference_skip import add_skips
from snello.models.spec import Spec

if TYPE_CHECKING:
    from snello.models.model import Model, Weights

__all__ = ["Block", "Reference", "Tail", "TokenEmbedding", "build_block", "build_embedding", "build_head", "streamed"]

M = TypeVar("M", bound=nn.Module)


class Tail(nn.Module):
    """What stands after the blocks: the final norm and the head. `tied` is the embedding's matrix where they share."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if spec.final_norm:
            self.norm = NormLayer(spec.norm, spec.hidden_size)
        self.head = AnswerHead(spec)
        self.tied: Tensor | None = None

    def normed(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x)) if hasattr(self, "norm") else x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.head(self.normed(x), mask, self.tied))


class Reference(nn.Module):
    """The whole model. Use `Reference.from_model(model)`; the bare constructor leaves parameters unset."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        check(spec)
        self.spec = spec
        self.embedding = TokenEmbedding(spec)
        self.layers = nn.ModuleList(Block(spec, index) for index in range(len(spec.layers)))
        if spec.final_norm:
            self.norm = NormLayer(spec.norm, spec.hidden_size)
        self.head = AnswerHead(spec)

    @classmethod
    def from_model(cls, model: Model, dtype: torch.dtype = torch.float32) -> Reference:
        return cls.from_weights(model.spec, model.weights, dtype)

    @classmethod
    def from_weights(cls, spec: Spec, weights: Weights, dtype: torch.dtype = torch.float32) -> Reference:
        with torch.device("meta"):
            reference = cls(spec)
        for index, block in enumerate(reference.layers):
            add_skips(cast(Block, block), index, spec, weights)
        return fill(reference, "", weights, dtype)

    def hidden(self, tokens: Tensor, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Rows after the last block and the final norm, (B, T, D)."""
        self._check_length(tokens)
        x = self.embedding(tokens, types)
        for block in self.layers:
            x = block(x, mask)
        return cast(Tensor, self.norm(x)) if self.spec.final_norm else cast(Tensor, x)

    def forward(self, tokens: Tensor, *, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), label logits (B, labels), or for embedding models hidden rows (B, T, D).

        `mask` (B, T) is 1 on real tokens; padding stands at the end.
        """
        tied = self.embedding.tokens.weight if self.spec.head.tied else None
        return cast(Tensor, self.head(self.hidden(tokens, types, mask), mask, tied))

    def embed(self, tokens: Tensor, *, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """One vector per sequence, (B, D)."""
        y = self.head.pool(self.hidden(tokens, types, mask), mask)
        return F.normalize(y, dim=-1) if self.spec.head.normalize else y

    def _check_length(self, tokens: Tensor) -> None:
        if tokens.shape[1] > self.spec.max_positions:
            raise SnelloError(
                f"{tokens.shape[1]} tokens are more than the {self.spec.max_positions} positions of this model",
                "use shorter windows",
            )


def streamed(model: Model, batches: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Logits (B, T, V) of each batch of tokens (B, T), as `Reference` gives them to the bit, with one block's weights
    in memory at a time: the hidden rows of all batches wait between blocks.
    """
    spec, weights = model.spec, model.weights
    embedding = build_embedding(spec, weights, dtype)
    hidden = [cast(Tensor, embedding(tokens)) for tokens in batches]
    del embedding
    for index in range(len(spec.layers)):
        block = build_block(spec, index, weights, dtype)
        hidden = [cast(Tensor, block(x)) for x in hidden]
        del block
    tail = build_head(spec, weights, dtype)
    for x in hidden:
        yield cast(Tensor, tail(x))


def build_embedding(spec: Spec, weights: Weights, dtype: torch.dtype = torch.float32) -> TokenEmbedding:
    with torch.device("meta"):
        module = TokenEmbedding(spec)
    return fill(module, "embedding.", weights, dtype)


def build_block(spec: Spec, index: int, weights: Weights, dtype: torch.dtype = torch.float32) -> Block:
    check(spec)
    with torch.device("meta"):
        module = Block(spec, index)
    add_skips(module, index, spec, weights)
    return fill(module, f"layers.{index}.", weights, dtype)


def build_head(spec: Spec, weights: Weights, dtype: torch.dtype = torch.float32) -> Tail:
    with torch.device("meta"):
        module = Tail(spec)
    tail = fill(module, "", weights, dtype)
    if spec.head.tied:
        tail.tied = torch.from_numpy(weights.values("embedding.tokens.weight")).to(dtype)
    return tail


def fill(module: M, prefix: str, weights: Weights, dtype: torch.dtype) -> M:
    """Give every parameter of a module made on the meta device its values, by name."""
    for name, parameter in list(module.named_parameters()):
        values = torch.from_numpy(weights.values(prefix + name)).to(dtype)
        assert values.shape == parameter.shape, f"{prefix + name}: {tuple(values.shape)}, not {tuple(parameter.shape)}"
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(values))
    return module
