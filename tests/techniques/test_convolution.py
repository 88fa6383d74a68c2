"""Convolutions made of attention: the fit, the choice of layers, refusals, and what may follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.families.convolutions import convolving_layers
from snello.models.reference import Reference, build_block
from snello.models.reference_layers import Half
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.convolution import Convolution
from snello.techniques.convolution.apply import attention_influence, least_influence
from snello.techniques.convolution.fit import fit, moments, seen_rows
from snello.techniques.distill import Distill
from snello.techniques.prune import Prune
from snello.techniques.quantize import Quantize
from snello.techniques.table import TECHNIQUES
from tests.checkpoints import make_checkpoint

WINDOWS = [np.random.default_rng(seed).integers(1, 307, 60).astype(np.int32) for seed in range(6)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("original") / "qwen3", "qwen3"))


@pytest.fixture(scope="module")
def converted(original: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("converted") / "model"
    return Convolution(layers="0,2").apply(original, Context(output=folder, windows=WINDOWS))


# ---- the fit --------------------------------------------------------------------------------------------------------


class Planted(Half):
    """Adds a known map of the last rows."""

    def __init__(self, maps: list[torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.maps = maps

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def added(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows = seen_rows(x, len(self.maps))[:, :-1]
        return (rows @ torch.cat(self.maps) + 0.7).reshape(*x.shape[:2], -1)


def planted(ranks: list[int], size: int = 12) -> tuple[Planted, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = [drawn(size, rank) @ drawn(rank, size) for rank in ranks]
    return Planted(maps), [drawn(2, 90, size) for _ in range(4)]


def test_a_map_of_as_many_channels_is_found_again() -> None:
    half, hidden = planted([5, 4, 3])
    found = fit(moments(half, hidden, 3), 3)
    assert found.unexplained < 1e-4
    p = found.parameters
    assert p["taps.weight"].sum(0).eq(1).all() and p["b.weight"].eq(0).all() and p["c.bias"].eq(1).all()
    x = hidden[0]
    u = x @ p["x.weight"].T  # (B, T, D)
    total = sum(torch.nn.functional.pad(u, (0, 0, 2 - k, 0))[:, : u.shape[1]] * p["taps.weight"][k] for k in range(3))
    error = total @ p["o.weight"].T + p["o.bias"] - half.added(x)
    assert error.square().mean() < 1e-4 * half.added(x).square().mean()


def test_more_channels_than_there_is_room_for_lose_the_weakest() -> None:
    half, hidden = planted([12, 12, 12])
    few, more = (fit(moments(half, hidden, kernel), kernel).unexplained for kernel in (2, 3))
    assert 0.05 < more < few < 1.0


def test_an_attention_that_adds_nothing_is_fitted_by_nothing() -> None:
    half, hidden = planted([1])
    half.maps = [torch.zeros(12, 12)]
    found = fit(moments(half, hidden, 2), 2)
    assert all(torch.isfinite(value).all() for value in found.parameters.values())
    assert found.parameters["o.weight"].abs().max() < 1e-4
    assert (found.parameters["o.bias"] - 0.7).abs().max() < 1e-4


# ---- the model ------------------------------------------------------------------------------------------------------


def test_what_is_made_is_nearer_than_nothing(original: Model, converted: Model) -> None:
    """In the first replaced layer, on the text that it was fitted on."""
    entry = converted.history[-1]
    assert entry["layers"] == [0, 2] and len(entry["unexplained"]) == 2 and "influence" not in entry
    assert all(0 <= share < 1 for share in entry["unexplained"])
    ids = torch.from_numpy(WINDOWS[0].astype(np.int64))[None]
    with torch.inference_mode():
        x = Reference.from_model(original).embedding(ids)
        before, after = (build_block(each.spec, 0, each.weights).attention for each in (original, converted))
        wanted, found = before.added(x), after.added(x)
    assert (wanted - found).square().sum() < 0.9 * wanted.square().sum()


def test_a_qwen3_becomes_an_lfm2_of_transformers(converted: Model) -> None:
    import transformers

    assert converted.spec.family == "lfm2" and "note" not in converted.history[-1]
    stock = transformers.AutoModelForCausalLM.from_pretrained(converted.path, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.stack(WINDOWS).astype(np.int64))
    with torch.inference_mode():
        assert torch.allclose(Reference.from_model(converted)(ids), stock(ids).logits, atol=1e-4)


def test_a_llama_keeps_its_name_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    original = load(make_checkpoint(tmp_path / "llama", "llama"))
    made = Convolution(layers="1").apply(original, Context(output=tmp_path / "made", windows=WINDOWS))
    assert made.spec.family == "llama" and convolving_layers(made.spec) == [1]
    assert "no stock configuration" in made.history[-1]["note"]


def test_other_layers_are_as_they_were(original: Model, converted: Model) -> None:
    names = [name for name in original.weights.names() if ".attention." not in name or name.startswith("layers.1.")]
    for name in [*names, "layers.0.attention.norm.weight"]:
        assert np.array_equal(converted.weights.values(name), original.weights.values(name)), name


def test_the_same_text_gives_the_same_bytes(original: Model, converted: Model, tmp_path: Path) -> None:
    again = Convolution(layers="0,2").apply(original, Context(output=tmp_path / "again", windows=WINDOWS))
    assert again.digest == converted.digest


def test_the_least_influence_goes_first(original: Model, tmp_path: Path) -> None:
    with torch.inference_mode():
        found = attention_influence(original, WINDOWS, lambda _: None)
    assert len(found) == 3 and all(0 < value < 2 for value in found)
    made = Convolution(keep=0.34).apply(original, Context(output=tmp_path / "made", windows=WINDOWS))
    assert convolving_layers(made.spec) == [int(np.argmin(found))]
    assert made.history[-1]["influence"] == pytest.approx(found, rel=1e-3)
    assert least_influence([0.3, 0.1, 0.1, 0.2], 2) == [1, 2] and least_influence([0.1, 0.1], 1) == [1]


def test_it_runs_quantized_and_the_executor_agrees(converted: Model, tmp_path: Path) -> None:
    ids = WINDOWS[0]
    for options in ({"weights": "int8"}, {"weights": "int4", "method": "gptq", "group_size": 32}):
        name = str(options["weights"])
        lean = Quantize(**options).apply(converted, Context(output=tmp_path / name, windows=WINDOWS))  # type: ignore[arg-type]
        assert convolving_layers(lean.spec) == [0, 2]
        with torch.inference_mode():
            wanted = Reference.from_model(lean)(torch.from_numpy(ids.astype(np.int64))[None])[0].numpy()
        with NativeExecutor(lean, Deployment(chunk_rows=17)) as executor:
            logits = executor.logits(ids)
        assert np.abs(logits - wanted).max() < 0.25 * np.abs(wanted).max()  # activations are rounded


def test_healing_brings_it_nearer_to_the_original(original: Model, converted: Model, tmp_path: Path) -> None:
    how = Distill(tokens=2400, batch_tokens=120, rate=3e-3)
    healed = how.apply(converted, Context(output=tmp_path / "healed", windows=WINDOWS, original=original))
    assert healed.spec == converted.spec
    assert np.abs(healed.weights.values("layers.0.attention.b.weight")).max() > 0  # gates learn, from nothing
    ids = torch.from_numpy(np.stack(WINDOWS).astype(np.int64))
    with torch.inference_mode():
        wanted, before, after = (Reference.from_model(m)(ids).log_softmax(-1) for m in (original, converted, healed))
    before, after = ((wanted.exp() * (wanted - each)).sum(-1).mean() for each in (before, after))
    assert after < 0.8 * before


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.2}, {"keep": 1.0}, {"keep": True}, {"keep": "half"}, {"keep": float("nan")},
        {"kernel": 1}, {"kernel": 9}, {"kernel": 3.0}, {"kernel": True},
        {"layers": "all"}, {"layers": "3-1"}, {"layers": ""}, {"layers": 2}, {"layers": "0,x"},
    ],
)  # fmt: skip
def test_odd_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        Convolution(**options)
    assert caught.value.hint


def test_what_cannot_be_converted_is_refused(original: Model, converted: Model) -> None:
    for technique, spec in (
        (Convolution(layers="3"), original.spec),  # there are three
        (Convolution(layers="0-2"), original.spec),  # no attention would be left
        (Convolution(keep=0.9), original.spec),  # none of three
        (Convolution(), converted.spec),
        (Prune(), converted.spec),
        (TECHNIQUES["attention"](window=8), converted.spec),  # type: ignore[call-arg]
        (Distill(loss="relations"), converted.spec),
        (Convolution(), dataclasses.replace(original.spec, family="phi3")),
        (Convolution(), dataclasses.replace(original.spec, cache_format="int8")),
    ):
        with pytest.raises(Unsupported) as caught:
            technique.plan(spec)
        assert caught.value.hint, technique


@pytest.mark.parametrize("count", [2, 3, 6, 7, 11, 36])
def test_the_keep_that_is_hinted_replaces_one(count: int, original: Model) -> None:
    spec = dataclasses.replace(original.spec, layers=original.spec.layers[:1] * count)
    with pytest.raises(Unsupported, match="replaces none") as caught:
        Convolution(keep=0.99).plan(spec)
    option, value = str(caught.value.hint).split()[0].split("=")
    assert option == "keep" and len(convolving_layers(Convolution(keep=float(value)).plan(spec))) == 1


def test_one_layer_keeps_its_attention(original: Model) -> None:
    with pytest.raises(Unsupported) as caught:
        Convolution().plan(dataclasses.replace(original.spec, layers=original.spec.layers[:1]))
    assert caught.value.hint == "a model of one layer keeps its attention"


def test_no_text_is_refused_before_anything_is_written(original: Model, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="none was given"):
        Convolution(layers="0").apply(original, Context(output=tmp_path / "made"))
    assert not (tmp_path / "made").exists()
