"""The basis: products are unchanged, outlier channels vanish."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snello.models import load
from snello.models.spec import input_name, linear_names, linear_shape
from snello.techniques.quantize import loudness
from snello.techniques.quantize.basis import Basis, balanced_scale, hadamard
from tests.checkpoints import make_checkpoint
from tests.techniques import simulate


@pytest.mark.parametrize("columns", [64, 80, 128, 172, 320, 384])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("equalized", [True, False])
def test_products_are_unchanged(columns: int, rotated: bool, equalized: bool) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(7, columns), torch.randn(5, columns)
    basis = Basis(columns, balanced_scale(x.square().mean(0).sqrt(), [w]) if equalized else None, rotated)
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


def test_scale_undoes_any_rescaling() -> None:
    """Channels scaled in the input and back in the weights, rows scaled at will: the stored basis is the same."""
    torch.manual_seed(0)
    w, loudness = torch.randn(32, 64), torch.rand(64) + 0.5
    channels, rows = torch.ones(64), torch.ones(32, 1)
    channels[::20], channels[1::20], rows[::10], rows[1::10] = 64.0, 1 / 64, 64.0, 1 / 64
    plain = Basis(64, balanced_scale(loudness, [w]), False).weights(w)
    twin = rows * w / channels
    stored = Basis(64, balanced_scale(loudness * channels, [twin]), False).weights(twin)
    assert torch.allclose(stored / stored.norm(), plain * rows / (plain * rows).norm(), rtol=0.02)


def test_dead_channels_get_a_finite_scale() -> None:
    w, loudness = torch.randn(8, 64), torch.ones(64)
    w[:, 3], loudness[5] = 0, 0
    assert torch.isfinite(balanced_scale(loudness, [w])).all()
    assert torch.isfinite(balanced_scale(torch.zeros(64), [torch.zeros(8, 64)])).all()


@pytest.mark.parametrize("variant", ["qwen3", "bert-mlm", "distilbert-mlm"])
def test_loudness_is_known_for_every_input(variant: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / variant, variant))
    for linear in linear_names(model.spec):
        found = loudness.estimate(model, input_name(linear))
        assert found.shape == (linear_shape(model.spec, linear)[1],) and (found >= 0).all()


def test_loudness_names_the_right_norm(tmp_path: Path) -> None:
    pre = load(make_checkpoint(tmp_path / "qwen3", "qwen3")).spec
    post = load(make_checkpoint(tmp_path / "bert", "bert-mlm")).spec
    for spec, name, norm in (
        (pre, "layers.1.attention.in", "layers.1.attention.norm"),
        (pre, "layers.1.ffn.in", "layers.1.ffn.norm"),
        (pre, "head.in", "norm"),
        (post, "layers.0.attention.in", "embedding.norm"),
        (post, "layers.1.attention.in", "layers.0.ffn.norm"),
        (post, "layers.1.ffn.in", "layers.1.attention.norm"),
        (post, "head.transform.in", "layers.1.ffn.norm"),
        (post, "head.in", "head.transform.norm"),
    ):
        assert loudness.norm_before(spec, name) == norm
