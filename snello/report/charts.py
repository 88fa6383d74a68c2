"""The five charts, one function each: ladder, Pareto, losses by document, divergence, timing pairs.

Each returns the drawing and the table of what it shows. Losses are drawn with their bounds; points that the paired
difference does not tell apart are joined by a grey band and never ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from snello.measure.interval import Interval
from snello.optimize.events import LadderRow
from snello.optimize.receipts import CostRatio, DocumentLoss, ParetoPoint
from snello.report import numbers
from snello.report.blocks import Chart, Table
from snello.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Canvas, axis, log_axis

ROW = 22  # height of one line of the ladder
NAMES = 190  # width of its names
UNITS = {"latency": numbers.seconds, "throughput": numbers.seconds, "memory": numbers.size}  # of a goal's cost
REACH = 4  # times the budget: a loss beyond it would press all others into a corner


def ladder(rows: Sequence[LadderRow], max_loss: float) -> Chart:
    """Interval plot: each stage's loss with its bounds, the budget as a line."""
    drawn = [(row, row.loss) for row in rows if row.loss is not None]
    canvas = Canvas(TOP + BOTTOM + ROW * max(1, len(drawn)))
    ends = [min(bound, REACH * max_loss) for _, loss in drawn for bound in (loss.low, loss.high)]
    x = axis([*ends, max_loss], NAMES, WIDTH - RIGHT, "%")
    canvas.frame(x, None, "loss, with its 95% bounds; the dashed line is the budget")
    canvas.line(x.at(max_loss), TOP, x.at(max_loss), canvas.height - BOTTOM, "budget")
    for place, (row, loss) in enumerate(drawn):
        y = TOP + ROW * (place + 0.5)
        canvas.text(NAMES - 8, y + 4, _short(row.name), "end")
        canvas.line(x.at(loss.low), y, x.at(loss.high), y, "whisker")
        canvas.mark(x.at(loss.mid), y, _kind(row), f"{row.name}: {numbers.loss(loss)}, {row.verdict}")
        if loss.mid > x.high:
            canvas.text(x.end - 8, y + 4, f"off the scale: {numbers.percent(loss.mid)}", "end")
    cells = tuple((row.name, *_bounds(loss), row.verdict) for row, loss in drawn)
    table = Table(columns=("stage", "loss", "low", "high", "verdict"), rows=cells, right=(1, 2, 3))
    description = f"{len(drawn)} stages with their losses and 95% bounds, against a budget of {max_loss:.2%}."
    return Chart(title="Loss of every stage", svg=canvas.svg("Loss of every stage", description), table=table)


def pareto(points: Sequence[ParetoPoint], max_loss: float) -> Chart:
    """Speed-up against the upper bound of the loss, with crosses for intervals and the front as a staircase."""
    canvas = Canvas(340)
    floor = canvas.height - BOTTOM
    speeds = [bound for point in points for bound in (point.speedup.low, point.speedup.high)]
    x = axis([*speeds, 1.0], LEFT, WIDTH - RIGHT, "x", zero=False)
    highest = [min(point.loss.high, REACH * max_loss) for point in points]
    y = axis([*highest, max_loss], floor, TOP, "%")
    canvas.frame(x, y, "speed-up over the original, with its 95% bounds", "loss, from the estimate to its 95% bound")
    canvas.line(x.start, y.at(max_loss), x.end, y.at(max_loss), "budget")
    by_name = {point.name: point for point in points}
    for point in points:
        for other in (by_name[name] for name in point.tied_with if name in by_name):
            ends = (x.at(other.speedup.mid), y.at(other.loss.high))
            canvas.line(x.at(point.speedup.mid), y.at(point.loss.high), *ends, "tie")
    front = sorted((p for p in points if p.on_front), key=lambda p: p.speedup.mid)
    stairs = [(x.at(point.speedup.mid), y.at(point.loss.high)) for point in front]
    steps = [corner for a, b in pairwise(stairs) for corner in (a, (a[0], b[1]))] + stairs[-1:]
    canvas.polyline(steps, "front")
    for point in points:
        across, up = x.at(point.speedup.mid), y.at(point.loss.high)
        canvas.line(x.at(point.speedup.low), up, x.at(point.speedup.high), up, "whisker")
        canvas.line(across, y.at(max(point.loss.mid, y.low)), across, up, "whisker")
        canvas.mark(across, up, point.verdict, f"{point.name}: {point.verdict}")
        canvas.label(across, up, _short(point.name))
    cells = tuple(_pareto_row(point) for point in points)
    columns = ("candidate", "speed-up", "loss (at most)", "weights", "front", "cannot tell from")
    table = Table(columns=columns, rows=cells, right=(1, 2, 3))
    title = "Speed-up against loss"
    description = f"{len(points)} candidates; further right is faster, lower is nearer to the original, "
    description += "the dashed line is the budget."
    return Chart(title=title, svg=canvas.svg(title, description), table=table)


def documents(losses: Sequence[DocumentLoss]) -> Chart:
    """A sorted strip: one dot a document, the worst at the right and named."""
    ordered = sorted(losses, key=lambda item: item.loss)
    canvas = Canvas(220)
    x = axis([0, len(ordered)], LEFT, WIDTH - RIGHT)
    y = axis([item.loss for item in ordered], canvas.height - BOTTOM, TOP, "%")
    canvas.frame(x, y, "documents, by loss", "loss")
    for place, item in enumerate(ordered):
        canvas.mark(x.at(place + 0.5), y.at(item.loss), "original", f"{item.document}: {item.loss:.2%}", size=2)
    worst = ordered[::-1][:10]
    cells = tuple((item.document, numbers.count(item.tokens), numbers.percent(item.loss)) for item in worst)
    table = Table(columns=("ten worst documents", "tokens", "loss"), rows=cells, right=(1, 2))
    title = "Loss of every document"
    return Chart(title=title, svg=canvas.svg(title, f"{len(ordered)} documents sorted by loss."), table=table)


def divergence(quantiles: Sequence[tuple[float, float]]) -> Chart:
    """The cumulative curve of KL(original || lean) per token, on a log axis."""
    canvas = Canvas(240)
    x = log_axis([nats for _, nats in quantiles], LEFT, WIDTH - RIGHT)
    y = axis([0, 1], canvas.height - BOTTOM, TOP, "%")
    canvas.frame(x, y, "KL(original || lean), nats", "share of sampled tokens")
    canvas.polyline([(x.at(nats), y.at(share)) for share, nats in quantiles], "curve")
    cells = tuple((numbers.percent(share, 1), f"{nats:.3g}") for share, nats in quantiles)
    table = Table(columns=("share of sampled tokens", "nats, at most"), rows=cells, right=(0, 1))
    title = "Divergence from the original, token by token"
    return Chart(title=title, svg=canvas.svg(title, "Cumulative share of tokens by divergence."), table=table)


def pairs(cost: CostRatio) -> Chart:
    """Raw timing pairs in the order of measurement, so that drift shows. A pair is (base, lean)."""
    canvas = Canvas(220)
    ratios = [lean / base for base, lean in cost.pairs]
    x = axis([0, len(ratios)], LEFT, WIDTH - RIGHT)
    bounds = [*ratios, cost.ratio.low, cost.ratio.high]
    y = axis(bounds, canvas.height - BOTTOM, TOP, "x", zero=False)
    canvas.frame(x, y, "pairs, in order of measurement", f"{cost.goal} cost, lean over {cost.against}; dashed: 95%")
    for bound in (cost.ratio.low, cost.ratio.high):
        canvas.line(x.start, y.at(bound), x.end, y.at(bound), "budget")
    for place, ratio in enumerate(ratios):
        canvas.mark(x.at(place + 0.5), y.at(ratio), "lean", f"pair {place + 1}: {ratio:.3f}", size=3)
    write = UNITS[cost.goal]
    cells = tuple((str(place + 1), write(base), write(lean)) for place, (base, lean) in enumerate(cost.pairs))
    table = Table(columns=("pair", cost.against, "lean"), rows=cells, right=(0, 1, 2))
    title = f"Every timing pair, {cost.goal}"
    return Chart(title=title, svg=canvas.svg(title, f"{len(ratios)} pairs in order of measurement."), table=table)


def _bounds(interval: Interval) -> tuple[str, str, str]:
    return numbers.percent(interval.mid), numbers.percent(interval.low), numbers.percent(interval.high)


def _kind(row: LadderRow) -> str:
    return row.verdict if row.kind == "stage" else "original"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _pareto_row(point: ParetoPoint) -> tuple[str, ...]:
    return (
        point.name,
        numbers.times_interval(point.speedup),
        numbers.loss(point.loss),
        numbers.size(point.weights_bytes),
        "yes" if point.on_front else "no",
        ", ".join(point.tied_with) or "-",
    )
