"""Does the bandwidth that our ceilings rest on agree with a program that shares no code with us?

Both read a gibibyte with every thread, in turn (A B B A), each pass the best of its own repeats; what is compared is
the median over the passes.

    python -m benchmarks.bandwidth_agreement
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.decode_vs_peers import ROOT, measure_bandwidth, refuse_noise
from snello.measure.machine import cpu_name
from snello.native import core

RESULTS = ROOT / "benchmarks" / "results" / "bandwidth_agreement.json"
BYTES = 1 << 30
THREADS = 2  # as many as the other program has
REPEATS = 5


def ours() -> float:
    """GB/s of the core's probe."""
    pool = core.Pool(THREADS)
    try:
        return core.probe_bandwidth(pool, BYTES, REPEATS)
    finally:
        pool.close()


def theirs() -> float:
    """GB/s of the other program, in the order of reading that suits this machine best."""
    return max(float(entry["max"]) for entry in measure_bandwidth() if entry["threads"] == THREADS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each measures both programs twice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    options = parser.parse_args()
    refuse_noise(options.force)
    passes = [measured for _ in range(options.rounds) for measured in ((ours(), theirs()), (theirs(), ours())[::-1])]
    result = {
        "command": "python -m benchmarks.bandwidth_agreement",
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "threads": THREADS,
        "bytes": BYTES,
        "ours_gigabytes_per_second": statistics.median(a for a, _ in passes),
        "independent_gigabytes_per_second": statistics.median(b for _, b in passes),
        "ours_over_independent": statistics.median(a / b for a, b in passes),
        "passes": passes,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "passes"}))


if __name__ == "__main__":
    main()
