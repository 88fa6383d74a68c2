"""Losses beside their formulas, and at their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snello.errors import SnelloError
from snello.techniques.distill import losses
from snello.techniques.distill.lesson import layer_pairs
from snello.techniques.distill.mix import LOSSES, parse_mix


def logits(seed: int, rows: int = 9, words: int = 30) -> Tensor:
    return 2 * torch.randn(rows, words, generator=torch.Generator().manual_seed(seed))


def by_hand(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of probabilities (N, V), word by word, a row on average."""
    rows = [sum(float(a * (a / b).log()) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_their_formulas(temperature: float) -> None:
    q, p = logits(0), logits(1)
    soft_q, soft_p = ((x.double() / temperature).softmax(-1) for x in (q, p))
    square = temperature**2
    assert float(losses.forward_kl(q, p, temperature)) == pytest.approx(square * by_hand(soft_p, soft_q), rel=1e-4)
    assert float(losses.reverse_kl(q, p, temperature)) == pytest.approx(square * by_hand(soft_q, soft_p), rel=1e-4)
    between = (by_hand(soft_p, (soft_p + soft_q) / 2) + by_hand(soft_q, (soft_p + soft_q) / 2)) / 2
    assert float(losses.jensen_shannon(q, p, temperature)) == pytest.approx(square * between, rel=1e-4)
    for divergence in losses.DIVERGENCES.values():
        assert float(divergence(p, p)) == pytest.approx(0, abs=1e-6)


def test_jensen_shannon_is_bounded_and_has_no_side() -> None:
    q, p = 50 * logits(0), 50 * logits(1)
    assert float(losses.jensen_shannon(q, p)) == pytest.approx(float(losses.jensen_shannon(p, q)), rel=1e-5)
    assert 0.9 * math.log(2) < float(losses.jensen_shannon(q, p)) <= math.log(2) * (1 + 1e-6)


@pytest.mark.parametrize("loss", losses.DIVERGENCES.values())
def test_top_k_counts_the_rest_as_one_word(loss: Any) -> None:
    q, p = logits(0), logits(1)
    words = p.topk(4).indices
    buckets = []
    for x in (q, p):
        chosen = x.softmax(-1).gather(-1, words)
        buckets.append(torch.cat((chosen, 1 - chosen.sum(-1, keepdim=True)), -1).log())
    assert float(loss(q, p, 1.0, 4)) == pytest.approx(float(loss(*buckets)), rel=1e-4)
    assert float(loss(q, p, 1.0, 4)) < float(loss(q, p))  # merging words hides differences among them
    torch.testing.assert_close(loss(q, p, 1.0, 29), loss(q, p), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(q, p, 1.0, 30), loss(q, p))


def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities() -> None:
    q, p = logits(0).requires_grad_(), logits(1)
    losses.forward_kl(q, p).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(q.grad, (q.softmax(-1) - p.softmax(-1)).detach() / len(q), atol=1e-6, rtol=1e-4)


def test_top_k_of_sure_teachers_has_a_finite_gradient() -> None:
    q, p = logits(0).requires_grad_(), logits(1)
    p[:, 0] = 200.0
    losses.forward_kl(q, p, 1.0, 2).backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and torch.isfinite(q.grad).all()


def test_hidden_rows() -> None:
    x = logits(0)
    assert float(losses.cosine(3 * x, x)) == pytest.approx(0, abs=1e-6)
    assert float(losses.cosine(-x, x)) == pytest.approx(2, abs=1e-6)
    assert float(losses.mean_square(x + 2, x)) == pytest.approx(4, abs=1e-5)


def test_relations_compare_models_of_different_width() -> None:
    wide = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    narrow = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    seen = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    total = 0.0
    for b in range(2):
        for h in range(2):
            for t in range(6):
                both = []
                for x, size in ((narrow, 4), (wide, 12)):
                    part = x[b, :, size * h : size * (h + 1)].double()
                    both.append(((part[: t + 1] @ part[t]) / math.sqrt(size)).softmax(0)[None])
                total += by_hand(both[1], both[0]) / 24
    assert float(losses.relation_kl(narrow, wide, 2, seen)) == pytest.approx(total, rel=1e-4)
    assert float(losses.relation_kl(wide, wide, 2, seen)) == pytest.approx(0, abs=1e-6)


def test_relations_do_not_see_padding() -> None:
    x, y = (torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(2))
    seen = torch.zeros(1, 5, 5, dtype=torch.bool)
    seen[:, :3, :3] = True
    found = losses.relation_kl(x, y, 2, seen)
    short = losses.relation_kl(x[:, :3], y[:, :3], 2, torch.ones(1, 3, 3, dtype=torch.bool))
    torch.testing.assert_close(found, short)
    found.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.isfinite(x.grad).all() and not x.grad[:, 3:].any()


def test_text_loss_is_cross_entropy_of_what_is_there() -> None:
    x, targets = logits(0), torch.arange(9)
    targets[::2] = -100
    torch.testing.assert_close(losses.text_loss(x, targets), F.cross_entropy(x[1::2], targets[1::2]))
    assert float(losses.text_loss(x, torch.full((9,), -100))) == 0


def test_layers_are_paired_evenly() -> None:
    assert layer_pairs(4, 8) == [(1, 2), (2, 4), (3, 6), (4, 8)]
    assert layer_pairs(3, 5)[-1] == (3, 5) and layer_pairs(5, 5) == [(i, i) for i in range(1, 6)]


def test_a_mix() -> None:
    assert parse_mix("cosine:1, forward:5 ,text:2") == {"forward": 5.0, "text": 2.0, "cosine": 1.0}
    assert parse_mix("reverse") == {"reverse": 1.0} and all(parse_mix(name) for name in LOSSES)


@pytest.mark.parametrize("text", ["", "kl", "forward:", "forward:0", "forward:-1", "forward,forward:2", "text:nan", 3])
def test_bad_mixes_are_refused(text: Any) -> None:
    with pytest.raises(SnelloError) as caught:
        parse_mix(text)
    assert "forward" in str(caught.value.hint)
