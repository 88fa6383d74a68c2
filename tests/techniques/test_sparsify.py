"""Sparsify as a whole: options, plans, what is written, in which order it is calibrated, what comes after it."""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.reference import Reference
from snello.models.spec import Experts, Recurrent, Spec
from snello.optimize.recipe import Recipe
from snello.techniques.base import Context
from snello.techniques.curvature import inverse_factor
from snello.techniques.quantize import Quantize
from snello.techniques.sparsify import Sparsify
from snello.techniques.sparsify.sparsegpt import sparsegpt
from snello.techniques.units import body_linears, units
from tests.checkpoints import DENSE, make_checkpoint
from tests.techniques import real
from tests.techniques.test_quantize import hooked_inputs

EVERY = {
    "magnitude": Sparsify(),
    "magnitude by rows": Sparsify(scope="row", sparsity=0.3),
    "magnitude, whole model": Sparsify(scope="global", sparsity=0.7),
    "magnitude 2:4": Sparsify(pattern="2:4"),
    "magnitude, whole rows": Sparsify(pattern="rows", sparsity=0.2),
    "magnitude, whole columns": Sparsify(pattern="columns", sparsity=0.3),
    "wanda": Sparsify(method="wanda"),
    "wanda by layers": Sparsify(method="wanda", scope="layer", sparsity=0.6),
    "wanda 4:8": Sparsify(method="wanda", pattern="4:8"),
    "sparsegpt": Sparsify(method="sparsegpt", sparsity=0.6),
    "sparsegpt 2:4": Sparsify(method="sparsegpt", pattern="2:4"),
}


def random_windows(count: int = 3, length: int = 40, vocabulary: int = 307) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, vocabulary, length).astype(np.int32) for _ in range(count)]


def applied(options: Sparsify, source: Model, output: Path) -> Model:
    return options.apply(source, Context(output=output, windows=random_windows()))


def body(model: Model) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(model.weights.values(f"{name}.weight")) for name in body_linears(model.spec)}


# ---- options and plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "movement"}, "method='movement'"),
        ({"pattern": "1:4"}, "pattern='1:4'"),
        ({"scope": "block"}, "scope='block'"),
        ({"sparsity": 0.0}, "not between 0 and 1"),
        ({"sparsity": 1.0}, "not between 0 and 1"),
        ({"sparsity": -0.2}, "not between 0 and 1"),
        ({"sparsity": 50.0}, "not between 0 and 1"),
        ({"sparsity": float("nan")}, "not between 0 and 1"),
        ({"sparsity": True}, "not a share"),
        ({"sparsity": "0.5"}, "not a share"),
        ({"pattern": "2:4", "sparsity": 0.6}, "not sparsity=0.6"),
        ({"pattern": "2:4", "scope": "row"}, "no meaning"),
        ({"pattern": "columns", "scope": "row"}, "no meaning"),
        ({"pattern": "rows", "method": "wanda"}, "not whole rows"),
        ({"method": "wanda", "scope": "global"}, "scope='global'"),
        ({"method": "sparsegpt", "scope": "row"}, "scope='row'"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message) as caught:
        Sparsify(**options)
    assert caught.value.hint


def spec_of(tmp_path: Path, variant: str = "llama") -> Spec:
    return load(make_checkpoint(tmp_path / variant, variant)).spec


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert all(options.plan(spec) == spec for options in EVERY.values())


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    layer = spec.layers[0]
    odd = {
        "Recurrent in layer 1": dataclasses.replace(layer, mixer=Recurrent(kind="mamba", num_heads=4, state_dim=16)),
        "experts in layer 1": dataclasses.replace(
            layer, feed_forward=dataclasses.replace(layer.feed_forward, experts=Experts(num_experts=8, num_active=2))
        ),
    }
    for message, other in odd.items():
        with pytest.raises(Unsupported, match=message) as caught:
            Sparsify().plan(dataclasses.replace(spec, layers=(layer, other)))
        assert caught.value.hint


def test_integers_cannot_be_pruned(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="quantized already") as caught:
        Sparsify().plan(Quantize().plan(spec_of(tmp_path)))
    assert "then quantize" in caught.value.hint


def test_groups_must_fit_the_columns(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    layer = spec.layers[0]
    for width, fits in ((202, ()), (204, ("2:4",)), (208, ("2:4", "4:8"))):
        feed = dataclasses.replace(layer.feed_forward, width=width)
        other = dataclasses.replace(spec, layers=(dataclasses.replace(layer, feed_forward=feed),))
        for pattern in ("2:4", "4:8"):
            if pattern in fits:
                Sparsify(pattern=pattern).plan(other)  # type: ignore[arg-type]
            else:
                with pytest.raises(Unsupported, match=f"ffn.down has {width} input columns"):
                    Sparsify(pattern=pattern).plan(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_missing_text_is_said_before_anything_is_written(method: str, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(SnelloError, match="none was given") as caught:
        Sparsify(method=method).apply(source, Context(output=tmp_path / "lean"))  # type: ignore[arg-type]
    assert "method='magnitude'" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_recipe_keys_are_the_fields() -> None:
    recipe = Recipe.from_table(
        {"steps": [{"use": "sparsify", "method": "wanda", "sparsity": 0.6}, {"use": "sparsify"}]}
    )
    assert [stage.steps[0].technique for stage in recipe.stages] == [Sparsify(method="wanda", sparsity=0.6), Sparsify()]
    written = Recipe.from_table(tomllib.loads(recipe.to_toml()))
    assert [stage.steps[0].technique for stage in written.stages] == [
        stage.steps[0].technique for stage in recipe.stages
    ]
    for key, value, message in (("sparcity", 0.5, "did you mean 'sparsity'"), ("sparsity", 2.0, "is a good start")):
        with pytest.raises(SnelloError) as caught:
            Recipe.from_table({"steps": [{"use": "sparsify", key: value}]})
        assert message in caught.value.hint


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(DENSE))
@pytest.mark.parametrize("case", EVERY)
def test_only_the_blocks_get_zeros_and_as_many_as_asked(case: str, variant: str, tmp_path: Path) -> None:
    options, source = EVERY[case], load(make_checkpoint(tmp_path / "source", variant))
    result = applied(options, source, tmp_path / "lean")
    assert result.spec == source.spec and result.weights.names() == source.weights.names()
    linears = body(result)
    for name in set(source.weights.names()) - {f"{linear}.weight" for linear in linears}:
        assert np.array_equal(result.weights.values(name), source.weights.values(name)), name
    zeros = sum(int((w == 0).sum()) for w in linears.values())
    total = sum(w.numel() for w in linears.values())
    assert zeros == pytest.approx(options.sparsity * total, abs=1 if options.scope == "global" else 0.01 * total)
    if options.ranked_over != "global":
        assert all(((w == 0).double().mean() - options.sparsity).abs() < 0.01 for w in linears.values())
    if options.group:
        assert all(((w == 0).reshape(-1, options.group).sum(1) == options.group // 2).all() for w in linears.values())
    entry = result.history[-1]
    assert entry["technique"] == "sparsify" and entry["options"] == dataclasses.asdict(options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["magnitude", "wanda"])
def test_what_stays_is_what_it_was(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen2", dtype=dtype))
    result = applied(EVERY[case], source, tmp_path / "lean")
    before, after = body(source), body(result)
    for name, w in after.items():
        assert torch.equal(w, before[name].masked_fill(w == 0, 0.0)), name


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_model_is_pruned_as_torch_prunes_its_modules(scope: str, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    result = applied(Sparsify(scope=scope, sparsity=0.37), source, tmp_path / "lean")  # type: ignore[arg-type]
    reference = Reference.from_model(source).requires_grad_(True)
    modules = {name: reference.get_submodule(name) for name in body_linears(source.spec)}
    if scope == "layer":
        for module in modules.values():
            prune.l1_unstructured(module, "weight", 0.37)
    else:
        prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=0.37)
    for name, w in body(result).items():
        assert torch.equal(w, modules[name].weight.detach()), name


@pytest.mark.parametrize("variant", ["qwen3", "bert-mlm"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_later_layers_are_calibrated_on_pruned_earlier_ones(method: str, variant: str, tmp_path: Path) -> None:
    """Every unit is solved anew from inputs hooked out of a whole model in which all earlier units are the result's."""
    source = load(make_checkpoint(tmp_path / "source", variant, dtype=torch.bfloat16))
    result = applied(Sparsify(method=method), source, tmp_path / "lean")  # type: ignore[arg-type]
    before, after, walked = body(source), body(result), Reference.from_model(source)
    for unit in units(source.spec, body_linears(source.spec)):
        x = hooked_inputs(walked, random_windows())[unit.linears[0]].double()
        for name in unit.linears:
            w = before[name]
            if method == "wanda":
                scores = w.double().abs() * x.square().sum(0).sqrt()
                gone = scores.argsort(1)[:, : round(0.5 * w.shape[1])]
                expected = w.scatter(1, gone, 0.0)
            else:
                expected = sparsegpt(w, inverse_factor(x.T @ x / len(x)), 0.5).bfloat16().float()
            differing = (after[name] != expected).float().mean()  # sums in another order turn a rounding now and then
            assert differing < 0.02, f"{name}: {differing:.3f}"
        for name in unit.linears:
            walked.get_submodule(name).weight = torch.nn.Parameter(after[name], requires_grad=False)


def folder_hash(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("case", EVERY)
def test_same_seed_same_bytes(case: str, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen3"))
    digests = [applied(EVERY[case], source, tmp_path / name).digest for name in ("first", "second")]
    assert digests[0] == digests[1] != source.digest
    assert folder_hash(tmp_path / "first") == folder_hash(tmp_path / "second")


def test_repairs_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    from snello.techniques.sparsify.apply import as_stored

    source = load(make_checkpoint(tmp_path / "source", "llama", dtype=torch.float16))
    with pytest.raises(SnelloError, match=r"layers\.0\.ffn\.up\.weight does not fit") as caught:
        as_stored(source, "layers.0.ffn.up.weight", torch.tensor([[7e4, 1.0]]))
    assert "wanda" in caught.value.hint


# ---- what comes after -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"method": "awq"}], ids=str)
def test_zeros_survive_rounding_to_nearest_without_a_rotation(options: dict[str, Any], tmp_path: Path) -> None:
    sparse = applied(EVERY["wanda"], load(make_checkpoint(tmp_path / "source", "llama")), tmp_path / "sparse")
    lean = Quantize(**options, rotate=False).apply(sparse, Context(output=tmp_path / "lean", windows=random_windows()))
    after = body(lean)
    for name, w in body(sparse).items():
        assert not after[name][w == 0].any(), name
    assert [entry["technique"] for entry in lean.history] == ["sparsify", "quantize"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_rotation_turns_zeros_into_rounding_noise(method: str, tmp_path: Path) -> None:
    sparse = applied(EVERY["sparsegpt"], load(make_checkpoint(tmp_path / "source", "llama")), tmp_path / "sparse")
    options = Quantize(weights="int8", method=method)  # type: ignore[arg-type]
    lean = options.apply(sparse, Context(output=tmp_path / "lean", windows=random_windows()))
    after = body(lean)
    for name, w in body(sparse).items():
        noise, kept = after[name][w == 0].square().mean().sqrt(), w[w != 0].square().mean().sqrt()
        assert 0 < noise < 0.02 * kept, f"{name}: {noise / kept:.4f}"


def test_the_result_is_run_exported_and_read_by_transformers(tmp_path: Path) -> None:
    import transformers

    from snello.interop.huggingface import export

    sparse = applied(EVERY["sparsegpt"], load(make_checkpoint(tmp_path / "source", "llama")), tmp_path / "sparse")
    export(sparse, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    down = theirs.model.layers[1].mlp.down_proj.weight.detach()
    assert torch.equal(down, body(sparse)["layers.1.ffn.down"])
    tokens = torch.from_numpy(random_windows()[0].astype(np.int64))[None]
    with torch.inference_mode():
        ours = Reference.from_model(sparse)(tokens)
        assert torch.allclose(theirs(tokens).logits, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


# ---- quality on a real model ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_methods_stand_in_the_papers_order(tmp_path: Path) -> None:
    """Wanda loses less than magnitude at half, SparseGPT less than Wanda at 60% and in 2:4."""
    source, calib, held = real.novels(), real.windows("train", 12), real.windows("valid", 8)
    losses = {}
    for case in (
        Sparsify(),
        Sparsify(method="wanda"),
        Sparsify(method="wanda", sparsity=0.6),
        Sparsify(method="sparsegpt", sparsity=0.6),
        Sparsify(method="wanda", pattern="2:4"),
        Sparsify(method="sparsegpt", pattern="2:4"),
    ):
        result = case.apply(source, Context(output=tmp_path / "lean", windows=calib))
        losses[case] = real.loss(Reference.from_model(result), held)
    magnitude, wanda, wanda_60, sparsegpt_60, wanda_24, sparsegpt_24 = losses.values()
    assert wanda < magnitude and sparsegpt_60 < wanda_60 and sparsegpt_24 < wanda_24
    assert real.loss(Reference.from_model(source), held) < wanda


# ---- documentation --------------------------------------------------------------------------------------------------


def test_the_page_lists_every_option_as_the_code_has_it() -> None:
    page = (Path(__file__).parents[2] / "docs/sparsify.md").read_text()
    for option in dataclasses.fields(Sparsify):
        assert f"| `{option.name}` | {option.default} | {option.metadata['help']} |" in page
