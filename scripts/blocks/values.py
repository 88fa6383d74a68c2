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


def added(row: Mapping[str, Any]) -> str:
    found = row["increase_nats"]
    return f"{found['mid']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def times(bounds: Sequence[float]) -> str:
    return f"{bounds[1]:.2f} ({bounds[0]:.2f}-{bounds[2]:.2f})"


def span(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
