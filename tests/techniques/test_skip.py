"""Skip: thresholds that hold the share, one truth in two executors, bits that do not depend on rows, clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.interop.huggingface import export
from snello.models import Model, load, write_lean_folder
from snello.models.packed import PackedWeights
from snello.models.reference import Reference
from snello.models.reference_skip import InputBasis, basis_of
from snello.models.spec import Deployment, Spec, input_name, linear_names
from snello.models.spec_json import spec_from_json
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.prune import Prune
from snello.techniques.quantize import Quantize
from snello.techniques.skip import Skip
from snello.techniques.skip.apply import fill
from snello.techniques.skip.shares import Curve, curve, greedy, threshold_at
from tests.checkpoints import make_checkpoint
from tests.techniques.test_quantize import random_windows

INT4 = Quantize(weights="int4", group_size=32)
PLAIN = Quantize(weights="int8", rotate=False, equalize=False)


def quantized(tmp_path: Path, options: Quantize = INT4, variant: str = "llama") -> Model:
    source = load(make_checkpoint(tmp_path / "source", variant))
    return options.apply(source, Context(output=tmp_path / "quantized", windows=random_windows()))


def skipped(model: Model, tmp_path: Path, **options: Any) -> Model:
    return Skip(**options).apply(model, Context(output=tmp_path / "skip", windows=random_windows(8, 60), threads=1))


def packed(model: Model) -> PackedWeights:
    assert isinstance(model.weights, PackedWeights)
    return model.weights


@pytest.mark.parametrize("rank", ["weighted", "magnitude"])
@pytest.mark.parametrize("options", [INT4, PLAIN, Quantize(weights="int8", activations="int8-static")])
def test_the_share_of_zeros_is_what_was_asked(options: Quantize, rank: str, tmp_path: Path) -> None:
    """Of the first input, which nothing that is skipped before disturbs."""
    model = quantized(tmp_path, options)
    lean = skipped(model, tmp_path, share=0.4, shares="uniform", rank=rank)
    block = Reference.from_model(lean).layers[0]
    with torch.inference_mode():
        x = Reference.from_model(model).embedding(torch.from_numpy(np.stack(random_windows(8, 60))).long())
        skip = block.attention.skips["inputs"]
        rows = skip.basis.enter(block.attention.norm(x))
        zero = (rows.abs() < skip.threshold).float().mean().item()
    assert zero == pytest.approx(0.4, abs=0.02)
    if rank == "magnitude":
        assert skip.threshold.min() == skip.threshold.max()


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2", "bert-mlm"])
def test_native_and_reference_agree(variant: str, tmp_path: Path) -> None:
    """The reference with the executor's 8-bit inputs, and thresholds that lie where no input is near them: one value
    that falls on the other side of its threshold changes all that follows. The zeros matter: without them the logits
    are others.
    """
    model = quantized(tmp_path, Quantize(weights="int8", head="float"), variant)
    lean = skipped(model, tmp_path, share=0.5, shares="uniform")
    tokens, reference = random_windows(1, 12)[0], Reference.from_model(lean)
    gaps: dict[str, InGaps] = {}
    for index, block in enumerate(reference.layers):
        for name, half in (("attention", block.attention), ("ffn", block.ffn)):
            for place, part in (("inputs", half.inputs[0]), ("output", half.output)):
                linear = f"layers.{index}.{name}.{part}"
                gap = InGaps(basis_of(lean.spec, packed(lean), linear))
                half.skips[place] = gaps[input_name(linear)] = gap
    with torch.inference_mode():
        batch = torch.from_numpy(tokens.astype(np.int64))[None]
        wanted, without = (each(batch)[0].numpy() for each in (reference, Reference.from_model(model)))
    assert all(0.3 < gap.zeros < 0.7 for gap in gaps.values())
    placed = {name: gap.threshold for name, gap in gaps.items()}
    write_lean_folder(
        tmp_path / "placed", lean.spec, model, (), lambda writer: fill(writer, packed(model), lean.spec, placed)
    )
    with NativeExecutor(load(tmp_path / "placed"), Deployment(context=64, threads=1)) as executor:
        got = logits(executor, tokens)
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(without - wanted)


class InGaps:
    """Rounds rows to 8 bits, and cuts them by thresholds that it puts in the widest gap of each channel's middle."""

    threshold: torch.Tensor
    zeros: float

    def __init__(self, basis: InputBasis) -> None:
        self.basis = basis

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.basis.enter(x)
        magnitudes = y.abs().flatten(0, -2).sort(0).values  # (T, padded K)
        middle = magnitudes[len(magnitudes) // 5 : -(len(magnitudes) // 5)]
        at = middle.diff(dim=0).argmax(0, keepdim=True)
        self.threshold = ((middle.gather(0, at) + middle.gather(0, at + 1)) / 2)[0]
        small = y.abs() < self.threshold
        self.zeros = small.float().mean().item()
        step = y.abs().amax(-1, keepdim=True) / 127
        return self.basis.leave(torch.where(small, 0.0, (y / step).round() * step))


def logits(executor: NativeExecutor, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(executor.logits(tokens))


def test_the_same_bits_for_any_rows_threads_and_storage(tmp_path: Path) -> None:
    """One row at a time, all at once, and the same integers stored by panel."""
    lean = skipped(quantized(tmp_path), tmp_path, share=0.5)
    tokens = random_windows(1, 24)[0]
    found = []
    for threads, rows in ((1, 1), (2, 3), (2, 24)):
        with NativeExecutor(lean, Deployment(context=64, threads=threads, chunk_rows=rows)) as executor:
            session = executor.session()
            last = [session.feed(tokens[at : at + rows]) for at in range(0, len(tokens), rows)][-1]
            found.append(np.asarray(last).tobytes())
    assert found[0] == found[1] == found[2]


def test_integers_are_moved_not_rounded(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    lean = skipped(model, tmp_path, share=0.3)
    skipping = [linear for linear in linear_names(lean.spec) if lean.spec.format(linear).skip]
    assert skipping and all(linear.startswith("layers.") for linear in skipping)
    for name in packed(model).names():
        assert packed(lean).values(name).tobytes() == packed(model).values(name).tobytes(), name
    assert packed(lean).layouts[f"{skipping[0]}.weight"].format == "int4-channels"


def test_greedy_spends_the_same_bytes_and_loses_less(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    even, spread = (skipped(model, tmp_path, share=0.4, shares=shares) for shares in ("uniform", "greedy"))
    sizes = {name: packed(model).layouts[f"{name}.weight"].num_bytes for name in linear_names(model.spec)}

    def saved(spec: Spec) -> float:
        return sum(spec.format(name).skip * sizes[name] for name in sizes if name.startswith("layers."))

    lost = [sum(lean.history[-1]["lost_energy"].values()) for lean in (even, spread)]
    assert saved(spread.spec) == pytest.approx(saved(even.spec), rel=0.02)
    assert len(set(spread.history[-1]["shares"].values())) > 1 and lost[1] <= lost[0]


def test_greedy_prefers_the_quiet_input() -> None:
    rng = torch.Generator().manual_seed(0)
    ones = torch.ones(64)
    loud = curve(torch.randn(200, 64, generator=rng), ones, True, 100.0)
    quiet = curve(torch.randn(200, 64, generator=rng) ** 3, ones, True, 100.0)
    given = greedy({"loud": loud, "quiet": quiet}, 0.4)
    assert given["quiet"] > 0.5 > 0.35 > given["loud"] and sum(given.values()) == pytest.approx(0.8)
    rows = torch.arange(1.0, 101.0)[None]
    plain = curve(rows, torch.ones(100), False, 1.0)
    assert threshold_at(plain, 0.25) == 26.0  # a quarter lies below it
    assert plain.loss[-1] == pytest.approx(1.0) and plain.loss[0] == 0.0


def test_greedy_stops_at_the_most_an_input_may_skip() -> None:
    flat = Curve(torch.zeros(101), torch.zeros(101), 1.0)
    assert greedy({"a": flat, "b": flat}, 0.9) == {"a": 0.9, "b": 0.9}


def test_the_spec_survives_its_json_and_old_digests_stay(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    lean = skipped(model, tmp_path, share=0.3)
    assert spec_from_json(lean.spec.to_json()) == lean.spec
    assert "skip" not in str(model.spec.to_json()) and "'skip': 0." in str(lean.spec.to_json())


def test_refusals(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(Unsupported) as plain:
        Skip().plan(source.spec)
    assert "quantize it first" in (plain.value.hint or "")
    with pytest.raises(Unsupported, match="has none"):
        Skip().plan(Quantize(weights="int8", activations="float").plan(source.spec))
    lean = skipped(quantized(tmp_path), tmp_path, share=0.3)
    with pytest.raises(Unsupported, match="skips already"):
        Skip().plan(lean.spec)
    with pytest.raises(Unsupported, match="skips small inputs"):
        export(lean, tmp_path / "exported")
    for bad in (0.0, 0.0004, 1.0, -0.5, 1, "much", float("nan"), True):
        with pytest.raises(SnelloError, match="share="):
            Skip(share=bad)  # type: ignore[arg-type]
    one = Prune(ffn=0.0, layers=0.7).apply(source, Context(output=tmp_path / "one", windows=random_windows()))
    little = INT4.apply(one, Context(output=tmp_path / "little", windows=random_windows()))
    with pytest.raises(SnelloError, match=r"share=0\.001 is too little to skip anything"):
        skipped(little, tmp_path / "nothing", share=0.001, shares="greedy")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(SnelloError, match="shares='best'"):
        Skip(shares="best")  # type: ignore[arg-type]
    with pytest.raises(SnelloError, match="none was given"):
        Skip().apply(quantized(tmp_path), Context(output=tmp_path / "textless"))
    assert not (tmp_path / "textless").exists()


def test_a_wide_input_is_refused() -> None:
    from snello.models.shapes import spec_of_shape

    spec = spec_of_shape("tinyllama-1.1b", "int4")
    layer = spec.layers[0]
    wide = dataclasses.replace(layer.feed_forward, width=core.MAX_CHANNELS + 64)
    with pytest.raises(Unsupported, match="input columns"):
        Skip().plan(dataclasses.replace(spec, layers=(dataclasses.replace(layer, feed_forward=wide),)))
