"""One comparison: loads ours and all of theirs, lets them run in turn, and judges.

All engines are loaded at once and measured with the same prompts, threads and lengths. The bandwidth is measured by
whoever asks: the command line by the core's own probe, the benchmarks by a program that belongs to no engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snello.engine.resources import free_memory_bytes
from snello.errors import SnelloError
from snello.measure.machine import cpu_name
from snello.measure.peers.contenders import Contender, Subject
from snello.measure.peers.environments import peers_folder
from snello.measure.peers.judge import judge, spread
from snello.measure.peers.quality import Quality, compared
from snello.measure.peers.turns import Bandwidth, Told, Worker, in_turn


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The workload of every turn, and how often.

    Attributes:
        prompt, generate: tokens of each prompt and of each answer.
        streams: answers at once; each has a prompt of its own.
        rounds: each measures everybody twice.
    """

    prompt: int
    generate: int
    threads: int
    streams: int = 1
    rounds: int = 5
    seed: int = 0

    def flags(self) -> list[str]:
        pairs = {
            "prompt": self.prompt,
            "generate": self.generate,
            "streams": self.streams,
            "threads": self.threads,
            "seed": self.seed,
        }
        return [word for name, value in pairs.items() for word in (f"--{name}", str(value))]


def compare(
    subject: Subject,
    contenders: Sequence[Contender],
    lengths: Lengths,
    bandwidth: Bandwidth,
    told: Told,
    quality: Quality | None = None,
) -> dict[str, Any]:
    """Everybody's row, and what was measured around them; with `quality` also what each one's arithmetic costs.

    Raises:
        SnelloError: they do not fit into memory together, or one of them ends.
    """
    _check_memory(subject, contenders)
    load = os.getloadavg()[0]
    workers: dict[str, Worker] = {}
    try:
        for one in contenders:
            command = [*one.command(subject), *lengths.flags()]
            log = peers_folder() / "logs" / f"{one.name}.log"
            workers[one.name] = Worker(one.name, command, log, one.variables)
            workers[one.name].load()
            told(f"loaded {one.name}")
        series = in_turn(workers, lengths.rounds, bandwidth, told)
        divergences = {name: quality.divergences(worker) for name, worker in workers.items()} if quality else {}
    finally:
        for worker in workers.values():
            worker.close()
    rows = judge(contenders, series, lengths.streams, lengths.seed)
    isa = contenders[0].isa
    if quality:
        compared(rows, divergences)
    return {
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        **({"held_to": isa} if isa else {}),
        "load_before": load,
        "threads": lengths.threads,
        "streams": lengths.streams,
        "prompt_tokens": lengths.prompt,
        "generated_tokens": lengths.generate,
        "rounds": lengths.rounds,
        "bandwidth_gigabytes_per_second": spread([limit for one in series.values() for limit in one.bandwidth]),
        **({"kl_positions": quality.positions} if quality else {}),
        "rows": rows,
    }


def _check_memory(subject: Subject, contenders: Sequence[Contender]) -> None:
    """Their models together: caches and what engines keep besides come on top."""
    needed = sum(one.loaded_bytes(subject) for one in contenders)
    free = free_memory_bytes()
    if needed > free:
        message = f"the peers' models take {needed / 1e9:.1f} GB together, and {free / 1e9:.1f} GB are free"
        raise SnelloError(message, "compare with one peer at a time")
