"""AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) as one search: which input scale loses least.

The scale is `x^a / w^b`, x the RMS of each channel's inputs on calibration text and w that of its weights. b = 0 is
AWQ; a = b = 1/2 is SmoothQuant's, and balanced. Each candidate is judged by the squared error of the
outputs of all linears that read the input, 8-bit activations included where the model will have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from snello.models.spec import Format
from snello.techniques.quantize import Scales
from snello.techniques.quantize.basis import Basis, column_rms
from snello.techniques.quantize.rounding import GRIDS, round_activations, round_grouped, round_int8

Exponents = tuple[float, float]
GRID: tuple[Exponents, ...] = tuple((a / 4, b / 2) for a in range(5) for b in range(3))
JUDGED_ROWS = 256  # outputs of each linear, evenly spaced
MANY, LEAST_JUDGED = 4, 16  # of more linears than this, fewer outputs are judged, but never fewer than these


@dataclass(frozen=True)
class Choice:
    """`errors` of every candidate of the grid; `scale` (K) is that of the smallest."""

    scale: Tensor
    exponents: Exponents
    errors: Mapping[Exponents, float]


def search_scale(
    consumers: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    rows: Tensor,
    scales: Scales = "group",
    own: Mapping[str, Tensor] | None = None,
) -> Choice:
    """The best scale for these linears, by name, on sampled inputs `rows` (M, K).

    `own`: the rows that each linear sees, where that is not all of them; so experts count by how often they are asked.
    """
    few = JUDGED_ROWS if len(consumers) <= MANY else max(LEAST_JUDGED, MANY * JUDGED_ROWS // len(consumers))
    judged = {name: w[:: max(1, len(w) // few)] for name, w in consumers.items()}
    scale_of = candidates(list(consumers.values()), rows)
    own = own or dict.fromkeys(consumers, rows)
    errors = {point: output_error(judged, formats, own, scale_of(point), scales) for point in GRID}
    best = min(GRID, key=lambda point: errors[point])
    return Choice(scale_of(best), best, errors)


def candidates(consumers: list[Tensor], rows: Tensor) -> Callable[[Exponents], Tensor]:
    w, x = column_rms(consumers), column_rms([rows])
    return lambda point: x ** point[0] / w ** point[1]


def output_error(
    consumers: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    seen: Mapping[str, Tensor],
    scale: Tensor | None,
    scales: Scales = "group",
) -> float:
    """Squared error of all outputs for the rows (M, K) that each linear sees, relative to their energy, when rounded to
    nearest with this input scale.
    """
    error = energy = 0.0
    for name, w in consumers.items():
        format, rows = formats[name], seen[name]
        if not len(rows):
            continue
        basis = Basis(w.shape[1], scale, format.rotate)
        stored = basis.weights(w)
        grid = GRIDS.get(format.weights)
        size = format.group_size if scales == "group" else basis.padded
        rounded = round_grouped(stored, size, grid) if grid else round_int8(stored)
        x = basis.inputs(rows)
        x = x if format.activations == "float" else round_activations(x, static=format.activations == "int8-static")
        target = rows @ w.T
        error += (x @ rounded.values().T - target).square().sum().item()
        energy += target.square().sum().item()
    return error / max(energy, 1e-30)
