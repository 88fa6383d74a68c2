"""Does Snello decode one stream faster than its peers on this machine, and how near is each to the memory's limit?

Every engine runs the same checkpoint's shape in a worker of its own (`benchmarks/peers`), all loaded at once, and is
measured in turn: A B C, then C B A, for every round, so that drift falls on all alike.  Beside each speed stand the
bytes it reads per token and the share of the memory bandwidth, which a program that belongs to no engine measures
right before and right after each turn: other tenants of a machine move it by half within seconds.  Attention's cache is
left out of the bytes: at these lengths it is under one percent.

    python -m benchmarks.decode_vs_peers --shape tinyllama-1.1b
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import SHAPES
from benchmarks.peers.setup import PEERS, ROOT

RESULTS = ROOT / "benchmarks" / "results" / "decode_vs_peers.json"
BANDWIDTH = ROOT / "build" / "bandwidth" / "bandwidth"
QUIET_LOAD = 0.7
OURS = "snello-int4"
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One engine with one set of settings: the worker, the Python that runs it, and its model."""

    worker: str
    environment: str | None = None  # of the peer; ours runs in the Python that runs this program
    model: str = "{shape}"  # below the models of its peer
    options: tuple[str, ...] = ()
    ours: str = OURS  # what stands against it: as many bits in the body and in the head

    def python(self) -> Path:
        return PEERS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def model_path(self, shape: str) -> Path:
        name = self.model.format(shape=shape)
        return PEERS / "models" / self.environment / name if self.environment else Path(name)

    def missing(self, shape: str) -> str | None:
        """The command that makes what is missing, if anything is."""
        if self.environment is None:
            return None
        if not self.python().exists():
            return f"python -m benchmarks.peers.setup {self.environment}"
        if not self.model_path(shape).exists():
            python = "python" if self.environment == "openvino" else self.python().relative_to(ROOT)
            return (
                f"python -m benchmarks.peers.checkpoint {shape} && "
                f"{python} -m benchmarks.peers.convert_{self.environment} {shape}"
            )
        return None

    def command(self, shape: str, options: argparse.Namespace) -> list[str]:
        lengths = ["--prompt", str(options.prompt), "--generate", str(options.generate)]
        lengths += ["--threads", str(options.threads), "--seed", str(options.seed)]
        module = f"benchmarks.peers.{self.worker}"
        return [str(self.python()), "-m", module, str(self.model_path(shape)), *lengths, *self.options]


OURS_ALL, OURS_INT8 = "snello-int4-all", "snello-int8"


def snello(weights: str, name: str) -> Contender:
    return Contender(worker="worker_snello", options=("--weights", weights), ours=name)


def llamacpp(kind: str, ours: str) -> Contender:
    return Contender(worker="worker_llamacpp", environment="llamacpp", model=f"{{shape}}-{kind}.gguf", ours=ours)


def openvino(variant: str, precision: str, ours: str) -> Contender:
    options, model = ("--precision", precision), f"{{shape}}-{variant}"
    return Contender(worker="worker_openvino", environment="openvino", model=model, options=options, ours=ours)


CONTENDERS = {
    OURS: snello("int4", OURS),
    OURS_ALL: snello("int4-all", OURS_ALL),
    OURS_INT8: snello("int8", OURS_INT8),
    "llamacpp-q4_0": llamacpp("q4_0", OURS),
    "llamacpp-q4_0-all": llamacpp("q4_0-all", OURS_ALL),
    "llamacpp-q8_0": llamacpp("q8_0", OURS_INT8),
    "openvino-int4-f32": openvino("int4", "f32", OURS),
    "openvino-int4-bf16": openvino("int4", "bf16", OURS),
    "openvino-int4-all-f32": openvino("int4-all", "f32", OURS_ALL),
    "openvino-int4-all-bf16": openvino("int4-all", "bf16", OURS_ALL),
    "openvino-int8-f32": openvino("int8", "f32", OURS_INT8),
    "openvino-int8-bf16": openvino("int8", "bf16", OURS_INT8),
}


class Worker:
    """A running worker; it leaves when its input is closed."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.ready = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-5:])
            raise SystemExit(f"{self.name}: the worker ended; the last lines of {self.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def go(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Series:
    """What one contender said: its last description, its speeds and the bandwidth around them, one per measurement."""

    description: dict[str, Any]
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any], bandwidth: float) -> None:
        self.bandwidth += [bandwidth] * len(answer["decode_tokens_per_second"])
        self.decode += answer.pop("decode_tokens_per_second")
        self.prefill += answer.pop("prefill_tokens_per_second")
        answer.pop("first_tokens")
        self.description = answer


def refuse_noise(force: bool) -> None:
    """Timing beside other work measures the other work."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD and not force:
        raise SystemExit(
            f"the machine is busy: its one-minute load is {load:.2f}, above {QUIET_LOAD}. "
            "Wait until it is quiet, or pass --force and distrust the figures."
        )


def measure_bandwidth(*, mebibytes: int = 1024, repeats: int = 15) -> list[dict[str, Any]]:
    """GB/s of the independent program, built first if need be; one entry per way of reading."""
    subprocess.run(["make", "--silent", "-C", str(ROOT / "benchmarks" / "bandwidth")], check=True)
    command = [str(BANDWIDTH), str(mebibytes), str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout)["gigabytes_per_second"]
    return entries


def bandwidth_now(threads: int) -> float:
    """GB/s at this moment with that many threads, or as many as the program has: its best way of reading."""
    entries = measure_bandwidth(mebibytes=512, repeats=3)
    most = min(threads, max(entry["threads"] for entry in entries))
    return max(float(entry["median"]) for entry in entries if entry["threads"] == most)


def run_in_turn(workers: dict[str, Worker], rounds: int, threads: int) -> dict[str, Series]:
    """A B C C B A, so often, with a look at the bandwidth between any two."""
    series = {name: Series(worker.ready) for name, worker in workers.items()}
    for number in range(rounds):
        before = bandwidth_now(threads)
        for name in [*workers, *reversed(workers)]:
            answer = workers[name].go()
            after = bandwidth_now(threads)
            series[name].add(answer, (before + after) / 2)
            before = after
        speeds = ", ".join(f"{name} {series[name].decode[-1]:.1f}" for name in workers)
        print(f"round {number + 1} of {rounds}: {speeds}", file=sys.stderr, flush=True)
    return series


def paired_interval(ours: list[float], theirs: list[float], seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of medians, resampling passes with both sides of each."""
    pairs = list(zip(ours, theirs, strict=True))
    generator = random.Random(seed)
    ratios = []
    for _ in range(RESAMPLES):
        sample = generator.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in sample) / statistics.median(b for _, b in sample))
    ratios.sort()
    return ratios[RESAMPLES // 40], ratios[-1 - RESAMPLES // 40]


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


def judge(series: dict[str, Series], seed: int) -> dict[str, dict[str, Any]]:
    """Each contender's row: speeds, bytes, bandwidth used, and how much faster ours is."""
    rows = {}
    for name, one in series.items():
        row = {**one.description, "decode": spread(one.decode), "prefill": spread(one.prefill)}
        if size := one.description["bytes_per_token"]:
            shares = [speed * size / 1e9 / limit for speed, limit in zip(one.decode, one.bandwidth, strict=True)]
            row["gigabytes_per_second"] = row["decode"]["median"] * size / 1e9
            row["bandwidth_gigabytes_per_second"] = one.bandwidth
            row["share_of_bandwidth"] = statistics.median(shares)
        rival = CONTENDERS[name].ours
        if rival in series and name != rival:
            row["ours"] = rival
            ours = series[rival].decode
            row["ours_over_this"] = statistics.median(ours) / row["decode"]["median"]
            row["ours_over_this_95"] = paired_interval(ours, one.decode, seed)
        rows[name] = row
    return rows


def table(rows: dict[str, dict[str, Any]]) -> Iterable[str]:
    """The rows as fixed-width text, fastest first."""
    yield (
        f"{'engine':<24}{'decode tok/s':>13}{'min':>8}{'max':>8}{'prefill':>9}"
        f"{'MB/token':>10}{'GB/s':>7}{'of limit':>9}{'ours/this':>11}  95%"
    )
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["decode"]["median"]):
        decode = row["decode"]
        line = f"{name:<24}{decode['median']:>13.2f}{decode['min']:>8.2f}{decode['max']:>8.2f}"
        line += f"{row['prefill']['median']:>9.1f}"
        if "share_of_bandwidth" in row:
            line += f"{row['bytes_per_token'] / 1e6:>10.1f}{row['gigabytes_per_second']:>7.1f}"
            line += f"{row['share_of_bandwidth']:>9.0%}"
        else:
            line += f"{'':>26}"
        if "ours_over_this" in row:
            low, high = row["ours_over_this_95"]
            line += f"{row['ours_over_this']:>10.2f}x  {low:.2f}-{high:.2f}"
        yield line


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def save(path: Path, shape: str, result: dict[str, Any]) -> None:
    """Keeps the other shapes' results in the file."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[shape] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Loads every contender and measures all in turn."""
    load = os.getloadavg()[0]
    workers: dict[str, Worker] = {}
    try:
        for name in options.engines:
            command = CONTENDERS[name].command(options.shape, options)
            workers[name] = Worker(name, command, PEERS / "logs" / f"{name}.log")
            print(f"loaded {name}", file=sys.stderr, flush=True)
        series = run_in_turn(workers, options.rounds, options.threads)
    finally:
        for worker in workers.values():
            worker.close()
    around = [limit for one in series.values() for limit in one.bandwidth]
    return {
        "when": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "load_before": load,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "generated_tokens": options.generate,
        "rounds": options.rounds,
        "bandwidth_gigabytes_per_second": spread(around),
        "rows": judge(series, options.seed),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--engines", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=5, help="each measures every engine twice")
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    return parser.parse_args()


def main() -> None:
    options = parse()
    missing = [command for name in options.engines if (command := CONTENDERS[name].missing(options.shape))]
    if missing:
        raise SystemExit("make what is missing first:\n  " + "\n  ".join(dict.fromkeys(missing)))
    refuse_noise(options.force)
    result = compare(options)
    print(f"{options.shape}, {options.threads} threads, prompt {options.prompt}, {options.generate} tokens generated")
    limit = result["bandwidth_gigabytes_per_second"]
    read = f"{limit['median']:.1f} GB/s ({limit['min']:.1f}-{limit['max']:.1f})"
    print(f"memory read by the independent program meanwhile: {read}")
    print("\n".join(table(result["rows"])))
    save(options.out, options.shape, result)
    print(json.dumps({"results": str(options.out)}))


if __name__ == "__main__":
    main()
