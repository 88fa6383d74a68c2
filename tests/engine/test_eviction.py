"""What a deployment gives up: the formula against torch, the same bits however it is run, room for what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from snello.engine.engine import Engine, EngineOptions
from snello.engine.eviction import as_kept, forgotten, sentence
from snello.engine.native import NativeExecutor
from snello.engine.pages import PagePool, PageTable, Retention, pages_for
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Attention, Deployment
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.engine.test_engine import collect, model_of, said

KEEP = {"keep_first": 5, "keep_last": 40}
LONG = np.random.default_rng(3).integers(20, 300, 500).astype(np.int32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of("qwen3", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def lean(original: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Quantize(cache="int8").apply(original, Context(output=tmp_path_factory.mktemp("eviction") / "lean"))


def kept_by(model: Model) -> list[tuple[int | None, int]]:
    spec = as_kept(model.spec, Deployment(keep_first=5, keep_last=40))
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    return [(mixer.window, mixer.sinks) for mixer in mixers]


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_layers_that_see_farther_see_less(original: Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert set(kept_by(original)) == {(40, 5)}
    mixed = model_of("gemma3", tmp_path_factory.getbasetemp())  # windows of 33 in every second layer
    assert kept_by(mixed) == [(33, 0), (40, 5)]
    assert as_kept(original.spec, Deployment()) == original.spec
    assert [forgotten(Deployment(**KEEP), length) for length in (3, 45, 46, 500)] == [0, 0, 1, 455]  # type: ignore[arg-type]
    assert "first 5 and the newest 40 tokens" in sentence(Deployment(keep_first=5, keep_last=40))


@pytest.mark.parametrize(
    ("deployment", "variant", "message"),
    [
        (Deployment(keep_first=5), "qwen3", "keep_first=5 goes with keep_last"),
        (Deployment(keep_last=40), "mistral-window", "no layer of this model sees more"),
        (Deployment(keep_last=40), "bert-mlm", "an encoder sees whole texts"),
    ],
)
def test_refusals(deployment: Deployment, variant: str, message: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = model_of(variant, tmp_path_factory.getbasetemp())
    with pytest.raises(SnelloError, match=message) as caught:
        NativeExecutor(model, deployment)
    assert caught.value.hint


# ---- what it computes -----------------------------------------------------------------------------------------------


def test_it_is_the_formula(original: Model) -> None:
    deployment = Deployment(threads=1, **KEEP)  # type: ignore[arg-type]
    reference = Reference.from_weights(as_kept(original.spec, deployment), original.weights)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(LONG[None].astype(np.int64)))[0].numpy()
        whole = Reference.from_model(original)(torch.from_numpy(LONG[None].astype(np.int64)))[0].numpy()
    with NativeExecutor(original, deployment) as executor:
        got = executor.logits(LONG)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert np.abs(got - whole).max() > 0.05 * np.abs(whole).max()  # and something was forgotten
    np.testing.assert_allclose(got[:40], whole[:40], rtol=0, atol=2e-4 * np.abs(whole).max())


def test_the_same_bits_however_it_is_cut(lean: Model) -> None:
    with NativeExecutor(lean, Deployment(threads=1, **KEEP)) as executor:  # type: ignore[arg-type]
        expected = executor.logits(LONG)
    try:
        for chunk, threads, isa in ((1, 1, None), (33, 2, None), (256, 2, "scalar"), (64, 1, "avx2")):
            deployment = Deployment(chunk_rows=chunk, threads=threads, isa=isa, **KEEP)
            with NativeExecutor(lean, deployment) as executor:
                assert executor.logits(LONG).tobytes() == expected.tobytes(), (chunk, threads, isa)
                assert executor.score(LONG).top1.tolist() == expected[:-1].argmax(axis=1).tolist()
                with executor.session() as session:
                    session.feed(LONG[:301])
                    assert session.feed(LONG[301:302]).tobytes() == expected[301].tobytes()
                executor.pages.check()
                assert executor.pages.num_held == 0
    finally:
        core.select_isa(None)


def test_who_else_is_there_changes_nothing(lean: Model) -> None:
    """Together, with a cache that knows them, and alone: the same answers, each with few pages."""
    prompts = [LONG[:400].tolist(), [*LONG[:128].tolist(), *LONG[300:420].tolist()], LONG[7:60].tolist()]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    deployment = Deployment(threads=2, chunk_rows=64, **KEEP)  # type: ignore[arg-type]
    alone = []
    with NativeExecutor(lean, deployment) as executor:
        assert executor.pages.num_pages == Retention(window=40, sinks=5).peak(512, 64) < pages_for(512)
        for prompt in prompts:
            engine = Engine(executor, lean.tokenizer, EngineOptions(max_num_seqs=1))
            alone += [said(chunks) for chunks in collect(engine, [(prompt, params)])]
            engine.clear_cache()
    with NativeExecutor(lean, dataclasses.replace(deployment, streams=3)) as executor:
        engine = Engine(executor, lean.tokenizer, EngineOptions(max_num_seqs=3))
        for _ in range(2):  # the second time prompts are known, as far as they are still there
            assert [said(chunks) for chunks in collect(engine, [(prompt, params) for prompt in prompts])] == alone
        executor.pages.check()
        assert executor.pages.num_held == 0


def test_sessions_in_one_batch_give_pages_back(lean: Model) -> None:
    deployment = Deployment(threads=1, streams=2, chunk_rows=32, keep_first=130, keep_last=10)
    with NativeExecutor(lean, deployment) as executor, executor.session() as one, executor.session() as other:
        one.feed(LONG[:300])
        other.feed(LONG[:130])
        both = executor.step([one, other], [int(LONG[300]), int(LONG[130])])
        whole = executor.logits(LONG[:301])
        assert both[0].tobytes() == whole[300].tobytes() and both[1].tobytes() == whole[130].tobytes()
        assert executor.pages.num_held == 3 + 2  # of one: two pinned pages and the last; the beginning of the other


def test_a_table_keeps_what_is_pinned_and_what_is_new() -> None:
    pool = PagePool(8)
    table = PageTable(pool, Retention(window=100, sinks=1))
    table.grow(700)
    assert len(table.pages) == 6 and pool.num_held == 6
    table.leave(700)  # a row at 700 sees 0 and 601 to 700
    assert [page >= 0 for page in table.pages] == [True, False, False, False, True, True]
    assert table.entries(8) == [0, 0, 0, 0, 4, 5, 0, 0]
    table.leave(700)
    table.close()
    pool.check()
    assert pool.num_held == 0


def test_more_context_fits_where_less_is_kept(lean: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with NativeExecutor(lean) as executor:
        page_bytes = executor.page_bytes
    monkeypatch.setattr("snello.engine.resources.free_memory_bytes", lambda: 8 * page_bytes)
    with NativeExecutor(lean, Deployment(threads=1)) as executor:
        assert executor.context == 256  # a quarter of what is free
    kept = Deployment(threads=1, chunk_rows=64, keep_last=40)
    with NativeExecutor(lean, kept) as executor:
        assert executor.context == 512 and executor.pages.num_pages == 2


def test_a_file_says_nothing_of_it(lean: Model) -> None:
    """It is how a model runs here: neither the spec that is stored nor its packed copy know."""
    with NativeExecutor(lean, Deployment(keep_last=40)) as executor:
        assert executor.model.spec == lean.spec != executor.spec
        assert executor.weights is lean.weights or executor.weights.path == Path(lean.files[0])
