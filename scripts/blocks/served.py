"""Blocks about servers on recorded traffic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocks.values import read

TRACES = {"azure": "Azure, conversations", "mooncake": "Mooncake, conversations"}
LOADS = {
    "capacity": "16 askers without rest",
    "both": "0.7 of what llama.cpp's carries",
    "ours": "0.7 of what ours carries",
    "long": "the same, longer",
}


def traces() -> str:
    """Each server on the same requests, one after the other in one run; a table for each processor."""
    head = (
        "| trace, load | server | answered | tokens a second | first token p50 / p90 / p99 | between tokens | in time "
    )
    head = f"{head}| known of prompts (could be) |\n|---|---|---|---|---|---|---|---|"
    tables = []
    for processor, measured in read("serve_traces.json").items():
        lines = [f"{processor}:", "", head]
        for trace, said in TRACES.items():
            for load, words in LOADS.items():
                servers = measured.get(trace, {}).get(load, {}).get("servers", {})
                lines += [f"| {said}; {words} | {_served(name, row)} |" for name, row in servers.items()]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or "`python -m benchmarks.serve_traces` replays both traces here and at llama.cpp's."


def _served(name: str, row: Mapping[str, Any]) -> str:
    speed = f"{row['prompt_tokens_per_second']:.0f} read, {row['answer_tokens_per_second']:.0f} drawn"
    in_time = f"{row['good']} ({row['goodput_requests_per_second']:.2f} a second)"
    known = "-" if row["cached_share"] is None else f"{row['cached_share']:.1%} ({row['shared_share']:.1%})"
    answered = f"{row['answered']} of {row['requests']}"
    cells = (name, answered, speed, _spread(row["first_token_seconds"]), _spread(row["between_tokens_seconds"]))
    return " | ".join((*cells, in_time, known))


def _spread(seconds: Mapping[str, float] | None) -> str:
    return "-" if seconds is None else " / ".join(f"{seconds[part]:.2f}" for part in ("p50", "p90", "p99")) + " s"
