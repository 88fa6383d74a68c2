"""How long a step takes, learned while it runs: so much a step, so much a row, so much a position read.

The scheduler asks it how many prompt rows fit its budget. A wrong answer costs time and never changes a token, so it
may look at the clock. Three made-up observations stand in until there are real ones.
"""

from __future__ import annotations

ROWS, READS = 64.0, 65536.0  # units that bring the three figures to one scale
MEMORY = 0.98  # weight of an observation after the next one
PRIOR_WEIGHT = 0.02
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
