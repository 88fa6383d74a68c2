"""Fills the marked blocks of README.md and docs/ from benchmarks/results, so that no figure there was typed by hand.

    python scripts/render_readme.py            rewrites the blocks
    python scripts/render_readme.py --check    exits 1 if a block is not what the results say

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. `demo` is what `make demo` printed, as recorded in
results/demo.txt; `peers` are ours over the best of others in results/decode_vs_peers.json, those that we lose included;
`methods` and `outliers`, of docs/quantize.md, are results/quantize_methods.json and results/outliers.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = {"snello-int4": "INT4, head INT8", "snello-int4-all": "INT4", "snello-int8": "INT8"}


def demo() -> str:
    recorded = RESULTS / "demo.txt"
    if not recorded.exists():
        return "`make demo` shows it on your machine: the ladder, the proof, and both models side by side."
    return f"```text\n{recorded.read_text(encoding='utf-8').strip()}\n```"


def peers() -> str:
    measured = RESULTS / "decode_vs_peers.json"
    whole = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
    if not whole:
        return "`python -m benchmarks.decode_vs_peers` measures Snello and its peers in turn, on your machine."
    one = next(iter(whole.values()))
    said = f"One stream, {one['threads']} threads, {one['processor']}, {one['when']}; each shape in turn in one run."
    lines = [
        "| shape | weights | tokens a second | of the memory's limit | over llama.cpp (95%) | over OpenVINO (95%) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, result in sorted(whole.items(), reverse=True):
        lines += [f"| {shape} | {_pairs(result['rows'], ours, bits)} |" for ours, bits in WEIGHTS.items()]
    told = "Ratios at the same bits, the other at its best settings; all in `benchmarks/results/decode_vs_peers.json`."
    return "\n".join([said, "", *lines, "", told])


def _pairs(rows: Mapping[str, Any], ours: str, bits: str) -> str:
    """Our row, and how much faster it is than the fastest row of each peer with as many bits."""
    against = [
        max(
            (row for name, row in rows.items() if name.startswith(peer) and row.get("ours") == ours),
            key=lambda row: row["decode"]["median"],
        )
        for peer in ("llamacpp", "openvino")
    ]
    row = rows[ours]
    return " | ".join([bits, _speed(row), _share(row), *map(_ratio, against)])


def _speed(row: Mapping[str, Any]) -> str:
    decode = row["decode"]
    return f"{decode['median']:.1f} ({decode['min']:.1f}-{decode['max']:.1f})"


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else "-"


def _ratio(row: Mapping[str, Any]) -> str:
    if "ours_over_this" not in row:
        return "-"
    low, high = row["ours_over_this_95"]
    return f"{row['ours_over_this']:.2f} ({low:.2f}-{high:.2f})"


def methods() -> str:
    measured = _read("quantize_methods.json")
    lines = ["| | added loss (95% bounds) | KL from the original | weights |", "|---|---:|---:|---:|"]
    lines.append(f"| original, BF16 | | | {measured['original_bytes'] / 1e6:.1f} MB |")
    lines += [
        f"| {name} | {_added(row)} | {row['kl_nats']:.4f} | {row['weights_bytes'] / 1e6:.1f} MB |"
        for name, row in measured["rows"].items()
    ]
    told = f"{measured['tokens']:,} held-out tokens, {measured['calibration_tokens']:,} of calibration"
    return "\n".join([f"{told}; `{measured['command']}`:", "", *lines])


def outliers() -> str:
    measured = _read("outliers.json")
    models = measured["rows"]
    lines = [f"| | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for recipe in next(iter(models.values())):
        lines.append(f"| {recipe} | {' | '.join(_added(rows[recipe]) for rows in models.values())} |")
    return "\n".join([f"Added loss on {measured['tokens']:,} tokens; `{measured['command']}`:", "", *lines])


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _added(row: Mapping[str, Any]) -> str:
    found = row["increase_nats"]
    return f"{found['mid']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo, "peers": peers},
    "docs/quantize.md": {"methods": methods, "outliers": outliers},
}


def rendered(name: str, text: str) -> str:
    """`text` of this file with every block filled anew."""
    for block, fill in BLOCKS[name].items():
        pattern = re.compile(rf"(<!-- begin {block} -->\n).*?(<!-- end {block} -->)", re.DOTALL)
        assert pattern.search(text), f"{name} has no block {block}"
        content = fill()
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    stale = 0
    for name in BLOCKS:
        before = (ROOT / name).read_text(encoding="utf-8")
        after = rendered(name, before)
        stale += before != after
        if "--check" not in sys.argv:
            (ROOT / name).write_text(after, encoding="utf-8")
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
