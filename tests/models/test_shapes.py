"""Random models in published shapes: the bytes they should have, values of ordinary size, the same for a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.models import shapes
from snello.models.packed import PackedWeights, packed_bytes
from snello.models.shapes import PRESETS, SHAPES, RandomWeights, random_model, spec_of_shape
from snello.models.spec import Format, linear_names


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer and few words of each shape: odd widths stay."""
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path / "cache"))
    little: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 330, "bos_token_id": 0, "eos_token_id": 1}
    monkeypatch.setattr(shapes, "SHAPES", {name: config | little for name, config in SHAPES.items()})


@pytest.mark.parametrize("weights", PRESETS)
@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b"])
def test_values_are_of_ordinary_size(name: str, weights: RandomWeights) -> None:
    model = random_model(name, weights)
    assert isinstance(model.weights, PackedWeights)
    model.weights.verify()
    for linear in linear_names(model.spec):
        tied = linear == "head" and model.spec.head.tied
        values = model.weights.values("embedding.tokens.weight" if tied else f"{linear}.weight")
        assert np.isfinite(values).all()
        # input scales are between 1/2 and 2, so a row's size may differ from 1 / sqrt(K) by that much
        spread = values.std() * np.sqrt(values.shape[1])
        assert 0.5 < spread < 2.5 and abs(values.mean()) < 0.05 * values.std(), linear
        assert len(np.unique(values[:4])) > 100
    gain = model.weights.values("layers.0.attention.norm.weight")
    assert set(np.unique(gain)) == {0.5, 1.0, 2.0}


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    first = random_model("smollm2-135m", "int4", seed=1)
    path = first.weights.path  # type: ignore[attr-defined]
    raw = path.read_bytes()
    path.unlink()
    again = random_model("smollm2-135m", "int4", seed=1)
    assert path.read_bytes() == raw and again.digest == first.digest
    assert random_model("smollm2-135m", "int4", seed=2).digest != first.digest


def test_formats_are_those_that_quantize_plans() -> None:
    spec = spec_of_shape("tinyllama-1.1b", "int4")
    body = Format(weights="int4", group_size=128, activations="int8", rotate=True, equalize=True)
    assert spec.format("layers.0.ffn.down") == body
    assert spec.format("head") == Format(weights="int8", activations="int8", rotate=True, equalize=True)
    assert spec.format("embedding") == Format(weights="int8")
    assert spec.default_format == Format(weights="bf16", activations="bf16")
    tied = spec_of_shape("llama-3.2-1b", "int8")
    assert {tied.format(linear).weights for linear in linear_names(tied)} == {"int8"}


def test_bits_a_weight() -> None:
    import math

    from snello.models.parameters import parameter_shapes

    for weights, bits in (("bf16", 16.0), ("int8", 8.03), ("int4", 4.14), ("int3", 3.14)):
        spec = spec_of_shape("llama-3.2-3b", weights)  # type: ignore[arg-type]
        count = sum(math.prod(shape) for shape in parameter_shapes(spec).values())
        assert 8 * packed_bytes(spec) / count == pytest.approx(bits, abs=0.05), weights


def test_unknown_names() -> None:
    with pytest.raises(SnelloError, match="no shape is named gpt-9"):
        spec_of_shape("gpt-9")
    with pytest.raises(SnelloError, match="no random weights of type int2"):
        spec_of_shape("smollm2-135m", "int2")  # type: ignore[arg-type]


def test_it_has_no_tokenizer() -> None:
    with pytest.raises(SnelloError, match="has no tokenizer"):
        _ = random_model("smollm2-135m", "bf16").tokenizer
