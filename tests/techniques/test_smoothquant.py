"""SmoothQuant: the paper's formula, the same file as every input scale, and what it is for: loud input channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.models import Model, load
from snello.models.packed import PackedWeights
from snello.models.reference import Reference
from snello.models.spec import Deployment, input_name
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.size import body_linears, units
from snello.techniques.quantize.smoothquant import smooth_scale
from tests import twins
from tests.checkpoints import make_checkpoint
from tests.techniques import real
from tests.techniques.simulate import quantized_reference
from tests.techniques.test_quantize import folder_hash, hooked_inputs, random_windows

PLAIN = Quantize(weights="int8", head="float", rotate=False, equalize=False)
SMOOTH = Quantize(weights="int8", head="float", rotate=False, method="smoothquant")


def source(tmp_path: Path, variant: str = "llama") -> Model:
    return load(make_checkpoint(tmp_path / "source", variant))


# ---- the formula ----------------------------------------------------------------------------------------------------


def naive_scale(rows: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> list[float]:
    """Equation 4 of the paper, channel by channel."""
    scale = []
    for channel in range(rows.shape[1]):
        loudest = max(abs(float(row[channel])) for row in rows)
        strongest = max(abs(float(value)) for w in weights for value in w[:, channel])
        scale.append(loudest**alpha / strongest ** (1 - alpha))
    return scale


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_scale_is_the_papers(alpha: float) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(20, 64), [torch.randn(24, 64), torch.randn(8, 64) * 3]
    rows[:, 5] *= 50
    scale = smooth_scale(rows.abs().amax(0), weights, alpha)
    assert scale.tolist() == pytest.approx(naive_scale(rows, weights, alpha), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_the_file_holds_the_papers_scale(alpha: float, tmp_path: Path) -> None:
    """Of the first input, which no earlier rounding disturbs; over all rows of text, not a sample."""
    model, texts = source(tmp_path), random_windows(12, 60)
    options = Quantize(weights="int8", method="smoothquant", alpha=alpha)
    lean = options.apply(model, Context(output=tmp_path / "lean", windows=texts))
    seen = hooked_inputs(Reference.from_model(model), texts)["layers.0.attention.q"]
    weights = [torch.from_numpy(model.weights.values(f"layers.0.attention.{part}.weight")) for part in "qkv"]
    assert isinstance(lean.weights, PackedWeights)
    stored = lean.weights.input_scale("layers.0.attention.in")
    assert stored is not None
    expected = naive_scale(seen, weights, alpha)
    assert stored[: len(expected)].tolist() == pytest.approx(expected, rel=1e-4)
    assert (stored[len(expected) :] == 1).all()


def test_silent_channels_stay_finite() -> None:
    peaks, weights = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([[1.0, 1.0, 0.0]])
    for alpha in (0.0, 0.5, 1.0):
        scale = smooth_scale(peaks, [weights], alpha)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.isfinite(1 / scale).all()


def test_every_input_of_the_blocks_has_one(tmp_path: Path) -> None:
    lean = SMOOTH.apply(source(tmp_path), Context(output=tmp_path / "lean", windows=random_windows()))
    assert isinstance(lean.weights, PackedWeights)
    for unit in units(lean.spec, body_linears(lean.spec)):
        scale = lean.weights.input_scale(unit.input)
        assert scale is not None and scale.std() > 0
        assert all(input_name(linear) == unit.input for linear in unit.linears)


# ---- what it is for -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def distance(options: Quantize, model: Model, texts: Sequence[np.ndarray]) -> float:
    """Of the logits from the original's, relative, 8-bit activations included."""
    quantized, original = quantized_reference(options, model, texts), Reference.from_model(model)
    error = energy = 0.0
    for window in texts:
        tokens = torch.from_numpy(window.astype(np.int64))[None]
        wanted = original(tokens)
        error += float((quantized(tokens) - wanted).square().sum())
        energy += float(wanted.square().sum())
    return (error / energy) ** 0.5


def test_loud_channels_are_tamed(tmp_path: Path) -> None:
    """On a twin with loud channels one scale per row fails; smoothed it is as good as the model without them."""
    model, texts = source(tmp_path), random_windows(4, 60)
    twin = twins.scaled_channels(model)
    plain, smooth = distance(PLAIN, twin, texts), distance(SMOOTH, twin, texts)
    assert smooth < 0.4 * plain
    assert smooth < 1.5 * distance(SMOOTH, model, texts)


@pytest.mark.slow
def test_loud_channels_of_a_real_model_are_tamed() -> None:
    twin = twins.scaled_channels(real.novels())
    texts, valid = real.windows("train", 8), real.windows("valid", 6)
    base = real.loss(Reference.from_model(twin), valid)
    plain, smooth = (real.loss(quantized_reference(o, twin, texts), valid) - base for o in (PLAIN, SMOOTH))
    print(f"\nadded loss on the twin with loud channels: plain rows {plain:+.4f}, smoothquant {smooth:+.4f}")
    assert smooth < 0.2 * plain


# ---- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "bert-mlm"])
def test_the_engine_computes_the_same_on_every_instruction_set(rotate: bool, variant: str, tmp_path: Path) -> None:
    options = Quantize(weights="int8", head="float", method="smoothquant", rotate=rotate)
    model, texts = source(tmp_path, variant), random_windows()
    lean = options.apply(model, Context(output=tmp_path / "lean", windows=texts))
    with torch.inference_mode():
        reference = quantized_reference(options, model, texts)
        expected = reference(torch.from_numpy(texts[0].astype(np.int64))[None])[0].numpy()
    results = {}
    for isa in core.available_isas():
        with NativeExecutor(lean, Deployment(isa=isa)) as executor:
            got = executor.logits(texts[0]) if lean.spec.causal else executor.encode(texts[0])
            results[isa] = got.tobytes()
    core.select_isa(None)
    assert len(set(results.values())) == 1, sorted(results)
    # sums in another order move some activations over an edge of rounding, and all later ones see that
    assert np.linalg.norm(got - expected) < 2e-2 * np.linalg.norm(expected)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -0.1}, "between 0 and 1"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"alpha": float("nan")}, "between 0 and 1"),
        ({"alpha": True}, "between 0 and 1"),
        ({"alpha": "0.5"}, "between 0 and 1"),
        ({"weights": "int4"}, "has nothing to do with"),
        ({"activations": "float"}, "activations are float"),
        ({"method": "rtn", "alpha": 0.7}, "no meaning"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SnelloError, match=words) as caught:
        Quantize(**({"weights": "int8", "method": "smoothquant"} | options))
    assert caught.value.hint


def test_no_text_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="none was given") as caught:
        SMOOTH.apply(source(tmp_path), Context(output=tmp_path / "lean"))
    assert caught.value.hint and not (tmp_path / "lean").exists()


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    model = source(tmp_path)
    for name in ("first", "second"):
        SMOOTH.apply(model, Context(output=tmp_path / name, windows=random_windows(), threads=1))
    assert folder_hash(tmp_path / "first") == folder_hash(tmp_path / "second")
