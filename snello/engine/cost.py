"""How long a step takes, learned while it runs: so much a step, so much a row, so much a position read.

The scheduler asks it how many prompt rows fit its budget. A wrong answer costs time and never changes a token, so it
may look at the clock. Three made-up observations stand in until there are real ones.
"""

from __future__ import annotations

from bisect import bisect_left

ROWS, READS = 64.0, 65536.0  # units that bring the three figures to one scale
MEMORY = 0.98  # weight of an observation after the next one
PRIOR_WEIGHT = 0.02
FEW_ROWS = 64
STEP_WEIGHT = 0.1  # of the newest step with as many rows
WELL_KNOWN = 5  # steps with as many rows; until then their mean counts
STALE = 1024  # steps after which a figure is forgotten
REFRESH = 64  # steps after which figures that were not seen are drawn anew
QUANTILE, PACE = 0.95, 0.05  # of overruns; how much of itself it moves with one of them
MOST_OVERRUN = 2.0
Vector = tuple[float, float, float]


class LearnedCost:
    """Least squares over recent steps, in relative error; all three figures at least 0.

    Args:
        step_ms, row_ms, read_ms: first guesses, milliseconds a step, a row, a position read.
    """

    def __init__(self, step_ms: float, row_ms: float, read_ms: float) -> None:
        self._prior = (step_ms, row_ms * ROWS, read_ms * READS)
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._figures: Vector | None = None

    def __call__(self, rows: int, reads: int) -> float:
        """Predicted milliseconds of a step with so many rows that read so many positions together."""
        if self._figures is None:
            self._figures = self._solve()
        return _dot(self._figures, _features(rows, reads))

    def observe(self, rows: int, reads: int, milliseconds: float) -> None:
        """A step with these rows and reads took so long."""
        weight = 1.0 / max(milliseconds, 1e-3) ** 2
        x = _features(rows, reads)
        for i in range(3):
            self._targets[i] = self._targets[i] * MEMORY + weight * x[i] * milliseconds
            self._products[i] = [self._products[i][j] * MEMORY + weight * x[i] * x[j] for j in range(3)]
        self._figures = None

    def _solve(self) -> Vector:
        products, targets = [list(row) for row in self._products], list(self._targets)
        for x in ((1.0, 1 / ROWS, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)):
            expected = max(_dot(self._prior, x), 1e-3)
            weight = PRIOR_WEIGHT / expected**2
            for i in range(3):
                targets[i] += weight * x[i] * expected
                for j in range(3):
                    products[i][j] += weight * x[i] * x[j]
        return _at_least_zero(products, targets)

    def read_ms(self) -> float:
        """Of one position read."""
        return (self(1, int(READS)) - self(1, 0)) / READS


class Overrun:
    """How much longer prompts make a step than predicted: the ratio that one of twenty exceeds.

    A prediction is a mean, so prompts cut to fit a budget would exceed it in every other step. Learned one by one
    (stochastic approximation of a quantile: Robbins and Monro 1951).
    """

    def __init__(self) -> None:
        self.ratio = 1.0

    def observe(self, predicted_ms: float, took_ms: float) -> None:
        """Prompts were to make a step so much longer, and made it so much longer."""
        over = took_ms > self.ratio * predicted_ms
        self.ratio += PACE * (QUANTILE if over else QUANTILE - 1)
        self.ratio = min(max(self.ratio, 1.0), MOST_OVERRUN)


class StepTimes:
    """What steps of few rows took, by their number of rows, each on its own.

    Kernels take rows in groups, so a fifth row may cost as much as four before it and the sixth nothing; a line misses
    that, and whether a guess pays hangs on it. Numbers that were not seen lie between their neighbours, as the line
    does.
    """

    def __init__(self, line: LearnedCost) -> None:
        self._line = line
        self._seen: dict[int, float] = {}  # rows -> milliseconds without reads, smoothed
        self._times: dict[int, int] = {}  # rows -> so many observations
        self._when: dict[int, int] = {}  # observation that came last
        self._table: list[float] = []
        self._read_ms = 0.0
        self._observed = 0

    def __call__(self, rows: int, reads: int) -> float:
        """Milliseconds of a step."""
        if rows >= len(self._table):
            return max(self._line(rows, reads), self._table[-1] if self._table else 0.0)
        return self._table[rows] + self._read_ms * reads

    def observe(self, rows: int, reads: int, milliseconds: float) -> None:
        """A step took so long. What is far over a figure that is known well is something else on this machine."""
        if rows > FEW_ROWS:
            return
        took = max(milliseconds - self._read_ms * reads, 0.0)
        before = self._seen.get(rows)
        times = self._times[rows] = self._times.get(rows, 0) + 1
        if before is None:
            self._seen[rows] = took  # the line knows prompts, whose rows may be several times cheaper
        elif times <= WELL_KNOWN:
            self._seen[rows] = before + (took - before) / times
        else:
            self._seen[rows] = before + STEP_WEIGHT * (min(took, 2 * before) - before)
        self._observed += 1
        self._when[rows] = self._observed
        if before is None or self._observed % REFRESH == 0:
            self._refresh()

    def more(self, rows: int, reads: int, most: int, own: int) -> list[float]:
        """Milliseconds that 1, 2, ... `most` rows more take, each reading `own` positions."""
        if rows + most >= len(self._table):
            before = self(rows, reads)
            return [self(rows + count, reads + count * own) - before for count in range(1, most + 1)]
        before, read = self._table[rows], self._read_ms * own
        after = self._table[rows + 1 : rows + most + 1]
        return [took - before + count * read for count, took in enumerate(after, 1)]

    def age(self, rows: int) -> float:
        """Steps since one with so many rows."""
        when = self._when.get(rows)
        return float("inf") if when is None else self._observed - when

    def _refresh(self) -> None:
        """The line, raised or lowered to what was seen. What was seen long ago is to be seen anew."""
        self._read_ms = self._line.read_ms()
        for rows in [rows for rows in self._seen if self.age(rows) > STALE]:
            del self._seen[rows], self._when[rows], self._times[rows]
        known = sorted(self._seen)
        offsets = [self._seen[rows] - self._line(rows, 0) for rows in known]
        lines = [self._line(rows, 0) for rows in range(FEW_ROWS + 1)]
        self._table = [max(line + _between(rows, known, offsets), 1e-3) for rows, line in enumerate(lines)]


def _between(place: int, places: list[int], values: list[float]) -> float:
    """The straight line through the neighbours; outside of them the nearest."""
    at = bisect_left(places, place)
    if at == 0 or at == len(places):
        return values[min(at, len(places) - 1)]
    low, high = places[at - 1], places[at]
    return values[at - 1] + (values[at] - values[at - 1]) * (place - low) / (high - low)


def _features(rows: int, reads: int) -> Vector:
    return 1.0, rows / ROWS, reads / READS


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _at_least_zero(products: list[list[float]], targets: list[float]) -> Vector:
    """Solves the normal equations; a figure that comes out negative is 0 and the others are solved again."""
    used = [0, 1, 2]
    while used:
        values = _gauss([[products[i][j] for j in used] for i in used], [targets[i] for i in used])
        negative = [index for index, value in zip(used, values, strict=True) if value < 0]
        if not negative:
            found = dict(zip(used, values, strict=True))
            return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)
        used = [index for index in used if index not in negative]
    return 0.0, 0.0, 0.0


def _gauss(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solves a positive definite system by elimination."""
    size = len(right)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
            right[k] -= factor * right[i]
    values = [0.0] * size
    for i in reversed(range(size)):
        known = sum(matrix[i][j] * values[j] for j in range(i + 1, size))
        values[i] = (right[i] - known) / matrix[i][i]
    return values
