"""Ceilings are the slower of bytes and operations, bandwidth is read at the size in question, the cache has an age."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from snello.measure import machine as machines
from snello.measure.machine import Machine, ceiling
from snello.measure.sizes import (
    bits_per_weight,
    cache_bytes,
    linear_bytes,
    linear_operations,
    packed_bytes,
    read_bytes,
    weights_bytes,
)
from snello.models import packed
from snello.models.shapes import spec_of_shape
from snello.models.spec import Format, Spec, linear_names, linear_shape, read_share
from snello.native import core
from snello.techniques.quantize import Quantize
from snello.techniques.skip import Skip
from tests.optimize import fakes
from tests.optimize.fakes import spec

MACHINE = dataclasses.replace(
    fakes.MACHINE,
    bandwidth=((2**20, 50e9), (2**25, 50e9), (2**30, 20e9)),
    compute={"fp32": 1e11, "bf16": 1e11, "int8": 1e12, "int4": 1e12},
)


def test_bandwidth_at_a_size() -> None:
    assert MACHINE.bandwidth_at(1) == 50e9
    assert MACHINE.bandwidth_at(2**40) == 20e9
    assert 20e9 < MACHINE.bandwidth_at(2**28) < 50e9


def test_decode_is_bound_by_bytes_and_prefill_by_operations() -> None:
    original = spec()
    found = ceiling(original, MACHINE)
    assert found.bytes_per_token == linear_bytes(original) + cache_bytes(original, 576)
    assert found.decode_tokens_per_second <= MACHINE.bandwidth_at(found.bytes_per_token) / found.bytes_per_token
    no_arithmetic = dataclasses.replace(MACHINE, compute={"fp32": 1e30})
    assert ceiling(original, no_arithmetic).prefill_tokens_per_second > found.prefill_tokens_per_second


def test_fewer_bits_raise_the_ceiling() -> None:
    original = spec()
    rates = [
        ceiling(one, MACHINE).decode_tokens_per_second
        for one in (original, Quantize(weights="int8").plan(original), Quantize(weights="int4").plan(original))
    ]
    assert rates == sorted(rates) and rates[2] > 1.5 * rates[0]


def test_an_int8_cache_is_fewer_bytes() -> None:
    original = spec()
    lean = Quantize(weights="int8", cache="int8").plan(original)
    assert 0.5 < cache_bytes(lean, 1000) / cache_bytes(original, 1000) < 0.65


def test_sizes_agree_with_the_packed_layout() -> None:
    grouped = [(name, group) for name in ("int4", "int3") for group in (128, 32)]
    for name, group in (("fp32", 0), ("bf16", 0), ("int8", 0), *grouped):
        for rows, columns in ((16, 64), (100, 192), (33, 320)):
            form = Format(weights=name, group_size=group)  # type: ignore[arg-type]
            assert packed_bytes(form, rows, columns) == core.packed_bytes(name, rows, columns, group), name
    for name, group in (("int8", 0), ("int4", 128), ("int4", 32)):
        for rows, columns in ((16, 64), (100, 192), (2100, 320)):
            form = Format(weights=name, group_size=group, activations="int8", skip=0.5)  # type: ignore[arg-type]
            stored = core.packed_bytes(name + core.CHANNELS, rows, columns, group)
            assert packed_bytes(form, rows, columns) == stored, name
            one, many = (read_bytes(form, rows, columns, streams) for streams in (1, 8))
            assert stored // 2 <= one < 0.6 * stored and 0.99 * stored < many < stored


def test_sizes_agree_with_the_packed_file() -> None:
    for one in (spec(), Quantize(weights="int4").plan(spec()), Skip().plan(Quantize(weights="int4").plan(spec()))):
        assert weights_bytes(one) == pytest.approx(
            packed.packed_bytes(one), rel=0.05
        )  # the file holds norms and input scales too


def test_a_token_reads_the_experts_that_it_goes_to() -> None:
    one = spec_of_shape("dart-v2-moe", "int4")
    router, expert = "layers.0.ffn.router", "layers.0.ffn.experts.0.gate"
    assert (read_share(one, router), read_share(one, expert), read_share(one, expert, 2)) == (1.0, 0.5, 0.75)
    held = sum(size for name, size in linear_sizes(one).items())
    experts = sum(size for name, size in linear_sizes(one).items() if ".experts." in name)
    assert linear_bytes(one) == held - experts // 2 and linear_bytes(one, 1000) == held
    assert weights_bytes(one) == pytest.approx(packed.packed_bytes(one), rel=0.05)
    dense = [2 * r * c for name in linear_names(one) if ".experts." not in name for r, c in [linear_shape(one, name)]]
    active = 4 * 2 * 3 * 2 * 3072 * 768
    assert sum(linear_operations(one).values()) == sum(dense) + active


def test_more_streams_read_more_experts() -> None:
    one, here = spec_of_shape("dart-v2-moe", "int4"), MACHINE
    few, many = ceiling(one, here, streams=1), ceiling(one, here, streams=8)
    assert many.bytes_per_token == few.bytes_per_token
    assert many.decode_tokens_per_second < 8 * few.decode_tokens_per_second
    measured = ceiling(one, here, streams=8, measured_bytes=linear_bytes(one))
    assert measured.decode_tokens_per_second == pytest.approx(many.decode_tokens_per_second)


def linear_sizes(one: Spec) -> dict[str, int]:
    return {name: packed_bytes(one.format(name), *linear_shape(one, name)) for name in linear_names(one)}


def test_bits_per_weight() -> None:
    original: Spec = spec()
    assert bits_per_weight(weights_bytes(original), original) == 16.0
    assert sum(linear_operations(original).values()) > 0


def test_a_machine_survives_a_file() -> None:
    assert Machine.from_json(MACHINE.to_json()) == MACHINE


def test_the_cache_is_used_until_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path))
    probes: list[int] = []

    def probe(threads: int, isa: str) -> Machine:
        probes.append(threads)
        return dataclasses.replace(MACHINE, measured_at=time.time())

    monkeypatch.setattr(machines, "probe", probe)
    first = machines.machine(threads=2)
    assert machines.machine(threads=2) == first and probes == [2]
    machines.machine(threads=1)
    machines.machine(threads=2, refresh=True)
    assert probes == [2, 1, 2]
    monkeypatch.setattr(machines, "MAX_AGE_SECONDS", -1.0)
    machines.machine(threads=2)
    assert probes == [2, 1, 2, 2]


def test_the_better_of_two_probes() -> None:
    busy = dataclasses.replace(MACHINE, bandwidth=((2**20, 9e9), (2**25, 60e9)), compute={"int8": 2e12})
    found = busy.better_of(MACHINE)
    assert found.bandwidth == ((2**20, 50e9), (2**25, 60e9))
    assert found.compute == {"fp32": 1e11, "bf16": 1e11, "int8": 2e12, "int4": 1e12}


def test_a_beaten_ceiling_is_probed_again_and_never_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path))
    fresh = dataclasses.replace(MACHINE, bandwidth=((2**20, 9e9), (2**30, 30e9)), measured_at=time.time())
    monkeypatch.setattr(machines, "probe", lambda threads, isa: fresh)
    monkeypatch.setattr(machines, "_path", lambda isa, threads: tmp_path / "machine.json")
    found = machines.probe_again(dataclasses.replace(MACHINE, compute={"int8": 2e12}))
    assert found.bandwidth == ((2**20, 50e9), (2**30, 30e9)) and found.compute["int8"] == 2e12
    assert machines.machine(threads=2) == found


def test_this_machine_can_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "LADDER", (2**18, 2**20))
    found = machines.probe(1, "scalar")
    assert found.bandwidth_at(2**19) > 1e8
    assert found.peak("int8") > 1e8
    assert machines.cpu_name() and machines.memory_bytes() > 10**8


@pytest.mark.parametrize(
    "lines,name",
    [
        ("model name\t: Some CPU @ 2 GHz\nCPU part\t: 0xd0c", "Some CPU @ 2 GHz"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c", "ARM Neoverse N1"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xfff", "ARM 0x41, part 0xfff"),
        ("CPU implementer\t: 0xc0\nCPU part\t: 0xac3", "ARM 0xc0, part 0xac3"),
    ],
)
def test_processors_without_a_name_are_told_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, lines: str, name: str
) -> None:
    pairs = (line.split(":") for line in lines.splitlines())
    monkeypatch.setattr(machines, "_cpuinfo", lambda: {key.strip(): value.strip() for key, value in pairs})
    assert machines.cpu_name() == name
