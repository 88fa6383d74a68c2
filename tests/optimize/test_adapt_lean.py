"""A model that learned a task and was made lean: judged again by the executor that serves, against a lean base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.models import load
from snello.models.model import Model
from snello.models.reference import Reference
from snello.optimize import receipts
from snello.optimize.adapt import Adapted
from snello.optimize.adapt_data import Split, read_examples, split
from snello.optimize.adapt_judge import Verdict, by_runner, encode
from snello.optimize.adapt_lean import adapt_or_reuse, adapted_folder, check_text, make_base_lean, write_task
from snello.optimize.recipe import Recipe, Stage, Step
from snello.optimize.workbench import NativeWorkbench
from snello.report.sections import page
from snello.techniques.adapt import Adapt
from snello.techniques.adapt.train import score
from snello.techniques.base import Context, silent
from snello.techniques.quantize import Quantize
from tests.checkpoints import make_checkpoint
from tests.optimize.test_adapt import sentence, write
from tests.report import samples

INT8 = Step("quantize", {"weights": "int8"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"prompt": sentence(n), "completion": " zz zz"} for n in range(60)]
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", rows)


@pytest.fixture(scope="module")
def parts(data: Path) -> Split:
    return split(read_examples(data), 0)


def make(base: Model, data: Path, output: Path, **options: Any) -> Adapted:
    how: dict[str, Any] = {"seed": 0, "threads": 1, "overwrite": False, "progress": silent, **options}
    return adapt_or_reuse(base, data, how.pop("options", Adapt(epochs=4)), output, **how)


@pytest.fixture(scope="module")
def adapted(base: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make(base, data, tmp_path_factory.mktemp("made") / "lean")


def staged(folder: Path, model: Model) -> Path:
    """A folder as `optimize` puts it together: the lean model, its recipe and receipts."""
    Quantize(**INT8.options).apply(model, Context(output=folder))
    (folder / "recipe.toml").write_text(Recipe(stages=(Stage("int8", (INT8,)),)).to_toml())
    receipts.write(folder / "receipts", 0, "run", samples.run())
    return folder


def test_the_executor_scores_answers_as_the_reference(base: Model, parts: Split) -> None:
    answers = [answer for example in parts.held_out for answer in encode(base, example)]
    runner = NativeWorkbench(1).open(base, context=512)
    found, expected = by_runner(runner)(answers), score(Reference.from_model(base), answers)
    runner.close()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape and np.allclose(mine, theirs, atol=0.05)


def test_the_task_is_judged_against_the_base_made_lean_alike(
    base: Model, adapted: Adapted, parts: Split, tmp_path: Path
) -> None:
    folder = staged(tmp_path / "lean", load(adapted.path))
    found = write_task(folder, base, parts, adapted.verdict, tmp_path, seed=0, threads=1)
    assert found.lean.gain.low > 0 and found.lean_base not in (base.digest, load(folder).digest)
    assert found.full.gain == adapted.verdict.gain and found.index == 1
    back = receipts.read(folder)
    assert back.task == found
    section = next(part for part in page(back).sections if part.key == "task")
    assert f"{found.lean.before:.3f} -> {found.lean.after:.3f}" in str(section)


def test_a_lean_model_that_forgot_its_task_is_refused(base: Model, parts: Split, tmp_path: Path) -> None:
    folder = staged(tmp_path / "lean", base)  # the base itself: it learned nothing
    full = Verdict(measure="loss", before=1.0, after=0.5, gain=Interval(0.4, 0.5, 0.6), held_out=12)
    with pytest.raises(SnelloError, match="does not beat") as refused:
        write_task(folder, base, parts, full, tmp_path, seed=0, threads=1)
    assert refused.value.exit_code == 3 and receipts.read(folder).task is None


def test_examples_that_repeat_themselves_are_told_before_training(base: Model, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say it again, number {n}:", "completion": " the very same words as ever" * 9} for n in range(200)
    ]
    data = write(tmp_path / "same.jsonl", rows)
    with pytest.raises(SnelloError, match="cannot judge the lean model") as error:
        check_text(base, data, given=(), seed=0, recipe=Recipe(stages=()))
    assert error.value.hint is not None and "--text" in error.value.hint
    text = tmp_path / "text.txt"
    random = np.random.default_rng(0)
    words = [f"{random.integers(0, 999)} of {random.integers(0, 999)}\n\n" for _ in range(9000)]
    text.write_text("".join(words))
    check_text(base, data, given=(text,), seed=0, recipe=Recipe(stages=(Stage("int8", (INT8,)),)))


def test_a_base_of_few_bits_stays_as_it_is(base: Model, parts: Split, tmp_path: Path) -> None:
    few = Quantize(**INT8.options).apply(base, Context(output=tmp_path / "few"))
    assert make_base_lean(few, [INT8], parts, tmp_path, seed=0, threads=1) is few


def test_what_was_adapted_is_not_adapted_again(base: Model, data: Path, adapted: Adapted) -> None:
    output = adapted.path.with_name("lean")
    assert adapted_folder(output) == adapted.path
    again = make(base, data, output)
    assert again == dataclasses.replace(adapted, seconds=0.0)
    with pytest.raises(SnelloError, match="made otherwise"):
        make(base, data, output, options=Adapt(epochs=4, rank=2))


def test_other_examples_are_another_task(base: Model, data: Path, adapted: Adapted, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    other = write(tmp_path / "o.jsonl", [*rows[:-1], {**rows[-1], "completion": " yy"}])
    with pytest.raises(SnelloError, match="made otherwise"):
        make(base, other, adapted.path.with_name("lean"))
