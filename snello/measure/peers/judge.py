"""Who was faster, by how much, and how surely: medians, spreads, and the ratio to ours with a paired interval.

Turns are paired by their place in the order A B C C B A, so what happened to the machine meanwhile happened to both
sides of a pair. Ratios are of medians; their interval redraws pairs. Beside each speed stand the bytes of weights that
a step reads (the keys and values of attention are left out) and the share of the bandwidth measured around that turn.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from snello.measure.interval import Interval
from snello.measure.peers.contenders import Contender
from snello.measure.peers.turns import Series

RESAMPLES = 2000
GB = 1e9


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Ratio of the medians with its two-sided 95% bootstrap interval: both sides of each pair are redrawn together."""
    pairs = list(zip(ours, theirs, strict=True))
    generator = random.Random(seed)
    ratios = sorted(_ratio(generator.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return Interval(ratios[RESAMPLES // 40], _ratio(pairs), ratios[-1 - RESAMPLES // 40])


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def judge(
    contenders: Sequence[Contender], series: Mapping[str, Series], streams: int = 1, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each contender's row: speeds, bytes, bandwidth used, and how much faster ours is."""
    return {one.name: _row(one, series, streams, seed) for one in contenders}


def _row(contender: Contender, series: Mapping[str, Series], streams: int, seed: int) -> dict[str, Any]:
    own, ours = series[contender.name], series.get(contender.ours)
    row = {**own.description, "decode": spread(own.decode), "prefill": spread(own.prefill)}
    if size := own.description.get("bytes_per_token"):
        used = [speed / streams * size / GB for speed in own.decode]
        row["gigabytes_per_second"] = statistics.median(used)
        row["bandwidth_gigabytes_per_second"] = own.bandwidth
        row["share_of_bandwidth"] = statistics.median(a / b for a, b in zip(used, own.bandwidth, strict=True))
    if ours is not None and contender.peer is not None:
        decode, prefill = paired_ratio(ours.decode, own.decode, seed), paired_ratio(ours.prefill, own.prefill, seed)
        row["ours"] = contender.ours
        row["ours_over_this"], row["ours_over_this_95"] = decode.mid, [decode.low, decode.high]
        row["prefill_ours_over_this"], row["prefill_ours_over_this_95"] = prefill.mid, [prefill.low, prefill.high]
    return row
