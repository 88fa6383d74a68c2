"""Operations on single rows: the bytes of the NumPy statement on every instruction set, for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.native.harness import (
    ACTIVATE,
    ADD,
    EMBED,
    F32,
    ISAS,
    NORM,
    ROPE,
    SCALE,
    TRANSFORM,
    Batch,
    Builder,
    isa,
    packed,
    plain,
    run_rows,
    unpacked,
)
from tests.oracle import hadamard
from tests.oracle_rows import exp, norm, rope, tanh

ROWS = 33


def values(width: int, seed: int = 0, spread: float = 3.0) -> F32:
    rng = np.random.default_rng([seed, width])
    return (rng.standard_normal((ROWS, width)) * spread).astype(np.float32)


def same_everywhere(make: Callable[[Builder], int], rows: int = ROWS) -> F32:
    """Outputs of a program, after comparing them across instruction sets and threads."""
    results = []
    for name in ISAS:
        for threads in (1, 2, 4):
            with isa(name):
                b = Builder()
                b.gather(make(b))
                results.append(run_rows(b.build(threads=threads), rows))
    for other in results[1:]:
        assert other.tobytes() == results[0].tobytes()
    return results[0]


@pytest.mark.parametrize("width", [8, 16, 40, 896])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("gain", [False, True])
def test_norm(width: int, centered: bool, gain: bool) -> None:
    x, g, bias = values(width), values(width, 1)[0], values(width, 2)[0]

    def make(b: Builder) -> int:
        tensors = [b.tensor(plain(g)), b.tensor(plain(bias))] if gain else []
        out = b.register(width)
        return b.op(NORM, [b.table(x)], out, tensors, [int(centered), 0], [1e-6, 1.0 if gain else 0.0])

    want = [norm(row, g if gain else None, bias if gain else None, 1e-6, float(gain), centered) for row in x]
    assert same_everywhere(make).tobytes() == np.stack(want).tobytes()


def test_norm_in_segments_and_in_place() -> None:
    x, g = values(4 * 24), values(24, 1)[0]

    def make(b: Builder) -> int:
        register = b.table(x)
        return b.op(NORM, [register], register, [b.tensor(plain(g))], [0, 24], [1e-5, 0.0])

    want = [np.concatenate([norm(s, g, None, 1e-5, 0.0, False) for s in row.reshape(4, 24)]) for row in x]
    assert same_everywhere(make).tobytes() == np.stack(want).tobytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 32), (8, 8), (128, 128), (24, 10)])
def test_rope(interleaved: bool, head_dim: int, rotary: int) -> None:
    x = values(3 * head_dim)
    angles = np.outer(np.arange(64), 10000.0 ** (-np.arange(rotary // 2) / (rotary // 2)))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def make(b: Builder) -> int:
        register, tables = b.table(x), [b.tensor(plain(cosines)), b.tensor(plain(sines))]
        return b.op(ROPE, [register], register, tables, [3, head_dim, rotary, int(interleaved)])

    want = [rope(row.reshape(3, -1), cosines[m], sines[m], interleaved).ravel() for m, row in enumerate(x)]
    assert same_everywhere(make).tobytes() == np.stack(want).tobytes()


def activation(kind: int, x: F32) -> F32:
    f = np.float32
    if kind == 0:
        return x * (f(1) / (f(1) + exp(np.clip(-x, f(-87), f(87)))))
    if kind == 1:
        raise NotImplementedError
    positive = np.maximum(x, f(0))
    return {3: positive, 4: positive * positive, 5: tanh(x)}[kind]


@pytest.mark.parametrize("kind", [0, 3, 4, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [24, 256])
def test_activations_exactly(kind: int, gated: bool, width: int) -> None:
    x, up = values(width), values(width, 1)
    x[0, :6] = [0.0, 88.0, -88.0, 200.0, -200.0, 1e-30]

    def make(b: Builder) -> int:
        gate = b.table(x)
        return b.op(ACTIVATE, [gate, b.table(up)] if gated else [gate], b.register(width), i=[kind])

    want = activation(kind, x)
    assert same_everywhere(make).tobytes() == (want * up if gated else want).tobytes()


@pytest.mark.parametrize("kind", range(6))
def test_activations_are_close(kind: int) -> None:
    x = np.linspace(-12, 12, ROWS * 64, dtype=np.float32).reshape(ROWS, 64)
    functions: list[Callable[[float], float]] = [
        lambda t: t / (1 + math.exp(-t)),
        lambda t: 0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
        lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))),
        lambda t: max(t, 0),
        lambda t: max(t, 0) ** 2,
        math.tanh,
    ]
    got = same_everywhere(lambda b: b.op(ACTIVATE, [b.table(x)], b.register(64), i=[kind]))
    want = np.vectorize(functions[kind], otypes=[np.float64])(x.astype(np.float64))
    assert np.abs(got - want).max() < 2e-6 * max(1.0, np.abs(want).max() / 10)


def test_nan_survives_activations() -> None:
    x = values(32)
    x[5, 7] = np.nan
    for kind in range(6):
        b = Builder()
        b.gather(b.op(ACTIVATE, [b.table(x)], b.register(32), i=[kind]))
        result, out = b.build().step(Batch([(range(ROWS), 0, ROWS, [])]))
        assert result == 1 + 5
        assert np.isnan(out).all()  # one sequence: all its rows are void


@pytest.mark.parametrize("factor", [1.0, 0.125, -1.7])
def test_add(factor: float) -> None:
    a, c = values(72), values(72, 1)
    got = same_everywhere(lambda b: b.op(ADD, [b.table(a), b.table(c)], b.register(72), f=[factor]))
    assert got.tobytes() == (a + c * np.float32(factor)).tobytes()


@pytest.mark.parametrize(("factor", "cap"), [(0.3, 0.0), (2.5, 30.0)])
def test_scale(factor: float, cap: float) -> None:
    x, f = values(50, spread=20.0), np.float32
    got = same_everywhere(lambda b: b.op(SCALE, [b.table(x)], b.register(50), f=[factor, cap]))
    want = x * f(factor)
    if cap:
        want = f(cap) * tanh(want / f(cap))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("width", [40, 128, 200])
def test_embedding_formats(kind: str, width: int) -> None:
    table = packed(kind, values(width), 64)
    want = unpacked(table)[:, :width] * np.float32(1.5)
    got = same_everywhere(lambda b: b.op(EMBED, [], b.register(width), [b.tensor(table)], f=[1.5]))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["f32", "int8", "int4"])
def test_embedding_undoes_the_transform_of_a_shared_head(kind: str, block: int) -> None:
    width = 256 if kind == "f32" else 230
    table, undo = packed(kind, values(width), 128), values(256, 3)[0]

    def make(b: Builder) -> int:
        tensors = [b.tensor(table), b.tensor(plain(undo))]
        return b.op(EMBED, [], b.register(width), tensors, [0, 0, 0, block], [0.5])

    want = (hadamard(unpacked(table), block) * undo)[:, :width] * np.float32(0.5)
    assert same_everywhere(make).tobytes() == want.tobytes()


def test_embeddings_add_up() -> None:
    """Words, shifted positions and token types into one register, as encoders do."""
    words, positions, types = values(48), values(48, 1), values(48, 2)[:2]
    b = Builder()
    out = b.table(words)
    b.op(EMBED, [], out, [b.tensor(packed("f32", positions))], [1, 2, 1], [1.0])
    b.op(EMBED, [], out, [b.tensor(packed("f32", types))], [2, 0, 1], [1.0])
    b.gather(out)
    program = b.build()
    kinds = [i % 2 for i in range(20)]
    result, got = program.step(Batch([(range(20), 0, 20, [])], types=kinds))
    assert result == 0
    assert got.tobytes() == (words[:20] + positions[2:22] + types[kinds]).tobytes()
    _, got = program.step(Batch([(range(20), 0, 20, [])]))
    assert got.tobytes() == (words[:20] + positions[2:22] + types[0]).tobytes()


@pytest.mark.parametrize("width", [40, 896])
def test_transform_to_float_pads(width: int) -> None:
    x, multiplier, padded = values(width), values(width, 1)[0], -(-width // 64) * 64
    block = 128 if padded % 128 == 0 else 64

    def make(b: Builder) -> int:
        return b.op(TRANSFORM, [b.table(x)], b.register(padded), [b.tensor(plain(multiplier))], [block])

    want = hadamard(np.pad(x * multiplier, ((0, 0), (0, padded - width))), block)
    assert same_everywhere(make).tobytes() == want.tobytes()
