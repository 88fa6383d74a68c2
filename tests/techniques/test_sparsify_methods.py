"""The arithmetic of pruning against independent statements: torch.nn.utils.prune, loops, explicit inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from snello.errors import SnelloError
from snello.techniques.curvature import damped, inverse_factor
from snello.techniques.sparsify import masks
from snello.techniques.sparsify.cut import global_counts
from snello.techniques.sparsify.schedule import Schedule
from snello.techniques.sparsify.sparsegpt import BLOCK, sparsegpt

AMOUNTS = (0.004, 0.1, 0.3, 0.5, 0.501, 0.62, 0.999)


def matrix(rows: int, columns: int, kind: str, seed: int = 0) -> Tensor:
    """Random weights; "ties" holds few different values, so that every cut goes through equals."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return (w * 4).round() / 4 if kind == "ties" else w


def linear(weights: Tensor) -> nn.Linear:
    module = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    module.weight = nn.Parameter(weights.clone())
    return module


# ---- magnitude ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "ties"])
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("shape", [(1, 7), (31, 45), (96, 200), (307, 129)], ids=str)
def test_magnitude_is_torchs_l1_unstructured_bit_for_bit(shape: tuple[int, int], amount: float, kind: str) -> None:
    w = matrix(*shape, kind)
    theirs = prune.l1_unstructured(linear(w), "weight", amount)
    ours = masks.share_of_matrix(w.abs(), amount)
    assert torch.equal(~ours, theirs.weight_mask.bool())
    assert torch.equal(w.masked_fill(ours, 0.0), theirs.weight)  # -0 equals 0


def pruned_globally(weights: dict[str, Tensor], amount: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks (true: zero) of torch's global_unstructured, and ours."""
    modules = {name: linear(w) for name, w in weights.items()}
    pairs = [(module, "weight") for module in modules.values()]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=amount)
    theirs = {name: ~module.weight_mask.bool() for name, module in modules.items()}
    counts = global_counts(list(weights), weights.__getitem__, amount)
    return theirs, {name: masks.lowest(w.abs(), counts[name]) for name, w in weights.items()}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_magnitude_is_torchs_global_unstructured_bit_for_bit(amount: float) -> None:
    weights = {str(n): matrix(20 + 9 * n, 33 + n, "plain", seed=n) * 2.0 ** (n - 2) for n in range(5)}
    theirs, ours = pruned_globally(weights, amount)
    assert all(torch.equal(ours[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_global_cut_through_equals_takes_as_many_and_as_small(amount: float) -> None:
    """Which of equals go is nobody's promise there; how many, and that none smaller stays, is."""
    weights = {str(n): matrix(20 + 9 * n, 33 + n, "ties", seed=n) for n in range(5)}
    theirs, ours = pruned_globally(weights, amount)
    gone = [torch.cat([w.abs()[mask[name]] for name, w in weights.items()]).sort().values for mask in (theirs, ours)]
    assert torch.equal(*gone)


def test_of_equals_earlier_matrices_go_first() -> None:
    weights = {name: torch.full((2, 3), 1.0) for name in "abc"}
    assert global_counts(list(weights), weights.__getitem__, 0.5) == {"a": 6, "b": 3, "c": 0}


def test_a_global_cut_sees_the_last_bit_and_the_extremes() -> None:
    near = torch.tensor([[1.0, 1.0000001, 1.0000002, 3.4e38, 1e-45, -0.0, 2.0, -1.0000001]])
    assert global_counts(["x"], {"x": near}.__getitem__, 0.5) == {"x": 4}
    assert masks.lowest(near.abs(), 3).tolist() == [[True, False, False, False, True, True, False, False]]


def test_a_cut_over_rows_takes_as_many_from_each() -> None:
    w = matrix(40, 25, "plain")
    mask = masks.share_of_rows(w.abs(), 0.3)
    for row, gone in zip(w.abs(), mask, strict=True):
        assert gone.sum() == round(0.3 * 25) and row[gone].max() < row[~gone].min()


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_half_of_each_group_goes_and_it_is_the_smaller_half(group: int, kind: str) -> None:
    scores = matrix(13, 48, kind).abs()
    mask = masks.lowest_of_groups(scores, group)
    for values, gone in zip(scores.reshape(-1, group), mask.reshape(-1, group), strict=True):
        assert gone.sum() == group // 2 and values[gone].max() <= values[~gone].min()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("shape", [(1, 7), (31, 45), (96, 200)], ids=str)
def test_whole_lines_are_torchs_ln_structured_bit_for_bit(shape: tuple[int, int], amount: float, dim: int) -> None:
    w = matrix(*shape, "plain")
    theirs = prune.ln_structured(linear(w), "weight", amount, n=2, dim=dim)
    ours = masks.weakest_lines(w, amount, dim)
    assert torch.equal(~ours, theirs.weight_mask.bool())
    assert torch.equal(w.masked_fill(ours, 0.0), theirs.weight)


# ---- wanda ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
def test_wanda_ranks_each_row_by_weight_times_norm(share: float) -> None:
    w = matrix(17, 40, "plain").numpy().astype(np.float64)
    x = (matrix(90, 40, "plain", seed=1) * torch.logspace(-2, 2, 40)).numpy().astype(np.float64)
    expected = np.zeros(w.shape, bool)
    for n in range(len(w)):
        metric = [abs(w[n, k]) * sum(value * value for value in x[:, k]) ** 0.5 for k in range(40)]
        expected[n, np.argsort(metric)[: round(share * 40)]] = True
    scores = masks.wanda_scores(torch.from_numpy(w), torch.from_numpy((x * x).mean(0)))
    assert np.array_equal(masks.share_of_rows(scores, share).numpy(), expected)
    assert not torch.equal(torch.from_numpy(expected), masks.share_of_rows(torch.from_numpy(w).abs(), share))


# ---- sparsegpt ------------------------------------------------------------------------------------------------------


def naive(w: Tensor, gram: Tensor, share: float, group: int) -> Tensor:
    """Optimal brain surgery in fixed order: at column j what remains of G is inverted anew, and no factor is used."""
    w, g = w.clone(), damped(gram)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % (group or BLOCK) == 0:
            stop = min(j + (group or BLOCK), w.shape[1])
            costs = torch.stack([w[:, c] ** 2 / torch.linalg.inv(g[c:, c:])[0, 0] for c in range(j, stop)], dim=1)
            if group:
                for n in range(len(w)):
                    gone[n, j + costs[n].argsort()[: group // 2]] = True
            else:
                cheapest = costs.flatten().argsort()[: round(share * costs.numel())]
                gone[:, j:stop] = (
                    torch.zeros(costs.numel(), dtype=torch.bool).index_fill(0, cheapest, True).view_as(costs)
                )
        inverse = torch.linalg.inv(g[j:, j:])
        error = torch.where(gone[:, j], w[:, j] / inverse[0, 0], 0.0)
        w[:, j:] -= error[:, None] * inverse[0][None, :]
        w[gone[:, j], j] = 0.0
    return w


def problem(rows: int = 12, columns: int = 192, samples: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose channels differ in loudness and go together, as those of models do."""
    torch.manual_seed(0)
    mix = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    loudness = torch.logspace(0.5, -0.5, columns)[torch.randperm(columns)]
    x = (torch.randn(samples, columns) @ mix * loudness).double()
    return torch.randn(rows, columns).double(), x, x.T @ x


@pytest.mark.parametrize(("share", "group"), [(0.3, 0), (0.5, 0), (0.6, 0), (0.5, 4), (0.5, 8)])
@pytest.mark.parametrize("columns", [48, 192, 264])
def test_sparsegpt_equals_the_textbook_with_explicit_inverses(columns: int, share: float, group: int) -> None:
    w, _, gram = problem(columns=columns)
    ours, expected = sparsegpt(w, inverse_factor(gram), share, group), naive(w, gram, share, group)
    assert torch.equal(ours == 0, expected == 0)
    assert (ours - expected).abs().max() < 1e-9


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    w, x, gram = problem(rows=64)
    kept = {
        "magnitude": w.masked_fill(masks.share_of_matrix(w.abs(), 0.5), 0.0),
        "wanda": w.masked_fill(masks.share_of_rows(masks.wanda_scores(w, x.square().mean(0)), 0.5), 0.0),
        "sparsegpt": sparsegpt(w, inverse_factor(gram), 0.5),
    }
    errors = {name: float((x @ (other - w).T).square().sum()) for name, other in kept.items()}
    assert errors["sparsegpt"] < 0.8 * errors["wanda"] and errors["wanda"] < 0.5 * errors["magnitude"]


def test_a_channel_that_was_never_heard_is_dropped_without_repairs() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(12, 48).double(), torch.randn(300, 48).double()
    x[:, 7] = 0
    factor = inverse_factor(x.T @ x)
    pruned = sparsegpt(w, factor, 0.3)
    assert not pruned[:, 7].any() and (factor[7] != 0).sum() == 1
    w[:, 7] = 0
    assert torch.allclose(sparsegpt(w, factor, 0.3), pruned, rtol=1e-12)


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_published_formula() -> None:
    """s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3, arXiv:1710.01878, equation 1, evaluated in fractions."""
    from fractions import Fraction

    schedule = Schedule(initial=0.25, final=0.875, begin=1_000, end=11_000)
    for step in (1_000, 1_001, 3_500, 6_000, 10_999, 11_000):
        s_i, s_f, t = Fraction(1, 4), Fraction(7, 8), Fraction(step - 1_000, 10_000)
        assert schedule.sparsity(step) == pytest.approx(float(s_f + (s_i - s_f) * (1 - t) ** 3), rel=1e-12)
    assert schedule.sparsity(6_000) == 0.796875  # by hand: 7/8 - 5/8 * 1/8


def test_the_schedule_rests_outside_and_cuts_every_so_many_steps() -> None:
    schedule = Schedule(final=0.5, begin=50, end=250, every=100, power=1.0)
    assert [schedule.sparsity(step) for step in (0, 50, 150, 250, 10**9)] == [0.0, 0.0, 0.25, 0.5, 0.5]
    assert [step for step in range(500) if schedule.due(step)] == [50, 150, 250]
    rising = [schedule.sparsity(step) for step in range(300)]
    assert rising == sorted(rising)


@pytest.mark.parametrize(
    "wrong",
    [{"final": 1.0}, {"initial": -0.1}, {"begin": 10, "end": 10}, {"begin": -1}, {"power": 0.0}, {"every": 0}],
    ids=str,
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SnelloError) as caught:
        Schedule(**{"end": 10, **wrong})  # type: ignore[arg-type]
    assert caught.value.hint
