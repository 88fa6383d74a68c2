"""One batch as a lesson: both models look at it, and what they saw differently is weighed into one loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from snello.models.reference import Block, Reference
from snello.models.reference_layers import AttentionHalf, visible
from snello.models.spec import Attention, Spec
from snello.techniques.distill import losses
from snello.techniques.distill.mix import parse_mix
from snello.training.data import Batch

if TYPE_CHECKING:
    from snello.techniques.distill import Distill


@dataclass(frozen=True)
class Seen:
    """`rows`: hidden rows (B, T, D) before the first block and after each. `final`: normed. `logits`: (B, T, V), or
    (B, labels).
    """

    rows: list[Tensor]
    final: Tensor
    logits: Tensor


def look(model: Reference, tokens: Tensor, mask: Tensor | None) -> Seen:
    """The forward pass, remembering what lies between the blocks."""
    rows = [model.embedding(tokens)]
    for block in model.layers:
        rows.append(block(rows[-1], mask))
    final = model.norm(rows[-1]) if model.spec.final_norm else rows[-1]
    tied = model.embedding.tokens.weight if model.spec.head.tied else None
    return Seen(rows, final, model.head(final, mask, tied))


@dataclass(frozen=True)
class Lesson:
    """The loss of a student: a callable for the training loop."""

    mix: dict[str, float]
    temperature: float
    top_k: int
    spec: Spec
    teacher: Reference | None

    @classmethod
    def of(cls, options: Distill, spec: Spec, teacher: Reference | None) -> Lesson:
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        return cls(parse_mix(options.loss), options.temperature, options.top_k, spec, teacher)

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        student = cast(Reference, module)
        tokens, mask = batch["tokens"], batch.get("mask")
        own, theirs = look(student, tokens, mask), None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = look(self.teacher.to(tokens.device), tokens, mask)
        total = torch.zeros((), device=tokens.device)
        for name, weight in self.mix.items():
            if name == "text":
                total = total + weight * self._text(own, batch)
            else:
                assert theirs is not None
                total = total + weight * self._taught(name, student, own, theirs, mask)
        return total

    def _text(self, own: Seen, batch: Batch) -> Tensor:
        if "targets" in batch:
            return losses.text_loss(own.logits.flatten(0, 1), batch["targets"].flatten())
        following = batch["tokens"][:, 1:]
        if "text" in batch:  # what the student said itself is no text to learn
            following = following.masked_fill(~batch["text"][:, 1:].bool(), -100)
        if "mask" in batch:
            following = following.masked_fill(~batch["mask"][:, 1:].bool(), -100)
        return losses.text_loss(own.logits[:, :-1].flatten(0, 1), following.flatten())

    def _taught(self, name: str, student: Reference, own: Seen, theirs: Seen, mask: Tensor | None) -> Tensor:
        if name in losses.DIVERGENCES:
            both = (own.logits, theirs.logits)
            if self.spec.head.kind == "lm":
                both = (real(own.logits, mask), real(theirs.logits, mask))
            return losses.DIVERGENCES[name](*both, self.temperature, self.top_k)
        if name == "cosine":
            return losses.cosine(real(own.final, mask), real(theirs.final, mask))
        if name == "mse":
            pairs = layer_pairs(len(own.rows) - 1, len(theirs.rows) - 1)
            each = [losses.mean_square(real(own.rows[a], mask), real(theirs.rows[b], mask)) for a, b in pairs]
            return torch.stack(each).mean()
        assert self.teacher is not None
        return relations(student, self.teacher, own, theirs, mask)


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which block of the teacher each of the student should follow: evenly, the last the last."""
    return [(number, math.ceil(number * teacher / student)) for number in range(1, student + 1)]


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D) -> the rows of real tokens (N, D)."""
    return x.flatten(0, 1) if mask is None else x[mask.bool()]


def relations(student: Reference, teacher: Reference, own: Seen, theirs: Seen, mask: Tensor | None) -> Tensor:
    """Of the queries, keys and values of the last layers, before positions turn them; as many parts as both allow."""
    parts = []
    one, other = last_attention(student), last_attention(teacher)
    causal, length = one.mixer.causal, own.final.shape[1]
    seen = visible(Attention(num_heads=1, num_kv_heads=1, head_dim=1, causal=causal), length, mask, own.final.device)
    allowed = (
        seen[:, 0] if seen is not None else torch.ones(1, length, length, dtype=torch.bool, device=own.final.device)
    )
    if seen is None and causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask.bool()[:, :, None]
    x, y = one.prepare(own.rows[-2]), other.prepare(theirs.rows[-2])
    for name in "qkv":
        heads = math.gcd(_heads(one.mixer, name), _heads(other.mixer, name))
        parts.append(losses.relation_kl(getattr(one, name)(x), getattr(other, name)(y), heads, allowed))
    return torch.stack(parts).mean()


def last_attention(model: Reference) -> AttentionHalf:
    half = cast(Block, model.layers[-1]).attention
    assert isinstance(half, AttentionHalf)
    return half


def _heads(mixer: Attention, name: str) -> int:
    return mixer.num_heads if name == "q" else mixer.num_kv_heads
