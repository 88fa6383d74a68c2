"""The basis: products are unchanged, outlier channels vanish."""

from __future__ import annotations

import pytest
import torch

from snello.techniques.quantize.basis import Basis, equal_weight_scale, hadamard
from tests.techniques import simulate


@pytest.mark.parametrize("columns", [64, 80, 128, 172, 320, 384])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("equalized", [True, False])
def test_products_are_unchanged(columns: int, rotated: bool, equalized: bool) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(7, columns), torch.randn(5, columns)
    basis = Basis(columns, equal_weight_scale([w]) if equalized else None, rotated)
    stored, prepared = basis.weights(w), basis.inputs(x)
    assert stored.shape == (7, basis.padded) and basis.padded % 64 == 0
    assert torch.allclose(prepared @ stored.T, x @ w.T, atol=1e-4)
    assert torch.allclose(basis.plain_weights(stored), w, atol=1e-5)
    assert torch.allclose(basis.plain_inputs(prepared), x, atol=1e-5)
    gram = torch.nn.functional.pad(prepared, (0, 0, 0, 0))
    assert torch.allclose(basis.gram(x.T @ x), gram.T @ gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 192, 256])
def test_hadamard_is_that_of_the_numerics(columns: int) -> None:
    x = torch.randn(3, columns)
    ours = Basis(columns, None, True).inputs(x)
    assert torch.allclose(ours, x @ torch.from_numpy(simulate.hadamard(columns)), atol=1e-5)
    block = hadamard(64)
    assert torch.allclose(block @ block.T, torch.eye(64, dtype=torch.float64)) and torch.equal(block, block.T)


def test_scale_equalizes() -> None:
    torch.manual_seed(0)
    w = [torch.randn(32, 64) * torch.logspace(-3, 3, 64) for _ in range(2)]
    scale = equal_weight_scale(w)
    rms = torch.cat(w).mul(scale).square().mean(0).sqrt()
    assert rms.max() / rms.min() < 1.001


def test_dead_channels_get_a_finite_scale() -> None:
    w = torch.randn(8, 64)
    w[:, 3] = 0
    assert torch.isfinite(equal_weight_scale([w])).all()
    assert torch.isfinite(equal_weight_scale([torch.zeros(8, 64)])).all()
