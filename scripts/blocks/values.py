"""Where results lie, and how a number with its bounds is said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    """What a file of results holds; {} where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def by_seed(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By name: a row and those that differ from it by their seed alone."""
    found: dict[str, list[Any]] = {}
    for name, row in rows.items():
        found.setdefault(name.partition(", seed ")[0], []).append(row)
    return found


def added(*rows: Mapping[str, Any], key: str = "increase_nats") -> str:
    """Of the first with its bounds, of the others in the middle alone."""
    found = rows[0][key]
    others = "".join(f", {row[key]['mid']:+.4f}" for row in rows[1:])
    return f"{found['mid']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}){others}"


def times(bounds: Sequence[float]) -> str:
    return f"{bounds[1]:.2f} ({bounds[0]:.2f}-{bounds[2]:.2f})"


def span(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
