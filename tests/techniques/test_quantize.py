"""Quantize as a whole: plans, methods on a real model, mixed bits, the files it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.packed import PackedWeights, packed_bytes
from snello.models.reference import Reference
from snello.models.spec import Format, Spec, WeightFormat, input_name, linear_names
from snello.techniques.base import Context
from snello.techniques.calibration import Calibrator, Routing, Statistic, together
from snello.techniques.quantize import Method, Quantize, loudness, sensitivity
from snello.techniques.quantize.rounding import Grouped
from snello.techniques.quantize.size import average_bits, distribute, hull_steps, parse_budget, stored_bytes
from snello.techniques.quantize.solve import _gptq_unit, solve
from snello.techniques.units import body_linears, units
from tests.checkpoints import MIXTURES, VARIANTS, make_checkpoint
from tests.techniques import real
from tests.techniques.simulate import quantized_reference


def random_windows(count: int = 3, length: int = 40, vocabulary: int = 307) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, vocabulary, length).astype(np.int32) for _ in range(count)]


# ---- options and plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int2"},
        {"method": "spqr"},
        {"weights": "fp16", "method": "gptq"},
        {"group_size": 16},
        {"group_size": 0, "weights": "int8"},
        {"group_size": 0, "weights": "mixed", "budget": "5 bits"},
        {"activations": "int4"},
        {"cache": "fp8"},
        {"head": "bf16"},
        {"budget": "5 bits"},
        {"weights": "mixed"},
        *({"weights": "mixed", "budget": wrong} for wrong in (5, True, "", "5", "0 bits", "100%", "-1MB", "many")),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        Quantize(**options)
    assert caught.value.hint


def spec_of(tmp_path: Path, variant: str) -> Spec:
    return load(make_checkpoint(tmp_path / variant, variant)).spec


def test_preset_is_four_bits_with_an_eight_bit_head(tmp_path: Path) -> None:
    spec = Quantize().plan(spec_of(tmp_path, "llama"))
    body = Format(weights="int4", group_size=128, activations="int8", rotate=True, equalize=True)
    assert all(spec.format(linear) == body for linear in body_linears(spec))
    assert spec.format("head") == dataclasses.replace(body, weights="int8", group_size=0)
    assert spec.format("embedding") == Format(weights="int8")
    assert (
        spec.cache_format == "fp32" and Quantize(cache="int8").plan(spec_of(tmp_path, "qwen3")).cache_format == "int8"
    )


def test_encoder_plans(tmp_path: Path) -> None:
    masked = Quantize().plan(spec_of(tmp_path, "bert-mlm"))
    assert masked.format("head.transform").weights == masked.format("head").weights == "int8"
    classify = Quantize().plan(spec_of(tmp_path, "bert-classify"))
    assert classify.format("head").weights == "fp32" and classify.format("embedding").weights == "int8"
    assert Quantize(head="float").plan(spec_of(tmp_path, "distilbert-mlm")).format("head").weights == "fp32"


def test_cast_plans(tmp_path: Path) -> None:
    plain = spec_of(tmp_path, "llama")
    spec = Quantize(weights="bf16").plan(plain)
    assert spec.default_format == Format(weights="bf16", activations="bf16") and not spec.formats
    assert Quantize(weights="bf16", activations="float").plan(plain).default_format == Format(weights="bf16")
    assert Quantize(weights="fp16").plan(plain).default_format == Format(weights="fp16")


def test_quantized_twice_is_refused(tmp_path: Path) -> None:
    once = Quantize().plan(spec_of(tmp_path, "llama"))
    with pytest.raises(Unsupported, match="quantized already") as caught:
        Quantize(weights="int8").plan(once)
    assert caught.value.hint


def test_too_wide_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama")
    feed = dataclasses.replace(spec.layers[0].feed_forward, width=131_136)
    layer = dataclasses.replace(spec.layers[0], feed_forward=feed)
    with pytest.raises(Unsupported, match=r"layers\.0\.ffn\.down"):
        Quantize().plan(dataclasses.replace(spec, layers=(layer,)))


def test_mixed_budget_is_kept_and_used(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama")
    body = body_linears(spec)
    low = average_bits(Quantize(weights="int3").plan(spec), body)
    with pytest.raises(Unsupported, match="is below") as caught:
        Quantize(weights="mixed", budget="3.01 bits").plan(spec)
    assert "bits' or more" in str(caught.value.hint)
    for bits in (low + 0.5, low + 1.5, low + 4):
        planned = Quantize(weights="mixed", budget=f"{bits:.3f} bits").plan(spec)
        assert bits - 0.75 < average_bits(planned, body) <= bits + 0.001


@pytest.mark.parametrize(("share", "kinds"), [(0.23, {"int3", "int4"}), (0.3, {"int8"}), (0.9, {"fp32"})])
def test_a_budget_of_bytes_is_of_the_whole_file(share: float, kinds: set[str], tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    whole = packed_bytes(source.spec)
    for name, budget in (("share", f"{100 * share:g}%"), ("bytes", f"{share * whole / 1e3:g} kB")):
        options = Quantize(weights="mixed", budget=budget)
        lean = options.apply(source, Context(output=tmp_path / name, windows=random_windows()))
        found = packed_bytes(lean.spec)
        assert found <= share * whole + 1 and found <= packed_bytes(options.plan(source.spec))
        assert kinds & {lean.spec.format(linear).weights for linear in body_linears(lean.spec)}
        with NativeExecutor(lean) as executor:
            assert np.isfinite(executor.score(np.arange(20, dtype=np.int32)).log_probabilities).all()
    with pytest.raises(Unsupported, match="MB in all") as caught:
        Quantize(weights="mixed", budget=f"{0.05 * whole / 1e3:g} kB").plan(source.spec)
    assert "MB' or more" in str(caught.value.hint)


def test_a_loss_takes_as_few_bytes_as_it_allows(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama")
    sizes = []
    for loss in (0.1, 2, 50):
        options = Quantize(weights="mixed", budget=f"{loss}% loss")
        planned, ladder = options.plan(spec), options.ladder(spec)
        measured = {unit.input: {"int3": 0.01, "int4": 0.002} for unit in units(planned, body_linears(planned))}
        divergence = sensitivity.with_the_rest(measured, spec.default_format.weights)  # type: ignore[arg-type]
        chosen = distribute(planned, ladder, divergence, parse_budget(options.budget))
        grouped = units(chosen, body_linears(chosen))
        lost = sum(divergence[unit.input][chosen.format(unit.linears[0]).weights] for unit in grouped)
        assert lost <= np.log1p(loss / 100)
        sizes.append(stored_bytes(chosen, body_linears(chosen)))
        assert sizes[-1] <= stored_bytes(planned, body_linears(planned))
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(Unsupported, match="eight bits everywhere"):
        distribute(planned, ladder, divergence, parse_budget("0.001% loss"))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_on_the_hull(seed: int, tmp_path: Path) -> None:
    """Where units are of one size, no other choice of as few bytes diverges less: all of them are tried."""
    spec, random = spec_of(tmp_path, "llama"), np.random.default_rng(seed)
    options = Quantize(weights="mixed", budget="16 bits")
    planned, ladder = options.plan(spec), options.ladder(spec)
    grouped = units(planned, body_linears(planned))[:4]
    divergence = {unit.input: falling(random) for unit in grouped}
    steps = [step for unit in grouped for step in hull_steps(planned, unit, ladder, divergence[unit.input])]
    steps.sort(key=lambda step: step.gain / step.extra, reverse=True)
    every = [
        (
            sum(stored_bytes(planned.with_formats(dict.fromkeys(u.linears, f)), u.linears) for u, f in choice),
            sum(divergence[u.input][f.weights] for u, f in choice),
        )
        for choice in (list(zip(grouped, formats, strict=True)) for formats in itertools.product(ladder, repeat=4))
    ]
    size, lost = every[0]
    for step in steps:
        assert all(loss >= lost - 1e-9 for other, loss in every if other <= size)
        size, lost = size + step.extra, lost - step.gain
    assert steps and lost == pytest.approx(0.0, abs=1e-9)


def falling(random: np.random.Generator) -> dict[WeightFormat, float]:
    own: WeightFormat = "fp32"
    three, four, eight = sorted(map(float, random.exponential(size=3)), reverse=True)
    return {"int3": three, "int4": four, "int8": eight, own: 0.0}


# ---- sensitivity ----------------------------------------------------------------------------------------------------


NEVER_MIND = {"int3": 5e-6, "int4": 1e-6}


def test_bits_go_where_they_save_most(tmp_path: Path) -> None:
    options, source = Quantize(weights="mixed", budget="6.5 bits"), spec_of(tmp_path, "llama")
    planned, ladder = options.plan(source), options.ladder(source)
    grouped = units(planned, body_linears(planned))
    favoured = grouped[-1].input
    measured = {u.input: {"int3": 5.0, "int4": 1.0} if u.input == favoured else NEVER_MIND for u in grouped}
    divergence = sensitivity.with_the_rest(measured, source.default_format.weights)  # type: ignore[arg-type]
    spec = distribute(planned, ladder, divergence, parse_budget(options.budget))
    assert all(spec.format(linear).weights not in ("int3", "int4") for linear in grouped[-1].linears)
    assert stored_bytes(spec, body_linears(spec)) <= stored_bytes(planned, body_linears(planned))


def test_a_broken_layer_is_found_sensitive(tmp_path: Path) -> None:
    """Sensitivity equals the distance of a model in which that unit alone is rounded."""
    model = load(make_checkpoint(tmp_path / "llama", "llama"))
    options, texts = Quantize(), random_windows(2, 30)
    widths = [options.format("int3"), options.format("int4")]
    measured = sensitivity.measure(model, texts, widths, lambda message, fraction: None)
    unit = units(model.spec, body_linears(model.spec))[5]
    format = widths[1]
    clean, other = Reference.from_model(model), Reference.from_model(model)
    with torch.inference_mode():
        plain = {linear: other.get_submodule(linear).weight for linear in unit.linears}
        formats, loud = dict.fromkeys(unit.linears, format), loudness.estimate(model, unit.input)
        for linear, values in solve(plain, formats, loud).effective().items():
            other.get_submodule(linear).weight = torch.nn.Parameter(values)
        distances = []
        for window in texts:
            tokens = torch.from_numpy(window.astype(np.int64))[None]
            p, q = clean(tokens).log_softmax(-1), other(tokens).log_softmax(-1)
            distances.append((p.exp() * (p - q)).sum(-1).mean())
    assert measured[unit.input]["int4"] == pytest.approx(float(sum(distances)) / len(distances), rel=1e-3)
    assert all(both["int3"] > both["int4"] > 0 for both in measured.values())
    assert len(measured) == len(units(model.spec, body_linears(model.spec)))


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qwen3", "llama-tied-bias", "gpt-neox", "bert-mlm"])
def test_statistics_are_those_of_the_whole_model(variant: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / variant, variant))
    texts = random_windows()
    seen = hooked_inputs(Reference.from_model(model), texts)
    with torch.inference_mode():
        calibrator = Calibrator(model, texts)
        for unit in units(model.spec, body_linears(model.spec)):
            statistic, x = calibrator.statistic(unit.input), seen[unit.linears[0]]
            assert torch.allclose(statistic.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4)
            assert torch.allclose(statistic.rows, x[: len(statistic.rows)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["qwen3", "bert-mlm"])
def test_sentences_are_walked_together_and_seen_as_if_alone(variant: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / variant, variant))
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 300, 5 + number % 3).astype(np.int32) for number in range(200)]
    seen = hooked_inputs(Reference.from_model(model), texts)
    with torch.inference_mode():
        calibrator = Calibrator(model, texts)
        assert len(calibrator.hidden) == 3 and sum(len(x) for x in calibrator.hidden) == 200
        for unit in units(model.spec, body_linears(model.spec)):
            x = seen[unit.linears[0]]
            assert torch.allclose(calibrator.statistic(unit.input).gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_long_windows_stay_alone_and_in_order() -> None:
    texts = [np.full(400, number, np.int32) for number in range(3)]
    batches = together(texts)
    assert [tuple(batch.shape) for batch in batches] == [(1, 400)] * 3
    assert [int(batch[0, 0]) for batch in batches] == [0, 1, 2]


@pytest.mark.parametrize("variant", ["qwen3", "gpt-neox"])
def test_later_inputs_see_the_replaced_weights(variant: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / variant, variant))
    texts, linear = random_windows(), "layers.0.attention.o"
    changed = torch.from_numpy(model.weights.values(f"{linear}.weight")) * 0.5
    reference = Reference.from_model(model)
    reference.get_submodule(linear).weight = torch.nn.Parameter(changed)
    seen = hooked_inputs(reference, texts)
    with torch.inference_mode():
        calibrator = Calibrator(model, texts)
        calibrator.statistic("layers.0.attention.mixed")
        calibrator.replace(linear, changed)
        for name, reader in (("layers.0.ffn.in", "layers.0.ffn.up"), ("layers.1.ffn.hidden", "layers.1.ffn.down")):
            x = seen[reader]
            assert torch.allclose(calibrator.statistic(name).gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", MIXTURES)
def test_an_expert_is_calibrated_on_the_rows_that_it_is_sent(variant: str, tmp_path: Path) -> None:
    """On all of them and no others where they are enough, else on as many as channels: those sent, and the nearest."""
    model = load(make_checkpoint(tmp_path / variant, variant))
    texts = random_windows(4, 60)
    seen, enough = hooked_inputs(Reference.from_model(model), texts), set[bool]()
    with torch.inference_mode():
        calibrator = Calibrator(model, texts)
        for linear in (name for name in body_linears(model.spec) if ".experts." in name and not name.endswith("up")):
            expert, x = linear.rpartition(".")[0], seen[linear]
            name = input_name(linear) if linear.endswith("down") else f"{expert}.in"
            statistic, rows = calibrator.statistic(name), torch.cat(list(calibrator._inputs(name)))
            enough.add(len(x) >= x.shape[1])
            assert len(rows) == max(x.shape) and torch.allclose(statistic.gram, rows.T @ rows / len(rows))
            if len(x) == len(rows):
                assert torch.allclose(rows, x, rtol=1e-3, atol=1e-4)
                assert torch.allclose(statistic.peaks, x.abs().amax(0), rtol=1e-3, atol=1e-4)
            else:
                assert all(torch.isclose(rows, row, rtol=1e-3, atol=1e-3).all(1).any() for row in x)
    assert enough == {True, False}


def test_rows_that_are_missing_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(3)
    shares = torch.rand(50, 4, generator=generator).softmax(1)
    sent = torch.zeros(50, 4, dtype=torch.bool).scatter(1, shares.topk(2).indices, True)
    sent[:, 3] = False  # never asked
    routing = Routing(1, sent, shares)
    assert torch.equal(routing.rows(0, 5), sent[:, 0]) and int(sent[:, 0].sum()) >= 5
    more = routing.rows(0, int(sent[:, 0].sum()) + 3)
    added, left = more & ~sent[:, 0], ~more
    assert bool(more[sent[:, 0]].all()) and int(added.sum()) == 3
    assert shares[added, 0].min() >= shares[left, 0].max()
    assert torch.equal(routing.rows(3, 7), shares[:, 3] >= shares[:, 3].sort(descending=True).values[6])
    assert bool(routing.rows(3, 1_000).all())  # there are no more


@torch.inference_mode()
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_are_rounded_as_if_each_were_alone(method: Method, tmp_path: Path) -> None:
    """In the basis that they share, GPTQ gives each the integers that its own rows ask for; both beat the nearest."""
    model, texts = load(make_checkpoint(tmp_path / "source", "mixtral")), random_windows(8, 60)
    calibrator, name = Calibrator(model, texts), "layers.1.ffn.in"
    unit = next(unit for unit in units(model.spec, body_linears(model.spec)) if unit.input == name)
    weights = {linear: torch.from_numpy(model.weights.values(f"{linear}.weight")) for linear in unit.linears}
    formats = dict.fromkeys(weights, Quantize(group_size=32, activations="float").format("int4"))
    statistic, loud = calibrator.statistic(name), loudness.estimate(model, name)
    found = solve(weights, formats, loud, method, statistic, seen=calibrator)
    nearest = solve(weights, formats, loud).effective()
    assert list(found.rounded) == list(unit.linears)
    errors = {"nearest": 0.0, method: 0.0}
    for number in range(5):
        expert = f"layers.1.ffn.experts.{number}"
        own, part = calibrator.statistic(f"{expert}.in"), {p: weights[f"{expert}.{p}"] for p in ("gate", "up")}
        for p, effective in (("nearest", nearest), (method, found.effective())):
            errors[p] += sum(relative_error(w, effective[f"{expert}.{key}"], own) for key, w in part.items())
        if method == "gptq":
            gram = found.basis.gram(own.gram)
            alone = _gptq_unit(part, dict.fromkeys(part, formats[f"{expert}.up"]), found.basis, gram, "group")
            assert all(torch.equal(found.rounded[f"{expert}.{p}"].q, matrix.q) for p, matrix in alone.items())
    assert errors[method] < {"gptq": 0.8, "awq": 1.0}[method] * errors["nearest"]


def test_experts_that_text_does_not_reach_are_calibrated_too(tmp_path: Path) -> None:
    """The history says how many rows each was sent, and the engine runs what comes out."""
    from tests.twins import arrays_of, in_memory

    source = load(make_checkpoint(tmp_path / "source", "mixtral"))
    arrays = arrays_of(source)
    arrays["layers.1.ffn.router.weight"][2:] *= 0.02  # hardly ever before one of the first two
    arrays["layers.1.ffn.router.weight"][0] = -arrays["layers.1.ffn.router.weight"][1]
    uneven = in_memory(source, source.spec, arrays, "uneven")
    options = Quantize(method="gptq", activations="float", head="float")
    lean = options.apply(uneven, Context(output=tmp_path / "lean", windows=random_windows()))
    sent = lean.history[-1]["rows_sent"]
    assert list(sent) == ["layers.0.ffn.in", "layers.1.ffn.in"]
    assert all(sum(counts) == 2 * 120 for counts in sent.values()) and min(sent["layers.1.ffn.in"]) < 96
    tokens = random_windows(1)[0]
    with torch.inference_mode():
        expected = Reference.from_model(lean)(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
    with NativeExecutor(lean) as executor:
        assert np.abs(executor.logits(tokens) - expected).max() < 1e-3 * np.abs(expected).max()


@torch.inference_mode()
def hooked_inputs(reference: Reference, texts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Inputs (rows, K) of every linear of the blocks, by its name."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in body_linears(reference.spec)}
    for name, rows in seen.items():
        hook = lambda module, arguments, rows=rows: rows.append(arguments[0].flatten(0, -2))  # noqa: E731
        reference.get_submodule(name).register_forward_pre_hook(hook)
    for window in texts:
        reference(torch.from_numpy(window.astype(np.int64))[None])
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_wrong_text_is_an_error_with_a_hint(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "llama", "llama"))
    too_long, foreign = [np.ones(600, np.int32)], [np.full(9, 400, np.int32)]
    for texts, word in (([], "none was given"), (too_long, "600 tokens"), (foreign, "token 400")):
        with pytest.raises(SnelloError, match=word) as caught:
            Calibrator(model, texts)
        assert caught.value.hint


# ---- quality on a real model ----------------------------------------------------------------------------------------


@torch.inference_mode()
def held_back_errors(layers: int = 2) -> dict[str, float]:
    """Output error of the first blocks on text that calibration did not see, relative, summed, by method."""
    model, texts = real.novels(), real.windows("train", 12)
    seen, held_back = Calibrator(model, texts), Calibrator(model, real.windows("valid", 4))
    errors = dict.fromkeys(("rtn", "gptq", "awq"), 0.0)
    format = Quantize(activations="float").format("int4")
    for unit in units(model.spec, [n for n in body_linears(model.spec) if int(n.split(".")[1]) < layers]):
        weights = {name: torch.from_numpy(model.weights.values(f"{name}.weight")) for name in unit.linears}
        statistic, test = seen.statistic(unit.input), held_back.statistic(unit.input)
        formats, loud = dict.fromkeys(weights, format), loudness.estimate(model, unit.input)
        for method in errors:
            effective = solve(weights, formats, loud, method, statistic).effective()  # type: ignore[arg-type]
            errors[method] += sum(relative_error(weights[name], effective[name], test) for name in weights)
    return errors


def relative_error(weight: torch.Tensor, effective: torch.Tensor, test: Statistic) -> float:
    change = effective - weight
    return float(((change @ test.gram) * change).sum() / ((weight @ test.gram) * weight).sum())


def test_calibrated_methods_lose_less_on_unseen_text() -> None:
    errors = held_back_errors()
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["awq"] < errors["rtn"]


@pytest.mark.slow
def test_losses_of_the_methods() -> None:
    """The table of docs/quantize.md: loss over the original's in nats a token, eight-bit activations included."""
    model, texts, valid = real.novels(), real.windows("train", 24, 512), real.windows("valid", 8, 512)
    base = real.loss(Reference.from_model(model), valid)
    losses = {}
    for options in (
        Quantize(weights="int8"),
        Quantize(),
        Quantize(group_size=32),
        Quantize(method="awq"),
        Quantize(method="gptq"),
        Quantize(weights="mixed", budget="5 bits", method="gptq"),
        Quantize(method="hqq"),
        Quantize(weights="int8", method="smoothquant"),
    ):
        losses[options] = real.loss(quantized_reference(options, model, texts), valid) - base
        print(f"{options}: {losses[options]:+.4f}")
    assert losses[Quantize(weights="int8")] < 0.003 and losses[Quantize(weights="int8", method="smoothquant")] < 0.003
    assert losses[Quantize(method="gptq")] < losses[Quantize()] < 0.03
    assert losses[Quantize(method="gptq")] < losses[Quantize(method="hqq")] < 0.03


# ---- files ----------------------------------------------------------------------------------------------------------


def folder_hash(path: Path) -> dict[str, str]:
    return {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in sorted(path.iterdir())}


THREE_BITS: tuple[Method, ...] = ("rtn", "hqq", "awq", "gptq")
OPTIONS = {
    "preset": Quantize(),
    "mixed-gptq": Quantize(weights="mixed", budget="7 bits", method="gptq", group_size=64),
    "awq": Quantize(method="awq", rotate=False, cache="int8"),
    "int8-plain": Quantize(weights="int8", head="float", rotate=False, equalize=False, activations="float"),
    "head-int4": Quantize(head="int4", method="gptq"),
    "hqq": Quantize(method="hqq", group_size=64),
    **{f"int3-{method}": Quantize(weights="int3", method=method, group_size=64) for method in THREE_BITS},
    **{f"int4-{method}-row": Quantize(method=method, group_size=0) for method in THREE_BITS},
    "mixed-hqq": Quantize(weights="mixed", budget="7 bits", method="hqq"),
    "smoothquant": Quantize(weights="int8", method="smoothquant", alpha=0.6),
    "bf16": Quantize(weights="bf16"),
    "static": Quantize(method="hqq", activations="int8-static"),
    "fp16": Quantize(weights="fp16"),
}
CASES = [("preset", variant) for variant in VARIANTS]
CASES += [(case, variant) for case in OPTIONS if case != "preset" for variant in ("llama", "bert-classify")]
CASES += [("mixed-gptq", variant) for variant in ("gpt-neox", "gemma2")]
CASES += [(case, variant) for case in ("awq", "int3-gptq", "int4-gptq-row", "smoothquant") for variant in MIXTURES]


@pytest.mark.parametrize(("case", "variant"), CASES)
def test_files_hold_what_the_simulation_says(case: str, variant: str, tmp_path: Path) -> None:
    """The lean folder, read back and dequantized, answers as the recorded integers do."""
    options = OPTIONS[case]
    source = load(make_checkpoint(tmp_path / "source", variant))
    texts = random_windows()
    lean = options.apply(source, Context(output=tmp_path / "lean", windows=texts))
    tokens = torch.from_numpy(texts[0].astype(np.int64))[None]
    with torch.inference_mode():
        stored = Reference.from_model(lean)(tokens)
        simulated = quantized_reference(options, source, texts, activations=False)(tokens)
    assert torch.allclose(stored, simulated, rtol=1e-3, atol=1e-3 * float(simulated.abs().max()))
    entry = lean.history[-1]
    assert entry["technique"] == "quantize" and entry["options"]["method"] == options.method
    assert ("sensitivity" in entry) == (options.weights == "mixed")


@pytest.mark.parametrize("method", THREE_BITS)
def test_a_row_has_one_scale_where_asked(method: Method) -> None:
    generator = torch.Generator().manual_seed(5)
    w, rows = torch.randn(7, 200, generator=generator), torch.randn(300, 200, generator=generator)
    w[:, 3] *= 20  # so that groups would differ
    gram = rows.T @ rows / len(rows)
    statistic = Statistic(gram=gram, peaks=rows.abs().amax(0), rows=rows)
    errors = {}
    for scales in ("group", "row"):
        formats = {"a": Format(weights="int4", group_size=32, rotate=False, equalize=False)}
        solution = solve({"a": w}, formats, torch.ones(200), method, statistic, scales=scales)  # type: ignore[arg-type]
        matrix = solution.rounded["a"]
        assert isinstance(matrix, Grouped) and matrix.group_scale.shape == (7, 8)  # 200 columns, padded to 256
        assert bool((matrix.group_scale == matrix.group_scale[:, :1]).all()) == (scales == "row")
        errors[scales] = ((solution.effective()["a"] - w) @ rows.T).square().sum().item()
    assert errors["group"] < errors["row"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen3"))
    options = Quantize(weights="mixed", budget="7 bits", method="gptq")
    for name in ("first", "second"):
        options.apply(source, Context(output=tmp_path / name, windows=random_windows(), threads=1))
    assert folder_hash(tmp_path / "first") == folder_hash(tmp_path / "second")


def test_a_cast_rounds_and_nothing_else(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen2"))
    lean = Quantize(weights="fp16").apply(source, Context(output=tmp_path / "lean"))
    name = "layers.0.ffn.down.weight"
    assert np.array_equal(lean.weights.values(name), source.weights.values(name).astype(np.float16).astype(np.float32))
    assert np.array_equal(lean.weights.values("norm.weight"), source.weights.values("norm.weight"))


@pytest.mark.parametrize(
    ("weights", "value", "words"),
    [
        ("fp16", 1e6, r"holds 1e\+06, FP16 ends at 65504"),
        ("fp16", -65505.0, "FP16 ends at 65504"),
        ("bf16", 3.4e38, r"holds 3\.4e\+38, BF16 ends"),
        ("bf16", float("inf"), "not finite"),
        ("fp16", float("nan"), "not finite"),
        ("int8", float("nan"), "not finite"),
        ("int4", float("inf"), "not finite"),
    ],
)
def test_a_cast_that_would_overflow_is_refused(weights: Any, value: float, words: str, tmp_path: Path) -> None:
    """By the tensor's name, and nothing is left."""
    loud = with_one_value(load(make_checkpoint(tmp_path / "source", "llama")), value)
    with pytest.raises(SnelloError, match=rf"layers\.1\.ffn\.up\.weight {words}|{words}") as caught:
        Quantize(weights=weights).apply(loud, Context(output=tmp_path / "lean"))
    assert "layers.1.ffn.up.weight" in caught.value.message
    assert caught.value.hint and not (tmp_path / "lean").exists()


def test_a_cast_to_bf16_holds_what_fp16_cannot(tmp_path: Path) -> None:
    loud = with_one_value(load(make_checkpoint(tmp_path / "source", "llama")), 1e6)
    lean = Quantize(weights="bf16").apply(loud, Context(output=tmp_path / "lean"))
    assert lean.weights.values("layers.1.ffn.up.weight")[0, 0] == pytest.approx(1e6, rel=2**-8)


def with_one_value(model: Model, value: float) -> Model:
    from tests.twins import arrays_of, in_memory

    arrays = arrays_of(model)
    arrays["layers.1.ffn.up.weight"][0, 0] = value
    return in_memory(model, model.spec, arrays, "loud")


@pytest.mark.parametrize(("weights", "activations"), [("bf16", "float"), ("bf16", "int8"), ("fp16", "int8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_runs_in_its_own_type(weights: Any, activations: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """From any float type, as large as the plan says, and the engine computes what the reference does."""
    source = load(make_checkpoint(tmp_path / "source", "qwen3", dtype=dtype))
    options = Quantize(weights=weights, activations=activations)
    lean = options.apply(source, Context(output=tmp_path / "lean"))
    planned = options.plan(source.spec)
    rounded = weights == "bf16" and activations != "float"
    assert lean.spec == planned
    assert planned.default_format == Format(weights=weights, activations="bf16" if rounded else "float")
    assert isinstance(lean.weights, PackedWeights)
    assert lean.weights.linear_bytes == stored_bytes(planned, linear_names(planned))
    tokens = random_windows(1)[0]
    with torch.inference_mode():
        expected = Reference.from_model(lean)(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
    with NativeExecutor(lean) as executor:
        got = executor.logits(tokens)
    # the reference keeps keys and values in FP32, the engine in the source's type
    exact = dtype is torch.float32 and not rounded
    assert np.abs(got - expected).max() < (2e-4 if exact else 2e-2) * np.abs(expected).max()


# ---- documentation --------------------------------------------------------------------------------------------------


def test_the_page_lists_every_option_as_the_code_has_it() -> None:
    page = (Path(__file__).parents[2] / "docs/quantize.md").read_text()
    for option in dataclasses.fields(Quantize):
        assert f"| `{option.name}` | {option.default} | {option.metadata['help']} |" in page
