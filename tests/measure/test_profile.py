"""A profile holds every operation once, with the bytes and operations that the spec says, and times that add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.measure.profile import PRODUCTS, Profile, profile_answer, profile_prompt
from snello.measure.sizes import attention_operations, cache_bytes, linear_operations
from snello.models import load
from snello.models.sizes import packed_bytes
from snello.models.spec import Deployment, answers_alone, linear_names, linear_shape
from tests.checkpoints import make_checkpoint
from tests.optimize import fakes

LINEARS = ("q, k, v", "o", "up, gate", "down", "head")
CHUNK = 16


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeExecutor]:
    model = load(make_checkpoint(tmp_path_factory.mktemp("profile") / "llama", "llama"))
    with NativeExecutor(model, Deployment(threads=1, chunk_rows=CHUNK, streams=3)) as opened:
        yield opened


def linears(profile: Profile, quantity: str) -> float:
    return sum(getattr(part, quantity) for part in profile.parts if part.name in LINEARS)


def test_a_prompt_reads_the_weights_once_a_chunk(executor: NativeExecutor) -> None:
    """But for those that its last row alone needs."""
    prompt = 2 * CHUNK + 5
    found = profile_prompt(executor, fakes.MACHINE, prompt, repeats=2)
    spec, parts = executor.spec, {part.name: part for part in found.parts}
    assert sum(part.count for part in found.parts) == len(executor.lowered.ops)
    names = linear_names(spec)
    alone = {name for name in names if answers_alone(spec, name)}
    assert alone == {"head", "layers.2.attention.o", *(f"layers.2.ffn.{part}" for part in ("gate", "up", "down"))}
    read = {name: packed_bytes(spec.format(name), *linear_shape(spec, name)) for name in names}
    assert linears(found, "bytes") == sum(size * (1 if name in alone else 3) for name, size in read.items())
    wanted = {name: 2 * rows * columns for name in names for rows, columns in [linear_shape(spec, name)]}
    assert 1 <= parts["head"].operations / wanted["head"] < 1.1  # the head's rows fill whole panels
    rows = {name: 1 if name in alone else prompt for name in names}
    computed = linears(found, "operations") - parts["head"].operations
    assert computed == sum(rows[name] * wanted[name] for name in names if name != "head")
    assert sum(linear_operations(spec).values()) == sum(wanted.values())
    every = sum(attention_operations(spec, seen) for seen in range(1, prompt + 1))
    last = attention_operations(spec, prompt)
    assert parts["attention"].operations == pytest.approx((2 * every + last) / 3, rel=1e-3)


def test_streams_share_the_weights_and_not_the_cache(executor: NativeExecutor) -> None:
    one, three = (profile_answer(executor, fakes.MACHINE, 20, streams, repeats=4) for streams in (1, 3))
    assert linears(one, "bytes") == linears(three, "bytes") == executor.bytes_per_token()
    for found, streams in ((one, 1), (three, 3)):
        attention = next(part for part in found.parts if part.name == "attention")
        assert attention.bytes == pytest.approx(streams * cache_bytes(executor.spec, 24), rel=1e-3)
        assert linears(found, "operations") == pytest.approx(streams * linears(one, "operations"))


def test_a_mixture_counts_the_experts_that_rows_go_to(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "mixtral", "mixtral"))
    with NativeExecutor(model, Deployment(threads=1, streams=4)) as opened:
        one, four = (profile_answer(opened, fakes.MACHINE, 8, streams, repeats=2) for streams in (1, 4))
        per_token = opened.bytes_per_token()
    products = ("q, k, v", "o", "router", "experts: up, gate", "experts: down", "head")
    assert sum(part.bytes for part in one.parts if part.name in products) == pytest.approx(per_token, rel=1e-3)
    few, more = ({part.name: part for part in found.parts} for found in (one, four))
    experts, active, width = 5, 2, 72
    read = (1 - (1 - active / experts) ** 4) / (active / experts)
    assert more["experts: down"].bytes == pytest.approx(read * few["experts: down"].bytes, rel=1e-3)
    assert more["experts: down"].operations == 4 * few["experts: down"].operations
    assert few["activate"].bytes == len(model.spec.layers) * active * 3 * width * 4


def test_routers_alone_read_bf16_models_rows_as_they_are(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "mixtral", "mixtral", dtype=torch.bfloat16))
    with NativeExecutor(model, Deployment(threads=1)) as opened:
        lowered = opened.lowered
    products = [(part, op) for part, op in zip(lowered.parts, lowered.ops, strict=True) if op.kind in PRODUCTS]
    kinds = {part: lowered.registers[op.inputs[0]].rows for part, op in products}
    assert kinds.pop("router") == "fp32" and set(kinds.values()) == {"bf16"} and len(kinds) == 5


def test_times_add_up(executor: NativeExecutor) -> None:
    found = profile_answer(executor, fakes.MACHINE, 20, 2, repeats=9)
    assert 0 < found.seconds < 3 * found.step_seconds
    assert all(part.seconds >= 0 for part in found.parts)
    assert [part.seconds for part in found.parts] == sorted((part.seconds for part in found.parts), reverse=True)
    document = found.to_json()
    assert document["parts_seconds"] == found.seconds and len(document["parts"]) == len(found.parts)


def test_the_least_is_the_slower_of_both(executor: NativeExecutor) -> None:
    slow = dataclasses.replace(fakes.MACHINE, compute=dict.fromkeys(fakes.MACHINE.compute, 1.0))
    found = profile_answer(executor, slow, 20, 1, repeats=2)
    for part in found.parts:
        if part.name in LINEARS:
            assert part.least_seconds == pytest.approx(part.operations)  # at one operation a second


def test_sequences_are_given_back(executor: NativeExecutor, tmp_path: Path) -> None:
    free = executor.pages.num_free
    profile_prompt(executor, fakes.MACHINE, 20, repeats=1)
    profile_answer(executor, fakes.MACHINE, 20, 3, repeats=1)
    assert executor.pages.num_free == free
