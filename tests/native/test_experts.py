"""Mixtures of experts in the core: routes by the formula, and every row as if its experts had been run alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from snello.models.spec import INTEGER
from tests.native.harness import (
    ACTIVATE,
    BF16_ROWS,
    COMBINE,
    DISPATCH,
    EXPERTS,
    F32,
    INT8_ROWS,
    LINEAR,
    PRODUCT_ISAS,
    ROUTE,
    SCALE,
    TRANSFORM,
    Batch,
    Builder,
    CoreError,
    Program,
    isa,
    packed,
    plain,
    run_rows,
)
from tests.oracle_rows import exp, lane_sum

ROWS, WIDTH, INNER, COUNT = 37, 128, 192, 6
FORMATS = ("f32", "bf16", "bf16-rows", "int8", "int4", "int3")  # bf16-rows: BF16 that meets rounded rows
f32 = np.float32


def random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(f32)


def routed(logits: F32, active: int, normalized: bool) -> Program:
    b = Builder()
    b.gather(b.op(ROUTE, [b.table(logits)], b.register(2 * active), i=[active, int(normalized)]))
    return b.build()


# ---- routes ---------------------------------------------------------------------------------------------------------


def expected_route(logits: F32, active: int, normalized: bool) -> F32:
    """Numbers, then weights, stated again."""
    order = np.argsort(-logits, kind="stable")[:active]  # ties: the lowest number first
    chosen = np.sort(order)
    p = exp(logits - logits.max())
    total = lane_sum(p)
    if normalized:
        total = f32(0)
        for number in chosen:
            total = total + p[number]
    return np.concatenate([chosen.astype(f32), p[chosen] / total])


@pytest.mark.parametrize("name", PRODUCT_ISAS)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("count", "active"), [(1, 1), (5, 2), (16, 16), (37, 3), (128, 8)])
def test_routes(count: int, active: int, normalized: bool, name: str) -> None:
    logits = random(20, count)
    logits[3:6] = np.round(logits[3:6])  # ties
    logits[6] = 0
    with isa(name):
        got = run_rows(routed(logits, active, normalized), len(logits))
    assert got.tobytes() == np.stack([expected_route(row, active, normalized) for row in logits]).tobytes()


def test_what_is_not_finite_still_names_experts() -> None:
    logits = np.full((4, 5), np.nan, f32)
    logits[1], logits[2, 3], logits[3, 3:] = np.inf, np.nan, -np.inf
    _, got = routed(logits, 3, True).step(Batch([(range(4), 0, 4, [])]))
    program = routed(logits[:, ::-1].copy(), 3, True)
    for rows in (got, program.step(Batch([(range(4), 0, 4, [])]))[1]):
        finite = rows[~np.isnan(rows).any(axis=1)]  # the others end their request
        assert all(0 <= n < 5 and n == int(n) for n in finite[:, :3].ravel())


# ---- mixtures -------------------------------------------------------------------------------------------------------


class Mixture:
    """`COUNT` gated experts over rows of a table, with a router whose logits are a table too."""

    def __init__(self, format_: str, logits: F32, active: int) -> None:
        self.format, self.logits, self.active = format_, logits, active
        self.x = random(len(logits), WIDTH, seed=1)
        stored = format_.removesuffix("-rows")
        gate, up = (packed_all(stored, INNER, WIDTH, seed) for seed in (2, 3))
        self.matrices = {"gate": gate, "up": up, "down": packed_all(stored, WIDTH, INNER, 4)}
        self.multipliers = [plain(np.exp2(random(INNER, seed=5 + e)).astype(f32)) for e in range(COUNT)]

    @property
    def kind(self) -> int:
        """Of the rows that the experts read."""
        return INT8_ROWS if self.format in INTEGER else BF16_ROWS if self.format == "bf16-rows" else 0

    def first(self, b: Builder, part: str) -> int:
        first, *_ = [b.tensor(matrix) for matrix in self.matrices[part]]
        return first

    def program(self, threads: int = 1) -> Program:
        b = Builder()
        x = b.table(self.x)
        rows = b.op(TRANSFORM, [x], b.register(WIDTH, self.kind), i=[128]) if self.kind else x
        routes = b.op(ROUTE, [b.table(self.logits)], b.register(2 * self.active), i=[self.active, 1])
        given = b.op(DISPATCH, [rows, routes], b.register(WIDTH, self.kind))
        gate = b.op(EXPERTS, [given], b.register(INNER), [self.first(b, "gate")])
        up = b.op(EXPERTS, [given], b.register(INNER), [self.first(b, "up")])
        hidden = b.op(ACTIVATE, [gate, up], gate, i=[0])
        if self.kind:
            multipliers = [b.tensor(one) for one in self.multipliers]
            hidden = b.op(TRANSFORM, [hidden], b.register(INNER, self.kind), [multipliers[0]], [64, 1])
        answers = b.op(EXPERTS, [hidden], b.register(WIDTH), [self.first(b, "down")])
        b.gather(b.op(COMBINE, [answers, routes], x, i=[1]))
        return b.build(threads=threads)

    def alone(self, expert: int) -> F32:
        """What this expert says of every row, by the operations of dense models."""
        b = Builder()
        x = b.table(self.x)
        rows = b.op(TRANSFORM, [x], b.register(WIDTH, self.kind), i=[128]) if self.kind else x
        one = {part: b.tensor(matrices[expert]) for part, matrices in self.matrices.items()}
        gate, up = (b.op(LINEAR, [rows], b.register(INNER), [one[part]]) for part in ("gate", "up"))
        hidden = b.op(ACTIVATE, [gate, up], gate, i=[0])
        if self.kind:
            multiplier = b.tensor(self.multipliers[expert])
            hidden = b.op(TRANSFORM, [hidden], b.register(INNER, self.kind), [multiplier], [64])
        b.gather(b.op(LINEAR, [hidden], b.register(WIDTH), [one["down"]]))
        return run_rows(b.build(), len(self.x))

    def expected(self) -> F32:
        """x plus the weighted answers, each product rounded, summed in ascending order of experts."""
        alone = [self.alone(expert) for expert in range(COUNT)]
        out = []
        for row, x in enumerate(self.x):
            route = expected_route(self.logits[row], self.active, True)
            terms = [alone[int(n)][row] * w for n, w in zip(*np.split(route, 2), strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            out.append(x + total)
        return np.stack(out)


def packed_all(format_: str, rows: int, columns: int, seed: int) -> list:  # type: ignore[type-arg]
    scale = f32(columns**-0.5)
    return [packed(format_, random(rows, columns, seed=100 * seed + e) * scale) for e in range(COUNT)]


@pytest.mark.parametrize("format_", FORMATS)
def test_each_row_is_as_if_its_experts_were_alone(format_: str) -> None:
    mixture = Mixture(format_, random(ROWS, COUNT), 2)
    expected = mixture.expected()
    for name in PRODUCT_ISAS:
        for threads in (1, 3):
            with isa(name):
                assert run_rows(mixture.program(threads), ROWS).tobytes() == expected.tobytes(), (name, threads)


@pytest.mark.parametrize("format_", ["f32", "int4"])
def test_who_else_is_there_changes_nothing(format_: str) -> None:
    """All rows to one expert, none to some, each row alone, and more rows than any kernel takes at once."""
    logits = random(150, COUNT)
    logits[:60] = np.arange(COUNT)  # all to the last ones
    mixture = Mixture(format_, logits, 3)
    whole = run_rows(mixture.program(2), len(logits))
    alone = mixture.program()
    for row in (0, 59, 60, 149):
        _, one = alone.step(Batch([([row], 0, 1, [])]))
        assert one.tobytes() == whole[row].tobytes(), row
    _, some = alone.step(Batch([([70, 3], 0, 2, []), ([149], 0, 1, [])]))
    assert some.tobytes() == whole[[70, 3, 149]].tobytes()


@pytest.mark.parametrize("count", [9, 300])
def test_every_expert_for_every_row(count: int) -> None:
    """Of 300 rows each thread takes some, of every expert's."""
    mixture = Mixture("int8", random(count, COUNT), COUNT)
    expected = mixture.expected().tobytes()
    for threads in (2, 3):
        assert run_rows(mixture.program(threads), count).tobytes() == expected, threads


def test_an_answer_that_is_not_finite_ends_its_own_request() -> None:
    logits = random(3, COUNT)
    logits[:, 0] = -9, 9, -9  # the second row alone goes to the first expert
    mixture = Mixture("int8", logits, 2)
    clean = run_rows(mixture.program(), 3)
    mixture.multipliers[0] = plain(np.full(INNER, 3e38, f32))  # whose hidden rows overflow
    result, got = mixture.program(2).step(Batch([([n], 0, 1, []) for n in range(3)]))
    assert result == 2 and np.isnan(got[1]).all()
    assert got[[0, 2]].tobytes() == clean[[0, 2]].tobytes()


# ---- refusals -------------------------------------------------------------------------------------------------------


def built(*, columns: int = COUNT, active: int = 2, given: int = WIDTH, matrices: int = COUNT, **more: int) -> None:
    """A mixture in which one thing is wrong."""
    b = Builder()
    x = b.table(random(4, WIDTH))
    routes = b.op(ROUTE, [b.table(random(4, columns))], b.register(more.get("routes", 2 * active)), i=[active, 0])
    if more.get("touched"):
        b.op(SCALE, [routes], routes, f=[1.0, 0.0])
    rows = b.op(DISPATCH, [x, more.get("by", routes)], b.register(given))
    shapes = [(INNER, WIDTH + 64 * more.get("odd", 0) * (e == 1)) for e in range(matrices)]
    tensors = [b.tensor(packed("f32", random(*shape))) for shape in shapes]
    if more.get("again"):
        b.op(DISPATCH, [x, routes], b.register(WIDTH))
    answers = b.op(EXPERTS, [rows], b.register(more.get("out", INNER)), [tensors[0]], [more.get("adds", 0), 0])
    if more.get("plain"):
        b.op(SCALE, [answers], b.register(INNER), f=[1.0, 0.0])
    b.op(COMBINE, [answers, routes], b.register(more.get("sum", INNER)))
    b.gather(x)
    b.build()


REFUSALS: list[tuple[dict[str, int], str]] = [
    ({}, ""),
    ({"columns": 1}, "2 of 1 experts for each row"),
    ({"columns": 1025}, "1025 experts: at most 1024"),
    ({"active": 0}, "0 of 6 experts|width 0"),
    ({"routes": 5}, "out has 5 columns, not 4"),
    ({"given": 64}, "not alike"),
    ({"by": 0}, r"in1 \(register 0\) is not what route wrote last"),
    ({"touched": 1}, "is not what route wrote last"),
    ({"matrices": COUNT - 1}, "is the first of 6, and there are"),
    ({"odd": 1}, "is 192 x 192, the first expert's 192 x 128"),
    ({"adds": 1}, "neither adds into out nor has a bias"),
    ({"out": 100}, "they do not fit in out at column 0 of 100"),
    ({"again": 1}, "is read before column 0 is written"),
    ({"plain": 1}, "rows of the batch and rows of experts"),
    ({"sum": 100}, "in0 has 192 columns, out has 100"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSALS, ids=[str(wrong) for wrong, _ in REFUSALS])
def test_refused(wrong: dict[str, int], message: str) -> None:
    if not message:
        return built(**wrong)
    with pytest.raises(CoreError, match=message):
        built(**wrong)


def orphan(kind: int, width: int) -> Callable[[Builder], None]:
    def make(b: Builder) -> None:
        x = b.table(random(4, WIDTH))
        routes = b.op(ROUTE, [b.table(random(4, COUNT))], b.register(4), i=[2, 0])
        matrix = b.tensor(packed("f32", random(INNER, WIDTH)))
        b.op(kind, [x, routes], b.register(width, kind == TRANSFORM), [matrix], [64, 1])
        b.gather(x)

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [(EXPERTS, "no dispatch before it"), (COMBINE, "no dispatch before it"), (TRANSFORM, "no rows of experts")],
)
def test_nothing_was_dispatched(kind: int, message: str) -> None:
    b = Builder()
    orphan(kind, WIDTH)(b)
    with pytest.raises(CoreError, match=message):
        b.build()
