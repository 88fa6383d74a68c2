"""One unit, the linears that read one input: its basis, and its integers by the chosen method.

Round-to-nearest and HQQ balance the input scale on what weights tell, GPTQ on what calibration saw; AWQ searches it
and SmoothQuant takes its own. The experts of a layer read one input and share its scale, but each sees rows of its own:
GPTQ has a Gram matrix for each, and AWQ judges each by the rows that it is sent.
Results know both faces of a matrix: the integers that are stored, and the effective weights in the plain basis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from snello.models.spec import Format
from snello.techniques.calibration import Calibrator, Statistic
from snello.techniques.quantize import ALPHA, Method, Scales
from snello.techniques.quantize.awq import search_scale
from snello.techniques.quantize.basis import Basis, balanced_scale, chunk_rows, column_rms
from snello.techniques.quantize.gptq import gptq
from snello.techniques.quantize.hqq import round_grouped_hqq
from snello.techniques.quantize.rounding import (
    GRIDS,
    INT8_LIMIT,
    Grid,
    Grouped,
    Int8,
    best_group_scale,
    grouped_scales,
    int8_row_scale,
    join,
    round_grouped,
    round_int8,
)
from snello.techniques.quantize.smoothquant import smooth_scale

Consumers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Solution:
    basis: Basis
    rounded: dict[str, Grouped | Int8]

    def effective(self) -> dict[str, Tensor]:
        """Weights as the model will act, in the plain basis, (N, K) each."""
        return {name: self.basis.plain_weights(matrix.values()) for name, matrix in self.rounded.items()}


def solve(
    consumers: Consumers,
    formats: Mapping[str, Format],
    loudness: Tensor,
    method: Method = "rtn",
    statistic: Statistic | None = None,
    alpha: float = ALPHA,
    scales: Scales = "group",
    seen: Calibrator | None = None,
) -> Solution:
    """`loudness` (K) of the input as estimated from weights; without a statistic only rtn and hqq are what they say.

    `seen`, where the consumers are experts that share an input, says which of its rows each of them sees.
    """
    basis = choose_basis(consumers, formats, loudness, method, statistic, alpha, scales, seen)
    if method == "gptq" and statistic is not None:
        rounded: dict[str, Grouped | Int8] = {}
        for expert, names in by_expert(consumers).items():
            own = statistic if seen is None or expert is None else seen.statistic(f"{expert}.in")
            part = {name: consumers[name] for name in names}
            rounded |= _gptq_unit(part, formats, basis, basis.gram(own.gram), scales)
        return Solution(basis, rounded)
    return Solution(basis, {name: _rounded(w, basis, formats[name], method, scales) for name, w in consumers.items()})


def choose_basis(
    consumers: Consumers,
    formats: Mapping[str, Format],
    loudness: Tensor,
    method: Method,
    statistic: Statistic | None,
    alpha: float = ALPHA,
    scales: Scales = "group",
    seen: Calibrator | None = None,
) -> Basis:
    """The basis that these linears share: not equalized, or by the method's input scale."""
    format = formats[next(iter(consumers))]
    if not format.equalize:
        return Basis(len(loudness), None, format.rotate)
    if method == "awq" and statistic is not None:
        rows = statistic.rows
        sent = {e: rows if seen is None or e is None else seen.sent(e, rows) for e in by_expert(consumers)}
        own = {name: sent[expert] for expert, names in by_expert(consumers).items() for name in names}
        scale = search_scale(consumers, formats, rows, scales, own).scale
    else:
        scale = _input_scale(consumers, loudness, method, statistic, alpha)
    return Basis(len(loudness), scale, format.rotate)


def by_expert(linears: Iterable[str]) -> dict[str | None, list[str]]:
    """Linears of one input by the expert that they belong to; None: to none, or to the only one that reads it."""
    grouped: dict[str | None, list[str]] = {}
    for name in linears:
        expert, _, part = name.rpartition(".")
        grouped.setdefault(expert if ".experts." in name and part != "down" else None, []).append(name)
    return grouped


def _input_scale(
    consumers: Consumers, loudness: Tensor, method: Method, statistic: Statistic | None, alpha: float
) -> Tensor:
    """SmoothQuant has its formula; the others balance it, on what was seen if any."""
    if method == "smoothquant" and statistic is not None:
        return smooth_scale(statistic.peaks, list(consumers.values()), alpha)
    seen = loudness if statistic is None or method == "hqq" else column_rms([statistic.rows])
    return balanced_scale(seen, list(consumers.values()))


def _rounded(w: Tensor, basis: Basis, format: Format, method: Method, scales: Scales) -> Grouped | Int8:
    """Rows do not depend on each other, so only a chunk of them is ever in the basis: a head can be a gigabyte."""
    if format.weights == "int8":
        return join([round_int8(basis.weights(part)) for part in torch.split(w, chunk_rows(w))])
    round_rows, grid = round_grouped_hqq if method == "hqq" else round_grouped, GRIDS[format.weights]
    size = format.group_size if scales == "group" else basis.padded
    rounded = join([round_rows(basis.weights(part), size, grid) for part in torch.split(w, chunk_rows(w))])
    return rounded if scales == "group" else rounded.in_groups(format.group_size)


def _gptq_unit(
    consumers: Consumers, formats: Mapping[str, Format], basis: Basis, gram: Tensor, scales: Scales
) -> dict[str, Grouped | Int8]:
    """All linears of a unit have one format and one Gram matrix, so their rows are one matrix."""
    format = formats[next(iter(consumers))]
    assert all(formats[name] == format for name in consumers)
    stacked = torch.cat([basis.weights(w) for w in consumers.values()])
    grid = GRIDS.get(format.weights)
    rounded: Grouped | Int8
    if grid is None:
        rounded = _gptq_int8(stacked, gram)
    elif scales == "group":
        rounded = _gptq_grouped(stacked, gram, format.group_size, grid)
    else:
        rounded = _gptq_rows(stacked, gram, grid).in_groups(format.group_size)
    rows = [len(w) for w in consumers.values()]
    return dict(zip(consumers, _split(rounded, rows), strict=True))


def _gptq_int8(w: Tensor, gram: Tensor) -> Int8:
    scale = int8_row_scale(w)
    return Int8(gptq(w, gram, scale[:, None], w.shape[1], (-INT8_LIMIT, INT8_LIMIT)), scale)


def _gptq_rows(w: Tensor, gram: Tensor, grid: Grid) -> Grouped:
    """One scale a row, from the original weights."""
    row_scale, group_scale = grouped_scales(w, w.shape[1], grid)
    q = gptq(w, gram, row_scale[:, None] * group_scale, w.shape[1], grid.limits)
    return Grouped(q, group_scale, row_scale, w.shape[1], grid)


def _gptq_grouped(w: Tensor, gram: Tensor, group_size: int, grid: Grid) -> Grouped:
    """Row scales from the original weights; a group's scale is settled when its columns, as repaired, are reached."""
    row_scale, group_scale = grouped_scales(w, group_size, grid)

    def refresh(group: int, columns: Tensor) -> Tensor:
        group_scale[:, group] = best_group_scale(columns[:, None, :], row_scale, grid)[:, 0]
        return group_scale[:, group] * row_scale

    q = gptq(w, gram, row_scale[:, None] * group_scale, group_size, grid.limits, refresh)
    return Grouped(q, group_scale, row_scale, group_size, grid)


def _split(rounded: Grouped | Int8, rows: list[int]) -> list[Grouped | Int8]:
    parts = zip(torch.split(rounded.q, rows), torch.split(rounded.row_scale, rows), strict=True)
    if isinstance(rounded, Int8):
        return [Int8(q, scale) for q, scale in parts]
    groups = torch.split(rounded.group_scale, rows)
    return [Grouped(q, s, r, rounded.group_size, rounded.grid) for (q, r), s in zip(parts, groups, strict=True)]
