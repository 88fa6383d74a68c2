"""The search on fake models: which chains are tried, why others are not, when it stops, what each part was worth."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.measure.speed import Workload
from snello.models.spec import Spec
from snello.optimize import ablate, receipts
from snello.optimize.ablate import near_singles, parts_of
from snello.optimize.candidate import Candidate
from snello.optimize.climb import Climb
from snello.optimize.events import Planned, StageJudged
from snello.optimize.journal import Journal, Unit
from snello.optimize.planner import Goals, Overhead, hopeless
from snello.optimize.proposals import PHASES, Subject, prune_offers, quantize_offers, stage_of
from snello.optimize.recipe import Recipe, Step
from snello.optimize.target import Target
from snello.report.write import write_report
from snello.techniques.base import Trains
from snello.techniques.prune import Prune
from snello.techniques.quantize import Quantize
from tests.optimize import fakes
from tests.optimize.conftest import Bed

PRUNED = {"prune ffn 0.1667": (0.002, 0.9), "prune ffn 0.5": (0.15, 0.7), "prune layers 0.5": (0.2, 0.5)}
CHAIN = "ffn 1/6 + int4, gptq"


@pytest.fixture
def pruning(bed: Bed) -> Bed:
    bed.bench.prunes = True
    bed.bench.effects |= PRUNED
    return bed


def test_a_chain_beats_every_single_step(pruning: Bed, make_bed: Callable[[str], Bed]) -> None:
    result = pruning.run()
    rows = {row.name: row for row in result.ladder}
    assert result.exit_code == 0, result.sentence
    assert rows["prune ffn 1/6"].verdict == rows["quantize int8"].verdict == rows[CHAIN].verdict == "kept"
    assert (rows["prune ffn 1/2"].verdict, rows["prune ffn 1/2"].reason) == ("dropped", "over 4%")
    assert rows[CHAIN].replaces == "quantize int4, gptq"
    assert "ffn 1/6 + int4, awq" not in rows  # the same formats as gptq's, which lost less alone
    singles = [row for row in result.ladder if row.kind == "stage" and row.speedup is not None and "+" not in row.name]
    assert result.speedup is not None
    alone = [row for row in singles if row.name.startswith(("prune", "quantize")) and row.verdict != "dropped"]
    assert len(alone) > 2 and all(row.speedup is not None and row.speedup.mid < result.speedup.mid for row in alone)
    steps = Recipe.load(pruning.output / "recipe.toml").stages[-1].steps
    assert [step.use for step in steps] == ["prune", "quantize"]
    found = receipts.read(pruning.output)
    chain = next(step for step in found.steps if step.step == CHAIN)
    assert [step["use"] for step in chain.chain] == ["prune", "quantize"] and chain.applied_to == "original"
    front = {point.name for point in found.proof.pareto if point.on_front} if found.proof else set()
    assert "int8 kv cache" in front and "quantize int4, rtn" not in front
    assert pruning.bench.applied.count("prune ffn 0.1667") == 1  # chains go on from it
    again = make_bed("again").bench
    again.prunes, again.effects = True, pruning.bench.effects
    replayed = pruning.run(recipe=pruning.output / "recipe.toml", output=pruning.output / "../again/lean", text=None)
    assert replayed.artifact_sha256 == result.artifact_sha256


def test_each_part_of_the_chain_is_left_out_once(pruning: Bed) -> None:
    pruning.run()
    proof = receipts.read(pruning.output).proof
    assert proof is not None
    found = {item.without: item for item in proof.ablation}
    assert list(found) == ["prune ffn 0.1667", "quantize int4 gptq", "int8 kv cache"]
    gains = {name: item.gain.mid for name, item in found.items() if item.gain is not None}
    assert gains == pytest.approx(dict(zip(found, (1 / 0.9, 1 / 0.33, 1 / 0.9), strict=True)), rel=0.02)
    shares = [item.speed_share for item in proof.ablation]
    assert sum(share or 0.0 for share in shares) == pytest.approx(1.0, abs=0.03)  # they only multiply here
    prune = found["prune ffn 0.1667"]
    assert prune.speedup.mid == pytest.approx(1 / (0.33 * 0.9), rel=0.02) and prune.added is not None
    page = write_report(pruning.output).with_suffix(".md").read_text(encoding="utf-8")
    assert "prune ffn 0.1667" in page and "of the speed-up" in page


def test_the_chain_is_timed_beside_a_single_step_that_came_near(pruning: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = "quantize int4, gptq"

    def near(climb: Climb) -> list[Candidate]:
        assert near_singles(climb) == []  # by their own intervals all are clearly beaten
        for one in climb.judged:
            if one.name in (rival, CHAIN):  # only the first of them is a single step
                one.speedup = Interval(0.1, one.speedup.mid, 99.0)
        return near_singles(climb)

    monkeypatch.setattr(ablate, "near_singles", near)
    pruning.run()
    proof = receipts.read(pruning.output).proof
    assert proof is not None
    found = {duel.single: duel for duel in proof.duels}
    assert list(found) == [rival] and found[rival].steady
    assert found[rival].gain.mid == pytest.approx(1 / (0.9 * 0.9), rel=0.02)
    page = write_report(pruning.output).with_suffix(".md").read_text(encoding="utf-8")
    assert "the final chain over it" in page


def test_what_lost_too_much_alone_is_left_out_of_chains(pruning: Bed) -> None:
    pruning.bench.effects |= {"prune ffn 0.1667": (0.028, 0.9), "int4 gptq": (0.03, 0.33), "int4 awq": (0.031, 0.33)}
    result = pruning.run(max_loss="5%")
    rows = {row.name: row for row in result.ladder}
    assert rows["prune ffn 1/6"].verdict == "kept" and rows["quantize int4, gptq"].verdict == "kept"
    assert rows[CHAIN].verdict == "not run" and rows[CHAIN].reason.startswith("its steps alone lose 2.")
    assert rows["ffn 1/6 + int8"].reason.startswith("cannot pay: ")


def test_more_of_what_lost_too_much_is_not_run(pruning: Bed) -> None:
    pruning.bench.effects["prune ffn 0.1667"] = (0.2, 0.9)
    result = pruning.run()
    rows = {row.name: row for row in result.ladder}
    assert rows["prune ffn 1/6"].verdict == "dropped"
    assert (rows["prune ffn 1/2"].verdict, rows["prune ffn 1/2"].reason[:16]) == ("not run", "less of it lost ")
    assert not [name for name in rows if "+" in name]  # nothing of it is left for a chain


def test_the_search_trains_nothing(pruning: Bed) -> None:
    """What lost too much is not healed: that takes much text and long, and is for recipes."""
    pruning.bench.effects["prune ffn 0.1667"] = (0.1, 0.9)
    result = pruning.run()
    rows = {row.name: row for row in result.ladder}
    assert rows["prune ffn 1/6"].reason == "over 4%" and result.path is not None
    offered = [offer.step.technique for phase in PHASES for offer in phase(Subject(fakes.spec(), "memory"))]
    assert not [technique for technique in offered if isinstance(technique, Trains)]
    assert not [name for name in pruning.bench.applied if name.startswith("distill")]


@pytest.mark.parametrize("after", [40, 96])  # within the search, within the ablation
def test_killed_while_it_searches_it_ends_the_same(
    make_bed: Callable[[str], Bed], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class Killed(BaseException):
        pass

    def made(name: str) -> Bed:
        bed = make_bed(name)
        bed.bench.prunes, bed.bench.effects = True, {**bed.bench.effects, **PRUNED}
        return bed

    bed, kept, real = made("killed"), [], Journal.keep

    def keep(self: Journal, key: str, unit: Unit) -> None:
        assert key not in kept, "done again"
        real(self, key, unit)
        kept.append(key)
        if len(kept) == after:
            raise Killed

    monkeypatch.setattr(Journal, "keep", keep)
    with pytest.raises(Killed):
        bed.run()
    result = bed.run()
    monkeypatch.undo()
    fakes.install()
    clean = made("clean").run()
    assert result.artifact_sha256 == clean.artifact_sha256 is not None
    told = [[(row.name, row.verdict, row.loss) for row in one.ladder] for one in (result, clean)]
    assert told[0] == told[1]


def test_pruning_leaves_quantization_its_time(pruning: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from snello.optimize import planner

    monkeypatch.setattr(planner.Forecast, "stage", lambda *_, **__: 600.0)
    monkeypatch.setattr(planner.Forecast, "learn", lambda *_, **__: None)
    rows = {row.name: row for row in pruning.run(time_budget=2500.0).ladder}
    assert rows["prune ffn 1/6"].reason.startswith("needs about 10 min")
    assert rows["quantize int4, gptq"].verdict == "kept"


def test_the_plan_names_chains_without_promising_them(pruning: Bed) -> None:
    pruning.run(dry_run=True)
    plan = next(event for event in pruning.events if isinstance(event, Planned))
    chains = plan.stages[-1]
    assert chains.name == "chains" and not chains.runs and chains.predicted_seconds == 0
    assert chains.predicted_speedup > max(stage.predicted_speedup for stage in plan.stages[:-1])


# ---- the target ----


def test_a_target_ends_the_search_as_soon_as_it_is_reached(bed: Bed) -> None:
    result = bed.run(target="1.5x")
    assert result.exit_code == 0 and result.path is not None
    rows = {row.name: row for row in result.ladder}
    assert rows["quantize int8"].verdict == "kept"
    assert rows["quantize int4, gptq"].reason == "the target of 1.5x is reached"
    assert bed.bench.applied == ["int8 rtn"] and "unseen tokens" in result.sentence
    assert receipts.read(bed.output).run.target == 1.5


def test_a_size_is_a_target(bed: Bed) -> None:
    result = bed.run(target="600MB")
    assert result.exit_code == 0 and result.path is not None and bed.bench.applied == ["int8 rtn"]
    found = receipts.read(bed.output).run
    assert (found.goal, found.target, found.target_bytes) == ("memory", None, 600_000_000)
    assert Recipe.load(bed.output / "recipe.toml").target == Target(6e8, "bytes")


def test_a_size_that_is_missed_says_by_how_much(bed: Bed) -> None:
    result = bed.run(target="100MB")
    assert result.exit_code == 3 and result.path is None
    assert result.sentence == "target of 100MB missed: int8 kv cache serves in 297.0 MB"
    assert not (bed.output / "model.safetensors").exists() and (bed.output / "receipts").is_dir()


def test_an_original_that_is_small_enough_is_kept(bed: Bed) -> None:
    result = bed.run(target="2GB")
    assert result.exit_code == 0 and result.path is None and not bed.bench.applied
    assert result.sentence == "keep your model: it serves in 1,000.0 MB, within 2GB"


def test_a_target_that_nothing_comes_near_names_the_nearest(bed: Bed) -> None:
    bed.bench.effects = dict.fromkeys(bed.bench.effects, (0.0005, 1.09))
    result = bed.run(target="3x")
    assert result.exit_code == 3 and result.sentence.startswith("target of 3x missed: int8 kv cache came to 1.0")


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_a_size_needs_the_goal_memory(bed: Bed, goal: str) -> None:
    with pytest.raises(SnelloError, match="is a size, and the goal is") as error:
        bed.run(target="300MB", goal=goal)
    assert error.value.hint is not None and "--goal memory" in error.value.hint


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2x"),
        ("2x", "2x"),
        ("1.5", "1.5x"),
        ("300MB", "300MB"),
        ("1.5 GB", "1.5GB"),
        ("512mib", "536.870912MB"),
        ("123.456789012GB", "123.456789012GB"),
    ],
)
def test_targets_are_read_and_written(value: Any, text: str) -> None:
    target = Target.parse(value)
    assert str(target) == text and Target.parse(target.to_toml()) == target == Target.parse(target)


@pytest.mark.parametrize("value", ["", "x", "0.5x", 0.5, True, "1000", "0MB", "-3MB", "3TB", None, [2], "nan", "inf"])
def test_impossible_targets(value: Any) -> None:
    with pytest.raises(SnelloError) as error:
        Target.parse(value)
    assert error.value.hint


# ---- predictions ----


def planned(*steps: Any) -> Spec:
    spec = fakes.spec()
    for step in steps:
        spec = step.plan(spec)
    return spec


def test_overhead_of_like_formats_corrects_a_prediction() -> None:
    goals = Goals("latency", fakes.MACHINE, Workload.fitting(fakes.spec()))
    overhead, int8, int4 = Overhead(goals), planned(Quantize(weights="int8")), planned(Quantize())
    assert overhead.predicted(int8) == goals.predicted(int8)
    overhead.learn(fakes.spec(), 1.5 * goals.predicted(fakes.spec()))
    assert overhead.predicted(int8) == pytest.approx(1.5 * goals.predicted(int8))
    overhead.learn(int8, 2.5 * goals.predicted(int8))
    small = planned(Prune(ffn=0.5), Quantize(weights="int8"))
    assert overhead.predicted(small) == pytest.approx(2.5 * goals.predicted(small))
    assert overhead.predicted(int4) == pytest.approx(1.5 * goals.predicted(int4))  # rather too good than too bad


def test_memory_has_a_constant_beside_its_weights() -> None:
    goals = Goals("memory", fakes.MACHINE, Workload.fitting(fakes.spec()))
    overhead, int8 = Overhead(goals), planned(Quantize(weights="int8"))
    overhead.learn(fakes.spec(), goals.predicted(fakes.spec()) + 1e8)
    assert overhead.predicted(int8) == pytest.approx(goals.predicted(int8) + 1e8)


def test_losses_add_up_to_a_forecast_only_where_all_are_known() -> None:
    steps = [Step("prune", {"ffn": 0.25}), Step("quantize")]
    lost: dict[str, float | None] = {"prune": 0.006, "quantize": 0.008}
    why = "its steps alone lose 0.6% + 0.8%, together 1.4%, over 1%"
    assert hopeless(steps, lambda step: lost[step.use], 0.01) == why
    assert hopeless(steps, lambda step: lost[step.use], 0.02) == ""
    assert hopeless(steps[:1], lambda step: 0.5, 0.01) == ""  # alone it is a measurement's to say
    lost["quantize"] = None
    assert hopeless(steps, lambda step: lost[step.use], 0.001) == ""


@pytest.mark.parametrize("goal", ["latency", "throughput", "memory"])
@pytest.mark.parametrize("layers", [1, 2, 6, 30])
def test_every_prune_offer_removes_something_else(goal: str, layers: int) -> None:
    spec = fakes.spec(layers)
    offers = [offer for offer in prune_offers(Subject(spec, goal)) if not (layers == 1 and "layers" in offer.label)]
    shapes = [offer.step.technique.plan(spec).digest for offer in offers]
    assert len(set(shapes)) == len(shapes) > 1 and spec.digest not in shapes
    assert any("heads" in offer.label for offer in offers) == (goal != "latency")
    assert all(not offer.milder or offer.milder in [other.label for other in offers] for offer in offers)


def test_chains_are_named_by_their_steps() -> None:
    subject = Subject(fakes.spec(), "latency")
    prune, int8 = prune_offers(subject)[0], quantize_offers(subject)[0]
    first = stage_of((), "", prune)
    second = stage_of(first.steps, first.name, int8)
    assert (first.name, second.name) == ("prune ffn 1/6", "ffn 1/6 + int8")
    assert stage_of(second.steps, second.name, int8).name == "ffn 1/6 + int8 + int8"


def test_parts_of_a_chain() -> None:
    prune, both = Step("prune", {"ffn": 0.25}), Step("quantize", {"weights": "int4", "cache": "int8"})
    names = [name for name, _ in parts_of((prune, both), fakes.spec())]
    assert names == ["prune ffn 0.25", "quantize int4", "int8 kv cache"]
    rests = dict(parts_of((prune, both), fakes.spec()))
    assert rests["int8 kv cache"] == (prune, Step("quantize", {"weights": "int4"}))
    assert rests["quantize int4"] == (prune, Step("quantize", {"weights": "bf16", "cache": "int8"}))
    heal = Step("distill", {"tokens": 1000})
    healed = dict(parts_of((prune, heal, both), fakes.spec()))
    beginning, second = list(healed)[:2]
    assert beginning.startswith("prune ffn 0.25, distill") and healed[beginning] == (both,)  # nothing is left to heal
    assert second.startswith("distill") and healed[second] == (prune, both)
    assert parts_of((prune, heal), fakes.spec()) == []  # one part: healing is the pruning's
    assert parts_of((prune,), fakes.spec()) == [] == parts_of((), fakes.spec())


def test_a_reached_target_needs_the_lower_bound() -> None:
    assert Target(2.0).reached(Interval(2.0, 2.1, 2.2), None)
    assert not Target(2.0).reached(Interval(1.99, 2.1, 2.2), None)
    assert Target(1e6, "bytes").reached(Interval.exact(1.0), 10**6)
    assert not Target(1e6, "bytes").reached(Interval.exact(9.0), 10**6 + 1)
    assert not Target(1e6, "bytes").reached(Interval.exact(9.0), None)
    assert math.isfinite(Target(2.0).value)


def test_rows_of_the_search_come_in_order(pruning: Bed) -> None:
    result = pruning.run(max_loss="2%", target="1.05x")
    rows = [event.row for event in pruning.events if isinstance(event, StageJudged)]
    assert tuple(rows) == result.ladder and [row.index for row in rows] == list(range(1, len(rows) + 1))


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(pruning: Bed, path: Path, tmp_path: Path) -> None:
    """On a model that each of them suits: something is kept, and the chain is the recipe's own steps."""
    effects = pruning.bench.effects
    effects["prune ffn 0.125"] = effects["prune ffn 0.1667"]
    effects |= {"prune ffn 0.34": (0.1, 0.8), "distill forward,text": (-0.09, 1.0), "distill text": (0.01, 1.0)}
    pruning.bench.base = fakes.spec(feed_forward=512)
    if path.stem == "encoder":
        pruning.bench.base = fakes.encoder_spec("embedding")
        words = np.random.default_rng(0).integers(0, 3000, (600, 8))
        pruning.text.write_text("\n".join(" ".join(f"word{n}" for n in row) for row in words))
    recipe = Recipe.load(path)
    result = pruning.run(recipe=path, max_loss="4%")
    assert result.exit_code == 0 and result.path is not None, result.sentence
    asked = [step.resolved() for stage in recipe.stages for step in stage.steps]
    assert all(step in asked for step in (step.resolved() for step in kept_steps(pruning)))
    if path.stem == "small-and-fast":
        assert [step.use for step in kept_steps(pruning)] == ["prune", "quantize"]


def kept_steps(bed: Bed) -> tuple[Step, ...]:
    return Recipe.load(bed.output / "recipe.toml").stages[-1].steps


def test_the_benchmark_says_which_single_steps_were_not_beaten(pruning: Bed) -> None:
    from benchmarks.planner_vs_single import summary

    pruning.run()
    found = summary(receipts.read(pruning.output))
    assert found["not_beaten"] == [] and len(found["planner"]["parts"]) == 3
    assert found["rows"][CHAIN]["parts"] == 2 and found["rows"]["int8 kv cache"]["parts"] == 3
    assert min(low for low, _, _ in found["planner"]["over_the_chain_without"].values()) > 1.05
    assert found["rows"]["prune ffn 1/2"]["verdict"] == "dropped"
    shutil.rmtree(pruning.output)
    pruning.bench.effects = {name: (0.001, 0.33) if name == "int4 gptq" else (0.3, 0.3) for name in fakes.EFFECTS}
    found = summary_of_one_step(pruning)
    assert found["not_beaten"] == ["quantize int4, gptq"]  # the planner's own: nothing was put on top of it


def summary_of_one_step(bed: Bed) -> dict[str, Any]:
    """Where the cache does not pay, a chain of one is all there is."""
    from benchmarks.planner_vs_single import summary

    real = bed.bench.effect
    bed.bench.effect = lambda options: (0.3, 1.0) if options.get("cache") else real(options)  # type: ignore[method-assign]
    bed.run()
    return summary(receipts.read(bed.output))
