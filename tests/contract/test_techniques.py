"""Every technique of the table keeps the law: one shape, cheap plans, results that refine them, inputs untouched."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import Unsupported
from snello.models import Model, load
from snello.models.spec import Experts, Recurrent, ShortConvolution, Spec, linear_names, linear_shape
from snello.techniques.base import Context, Technique
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.size import stored_bytes
from snello.techniques.table import TECHNIQUES
from tests.checkpoints import MIXTURES, VARIANTS, make_checkpoint

EVERY = pytest.mark.parametrize("name", sorted(TECHNIQUES))
CONVOLVING = ("llama", "llama-tied-bias", "mistral-window", "qwen2", "qwen3")
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"window": 20},  # the defaults ask for nothing
    "distill": {"student": "alternate", "tokens": 96, "batch_tokens": 48},
    "trim": {"keep": 0.95},  # of a vocabulary that is hardly more than the bytes
}
# layers that differ cannot shrink alike, nor leave by turns
REFUSED = {(name, variant) for name in ("distill", "prune") for variant in ("gemma2", "gemma3", "lfm2")}
REFUSED |= {("attention", "distilbert-mlm")}  # Longformer is made of BERT
REFUSED |= {(name, "lfm2") for name in ("attention", "skip", "sparsify", "trim")}  # they know attention alone
REFUSED |= {("convolution", variant) for variant in VARIANTS if variant not in CONVOLVING}
NO_MIXTURES = ("attention", "convolution", "distill", "prune", "skip", "sparsify", "trim")
REFUSED |= {(name, variant) for name in NO_MIXTURES for variant in MIXTURES}


def windows(count: int = 2, length: int = 48) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, 307, length).astype(np.int32) for _ in range(count)]


def made_for(name: str, tmp_path: Path, variant: str) -> Model:
    """A checkpoint at `source`; for what works on quantized models, a quantized one."""
    if name != "skip":
        return load(make_checkpoint(tmp_path / "source", variant))
    plain = load(make_checkpoint(tmp_path / "plain", variant))
    return TECHNIQUES["quantize"]().apply(plain, Context(output=tmp_path / "source"))


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@EVERY
def test_options_are_a_frozen_keyword_only_dataclass(name: str) -> None:
    technique = TECHNIQUES[name]
    parameters = technique.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen and all(field.kw_only for field in dataclasses.fields(technique))
    assert len(dataclasses.fields(technique)) <= 10
    assert hash(technique()) == hash(technique()) and technique() == technique()


@EVERY
def test_every_option_and_the_technique_explain_themselves(name: str) -> None:
    technique = TECHNIQUES[name]
    for field in dataclasses.fields(technique):
        sentence = field.metadata.get("help", "")
        assert sentence.endswith(".") and 20 < len(sentence) < 120, f"{name}.{field.name}: {sentence!r}"
    story = inspect.getdoc(technique) or ""
    for part in ("Idea:", "Formula:", "When it hurts:", "arXiv:"):
        assert part in story, f"{name}'s docstring lacks {part!r}"


@EVERY
def test_explaining_and_planning_need_no_torch(name: str) -> None:
    use = f"from snello.techniques.table import TECHNIQUES; TECHNIQUES[{name!r}]()"
    subprocess.run([sys.executable, "-c", f"import sys; {use}; assert 'torch' not in sys.modules"], check=True)


@EVERY
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_result_refines_the_plan_and_the_input_is_untouched(name: str, variant: str, tmp_path: Path) -> None:
    source = made_for(name, tmp_path, variant)
    before, technique = hashes(tmp_path / "source"), TECHNIQUES[name](**OPTIONS.get(name, {}))
    if (name, variant) in REFUSED:
        with pytest.raises(Unsupported) as caught:
            technique.plan(source.spec)
        assert caught.value.hint
        return
    planned = technique.plan(source.spec)
    result = technique.apply(source, Context(output=tmp_path / "result", windows=windows()))
    assert hashes(tmp_path / "source") == before
    assert_refines(result.spec, planned)
    assert result.path == tmp_path / "result" and result.history[-1]["technique"] == name


def assert_refines(spec: Spec, planned: Spec) -> None:
    """The same skeleton; every linear no larger in all than planned. Which layers convolve is free, not how many."""
    if any(isinstance(layer.mixer, ShortConvolution) for layer in planned.layers):
        assert Counter(spec.layers) == Counter(planned.layers)
        assert stored_bytes(spec, linear_names(spec)) == stored_bytes(planned, linear_names(planned))
        planned = dataclasses.replace(planned, layers=spec.layers)
    bare = {"formats": ()}
    assert dataclasses.replace(spec, **bare) == dataclasses.replace(planned, **bare)  # type: ignore[arg-type]
    linears = linear_names(spec)
    assert linears == linear_names(planned)
    assert [linear_shape(spec, linear) for linear in linears] == [linear_shape(planned, linear) for linear in linears]
    assert stored_bytes(spec, linears) <= stored_bytes(planned, linears)


def test_mixed_bits_refine_too(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    technique = TECHNIQUES["quantize"](weights="mixed", budget="7 bits")  # type: ignore[call-arg]
    result = technique.apply(source, Context(output=tmp_path / "result", windows=windows()))
    assert_refines(result.spec, technique.plan(source.spec))


@EVERY
def test_odd_models_are_refused_with_a_hint(name: str, tmp_path: Path) -> None:
    spec = load(make_checkpoint(tmp_path / "source", "llama")).spec
    layer = spec.layers[0]
    experts = dataclasses.replace(layer.feed_forward, experts=Experts(num_experts=8, num_active=2))
    calibrated = Quantize(activations="int8-static") if name == "quantize" else TECHNIQUES[name]()
    for odd in (
        dataclasses.replace(layer, mixer=Recurrent(kind="mamba", num_heads=4, state_dim=16)),
        dataclasses.replace(layer, feed_forward=experts),
    ):
        with pytest.raises(Unsupported) as caught:
            calibrated.plan(dataclasses.replace(spec, layers=(layer, odd)))
        assert caught.value.hint


def test_the_table_holds_techniques() -> None:
    for technique in TECHNIQUES.values():
        assert all(callable(getattr(technique, name)) for name in ("plan", "apply"))
    table: dict[str, type[Technique]] = TECHNIQUES
    assert list(table) == sorted(table)
