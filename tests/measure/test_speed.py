"""The workload fits the model, costs are what the clock says, `bench` prints exactly its document."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from snello.errors import Unsupported
from snello.measure.memory import resident_bytes
from snello.measure.speed import Clock, Workload, bench, cost, lasting, steadied
from tests.optimize import fakes


@pytest.fixture
def runner() -> Any:
    import time

    fakes.install()
    fakes.FakeTime.noise = 0.0
    yield fakes.FakeRunner(fakes.FakeModel(fakes.spec(), Path("x")))
    fakes.install(time)


def test_the_workload_fits_the_context() -> None:
    assert Workload.fitting(fakes.spec()) == Workload(prompt=192, generate=64)
    assert Workload.fitting(dataclasses.replace(fakes.spec(), max_positions=4096)) == Workload()
    assert "time to first token (512) + 127 x" in str(Workload())


def test_latency_is_first_token_and_the_rest(runner: Any) -> None:
    clock = Clock(runner, Workload(prompt=100, generate=50))
    assert clock.latency() == pytest.approx(0.0005 * 100 + 49 * 0.01 * 1.1)


def test_throughput_is_seconds_of_one_token_of_many_streams(runner: Any) -> None:
    clock = Clock(runner, Workload(prompt=100, generate=50, streams=16))
    assert cost(clock, "throughput") == pytest.approx(0.01 * 2.6 / 16)
    with pytest.raises(Unsupported):
        cost(clock, "memory")


def test_prompts_are_new_each_time_and_seeded(runner: Any) -> None:
    first, second = Clock(runner, Workload(), seed=1), Clock(runner, Workload(), seed=1)
    a, b = first.tokens(20), first.tokens(20)
    assert a.tolist() != b.tolist()
    assert a.tolist() == second.tokens(20).tolist()


def test_bench_document(runner: Any) -> None:
    machine = fakes.FakeWorkbench(root=runner.model.path).machine()
    found = bench(runner, machine, prompt=100, generate=10, repeats=3, resident_bytes=5)
    assert list(found) == [
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "ceiling",
        "bytes_per_token",
        "weights_bytes",
        "bits_per_weight",
        "resident_bytes",
        "first_token_seconds",
    ]
    assert found["decode_tokens_per_second"] == pytest.approx(dict.fromkeys(("median", "min", "max"), 1 / 0.011))
    assert found["first_token_seconds"] == pytest.approx(0.05)
    assert found["ceiling"]["decode_tokens_per_second"] > 0 and found["resident_bytes"] == 5


def test_resident_bytes() -> None:
    assert resident_bytes("VmHWM") >= resident_bytes() > 10**6


def test_a_hiccup_is_not_what_a_small_model_costs(runner: Any) -> None:
    """Short runs are repeated and their median counts; a run that lasts is done once."""
    costs = iter([0.010, 0.150, 0.011, *[0.0101] * 50])

    def run() -> float:
        seconds = next(costs)
        fakes.FakeTime.spend(seconds)
        return seconds

    assert steadied(run) == pytest.approx(0.0101) and next(costs) == 0.0101 and lasting(0.010) == 0.15
    slow = iter([0.3, 9.0])
    assert steadied(lambda: (fakes.FakeTime.spend(0.3), next(slow))[1]) == 0.3 and lasting(0.3) == 0.3
    assert lasting(0.1) == 0.25
