"""Outlier channels cost nothing: twins of a real model quantize as well as the model itself.

The table that `pytest -s` prints is loss over FP32 in nats a token, four-bit weights and eight-bit activations.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from snello.models.model import Model
from snello.models.reference import Reference
from snello.techniques.quantize import Quantize
from tests import twins
from tests.techniques import real
from tests.techniques.simulate import quantized_reference

BASES = {
    "equalize and rotate": Quantize(),
    "rotate": Quantize(equalize=False),
    "equalize": Quantize(rotate=False),
    "row scale alone": Quantize(rotate=False, equalize=False),
}


@lru_cache
def twin(kind: str) -> Model:
    if kind == "original":
        return real.novels()
    if kind == "loud channels":
        return twins.scaled_channels(real.novels())
    return twins.rotated_stream(real.novels(), real.windows("train", 4))


@lru_cache
def increase(kind: str, basis: str) -> float:
    texts = real.windows("valid", 6)
    quantized = real.loss(quantized_reference(BASES[basis], twin(kind)), texts)
    return quantized - real.loss(Reference.from_model(twin(kind)), texts)


@pytest.mark.parametrize("kind", ["loud channels", "principal basis"])
def test_twins_compute_the_same_function(kind: str) -> None:
    tokens = torch.tensor(real.windows("valid", 2)[0])[None]
    with torch.inference_mode():
        original = Reference.from_model(twin("original"))(tokens)
        other = Reference.from_model(twin(kind))(tokens)
    assert (other - original).norm() / original.norm() < 1e-3


@pytest.mark.slow
def test_twins_lose_no_more() -> None:
    kinds = ("original", "loud channels", "principal basis")
    print(f"\n{'':20}" + "".join(f"{kind:>20}" for kind in kinds))
    for basis in BASES:
        print(f"{basis:20}" + "".join(f"{increase(kind, basis):+20.4f}" for kind in kinds))
    allowed = 1.5 * increase("original", "equalize and rotate") + 0.01
    assert all(increase(kind, "equalize and rotate") < allowed for kind in kinds)
    assert increase("loud channels", "row scale alone") > 3 * allowed
    assert increase("principal basis", "row scale alone") > 1.5 * increase("principal basis", "equalize and rotate")
