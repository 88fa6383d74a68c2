"""Measures Snello on random weights of a named shape, through its own command line.

Each measurement is one run of `snello bench`, in a process of its own as a user would start it; the model is made
anew every time, outside what is timed.  Its figures are medians over that run's own repetitions.

    echo go | python -m benchmarks.peers.worker_snello tinyllama-1.1b
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Measurement, arguments, claim_stdout, serve

ROOT = Path(__file__).resolve().parents[2]
DETAILS = ("weights_bytes", "bits_per_weight", "ceiling", "first_token_seconds")


class Snello:
    """The command to run, and what it said last."""

    def __init__(self, command: list[str], settings: dict[str, Any]) -> None:
        self.command = command
        self.settings = settings
        self.last: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        known = {name: self.last[name] for name in DETAILS if name in self.last}
        return {
            "engine": "snello",
            "version": self.last.get("version"),
            "settings": self.settings,
            "bytes_per_token": self.last.get("bytes_per_token"),
            "resident_bytes": self.last.get("resident_bytes"),
            **known,
        }

    def measure(self, index: int) -> Measurement:
        done = subprocess.run(self.command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(self.command)} ended with {done.returncode}")
        self.last = json.loads(done.stdout.strip().splitlines()[-1])
        return Measurement(
            prefill_tokens_per_second=self.last["prefill_tokens_per_second"]["median"],
            decode_tokens_per_second=self.last["decode_tokens_per_second"]["median"],
            tokens=[],
        )


def main() -> None:
    lines = claim_stdout()
    parser = arguments(__doc__)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--command", default=shlex.join([sys.executable, "-m", "snello"]), help="how to start it")
    options = parser.parse_args()
    command = [*shlex.split(options.command), "bench", "--shape", options.model.name, "--weights", options.weights]
    command += ["--prompt", str(options.prompt), "--generate", str(options.generate)]
    command += ["--streams", "1", "--threads", str(options.threads), "--json"]
    settings = {"shape": options.model.name, "weights": options.weights, "threads": options.threads}
    serve(Snello(command, settings), options.repeats, lines)


if __name__ == "__main__":
    main()
