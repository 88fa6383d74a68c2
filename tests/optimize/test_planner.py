"""What the fixed list tries, and what a recipe's step should take."""

from __future__ import annotations

from pathlib import Path

from snello.optimize.planner import Forecast, default_stages
from snello.optimize.recipe import Recipe, Stage, Step
from snello.techniques.quantize import Quantize
from tests.optimize.fakes import spec


def test_methods_that_only_cost_time_are_left_to_recipes() -> None:
    tried = {str(step.options.get("method", "rtn")) for stage in default_stages(spec()) for step in stage.steps}
    assert tried == {"rtn", "gptq", "awq"}


def test_integers_that_others_chose_are_looked_for_on_their_own_grid() -> None:
    plain, own = default_stages(spec()), default_stages(spec(), 64)
    assert len(own) == len(plain) + 1
    added = next(stage for stage in own if stage not in plain)
    wanted = Quantize(weights="int4", group_size=64, rotate=False, equalize=False)
    assert (
        added.steps[0].technique == wanted and own.index(added) == [s.name for s in own].index("quantize int4, rtn") - 1
    )


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
    seconds = [forecast.stage(Stage(m, (Step("quantize", {"method": m}),)), timed=False) for m in methods]
    assert seconds == sorted(seconds) and len(set(seconds)) == len(methods)
