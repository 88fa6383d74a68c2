"""On-policy distillation: the student's own words, scored by the teacher, and the same bytes after any interruption."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.llm import LLM
from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.reference import Reference
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.distill.lesson import Lesson
from snello.techniques.distill.rollouts import OnPolicyRows, beginning
from snello.techniques.prune import Prune
from snello.training import checkpoint
from snello.training.data import Rows, hash_seed
from snello.training.options import TrainOptions
from tests.checkpoints import make_checkpoint
from tests.techniques.test_distill import divergence, windows

SMALL: dict[str, Any] = {"tokens": 600, "batch_tokens": 64, "rate": 1e-3, "on_policy": 0.5}


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snello.techniques.distill.apply.REFRESH", 3)


@pytest.fixture
def source(tmp_path: Path) -> Model:
    return load(make_checkpoint(tmp_path / "source", "llama"))


@pytest.fixture
def narrow(source: Model, tmp_path: Path) -> Model:
    options: dict[str, Any] = {"ffn": 0.5, "width": 0.25, "heads": 0.5}
    return Prune(**options).apply(source, Context(output=tmp_path / "narrow", windows=windows()))


def on_policy(student: Model, folder: Path, **options: Any) -> OnPolicyRows:
    rows = Rows(windows(), 4, seed=3)
    module = Reference.from_model(student)
    return OnPolicyRows(rows, module, student, student.spec, folder=folder, **{"share": 0.5, "refresh": 3} | options)


def test_the_student_goes_on_with_a_share_of_the_rows(narrow: Model, tmp_path: Path) -> None:
    batches, plain = on_policy(narrow, tmp_path / "work", share=0.3), Rows(windows(), 4, seed=3)
    own = 0
    for step in range(9):
        batch, text = batches.at(step), plain.at(step)
        changed = (batch["tokens"] != text["tokens"][:, : batch["tokens"].shape[1]]).any(1)
        slots = batches.own_slots(step)
        own += len(slots)
        assert not changed[len(slots) :].any(), "the others are the text's"
        assert changed[: len(slots)].all()
        begin = beginning(32)
        assert (batch["tokens"][:, :begin] == text["tokens"][:, :begin]).all()
        assert (batch["text"][: len(slots)].sum(1) == begin).all() and batch["text"][len(slots) :].bool().all()
    assert own == int(0.3 * 36)
    assert not (tmp_path / "work" / "rollouts.0.npy").exists(), "periods that no checkpoint needs are gone"


def test_what_it_says_is_what_the_engine_says(narrow: Model, tmp_path: Path) -> None:
    batches = on_policy(narrow, tmp_path / "work", share=1.0)
    batch, rows = batches.at(0), batches.rows
    with LLM(narrow, context=32) as llm:
        for slot, place in enumerate(rows.places(0)):
            begin = rows.rows[place][: beginning(32)].tolist()
            names = {"temperature": 1.0, "seed": hash_seed(3, 0, slot), "max_tokens": 24}
            said = llm.answer(begin, llm.params(None, names)).outputs[0].token_ids
            assert batch["tokens"][slot, : 8 + len(said)].tolist() == [*begin, *said]


def test_own_words_are_no_text_to_learn(narrow: Model, source: Model, tmp_path: Path) -> None:
    batch = on_policy(narrow, tmp_path / "work", share=1.0).at(0)
    options = Distill(loss="forward:1,text:1")
    student, teacher = Reference.from_model(narrow), Reference.from_model(source)
    both, alone = (Lesson.of(o, narrow.spec, teacher)(student, batch) for o in (options, Distill(loss="forward")))
    short = {"tokens": batch["tokens"][:, : beginning(32)]}
    text = Lesson.of(Distill(loss="text"), narrow.spec, None)(student, short)
    torch.testing.assert_close(both - alone, text, rtol=1e-4, atol=1e-4)


def test_the_student_comes_nearer_to_the_teacher(source: Model, narrow: Model, tmp_path: Path) -> None:
    technique = Distill(**SMALL | {"tokens": 1500, "loss": "reverse"})
    context = Context(output=tmp_path / "out", windows=windows(), original=source)
    made = technique.apply(narrow, context)
    assert divergence(made, source) < 0.8 * divergence(narrow, source)
    assert made.history[-1]["options"]["on_policy"] == 0.5


def test_same_bytes_after_any_interruption(source: Model, narrow: Model, tmp_path: Path, monkeypatch: Any) -> None:
    whole = Context(output=tmp_path / "whole", windows=windows(), original=source)
    wanted = Distill(**SMALL).apply(narrow, whole)
    text = Distill(**SMALL | {"on_policy": 0.0}).apply(narrow, dataclasses.replace(whole, output=tmp_path / "text"))
    assert wanted.digest != text.digest
    monkeypatch.setattr("snello.training.loop.TELL_SECONDS", 0.0)
    for number in range(1, 8):  # in the middle of a period, at its end, at its beginning
        told = 0

        def stop(message: str, fraction: float, number: int = number) -> None:
            nonlocal told
            told += "train: step" in message
            if told == number:
                raise KeyboardInterrupt

        context = dataclasses.replace(whole, output=tmp_path / f"cut{number}", progress=stop)
        with pytest.raises(KeyboardInterrupt):
            Distill(**SMALL).apply(narrow, context)
        again = dataclasses.replace(context, progress=lambda message, fraction: None)
        assert Distill(**SMALL).apply(narrow, again).digest == wanted.digest, number
        assert not (tmp_path / f".cut{number}.training").exists()


@pytest.mark.parametrize("last", [0, 2, 3, 4])
def test_killed_long_after_its_last_checkpoint_it_goes_on(
    last: int, source: Model, narrow: Model, tmp_path: Path, monkeypatch: Any
) -> None:
    """Steps may be quick: between two checkpoints lie many periods, whose answers were said with weights now gone."""
    whole = Context(output=tmp_path / "whole", windows=windows(), original=source)
    wanted = Distill(**SMALL).apply(narrow, whole)
    monkeypatch.setattr("snello.training.loop.TELL_SECONDS", 0.0)
    save, saved = checkpoint.save, set[int]()

    def once(folder: Path, state: checkpoint.State, *rest: Any) -> None:
        if state.step == last:
            save(folder, state, *rest)
            saved.add(last)

    def stop(message: str, fraction: float) -> None:
        if message.startswith("train: step 9,"):
            raise KeyboardInterrupt

    monkeypatch.setattr("snello.techniques.distill.apply.TrainOptions", partial(TrainOptions, save_seconds=0.0))
    monkeypatch.setattr("snello.training.checkpoint.save", once)
    context = dataclasses.replace(whole, output=tmp_path / "cut", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        Distill(**SMALL).apply(narrow, context)
    assert saved == ({last} if last else set())
    monkeypatch.setattr("snello.training.checkpoint.save", save)
    again = dataclasses.replace(context, progress=lambda message, fraction: None)
    assert Distill(**SMALL).apply(narrow, again).digest == wanted.digest


def test_answers_that_are_gone_are_one_line(narrow: Model, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="rollouts.1.npy") as caught:
        on_policy(narrow, tmp_path / "work").at(4)
    assert "rm -r" in str(caught.value.hint)


def test_what_cannot_be_is_refused_before_time_is_spent(tmp_path: Path) -> None:
    for share in (-0.1, 1.5, True, "half", float("nan")):
        with pytest.raises(SnelloError, match="not a share"):
            Distill(on_policy=share)  # type: ignore[arg-type]
    with pytest.raises(SnelloError, match="nobody scores"):
        Distill(on_policy=0.5, loss="text")
    encoder = load(make_checkpoint(tmp_path / "bert", "bert-mlm"))
    with pytest.raises(Unsupported, match="writes nothing"):
        Distill(on_policy=0.5).plan(encoder.spec)


def test_its_control_has_no_student_to_listen_to(source: Model) -> None:
    control = Distill(on_policy=0.5).control(source.spec)
    assert control is not None and control.on_policy == 0.0


def test_rows_of_one_token_stay_text(narrow: Model, tmp_path: Path) -> None:
    rows = Rows([np.array([5], np.int32), np.arange(1, 20, dtype=np.int32)], 2)
    module = Reference.from_model(narrow)
    batches = OnPolicyRows(rows, module, narrow, narrow.spec, share=1.0, refresh=1, folder=tmp_path / "work")
    batch = batches.at(0)
    assert sorted(batch["mask"].sum(1).tolist())[0] == 1
