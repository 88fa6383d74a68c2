"""Controls: a stage that trains is judged against the original trained alike, and its gain pays for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from snello.optimize import receipts
from snello.optimize.recipe import Recipe
from snello.report.blocks import Table
from snello.report.sections import page
from tests.optimize.conftest import Bed

PRUNE = {"use": "prune", "ffn": 0.34, "stage": "prune and heal"}
HEAL = {"use": "distill", "tokens": 5_000, "stage": "prune and heal"}
INT8 = {"use": "quantize", "weights": "int8"}


def run(bed: Bed, *steps: dict[str, Any], **effects: tuple[float, float]) -> Any:
    bed.bench.prunes = True
    bed.bench.effects |= {name.replace("_", " "): effect for name, effect in effects.items()}
    return bed.run(recipe=Recipe.from_table({"steps": list(steps)}), max_loss="6%")


def stage_receipt(bed: Bed, stage: str) -> receipts.StepReceipt:
    found = receipts.read(bed.output).steps
    return next(step for step in found if step.stage == stage)


def test_the_loss_is_against_the_better_one(bed: Bed) -> None:
    """Healed to 1% over the original, but the same training takes 2% off the original itself."""
    effects = {"prune": (0.3, 0.6), "distill_forward": (-0.29, 1.0), "distill_text": (-0.02, 1.0)}
    result = run(bed, PRUNE, HEAL, **effects)
    assert bed.verdicts(result)["prune and heal"] == "kept"
    evidence = stage_receipt(bed, "prune and heal").evidence
    assert evidence is not None and evidence.against == "original trained alike (distill)"
    assert evidence.over_original is not None
    assert evidence.over_original.mid == pytest.approx(0.01, abs=0.008)
    assert evidence.loss.mid - evidence.over_original.mid == pytest.approx(0.02, abs=0.003)
    assert [one.loss.mid for one in evidence.controls] == [pytest.approx(-0.02, abs=0.003)]
    assert result.loss.mid == pytest.approx(0.03, abs=0.009)  # the proof too
    assert bed.bench.applied == ["prune ffn 0.34", "distill forward", "distill text"]
    section = next(part for part in page(receipts.read(bed.output)).sections if part.key == "controls")
    rows = [row for block in section.blocks if isinstance(block, Table) for row in block.rows]
    told = [row for row in rows if "original trained alike (distill)" in row[0]]
    assert len(told) == 2 and all("taken against: original trained alike" in row[2] for row in told)  # select, proof


def test_what_the_text_alone_gives_is_no_success(bed: Bed) -> None:
    """No worse than the original, yet far from the original trained alike: dropped."""
    effects = {"prune": (0.3, 0.6), "distill_forward": (-0.3, 1.0), "distill_text": (-0.08, 1.0)}
    assert bed.verdicts(run(bed, PRUNE, HEAL, **effects))["prune and heal"] == "dropped"


def test_a_control_that_learns_nothing_leaves_the_original_as_the_measure(bed: Bed) -> None:
    effects = {"prune": (0.3, 0.6), "distill_forward": (-0.29, 1.0), "distill_text": (0.02, 1.0)}
    run(bed, PRUNE, HEAL, **effects)
    evidence = stage_receipt(bed, "prune and heal").evidence
    assert evidence is not None and evidence.against == "original" and evidence.loss == evidence.over_original


def test_a_gain_is_no_budget_for_the_next_step(bed: Bed) -> None:
    """The student reads better than anybody; INT8 then brings it back to where the original is, which is a loss."""
    effects = {
        "prune": (0.3, 0.6),
        "distill_forward": (-0.40, 1.0),
        "distill_text": (-0.01, 1.0),
        "int8": (0.1005, 0.5),
    }
    result = run(bed, PRUNE, HEAL, INT8, **effects)
    assert bed.verdicts(result) | {"prune and heal": "kept", "quantize int8": "dropped"} == bed.verdicts(result)
    evidence = stage_receipt(bed, "quantize int8")
    assert evidence.row.loss is not None and evidence.row.loss.mid > 0.05


def test_stages_that_do_not_train_have_no_control(bed: Bed) -> None:
    run(bed, INT8)
    evidence = stage_receipt(bed, "quantize int8").evidence
    assert evidence is not None and evidence.controls == () and evidence.over_original is None
    assert evidence.against == "original" and bed.bench.applied == ["int8 rtn"]
