"""Does reading a prefix from disk beat computing it?

    python -m benchmarks.prefix_disk

writes benchmarks/results/prefix_disk.json. Random weights in the shape of tinyllama-1.1b (INT4), prompts of several
lengths: seconds to the first token when the prompt is computed, when its pages are read from files that the system
still has in memory, and from files that it was told to forget. The three take turns; medians. The first token is the
same each time, and the pages that were read are the computed ones to the byte (an audit of every hit, afterwards).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.engine import Engine
from snello.engine.native import NativeExecutor
from snello.engine.prefix_store import PrefixStore, PrefixStoreOptions, fingerprint_of
from snello.engine.request import SamplingParams
from snello.models import load
from snello.models.shapes import random_model
from snello.models.spec import Deployment

RESULTS = Path(__file__).parent / "results" / "prefix_disk.json"
SHAPE = "tinyllama-1.1b"
LENGTHS = (257, 513, 1025, 2001)
FIRST = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def forget_files(folder: Path) -> None:
    """Has the system drop what it keeps of these files in memory."""
    for path in folder.rglob("*.kv"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class Bench:
    """One executor, and engines that know nothing at their start."""

    def __init__(self, executor: NativeExecutor, folder: Path) -> None:
        self.executor, self.folder = executor, folder
        self._fingerprint = fingerprint_of(executor)
        self._tokenizer = load("demo").tokenizer  # the words do not matter

    def store(self, audit: float = 0.0) -> PrefixStore:
        return PrefixStore(self._fingerprint, self.executor, PrefixStoreOptions(folder=self.folder, audit=audit))

    def first_token(self, prompt: list[int], store: PrefixStore | None) -> tuple[float, int | None]:
        engine = Engine(self.executor, self._tokenizer, store=store)
        started = time.perf_counter()
        chunk = next(engine.stream(prompt, FIRST))
        seconds = time.perf_counter() - started
        engine.clear_cache()
        return seconds, chunk.token_id

    def row(self, prompt: list[int], rounds: int) -> dict[str, Any]:
        keep = self.store()
        self.first_token(prompt, keep)
        keep.close()
        seconds: dict[str, list[float]] = {"computed": [], "from_memory": [], "from_disk": []}
        tokens = set()
        for _ in range(rounds):
            for way, taken in seconds.items():
                store = None if way == "computed" else self.store()
                if way == "from_disk":
                    forget_files(self.folder)
                took, token = self.first_token(prompt, store)
                taken.append(took)
                tokens.add(token)
                if store is not None:
                    assert store.counters.hit == (len(prompt) - 1) // 128 * 128, store.counters
                    store.close()
        audit = self.store(audit=1.0)
        self.first_token(prompt, audit)
        audit.close()
        assert len(tokens) == 1 and audit.counters.audited_pages and not audit.counters.mismatched_pages
        medians = {way: statistics.median(taken) for way, taken in seconds.items()}
        return {
            "prompt": len(prompt),
            "page_megabytes": round((len(prompt) - 1) // 128 * self.executor.page_bytes / 1e6, 2),
            **{f"{way}_seconds": round(value, 4) for way, value in medians.items()},
            "times_faster_from_disk": round(medians["computed"] / medians["from_disk"], 2),
            "times_faster_from_memory": round(medians["computed"] / medians["from_memory"], 2),
            "audited_pages_equal": audit.counters.audited_pages,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = random_model(SHAPE, "int4", positions=4096)
    source = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, NativeExecutor(model, Deployment(context=4096)) as executor:
        bench = Bench(executor, Path(folder))
        bench.first_token(source.integers(3, 30000, 300).tolist(), None)  # warms up
        rows = [bench.row(source.integers(3, 30000, length).tolist(), args.rounds) for length in LENGTHS]
        facts = {"shape": SHAPE, "weights": "int4", "cache": model.spec.cache_format, "threads": executor.threads}
    machine = {"machine": platform.processor() or platform.machine(), "isa": executor.isa}
    results = {"command": "python -m benchmarks.prefix_disk", **machine, **facts, "rounds": args.rounds, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
