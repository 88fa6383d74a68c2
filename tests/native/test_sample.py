"""Drawing tokens: exact against a plain NumPy statement, right in distribution; comparing two models' logits."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import pytest

from snello.native.library import CSampling
from tests.native.harness import F32, I32, ISAS, LIB, CoreError, checked, ints, isa, pointer
from tests.oracle_rows import allowed, gumbel, modified

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": 0,
    "seed": 0,
}


def sample(
    logits: F32,
    history: list[int] | None = None,
    num_prompt: int = 0,
    position: int = 0,
    biases: dict[int, float] | None = None,
    **options: Any,
) -> tuple[int, float]:
    logits = np.ascontiguousarray(logits, np.float32)
    before = logits.tobytes()
    tokens, values = ints(list(biases or {})), np.array(list((biases or {}).values()), np.float32)
    s = CSampling(
        **{**DEFAULTS, **options}, num_biases=len(tokens), bias_tokens=pointer(tokens), bias_values=pointer(values)
    )
    past, log_probability = ints(history or []), C.c_float()
    token = checked(
        LIB.snello_sample(
            pointer(logits),
            len(logits),
            C.byref(s),
            pointer(past),
            len(past),
            num_prompt,
            C.c_int64(position),
            C.byref(log_probability),
        )
    )
    assert logits.tobytes() == before
    return token, log_probability.value


def logits_like(n: int, seed: int = 0, spread: float = 2.5) -> F32:
    return (np.random.default_rng([seed, n]).standard_normal(n) * spread).astype(np.float32)


def log_softmax(x: F32) -> F32:
    wide = x.astype(np.float64)
    result: F32 = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    return result


def stated(x: F32, seed: int, position: int, temperature: float, keep: list[int]) -> int:
    scores = (x / np.float32(temperature)).astype(np.float64) + gumbel(seed, position, len(x))
    return min(keep, key=lambda i: (-scores[i], i))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 3, 65, 2000])
def test_each_option_against_the_statement(options: dict[str, Any], n: int) -> None:
    o = {**DEFAULTS, **options}
    for seed in range(25):
        x = logits_like(n, seed)
        if seed % 5 == 0:
            x = np.round(x)  # ties
        if seed % 7 == 0 and n > 3:
            x[::3] = -np.inf
        keep = allowed(x / np.float32(o["temperature"]), o["top_k"], o["top_p"], o["min_p"])
        want = stated(x, seed << 33 | 5, 10**10 + seed, o["temperature"], keep)
        got, log_probability = sample(x, position=10**10 + seed, **{**options, "seed": seed << 33 | 5})
        assert got == want
        assert abs(log_probability - log_softmax(x)[got]) < 1e-5


@pytest.mark.parametrize(
    "penalties",
    [(1.3, 0.0, 0.0), (0.8, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.4), (1.2, -0.5, 0.25), (1.0, 0.0, 0.0)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_and_biases(penalties: tuple[float, float, float], temperature: float) -> None:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = logits_like(50, seed, 1.0)
        history = [int(t) for t in rng.integers(0, 12, 30)]
        biases = {3: 2.0, 17: -np.inf, 40: 1.5}
        changed = modified(x, biases, history, 20, *penalties)
        got, log_probability = sample(
            x, history, 20, 7, biases, temperature=temperature, seed=seed, **dict(zip(names, penalties, strict=True))
        )
        want = int(np.argmax(changed)) if temperature == 0 else stated(changed, seed, 7, temperature, list(range(50)))
        assert got == want
        assert abs(log_probability - log_softmax(x)[got]) < 1e-5


def test_greedy_takes_the_lowest_of_equals() -> None:
    x = np.full(100, 1.0, np.float32)
    x[[40, 70, 99]] = 3.0
    assert sample(x, temperature=0.0)[0] == 40
    assert sample(x, temperature=0.0, biases={40: -np.inf})[0] == 70
    assert sample(np.array([-0.0, 0.0], np.float32), temperature=0.0)[0] == 0


def test_top_k_ties_keep_the_lowest_ids() -> None:
    x = np.zeros(200, np.float32)
    x[150] = 1.0
    drawn = {sample(x, seed=seed, top_k=4)[0] for seed in range(300)}
    assert drawn == {150, 0, 1, 2}


def test_a_ban_holds() -> None:
    x = logits_like(20)
    drawn = {sample(x, seed=s, biases=dict.fromkeys(range(19), -np.inf))[0] for s in range(10)}
    assert drawn == {19}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.7}])
def test_distribution(options: dict[str, Any]) -> None:
    """Chi-square against the exact probabilities, over positions and over seeds."""
    o = {**DEFAULTS, **options}
    x, draws = logits_like(12, 3, 1.2), 6000
    scaled = x / np.float32(o["temperature"])
    keep = allowed(scaled, o["top_k"], o["top_p"], o["min_p"])
    p = np.zeros(len(x))
    p[keep] = np.exp(log_softmax(scaled)[keep])
    p /= p.sum()
    for vary in ("seed", "position"):
        drawn = [sample(x, **{**options, "seed": 1, vary: i})[0] for i in range(draws)]
        counts = np.bincount(drawn, minlength=len(x))
        assert counts[p == 0].sum() == 0
        some = p > 0
        chi2 = ((counts[some] - draws * p[some]) ** 2 / (draws * p[some])).sum()
        freedom = some.sum() - 1
        assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_large_vocabulary_equals_the_statement() -> None:
    n = 151_936
    noise = {seed: gumbel(seed, 5, n) for seed in (1, 2)}
    for spread, temperature in ((2.5, 1.0), (0.01, 1.0), (6.0, 0.3)):
        x = logits_like(n, 9, spread)
        for seed, g in noise.items():
            scores = (x / np.float32(temperature)).astype(np.float64) + g
            assert sample(x, position=5, seed=seed, temperature=temperature)[0] == int(np.argmax(scores))
            keep = allowed(x / np.float32(temperature), 50, 0.95, 0.0)
            want = max(keep, key=lambda i: scores[i])
            got = sample(x, position=5, seed=seed, temperature=temperature, top_k=50, top_p=0.95)[0]
            assert got == want


@pytest.mark.parametrize("name", ISAS)
def test_instruction_sets_draw_alike(name: str) -> None:
    x = logits_like(3001, 2)
    want = [sample(x, seed=s, top_p=0.9) for s in range(30)] + [sample(x, seed=s) for s in range(30)]
    with isa(name):
        got = [sample(x, seed=s, top_p=0.9) for s in range(30)] + [sample(x, seed=s) for s in range(30)]
    assert got == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"biases": {20: 1.0}}, "bias for token 20"),
        ({"biases": {1: float("nan")}}, "bias"),
        ({"history": [0, 20]}, "history"),
        ({"history": [1], "num_prompt": 2}, "history"),
        ({"biases": dict.fromkeys(range(20), -np.inf)}, "nothing finite"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CoreError, match=message):
        sample(logits_like(20), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    for where in (0, 7, 99):
        x = logits_like(100)
        x[where] = value
        for temperature in (0.0, 1.0):
            with pytest.raises(CoreError, match="finite"):
                sample(x, temperature=temperature)
    with pytest.raises(CoreError, match="finite"):
        sample(np.full(40, -np.inf, np.float32))


# ---- the most likely ----


def most_likely(logits: F32, count: int) -> tuple[I32, F32]:
    tokens, under = np.full(count, -1, np.int32), np.full(count, np.nan, np.float32)
    found = checked(LIB.snello_top(pointer(logits), len(logits), count, pointer(tokens), pointer(under)))
    return tokens[:found], under[:found]


@pytest.mark.parametrize("n,count", [(5, 5), (5, 9), (16, 1), (1000, 20), (50_003, 100), (50_003, 0)])
def test_the_most_likely_come_first_and_the_lowest_of_equals(n: int, count: int) -> None:
    logits = logits_like(n)
    logits[n // 2 :] = np.round(logits[n // 2 :] * 2) / 2  # many equals
    logits[n // 3] = -np.inf
    results = []
    for name in ISAS:
        with isa(name):
            results.append(most_likely(logits, count))
    tokens, under = results[0]
    assert all((t == tokens).all() and u.tobytes() == under.tobytes() for t, u in results)
    assert tokens.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
    rows, targets = np.broadcast_to(logits, (len(tokens), n)), tokens
    if len(tokens):
        assert under.tobytes() == compare(np.ascontiguousarray(rows), np.ascontiguousarray(rows), targets)[0].tobytes()


def test_the_most_likely_of_what_is_no_row_of_logits() -> None:
    logits = logits_like(100)
    for bad in (np.nan, np.inf):
        logits[50] = bad
        with pytest.raises(CoreError, match="top: the logits are not finite"):
            most_likely(logits, 3)
    with pytest.raises(CoreError, match="top: -1 of 100 logits"):
        checked(LIB.snello_top(pointer(logits), 100, -1, pointer(ints([0])), pointer(logits)))
    with pytest.raises(CoreError, match="top: no logits or no room"):
        checked(LIB.snello_top(pointer(logits), 100, 1, None, pointer(logits)))


# ---- comparing ----


def compare(a: F32, b: F32, targets: I32) -> tuple[F32, F32, F32, I32, I32]:
    rows, n = a.shape
    floats = [np.zeros(rows, np.float32) for _ in range(3)]
    tops = [np.zeros(rows, np.int32) for _ in range(2)]
    outputs = [pointer(x) for x in (*floats, *tops)]
    checked(LIB.snello_compare(pointer(a), pointer(b), rows, n, pointer(ints(targets)), *outputs))
    return floats[0], floats[1], floats[2], tops[0], tops[1]


@pytest.mark.parametrize("n", [5, 16, 1000, 50_003])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 2.0])
def test_compare(n: int, noise: float) -> None:
    a = np.stack([logits_like(n, i) for i in range(4)])
    b = a + np.stack([logits_like(n, 10 + i, noise) for i in range(4)])
    targets = ints([0, n - 1, n // 2, 1])
    results = {}
    for name in ISAS:
        with isa(name):
            results[name] = compare(a, b, targets)
    first = results[ISAS[0]]
    for other in results.values():
        assert all(x.tobytes() == y.tobytes() for x, y in zip(first, other, strict=True))
    la, lb = (np.stack([log_softmax(row) for row in x]) for x in (a, b))
    rows = np.arange(4)
    assert np.abs(first[0] - la[rows, targets]).max() < 1e-5
    assert np.abs(first[1] - lb[rows, targets]).max() < 1e-5
    kl = (np.exp(la) * (la - lb)).sum(axis=1)
    assert (first[2] >= 0).all()
    assert np.allclose(first[2], kl, rtol=1e-3, atol=2e-7)
    assert (first[3] == a.argmax(axis=1)).all() and (first[4] == b.argmax(axis=1)).all()


def test_a_model_does_not_differ_from_itself() -> None:
    a = np.stack([logits_like(5003, i) for i in range(3)])
    result = compare(a, a.copy(), ints([1, 2, 3]))
    assert (result[2] == 0).all()
    assert result[0].tobytes() == result[1].tobytes()


def test_banned_tokens_carry_no_divergence() -> None:
    a, b = logits_like(100)[None].copy(), logits_like(100, 1)[None].copy()
    a[0, 5] = b[0, 5] = -np.inf
    a[0, 6] = -np.inf
    kl = compare(a, b, ints([0]))[2]
    la, lb = log_softmax(a[0]), log_softmax(b[0])
    some = np.isfinite(la)
    assert np.allclose(kl, (np.exp(la[some]) * (la[some] - lb[some])).sum(), rtol=1e-4)


def test_compare_checks_its_arguments() -> None:
    a = np.zeros((2, 10), np.float32)
    with pytest.raises(CoreError, match="target 10 of row 1"):
        compare(a, a, ints([0, 10]))
