"""What a student is taught with: pure functions of tensors, one idea each.

Logits come as rows (N, V) of real positions only, so no function here knows of padding. Everything is in nats and a
mean over rows; computed in FP32 whatever the products were.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their size (arXiv:1503.02531).

    Covers all that the teacher may say. Logits (N, V).
    """
    q, p = _pair(student, teacher, temperature, top_k)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """KL(student || teacher), times the square of the temperature: avoids what the teacher would not say
    (MiniLLM, arXiv:2306.08543). Logits (N, V).
    """
    q, p = _pair(student, teacher, temperature, top_k)
    return temperature**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """The mean of KL(teacher || m) and KL(student || m), m halfway between them, times the square of the temperature.

    Between the two directions, and never above log 2 times that square (GKD, arXiv:2306.13649, with beta one half).
    Logits (N, V).
    """
    q, p = _pair(student, teacher, temperature, top_k)
    middle = torch.logaddexp(q, p) - math.log(2)
    one, other = (F.kl_div(middle, x, log_target=True, reduction="batchmean") for x in (p, q))
    return temperature**2 * (one + other) / 2


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen": jensen_shannon}


def _pair(student: Tensor, teacher: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both, over all words or over the teacher's `top_k` and the rest."""
    q, p = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    if not 0 < top_k < p.shape[-1]:
        return q, p
    words = p.topk(top_k, dim=-1).indices
    return with_rest(q, words), with_rest(p, words)


def with_rest(log_probabilities: Tensor, words: Tensor) -> Tensor:
    """Log-probabilities (N, k + 1) of the given words (N, k), and of all others as one: nothing is renormalized, so
    that mass outside of the k words counts (the residual bucket of a top-k distillation).
    """
    rest = log_probabilities.scatter(-1, words, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_probabilities.gather(-1, words), rest), dim=-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean cosine of hidden rows (N, D) (DistilBERT, arXiv:1910.01108)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of hidden rows (N, D) (TinyBERT, arXiv:1909.10351)."""
    return F.mse_loss(student.float(), teacher.float())


def relation_kl(student: Tensor, teacher: Tensor, heads: int, seen: Tensor) -> Tensor:
    """KL between how the rows of a text relate to each other: softmax(x x^T / sqrt(d)), in `heads` parts.

    Student (B, T, S) and teacher (B, T, U) may differ in width; only the relations (B, heads, T, T) are compared
    (MiniLMv2, arXiv:2012.15828). `seen` (B or 1, T, T) is True where a row may look; rows that see nothing do not
    count.
    """
    q, p = (_relations(x, heads, seen) for x in (student, teacher))
    visible = seen[:, None]
    each = torch.where(visible, p.exp() * (p - q), 0.0).sum(-1)  # (B, heads, T)
    rows = visible.any(-1).expand_as(each)
    return each[rows].mean()


def _relations(x: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Log-probabilities (B, heads, T, T); where a row may not look, 0 stands and is not to be read."""
    parts = x.float().reshape(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, heads, T, d)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    lowest = torch.finfo(scores.dtype).min
    found = scores.masked_fill(~seen[:, None], lowest).log_softmax(-1)
    return found.masked_fill(~seen[:, None], 0.0)


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the text's own words; logits (N, V), targets (N,), -100 where there is none.

    Zero where a batch has no target at all (a short text of which no word was masked).
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
