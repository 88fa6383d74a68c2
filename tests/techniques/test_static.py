"""Static activation scales: one per input, calibrated, stored with the model, and clamped beyond what was seen."""

from __future__ import annotations

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
from snello.models.spec import Deployment, input_name, linear_names
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.rounding import round_activations, static_step
from tests.checkpoints import make_checkpoint
from tests.techniques.simulate import hadamard, quantized_reference
from tests.techniques.test_quantize import folder_hash, hooked_inputs, random_windows

STATIC = Quantize(weights="int8", head="float", rotate=False, method="smoothquant", activations="int8-static")
WAYS = {
    "smoothquant": STATIC,
    "rotated": Quantize(weights="int8", activations="int8-static"),
    "int4-awq": Quantize(method="awq", activations="int8-static"),
    "mixed-gptq": Quantize(weights="mixed", budget="7 bits", method="gptq", activations="int8-static"),
}


def source(tmp_path: Path, variant: str = "llama") -> Model:
    path = tmp_path / "source"
    return load(path if path.exists() else make_checkpoint(path, variant))


def applied(options: Quantize, tmp_path: Path, texts: Any) -> Model:
    return options.apply(source(tmp_path), Context(output=tmp_path / "lean", windows=texts, threads=1))


@pytest.mark.parametrize("rotate", [True, False])
def test_the_scale_is_the_largest_that_was_seen(rotate: bool, tmp_path: Path) -> None:
    """Of the first input, which no earlier rounding disturbs, in the basis that the file says."""
    texts = random_windows(12, 60)
    lean = applied(Quantize(weights="int8", activations="int8-static", rotate=rotate), tmp_path, texts)
    assert isinstance(lean.weights, PackedWeights)
    x = hooked_inputs(Reference.from_model(source(tmp_path)), texts)["layers.0.attention.q"].numpy()
    scale = lean.weights.input_scale("layers.0.attention.in")
    assert scale is not None
    y = np.pad(x, ((0, 0), (0, len(scale) - x.shape[1]))) / scale
    y = y @ hadamard(len(scale)) if rotate else y
    assert lean.weights.input_step("layers.0.attention.in") == pytest.approx(float(np.abs(y).max()) / 127, rel=1e-5)


def test_blocks_are_static_and_the_head_is_not(tmp_path: Path) -> None:
    options = Quantize(weights="int8", activations="int8-static")
    lean = applied(options, tmp_path, random_windows())
    assert lean.spec == options.plan(source(tmp_path).spec)
    assert isinstance(lean.weights, PackedWeights)
    for linear in linear_names(lean.spec):
        static = linear.startswith("layers.")
        assert lean.spec.format(linear).activations == ("int8-static" if static else "int8")
        assert (lean.weights.input_step(input_name(linear)) > 0) == static


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_computes_what_the_reference_does_to_the_bit_everywhere(way: str, tmp_path: Path) -> None:
    options, texts = WAYS[way], random_windows(4, 150)
    lean, tokens = applied(options, tmp_path, texts), random_windows(5, 150)[4]
    with torch.inference_mode():
        reference = quantized_reference(options, source(tmp_path), texts)
        expected = reference(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
    results = {}
    for isa in core.available_isas():
        with NativeExecutor(lean, Deployment(isa=isa)) as executor:
            got = executor.logits(tokens)
            results[isa] = got.tobytes()
    core.select_isa(None)
    for chunk, threads in ((1, 1), (7, 2), (128, 1), (130, 2)):
        with NativeExecutor(lean, Deployment(threads=threads, chunk_rows=chunk)) as executor:
            results[f"{chunk} rows, {threads} threads"] = executor.logits(tokens).tobytes()
    assert len(set(results.values())) == 1, sorted(results)
    # the reference does not round the head's inputs; sums in another order move some values over an edge of rounding
    assert np.linalg.norm(got - expected) < (2e-2 if options.head == "float" else 5e-2) * np.linalg.norm(expected)


def test_louder_than_calibrated_is_clamped(tmp_path: Path) -> None:
    """Calibrated on one quiet token: others go beyond the range, and engine and reference cut them alike."""
    seen, other = [np.full(40, 17, np.int32)], random_windows(1, 60)[0]
    lean, model = applied(STATIC, tmp_path, seen), source(tmp_path)
    assert isinstance(lean.weights, PackedWeights)
    scale, step = lean.weights.input_scale("layers.0.attention.in"), lean.weights.input_step("layers.0.attention.in")
    x = hooked_inputs(Reference.from_model(model), [other])["layers.0.attention.q"].numpy()
    assert scale is not None and (np.abs(x / scale[: x.shape[1]]) > 127.5 * step).mean() > 0.01
    with torch.inference_mode():
        tokens = torch.from_numpy(other.astype(np.int64))[None]
        expected = quantized_reference(STATIC, model, seen)(tokens)[0].numpy()
        exact = Reference.from_model(model)(tokens)[0].numpy()
    with NativeExecutor(lean) as executor:
        got = executor.logits(other)
    assert np.linalg.norm(got - expected) < 2e-2 * np.linalg.norm(expected)
    assert np.linalg.norm(got - exact) > 10 * np.linalg.norm(got - expected)


def test_dynamic_scales_lose_no_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128) * torch.logspace(-1, 1, 64)[:, None]
    errors = [(round_activations(x, static=static) - x).square().sum() for static in (False, True)]
    assert errors[0] < errors[1]
    step = static_step(float(x.abs().max()))
    assert torch.equal(round_activations(x, static=True), (x / step).round() * step)
    assert static_step(0.0) == 1.0


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_also_methods_without_text_need_it_then(method: Any, tmp_path: Path) -> None:
    options = Quantize(method=method, activations="int8-static")
    with pytest.raises(SnelloError, match="none was given") as caught:
        options.apply(source(tmp_path), Context(output=tmp_path / "lean"))
    assert caught.value.hint and not (tmp_path / "lean").exists()


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_the_weights_are_those_of_the_method_without_text(method: Any, tmp_path: Path) -> None:
    """Text is read for the activations' scales alone."""
    lean = applied(Quantize(method=method, activations="int8-static"), tmp_path, random_windows())
    plain = Quantize(method=method).apply(source(tmp_path), Context(output=tmp_path / "plain"))
    for name in plain.weights.names():
        assert np.array_equal(lean.weights.values(name), plain.weights.values(name)), name


def test_a_damaged_scale_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = applied(STATIC, tmp_path, random_windows())
    monkeypatch.setattr(PackedWeights, "input_step", lambda self, name: float("nan"))
    with pytest.raises(SnelloError, match=r"the activation scale of layers\.0\.attention\.in is nan") as caught:
        NativeExecutor(lean)
    assert caught.value.hint


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        STATIC.apply(source(tmp_path), Context(output=tmp_path / name, windows=random_windows(), threads=1))
    assert folder_hash(tmp_path / "first") == folder_hash(tmp_path / "second")
