"""A draft model: in step with what was said, wrong without harm, and refused if it speaks otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.engine.draft_model import DraftModel
from snello.engine.engine import Engine
from snello.engine.llm import LLM
from snello.engine.native import NativeExecutor
from snello.engine.prefix import PAGE
from snello.engine.request import SamplingParams
from snello.engine.sequence import Step
from snello.errors import SnelloError
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native.core import NotFinite
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import DECODER, VARIANTS, make_checkpoint
from tests.engine.test_engine import AllThatIsGuessed, collect, model_of, requests, said

CONTEXT = 512


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of("llama", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def lean(target: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Quantize(weights="int8").apply(target, Context(output=tmp_path_factory.mktemp("lean") / "int8"))


def engine_with(executor: NativeExecutor, model: Model, draft: Model) -> tuple[Engine, DraftModel]:
    """Guesses whatever it costs."""
    drafter = DraftModel(draft, executor, max_num_seqs=8)
    engine = Engine(executor, model.tokenizer, drafter=drafter)
    engine.governor = AllThatIsGuessed()
    return engine, drafter


def test_a_good_draft_saves_steps_and_keeps_every_token(target: Model, lean: Model) -> None:
    wanted = requests(target.spec.vocab_size)
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=9)) as executor:
        plain = Engine(executor, target.tokenizer)
        expected = [said(chunks) for chunks in collect(plain, wanted)]
        plain.clear_cache()
        engine, drafter = engine_with(executor, target, lean)
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert engine.counters.steps < 0.6 * plain.counters.steps
        assert engine.governor.accepted > 0.5 * engine.governor.proposed, "sampled ones too: the noise is the same"
        pages = drafter.executor.pages
        pages.check()
        assert pages.num_held == 0
        drafter.close()


def test_drafts_draw_with_the_noise_of_the_answer(target: Model) -> None:
    """The model guesses for itself: at any temperature, whatever the penalties, every guess is right."""
    names: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    wanted = [
        ([30, 31, 32, 33, 34], SamplingParams(seed=seed, max_tokens=80, ignore_eos=True, **names)) for seed in (1, 2)
    ]
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=2)) as executor:
        engine, drafter = engine_with(executor, target, target)
        collect(engine, wanted)
        assert engine.governor.proposed == engine.governor.accepted > 80
        drafter.close()


def test_a_draft_that_is_always_wrong_changes_nothing(target: Model, tmp_path: Path) -> None:
    other = load(make_checkpoint(tmp_path / "other", "qwen3", seed=9))
    wanted = requests(target.spec.vocab_size)
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=9)) as executor:
        expected = [said(chunks) for chunks in collect(Engine(executor, target.tokenizer), wanted)]
        engine, drafter = engine_with(executor, target, other)
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert engine.governor.proposed > 500 and engine.governor.accepted < 0.2 * engine.governor.proposed
        drafter.close()


def test_a_shorter_context_reads_the_newest_tokens_again(target: Model, tmp_path: Path) -> None:
    """The draft was made for 128 positions, the answer goes to 400: it goes on with the newest 64."""
    short = Quantize(weights="int8").apply(_short(target, 128), Context(output=tmp_path / "short"))
    assert short.spec.max_positions == 128
    wanted = [(list(range(20, 120)), SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))]
    with NativeExecutor(target, Deployment(context=CONTEXT)) as executor:
        plain = Engine(executor, target.tokenizer)
        expected = [said(chunks) for chunks in collect(plain, wanted)]
        engine, drafter = engine_with(executor, target, short)
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert drafter.executor.context == 128
        assert engine.counters.steps < plain.counters.steps
        assert engine.governor.proposed > 10 * 250, "to the end, though with less to go by"
        drafter.close()


def _short(model: Model, positions: int) -> Model:
    return replace(model, spec=replace(model.spec, max_positions=positions))


def test_a_full_draft_cache_stops_drafts_alone(target: Model, lean: Model) -> None:
    wanted = requests(target.spec.vocab_size)
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=9)) as executor:
        expected = [said(chunks) for chunks in collect(Engine(executor, target.tokenizer), wanted)]
        engine, drafter = engine_with(executor, target, lean)
        pages = drafter.executor.pages
        taken = [pages.allocate() for _ in range(pages.num_free - 3)]
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert engine.governor.accepted > 0
        pages.free(taken)
        assert pages.num_held == 0
        drafter.close()


def test_a_draft_row_that_is_not_finite_makes_no_guess(
    target: Model, lean: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [([30 + each, 40, 50], SamplingParams(seed=each, max_tokens=40, ignore_eos=True)) for each in range(3)]
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=3)) as executor:
        expected = [said(chunks) for chunks in collect(Engine(executor, target.tokenizer), wanted)]
        engine, drafter = engine_with(executor, target, lean)
        run = drafter.executor.run
        failed = []

        def refuse(step: Step) -> np.ndarray:
            row = 0
            for piece in step.pieces:
                if piece.sequence.id == 2:
                    failed.append(row)
                    raise NotFinite(row)
                row += len(piece.tokens)
            return run(step)

        monkeypatch.setattr(drafter.executor, "run", refuse)
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert failed and engine.governor.accepted > 0
        drafter.close()


def test_what_the_draft_has_read_is_known_to_the_next(target: Model, lean: Model) -> None:
    prompt = list(np.random.default_rng(0).integers(20, 300, 300))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=2)) as executor:
        engine, drafter = engine_with(executor, target, lean)
        run, rows = drafter.executor.run, []

        def count(step: Step) -> np.ndarray:
            rows.append(step.num_rows)
            return run(step)

        drafter.executor.run = count  # type: ignore[method-assign]
        for salt in ("", "", "other"):
            rows.append(0)
            list(engine.stream(prompt, params, salt=salt))
        read = [sum(part) for part in _parts(rows)]
        assert read[0] > 300 and read[2] > 300, "and not to another salt"
        assert read[1] < read[0] - 2 * PAGE + 16
        drafter.close()


def _parts(rows: Sequence[int]) -> list[list[int]]:
    parts: list[list[int]] = []
    for each in rows:
        if each == 0:
            parts.append([])
        else:
            parts[-1].append(each)
    return parts


def test_cancelling_frees_the_draft_too(target: Model, lean: Model) -> None:
    with NativeExecutor(target, Deployment(context=CONTEXT, streams=2)) as executor:
        engine, drafter = engine_with(executor, target, lean)
        number = engine.add([30, 31, 32], SamplingParams(seed=1, max_tokens=200, ignore_eos=True))
        for _ in range(10):
            engine.step()
        assert drafter.executor.pages.num_held > 0
        engine.cancel(number)
        assert drafter.executor.pages.num_held == 0 and not drafter._shadows
        drafter.close()


# ---- in the product -------------------------------------------------------------------------------------------------


def test_a_folder_drafts_and_says_what_it_holds(target: Model, lean: Model) -> None:
    with LLM(target, context=256, speculate=str(lean.path)) as llm:
        assert llm.drafter is not None
        before = llm.drafter.memory_bytes
        assert before >= lean.weights.total_bytes
        llm.engine.governor = AllThatIsGuessed()
        answer = llm.generate("abc", max_tokens=40, seed=1, ignore_eos=True, n=2)
        assert llm.engine.governor.accepted > 0
    with LLM(target, context=256) as llm:
        assert llm.generate("abc", max_tokens=40, seed=1, ignore_eos=True, n=2).outputs == answer.outputs


def test_another_vocabulary_is_refused_before_anything_runs(
    target: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(NativeExecutor, "__init__", never)
    monkeypatch.setitem(VARIANTS, "larger", ("LlamaForCausalLM", DECODER | {"vocab_size": 320}))
    larger = make_checkpoint(tmp_path / "larger", "larger")
    with pytest.raises(SnelloError, match="320 tokens, the model 307") as caught:
        LLM(target, speculate=larger)
    assert "tokenizer" in (caught.value.hint or "")
    with pytest.raises(SnelloError, match=r"2 of their tokens differ, such as 'a'"):
        LLM(target, speculate=_with_two_tokens_swapped(tmp_path))
    with pytest.raises(SnelloError, match="is an encoder"):
        LLM(target, speculate=make_checkpoint(tmp_path / "encoder", "bert-mlm"))


def _with_two_tokens_swapped(folder: Path) -> Path:
    made = make_checkpoint(folder / "swapped", "llama")
    data = json.loads((made / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (made / "tokenizer.json").write_text(json.dumps(data))
    return made


def test_a_draft_that_is_not_there_is_named(target: Model, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    shutil.rmtree(gone)
    with pytest.raises(SnelloError, match="gone"):
        LLM(target, speculate=gone)
