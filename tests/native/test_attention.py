"""Attention: exact against the NumPy statement, the same bytes however the work is cut, and close to float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.native.harness import F32, PAGE, PRODUCT_ISAS, Batch, Builder, Cache, Program, isa, pages_for
from tests.oracle_rows import attention, visible

FORMATS = ["f32", "f16", "bf16", "int8"]


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    kv_format: str = "f16"
    window: int = 0
    sinks: int = 0
    causal: bool = True
    cap: float = 0.0
    tokens: int = 300
    seed: int = 0

    @property
    def scale(self) -> float:
        return float(np.float32(1 / np.sqrt(self.head_dim)))

    def tables(self) -> tuple[F32, F32, F32]:
        rng = np.random.default_rng([self.seed, self.heads, self.head_dim])
        q = rng.standard_normal((self.tokens, self.heads * self.head_dim)).astype(np.float32)
        k = rng.standard_normal((self.tokens, self.kv_heads * self.head_dim)).astype(np.float32)
        v = rng.standard_normal((self.tokens, self.kv_heads * self.head_dim)).astype(np.float32)
        q[::7] *= 3
        k[::5, ::3] *= 4
        return q, k, v

    def cache(self, pages: int = 24) -> Cache:
        return Cache([(self.kv_heads, self.head_dim, self.kv_format)], pages)

    def program(self, cache: Cache, threads: int = 1) -> Program:
        b = Builder()
        q, k, v = (b.table(t) for t in self.tables())
        arguments = [0, self.heads, self.kv_heads, self.head_dim, self.window, self.sinks, int(self.causal)]
        out = b.attention(q, k, v, b.register(self.heads * self.head_dim), arguments, [self.scale, self.cap])
        b.gather(out)
        return b.build(cache, threads)


def prefill(program: Program, tokens: list[int], chunks: list[int], pages: list[int]) -> F32:
    """All rows of one sequence, stored chunk by chunk."""
    outputs: list[F32] = []
    at = 0
    while at < len(tokens):
        size = min(chunks[min(len(outputs), len(chunks) - 1)], len(tokens) - at)
        result, out = program.step(Batch([(tokens[at : at + size], at, at + size, pages)]))
        assert result == 0
        outputs.append(out)
        at += size
    return np.concatenate(outputs)


def expected(case: Case, rows: list[int], tokens: list[int], length: int) -> F32:
    q, k, v = case.tables()
    group = case.heads // case.kv_heads
    k = k[tokens[:length]].reshape(length, case.kv_heads, case.head_dim)
    v = v[tokens[:length]].reshape(length, case.kv_heads, case.head_dim)
    out = np.empty((len(rows), case.heads, case.head_dim), np.float32)
    for i, row in enumerate(rows):
        seen = visible(row, length, case.window, case.sinks, case.causal)
        for h in range(case.heads):
            head = q[tokens[row]].reshape(case.heads, -1)[h]
            k_h, v_h = (np.ascontiguousarray(x[:, h // group]) for x in (k, v))
            out[i, h] = attention(head, k_h, v_h, seen, case.scale, case.cap, case.kv_format)
    return out.reshape(len(rows), -1)


CASES = [
    *[Case(kv_format=f) for f in FORMATS],
    *[Case(kv_format=f, heads=3, kv_heads=1, head_dim=8, tokens=140) for f in FORMATS],
    *[Case(kv_format=f, heads=2, kv_heads=2, head_dim=80, tokens=140) for f in ("f16", "int8")],
    *[Case(kv_format=f, heads=7, kv_heads=1, head_dim=128, tokens=140) for f in ("bf16", "int8")],
    *[Case(kv_format=f, window=50, tokens=300) for f in ("f32", "int8")],
    *[Case(kv_format=f, window=20, sinks=4, tokens=300) for f in ("f16", "int8")],
    Case(kv_format="f16", window=3, sinks=131, tokens=300),
    Case(kv_format="f32", causal=False, window=2**31 - 1, tokens=200),
    *[Case(kv_format=f, causal=False, tokens=200) for f in ("f32", "int8")],
    *[Case(kv_format=f, causal=False, window=30, tokens=200) for f in ("bf16", "int8")],
    *[Case(kv_format=f, cap=3.0, tokens=150) for f in ("f32", "int8")],
    *[Case(kv_format="int8", heads=6, kv_heads=2, head_dim=64, tokens=t) for t in (140, 300)],
    Case(kv_format="int8", heads=4, kv_heads=2, head_dim=64, window=50, sinks=4, tokens=300),
    Case(kv_format="int8", heads=4, kv_heads=4, head_dim=64, causal=False, window=30, tokens=200),
    Case(kv_format="int8", heads=20, kv_heads=1, head_dim=64, cap=3.0, tokens=150),
    Case(kv_format="int8", heads=2, kv_heads=1, head_dim=256, tokens=140),
    Case(kv_format="f16", heads=20, kv_heads=1, head_dim=24, tokens=140),
]


def interesting_rows(n: int) -> list[int]:
    return [r for r in (0, 1, 15, 16, 49, 50, 51, 126, 127, 128, 129, 130, 199, 255, 256, 257, n - 1) if r < n]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_statement_on_every_instruction_set(case: Case) -> None:
    tokens = [int(t) for t in np.random.default_rng(1).permutation(case.tokens)]
    n = case.tokens
    rows = sorted(set(interesting_rows(n)))
    want = expected(case, rows, tokens, n)
    for name in PRODUCT_ISAS:
        with isa(name):
            got = prefill(case.program(case.cache()), tokens, [n], pages_for(n))
        assert got[rows].tobytes() == want.tobytes(), name


@pytest.mark.parametrize("case", [c for c in CASES if c.causal], ids=str)
def test_chunks_threads_and_pages_change_nothing(case: Case) -> None:
    n = case.tokens
    tokens = list(range(n))
    base = prefill(case.program(case.cache()), tokens, [n], pages_for(n)).tobytes()
    cuts = [([1], 1), ([7], 2), ([128], 4), ([127, 2, 1, 60], 2), ([n], 4)]
    for chunks, threads in cuts:
        got = prefill(case.program(case.cache(), threads), tokens, chunks, pages_for(n, 20, -3))
        assert got.tobytes() == base, (chunks, threads)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", PRODUCT_ISAS)
def test_a_batch_equals_each_sequence_alone(kv_format: str, name: str) -> None:
    case = Case(kv_format=kv_format, heads=6, kv_heads=3, head_dim=32, window=100, sinks=2)
    lengths = [1, 126, 127, 128, 129, 130, 255, 256, 257]
    starts = [int(i) for i in np.cumsum([0, *[-(-n // PAGE) for n in lengths]])]
    cache = case.cache(starts[-1])
    with isa(name):
        alone, together = case.program(cache), case.program(cache, 2)
        want, parts = [], []
        for n, start in zip(lengths, starts, strict=False):
            tokens = [(7 * n + i) % case.tokens for i in range(n)]
            pages = pages_for(n, start)
            want.append(prefill(alone, tokens, [64], pages)[-1])
            parts.append((tokens[-1:], n - 1, n, pages))
        result, got = together.step(Batch(parts))
    assert result == 0
    assert got.tobytes() == np.stack(want).tobytes()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_mixed_decode_and_prefill(kv_format: str) -> None:
    case = Case(kv_format=kv_format)
    cache = case.cache()
    a, b = list(range(200)), list(range(100, 300))
    alone = case.program(cache)
    want_a = prefill(alone, a, [200], [0, 1])
    want_b = prefill(alone, b, [200], [2, 3])
    fresh = case.cache()
    program = case.program(fresh, 2)
    prefill(program, a[:-1], [50], [0, 1])
    _, got = program.step(Batch([(a[-1:], 199, 200, [0, 1]), (b, 0, 200, [2, 3])]))
    assert got[0].tobytes() == want_a[-1].tobytes()
    assert got[1:].tobytes() == want_b.tobytes()


def test_what_is_not_visible_does_not_matter() -> None:
    """Pages full of NaN beyond the window and behind the last position."""
    for kv_format in FORMATS:
        case = Case(kv_format=kv_format, window=40, sinks=3, tokens=300)
        n = 290
        base = prefill(case.program(case.cache()), list(range(n)), [n], [0, 1, 2])
        cache = case.cache()
        poison = replace(case)
        b = Builder()
        q, k, v = (b.table(np.full_like(t, np.nan)) for t in poison.tables())
        arguments = [0, case.heads, case.kv_heads, case.head_dim, 0, 0, 1]
        b.gather(b.attention(q, k, v, b.register(case.heads * case.head_dim), arguments, [1.0, 0.0]))
        poisoner = b.build(cache)
        poisoner.step(Batch([(list(range(300)), 0, 300, [0, 1, 2])]))
        got = prefill(case.program(cache), list(range(n)), [30], [0, 1, 2])
        assert got.tobytes() == base.tobytes(), kv_format


def test_copied_pages_continue_a_sequence() -> None:
    case = Case(kv_format="int8", tokens=300)
    cache = case.cache()
    program = case.program(cache)
    base = prefill(program, list(range(200)), [200], [0, 1])
    cache.copy_page(5, 0)
    cache.copy_page(6, 1)
    _, got = program.step(Batch([([199], 199, 200, [5, 6])]))
    assert got.tobytes() == base[-1:].tobytes()


@pytest.mark.parametrize(("kv_format", "tolerance"), [("f32", 2e-6), ("f16", 1e-3), ("bf16", 1e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_close_to_float64(kv_format: str, tolerance: float, head_dim: int) -> None:
    case = Case(kv_format=kv_format, head_dim=head_dim, tokens=270)
    n = case.tokens
    got = prefill(case.program(case.cache()), list(range(n)), [n], pages_for(n))
    q, k, v = (t.astype(np.float64) for t in case.tables())
    group = case.heads // case.kv_heads
    for h in range(case.heads):
        mine = slice(h * head_dim, (h + 1) * head_dim)
        theirs = slice(h // group * head_dim, (h // group + 1) * head_dim)
        s = q[:, mine] @ k[:, theirs].T * case.scale
        s[np.triu_indices(n, 1)] = -np.inf
        p = np.exp(s - s.max(axis=1, keepdims=True))
        want = p / p.sum(axis=1, keepdims=True) @ v[:, theirs]
        error = np.sqrt(np.mean((got[:, mine] - want) ** 2) / np.mean(want**2))
        assert error < tolerance
