"""A real model and real text, end to end: optimized, proved, replayed; and the statistics on its real losses.

Needs the shared data folder beside the checkout, torch, and minutes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from snello.measure import quality
from snello.measure.interval import Interval
from snello.measure.rulers import NextTokens
from snello.measure.text import Limits
from snello.optimize import receipts, texts
from snello.optimize.events import Event, Finished, Result
from snello.optimize.files import sha256_file
from snello.optimize.run import optimize
from snello.optimize.workbench import NativeWorkbench

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL, TEXT = DATA / "models" / "novels-16m", DATA / "text" / "english_novels_valid.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="the shared data folder is not there"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]

RECIPE = """
[data]
calib_tokens = 8192
select_tokens = 10000
proof_tokens = 20000

[[steps]]
stage = "int8"
use = "quantize"
weights = "int8"

[[steps]]
stage = "int4"
use = "quantize"
weights = "int4"
method = "gptq"
"""


def finished(events: list[Event]) -> Result:
    last = events[-1]
    assert isinstance(last, Finished)
    return last.result


def test_without_a_text_the_model_writes_enough_to_prove_one_percent(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[[steps]]\nuse = "quantize"\nweights = "int8"\n')
    recipe = tmp_path / "recipe.toml"
    result = finished(list(optimize("demo", recipe=recipe, goal="memory", output=tmp_path / "lean")))
    assert result.exit_code == 0 and result.path is not None, result.sentence
    assert "text that the model wrote itself" in result.sentence


def test_novels_end_to_end_and_replayed(tmp_path: Path) -> None:
    """By memory, which is judged without a clock: a busy machine changes no verdict."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    options = {"text": TEXT, "max_loss": "3%", "goal": "memory", "recipe": tmp_path / "recipe.toml"}
    result = finished(list(optimize(MODEL, output=tmp_path / "lean", **options)))  # type: ignore[arg-type]
    assert result.exit_code == 0, result.sentence
    found = receipts.read(tmp_path / "lean")
    assert found.proof is not None and found.proof.again == Interval.exact(0.0)
    assert found.steps[2].row.verdict == "caught"
    int8 = next(step for step in found.steps if step.stage == "int8")
    assert int8.evidence is not None and int8.evidence.loss.high < 0.01
    assert int8.evidence.guards.top1_agreement is not None and int8.evidence.guards.top1_agreement > 0.97
    assert int8.evidence.weights_only is not None and int8.evidence.executor_on_same_part is not None
    assert int8.row.verdict == "kept" and int8.speed is not None
    assert result.path is not None, result.sentence
    assert result.size_ratio is not None and result.size_ratio > 1.8
    assert found.proof.proved and found.proof.fault_caught and len(found.proof.worst) == 10
    assert found.proof.files["proof.json"] == sha256_file(tmp_path / "lean" / "proof.json")
    again = finished(list(optimize(MODEL, recipe=tmp_path / "lean" / "recipe.toml", output=tmp_path / "again")))
    assert again.artifact_sha256 == result.artifact_sha256
    assert sha256_file(tmp_path / "again" / "model.safetensors") == result.artifact_sha256


@pytest.fixture(scope="module")
def real_losses() -> tuple[list[np.ndarray], list[int]]:
    """The original's losses on 40,000 real tokens, by document."""
    bench = NativeWorkbench()
    model = bench.load(MODEL)
    limits = Limits(calib=1024, select=40_000, proof=1024)
    cut = texts.cut(texts.read_documents([TEXT], model), model, seed=0, limits=limits, self_written=False)
    runner = bench.open(model, context=1024)
    blocks = cut.blocks("select")
    reading = NextTokens().read(runner, blocks)
    runner.close()
    return list(reading.values), quality.clusters(blocks)


def test_a_fault_over_budget_is_kept_at_most_5_percent_of_the_time_on_real_losses(
    real_losses: tuple[list[np.ndarray], list[int]],
) -> None:
    """The text is the population: its true loss is 1.1 budgets; texts of 24 documents are redrawn from it."""
    from snello.measure.bootstrap import Clusters, mean_interval, relative

    values, names = real_losses
    budget = 0.01
    faulty = quality.disturb(values, float(np.log1p(1.1 * budget)), np.random.default_rng(0))
    every = Clusters.of([b - a for a, b in zip(values, faulty, strict=True)], names)
    assert relative(Interval.exact(every.mean)).mid == pytest.approx(1.1 * budget, rel=1e-6)
    generator = np.random.default_rng(1)
    kept = covered = 0
    for trial in range(200):
        chosen = generator.integers(0, len(every.sums), 24)
        found = mean_interval(Clusters(every.sums[chosen], every.counts[chosen]), seed=trial, draws=2000)
        kept += relative(found).high <= budget
        covered += found.high >= every.mean
    assert kept / 200 <= 0.05
    assert covered / 200 >= 0.90
