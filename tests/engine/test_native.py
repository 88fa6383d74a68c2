"""The native executor: equal to the torch reference in value, and to itself in every bit, however work is cut."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import snello
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import DEPLOYMENT_LIMITS, Deployment, answers_alone, linear_names
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import DECODERS, VARIANTS, make_checkpoint

TOKENS = np.random.default_rng(0).integers(1, 300, 300).astype(np.int32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def checkpoint(tmp_path_factory: pytest.TempPathFactory, variant: str, dtype: torch.dtype = torch.float32) -> Model:
    path = tmp_path_factory.getbasetemp() / f"{variant}-{str(dtype).removeprefix('torch.')}"
    return load(path if path.exists() else make_checkpoint(path, variant, dtype=dtype))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bert-classify"])
def test_equals_the_reference(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, variant)
    tokens = TOKENS[: min(len(TOKENS), model.spec.max_positions)]
    with torch.no_grad():
        expected = Reference.from_model(model)(torch.tensor(tokens[None].astype(np.int64)))[0].numpy()
    with NativeExecutor(model) as executor:
        got = executor.logits(tokens) if model.spec.causal else executor.encode(tokens)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_classifier_equals_the_reference(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, "bert-classify")
    with torch.no_grad():
        expected = Reference.from_model(model)(torch.tensor(TOKENS[None, :50].astype(np.int64)))[0].numpy()
    with NativeExecutor(model) as executor:
        np.testing.assert_allclose(executor.encode(TOKENS[:50]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", DECODERS)
def test_same_bits_however_it_is_cut(
    variant: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = checkpoint(tmp_path_factory, variant, dtype)
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        expected = executor.logits(TOKENS)
    for chunk, threads in ((1, 1), (7, 2), (128, 1), (130, 2), (512, 3)):
        with NativeExecutor(model, Deployment(threads=threads, chunk_rows=chunk)) as executor:
            assert executor.logits(TOKENS).tobytes() == expected.tobytes(), (chunk, threads)


@pytest.mark.parametrize("variant", DECODERS)
def test_rows_that_are_asked_for_alone_have_the_same_bits(
    variant: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last layer's end is computed of them only: of its products, of experts, and what they attend to."""
    model = checkpoint(tmp_path_factory, variant)
    rng = np.random.default_rng(1)
    with NativeExecutor(model, Deployment(threads=2)) as executor:
        every = executor.logits(TOKENS)
        for rows in ([len(TOKENS) - 1], [0], [130, 131, 299], np.sort(rng.choice(len(TOKENS), 140, replace=False))):
            assert executor.logits(TOKENS, rows).tobytes() == every[rows].tobytes()
        lowered = executor.lowered
    begin = [op.kind for op in lowered.ops].index(core.OpKind.GATHER)
    products = [op for op in lowered.ops[begin:] if op.kind in (core.OpKind.LINEAR, core.OpKind.EXPERTS)]
    alone = [name for name in linear_names(model.spec) if answers_alone(model.spec, name)]
    assert len(products) == len({re.sub(r"experts\.\d+", "experts", name) for name in alone})


@pytest.mark.parametrize("variant", ["gpt-neox", "gemma2", "opt"])
def test_same_bits_however_a_lean_one_is_cut(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, folder = checkpoint(tmp_path_factory, variant), tmp_path_factory.mktemp("lean")
    model = Quantize(cache="int8").apply(source, Context(output=folder / variant))
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        expected = executor.logits(TOKENS)
    for chunk, threads, isa in ((1, 1, None), (7, 2, "scalar"), (130, 3, "avx2")):
        if isa not in (None, *core.available_isas()):
            continue
        with NativeExecutor(model, Deployment(threads=threads, chunk_rows=chunk, isa=isa)) as executor:
            assert executor.logits(TOKENS).tobytes() == expected.tobytes(), (chunk, threads, isa)
    core.select_isa(None)


@pytest.mark.parametrize("variant", ["qwen3", "gpt-neox", "gemma2"])
def test_same_bits_on_every_instruction_set(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, variant, torch.bfloat16)
    results = {}
    for isa in (*core.available_isas(), "bf16-emulated"):
        with NativeExecutor(model, Deployment(isa=isa)) as executor:
            results[isa] = executor.logits(TOKENS[:150]).tobytes()
    core.select_isa(None)
    assert len(set(results.values())) == 1, sorted(results)
    assert "scalar" in results


def test_one_row_has_two_ways_where_there_are_tiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, "llama", torch.bfloat16)
    for isa in ("scalar", "amx-emulated"):
        with NativeExecutor(model, Deployment(isa=isa, threads=1)) as executor, executor.session() as session:
            for token in TOKENS[:32]:
                assert executor.program.one_row() is None
                session.feed(np.array([token]))
            tried = executor.program.one_row()
    core.select_isa(None)
    assert tried, "the last of them has tiles"
    assert tried.on_tiles == (tried.tiles_seconds <= tried.vectors_seconds)
    assert min(tried.tiles_seconds, tried.vectors_seconds) > 0


@pytest.mark.parametrize("variant", ["mistral-window", "opt", "gemma3"])
def test_sessions_alone_and_together(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, variant)
    lengths = (5, 127, 128, 140)
    with NativeExecutor(model, Deployment(streams=4, context=256)) as executor:
        sessions = [executor.session() for _ in lengths]
        for session, length in zip(sessions, lengths, strict=True):
            session.feed(TOKENS[:length])
        for step in range(3):
            logits = executor.step(sessions, [int(TOKENS[length + step]) for length in lengths])
        for session in sessions:
            session.close()
        for row, length in zip(logits, lengths, strict=True):
            assert row.tobytes() == executor.logits(TOKENS[: length + 3], [length + 2])[0].tobytes()
        assert executor.pages.num_free == executor.pages.num_pages


def test_score_is_the_log_softmax_of_the_logits(tmp_path_factory: pytest.TempPathFactory) -> None:
    with NativeExecutor(checkpoint(tmp_path_factory, "llama"), Deployment(chunk_rows=64)) as executor:
        logits = executor.logits(TOKENS).astype(np.float64)
        scores = executor.score(TOKENS)
    normal = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = normal[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    np.testing.assert_allclose(scores.log_probabilities, expected, atol=2e-6)
    np.testing.assert_array_equal(scores.top1, logits[:-1].argmax(axis=1))


def test_what_a_user_can_get_wrong(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, "llama")
    with NativeExecutor(model, Deployment(context=130)) as executor:
        with pytest.raises(SnelloError, match="140 tokens and the context here is 130"):
            executor.score(TOKENS[:140])
        with pytest.raises(SnelloError, match="outside the vocabulary"):
            executor.logits([1, 307])
        with pytest.raises(SnelloError, match="no tokens"):
            executor.score([])
    with pytest.raises(SnelloError, match=r"context 1,000 asked for.*made for 512"):
        NativeExecutor(model, Deployment(context=1000))
    with pytest.raises(SnelloError, match="threads"):
        NativeExecutor(model, Deployment(threads=0))


def test_a_closed_executor_can_be_closed_again(tmp_path: Path) -> None:
    executor = NativeExecutor(load(make_checkpoint(tmp_path / "m", "llama")))
    executor.close()
    executor.close()


def test_a_closed_executor_says_so(tmp_path: Path) -> None:
    executor = NativeExecutor(load(make_checkpoint(tmp_path / "m", "llama")))
    session = executor.session()
    executor.close()
    calls = (lambda: executor.score([1, 2, 3]), lambda: session.feed([1]), lambda: executor.page(0))
    for call in calls:
        with pytest.raises(SnelloError, match="closed"):
            call()


# ---- what a deployment may ask for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEPLOYMENT_LIMITS)
def test_a_deployment_names_the_number_that_is_out_of_its_limits(name: str) -> None:
    least, most, hint = DEPLOYMENT_LIMITS[name]
    for value in (least - 1, most + 1, 2**40, 2.5, True, "3"):
        with pytest.raises(
            SnelloError, match=re.escape(f"{name}={value!r} is not a whole number from {least} to")
        ) as e:
            Deployment(**{name: value})  # type: ignore[arg-type]
        assert e.value.hint == hint
    for fine in (least, most, np.int64(most)):
        Deployment(**{name: fine})  # type: ignore[arg-type]


def test_an_llm_hears_of_it_before_a_model_is_read() -> None:
    for name in ("threads", "context", "max_num_seqs", "keep_last", "keep_first"):
        with pytest.raises(SnelloError, match=f"{name}=-1 is not a whole number"):
            snello.LLM("/nowhere/at/all", **{name: -1})


def test_the_core_takes_what_the_limits_allow() -> None:
    core.Pool(DEPLOYMENT_LIMITS["threads"][1]).close()
    source = Path(__file__).parents[2] / "csrc" / "program_check.cpp"
    assert "kMaxRows = 1 << 16" in source.read_text() and DEPLOYMENT_LIMITS["streams"][1] == 1 << 16


def test_streams_that_memory_cannot_hold_are_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snello.engine.resources.free_memory_bytes", lambda: 10_000_000)
    with pytest.raises(SnelloError, match="streams=9000 needs .* GB for keys and values, more than is free") as caught:
        NativeExecutor(checkpoint(tmp_path_factory, "llama"), Deployment(streams=9000))
    assert re.search("at most [0-9,]+ fit", caught.value.hint or "")


def test_an_encoder_of_more_positions_than_a_step_has_rows_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = checkpoint(tmp_path_factory, "bert-mlm")
    long = dataclasses.replace(model, spec=dataclasses.replace(model.spec, max_positions=65_537))
    with pytest.raises(Unsupported, match="reads 65,537 positions at once, and the core 65,536"):
        NativeExecutor(long)
