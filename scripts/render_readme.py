"""Fills the marked blocks of README.md and docs/ from benchmarks/results, so that no figure there was typed by hand.

    python scripts/render_readme.py            rewrites the blocks
    python scripts/render_readme.py --check    exits 1 if a block is not what the results say

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. `demo` is what `make demo` printed, as recorded in
results/demo.txt; the others are functions of that name in `blocks/`, each of which says which file of results it reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from blocks import lean, peers, served, trained
from blocks.values import RESULTS, ROOT

NOT_RUN = re.compile(r"  not run: (cannot pay|its steps alone lose|less of it lost)")


def demo() -> str:
    recorded = RESULTS / "demo.txt"
    if not recorded.exists():
        return "`make demo` shows it on your machine: the ladder, the proof, and both models side by side."
    lines = recorded.read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if not NOT_RUN.search(line)]
    count = len(lines) - len(shown)
    left_out = (
        [f" {count} stages were not run: they could not pay, or their steps alone lost too much"] if count else []
    )
    return "\n".join(["```text", *shown[:-2], *left_out, *shown[-2:], "```"])


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo, "peers": peers.peers},
    "docs/compare.md": {
        "one": peers.one_stream,
        "streams": peers.streams,
        "unrounded": peers.unrounded,
        "quality": peers.quality,
        "mixed": peers.mixed,
        "speculation": peers.speculation,
    },
    "docs/quantize.md": {
        "methods": lean.methods,
        "three_bits": lean.three_bits,
        "headline": lean.headline,
        "scale": lean.scale,
        "outliers": lean.outliers,
    },
    "docs/eviction.md": {"forgetting": lean.forgetting},
    "docs/convolution.md": {"convolved": trained.convolved},
    "docs/adapt.md": {"batched": trained.batched, "prompted": trained.prompted, "taught": trained.taught},
    "docs/attention.md": {"attended": trained.attended, "recalled": trained.recalled, "grouped": trained.grouped},
    "docs/distill.md": {"healed": trained.healed, "halved": trained.halved, "recipe": trained.recipe},
    "docs/planner.md": {"planned": lean.planned, "stacked": trained.stacked},
    "docs/prune.md": {"pruned": lean.pruned},
    "docs/serve.md": {"traces": served.traces},
    "docs/skip.md": {"skipping": lean.skipping},
    "docs/sparsify.md": {"zeros": lean.zeros},
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
