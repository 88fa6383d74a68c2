"""What the fixed list tries, and what a recipe's step should take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from snello.measure.speed import Workload
from snello.optimize.planner import CONTROL_SECONDS, GATHERED, TRAIN_SECONDS, Forecast, Goals, Overhead
from snello.optimize.proposals import Subject, quantize_offers, skip_stages, trim_offers
from snello.optimize.recipe import Recipe, Stage, Step
from snello.techniques.quantize import Quantize
from snello.techniques.skip import Skip
from tests.optimize.fakes import MACHINE, spec


def test_methods_that_only_cost_time_are_left_to_recipes() -> None:
    tried = {str(offer.step.options.get("method", "rtn")) for offer in quantize_offers(Subject(spec(), "latency"))}
    assert tried == {"rtn", "gptq", "awq"}


def test_integers_that_others_chose_are_looked_for_on_their_own_grid() -> None:
    plain, own = (quantize_offers(Subject(spec(), "latency", grid)) for grid in (0, 64))
    (added,) = (offer for offer in own if offer not in plain)
    assert added.step.technique == Quantize(weights="int4", group_size=64, rotate=False, equalize=False)
    assert own.index(added) == [offer.label for offer in own].index("int4, rtn") - 1


def narrow(words: int) -> list[np.ndarray]:
    """Text that uses so many of the 512 words, and not the earliest."""
    generator = np.random.default_rng(1)
    return [generator.integers(500 - words, 500, 512).astype(np.int32) for _ in range(8)]


def test_words_leave_only_where_the_text_uses_few() -> None:
    few = Subject(spec(), "latency", calib=narrow(100))
    assert [offer.step.options["keep"] for offer in trim_offers(few)] == [0.5, 0.25]
    assert [offer.label for offer in trim_offers(few)] == ["words 1/2", "words 1/4"]
    assert [offer.label for offer in trim_offers(dataclasses.replace(few, calib=narrow(200)))] == ["words 1/2"]
    for none in (narrow(300), [], narrow(100)[:1]):
        assert not trim_offers(dataclasses.replace(few, calib=none))


def test_words_that_are_rare_in_the_text_are_counted_against_the_budget() -> None:
    windows = narrow(100)
    windows[1][:10] = np.arange(300, 310)  # of 2,048 tokens that are asked for; none was chosen
    lost = np.expm1(8 * 10 / 2048)
    offered = [bool(trim_offers(Subject(spec(), "latency", max_loss=budget, calib=windows))) for budget in (0.03, 0.05)]
    assert 0.03 < lost < 0.05 and offered == [False, True]


def test_skipping_comes_behind_what_is_quantized_for_one_stream() -> None:
    chain = (Step("prune", {"ffn": 0.25}), Step("quantize", {"weights": "int4", "method": "gptq", "cache": "int8"}))
    some, more = skip_stages("latency", chain)
    assert some.steps[0] == chain[0] and [step.use for step in some.steps] == ["prune", "quantize", "skip"]
    assert some.steps[1].technique == Quantize(weights="int4", method="gptq", cache="int8", rotate=False)
    assert (some.steps[2].technique, more.steps[2].technique) == (Skip(share=0.4), Skip(share=0.5))
    assert not skip_stages("throughput", chain) and not skip_stages("memory", chain)
    for other in ((), chain[:1], (Step("quantize", {"weights": "bf16"}),), (Step("quantize", {"weights": "int3"}),)):
        assert not skip_stages("latency", other)


def test_what_is_gathered_is_expected_to_come_slower() -> None:
    """A quarter less to read takes as long as all; the ceiling says otherwise, and stays one."""
    goals = Goals("latency", MACHINE, Workload(prompt=8, generate=128))
    whole = Quantize(weights="int4", rotate=False).plan(spec(layers=30))
    quarter, half = (Skip(share=share).plan(whole) for share in (0.25, 0.5))
    assert goals.expected(whole) == goals.predicted(whole)
    assert goals.predicted(half) < goals.predicted(quarter) < goals.predicted(whole)
    assert goals.expected(half) < goals.expected(whole) < 1.03 * goals.expected(quarter)
    assert 1 < goals.expected(half) / goals.predicted(half) <= 1 / GATHERED
    overhead = Overhead(goals)
    overhead.learn(whole, 2 * goals.predicted(whole))
    assert overhead.predicted(half) == pytest.approx(2 * goals.expected(half))
    overhead.learn(quarter, 3 * goals.expected(quarter))  # of those that skip, this one is nearer
    assert overhead.predicted(half) == pytest.approx(3 * goals.expected(half))
    memory = Goals("memory", MACHINE, Workload(prompt=8, generate=128))
    assert memory.expected(half) == memory.predicted(half)


def test_a_recipe_may_ask_for_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[[steps]]\nuse = "quantize"\nmethod = "hqq"\n'
        '[[steps]]\nuse = "quantize"\nweights = "int8"\nmethod = "smoothquant"\nalpha = 0.6\n'
        'activations = "int8-static"\n'
        '[[steps]]\nuse = "quantize"\nweights = "fp16"\n'
    )
    hqq, smooth, cast = (stage.steps[0].technique for stage in Recipe.load(path).stages)
    assert hqq == Quantize(method="hqq") and cast == Quantize(weights="fp16")
    assert smooth == Quantize(weights="int8", method="smoothquant", alpha=0.6, activations="int8-static")


def test_effort_is_foreseen_method_by_method() -> None:
    forecast = Forecast(10**9, score_tokens=0, score_tokens_per_second=1.0, run_seconds=0.0)
    methods = ("rtn", "hqq", "smoothquant", "awq", "gptq")
    weights = {"smoothquant": "int8"}
    steps = [Step("quantize", {"weights": weights.get(method, "int4"), "method": method}) for method in methods]
    seconds = [forecast.stage(Stage("one", (step,)), timed=False) for step in steps]
    assert seconds == sorted(seconds) and len(set(seconds)) == len(methods)


def test_training_is_foreseen_by_its_tokens() -> None:
    """The model's own training and its control's."""
    forecast = Forecast(10**9, score_tokens=0, score_tokens_per_second=1.0, run_seconds=0.0)
    some, more = (
        forecast.stage(Stage("heal", (Step("distill", {"tokens": tokens}),)), timed=False) for tokens in (1000, 2000)
    )
    assert more - some == pytest.approx(1000 * (TRAIN_SECONDS + CONTROL_SECONDS))
