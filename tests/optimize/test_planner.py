"""What the fixed list tries, and what a recipe's step should take."""

from __future__ import annotations

from pathlib import Path

import pytest

from snello.optimize.planner import CONTROL_SECONDS, TRAIN_SECONDS, Forecast
from snello.optimize.proposals import Subject, quantize_offers
from snello.optimize.recipe import Recipe, Stage, Step
from snello.techniques.quantize import Quantize
from tests.optimize.fakes import spec


def test_methods_that_only_cost_time_are_left_to_recipes() -> None:
    tried = {str(offer.step.options.get("method", "rtn")) for offer in quantize_offers(Subject(spec(), "latency"))}
    assert tried == {"rtn", "gptq", "awq"}


def test_integers_that_others_chose_are_looked_for_on_their_own_grid() -> None:
    plain, own = (quantize_offers(Subject(spec(), "latency", grid)) for grid in (0, 64))
    (added,) = (offer for offer in own if offer not in plain)
    assert added.step.technique == Quantize(weights="int4", group_size=64, rotate=False, equalize=False)
    assert own.index(added) == [offer.label for offer in own].index("int4, rtn") - 1


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


def test_what_trains_and_what_does_not_correct_each_their_own() -> None:
    """A quantizer that takes eight times as long as foreseen must not make a training eight times as long."""
    forecast = Forecast(10**9, score_tokens=0, score_tokens_per_second=1.0, run_seconds=0.0)
    heal = Stage("heal", (Step("prune", {"ffn": 0.5}), Step("distill", {"tokens": 1000})))
    lean = Stage("int4", (Step("quantize", {"weights": "int4"}),))
    foreseen = forecast.stage(heal, timed=False)
    prune = forecast.stage(Stage("prune", heal.steps[:1]), timed=False)
    training = foreseen - prune
    forecast.learn(lean, before := forecast.stage(lean, timed=False), 8 * before)
    assert forecast.stage(lean, timed=False) == pytest.approx(8 * before)
    assert forecast.stage(heal, timed=False) == pytest.approx(8 * prune + training)
    forecast.learn(heal, forecast.stage(heal, timed=False), 8 * prune + 2 * training)
    assert forecast.stage(lean, timed=False) == pytest.approx(8 * before)
    assert forecast.stage(heal, timed=False) == pytest.approx(8 * prune + 2 * training)
    assert forecast.stage(heal, timed=False, made=2) == pytest.approx(8 * 2.0)
