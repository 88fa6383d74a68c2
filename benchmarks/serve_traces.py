"""How does `snello serve` carry a real service's traffic, beside llama.cpp's own server on the same requests?

Stretches of two traces, shorter and slower (lengths divided, gaps scaled): Azure's conversations, and Mooncake's, whose
prompts share beginnings as they did there. Both servers run random weights in the shape of `tinyllama-1.1b`, INT4 and
Q4_0, with room for as many tokens of keys and values, each alone and started anew, one after the other in one run; the
client is that of `snello bench --serve`. llama.cpp's server runs with the settings that answered most here (`--tune`).

    capacity    16 askers, each asking again as soon as it is answered: requests a second
    both        by the trace's arrivals at 0.7 of llama.cpp's capacity: what both can carry
    ours        at 0.7 of our capacity; whoever hears no end within a minute has gone
    long        the same rate over a longer stretch, ours alone: prefix hits beside what the trace allows

    bash scripts/llama_server.sh                                      llama.cpp's server, once
    python -m benchmarks.serve_traces --tune                          its settings
    python -m benchmarks.serve_traces --trace azure --load capacity   a row; the others follow it

Rows are kept in benchmarks/results/serve_traces.json as they are done; one that is measured again replaces the old.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run_startup import make_folder
from snello.errors import SnelloError
from snello.measure.load.client import Target, ask, model_of
from snello.measure.load.outcome import Objective, summary
from snello.measure.load.plans import Request, by_chance, chosen, from_trace, read_trace
from snello.measure.machine import cpu_name
from snello.measure.peers.environments import peers_folder
from snello.serve.server import bind

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve_traces.json"
TRAFFIC = ROOT.parent / "shared" / "data" / "traffic"
SHAPE, CONTEXT, SEQUENCES = "tinyllama-1.1b", 2048, 32
CACHE_TOKENS = CONTEXT * SEQUENCES  # of keys and values, in two bytes each, ours and theirs
WORDS = range(300, 4000)
OBJECTIVE = Objective(first=3.0, between=0.2)  # somebody waits, then reads at five tokens a second
PATIENCE = 60.0  # seconds
SHARE = 0.7  # of a capacity
ASKERS = 16
TUNING_REQUESTS, CAPACITY_REQUESTS = 16, 48
LONG_SECONDS = 480.0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A file of traffic, and by what its lengths are divided."""

    file: str
    shrink: int
    skip: int = 0


TRACES = {
    "azure": Trace(file="AzureLLMInferenceTrace_conv.csv", shrink=8),
    "mooncake": Trace(file="mooncake_conversation_trace.jsonl", shrink=32),
}
OURS, THEIRS = "snello", "llama.cpp"
CANDIDATES = (  # of llama.cpp: slots, with attention fused
    ("-np", "16", "-fa", "on"),
    ("-np", "32", "-fa", "on"),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", choices=TRACES, default="azure")
    parser.add_argument("--load", choices=("capacity", "both", "ours", "long"), default="capacity")
    parser.add_argument("--tune", action="store_true", help="llama.cpp's settings, by how much each answers")
    parser.add_argument("--seconds", type=float, default=200.0, help="of a replay")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.tune:
        save(["tuning"], tune(options))
    else:
        save([options.trace, options.load], replay(options))


# ---- rows -----------------------------------------------------------------------------------------------------------


def replay(options: argparse.Namespace) -> dict[str, Any]:
    """A row: each server by itself, on the same requests."""
    rate = _rate(options)
    requests = stretch(options, rate)
    names = (OURS,) if options.load == "long" else (OURS, THEIRS)
    words = f"--trace {options.trace} --load {options.load} --seconds {options.seconds:g}"
    prompts, answers = [len(request.prompt) for request in requests], [request.answer for request in requests]
    return {
        "command": f"python -m benchmarks.serve_traces {words}",
        "when": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
        "threads": options.threads,
        "trace": TRACES[options.trace].file,
        "lengths_divided_by": TRACES[options.trace].shrink,
        "requests_per_second_asked": rate,
        "prompt_tokens": {"mean": float(np.mean(prompts)), "max": max(prompts)},
        "answer_tokens": {"mean": float(np.mean(answers)), "max": max(answers)},
        "cache_tokens": CACHE_TOKENS,
        "servers": {name: measured(name, requests, options, rate) for name in names},
    }


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """How much llama.cpp's server answers with each candidate, on the beginning of Azure's trace."""
    rows = chosen(read_trace(TRAFFIC / TRACES["azure"].file), TUNING_REQUESTS, longest=CONTEXT, shrink=8)
    requests = from_trace(rows, WORDS, shrink=8, seed=options.seed)
    found = {}
    for settings in CANDIDATES:
        with llama(settings, options.threads) as address:
            run = _ask(address, requests, streams=ASKERS)
        found[" ".join(settings)] = summary(requests, run, OBJECTIVE, open_loop=False)["requests_per_second"]
        print(settings, found[" ".join(settings)], file=sys.stderr, flush=True)
    return {"command": "python -m benchmarks.serve_traces --tune", "requests_per_second": found}


def _rate(options: argparse.Namespace) -> float | None:
    """Requests a second of an open loop; None: capacity is asked for."""
    if options.load == "capacity":
        return None
    servers = _results().get(options.trace, {}).get("capacity", {}).get("servers")
    if servers is None:
        raise SnelloError("the capacity comes first", f"--trace {options.trace} --load capacity")
    return SHARE * float(servers[THEIRS if options.load == "both" else OURS]["requests_per_second"])


def stretch(options: argparse.Namespace, rate: float | None) -> list[Request]:
    """The trace's first requests that fit into the context."""
    trace = TRACES[options.trace]
    seconds = LONG_SECONDS if options.load == "long" else options.seconds
    count = CAPACITY_REQUESTS if rate is None else max(2, round(rate * seconds))
    rows = chosen(read_trace(TRAFFIC / trace.file), count, skip=trace.skip, longest=CONTEXT, shrink=trace.shrink)
    return from_trace(rows, WORDS, rate=rate, shrink=trace.shrink, seed=options.seed, cache_tokens=CACHE_TOKENS)


def measured(name: str, requests: Sequence[Request], options: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    """What came of these requests at one server."""
    settings = () if name == OURS else best_settings()
    with snello(options.threads) if name == OURS else llama(settings, options.threads) as address:
        run = _ask(address, requests, streams=ASKERS if rate is None else None)
    found = summary(requests, run, OBJECTIVE, open_loop=rate is not None)
    print(f"{name}: {json.dumps(found)}", file=sys.stderr)
    return {**({"settings": " ".join(settings)} if settings else {}), **found}


def best_settings() -> tuple[str, ...]:
    tried = _results().get("tuning", {}).get("requests_per_second")
    if tried is None:
        raise SnelloError("llama.cpp's settings were not tried here", "--tune")
    return tuple(max(tried, key=tried.__getitem__).split())


def _ask(address: str, requests: Sequence[Request], streams: int | None) -> Any:
    target = Target(url=address, timeout=PATIENCE if streams is None else 600.0)
    target = Target(url=address, model=model_of(target), timeout=target.timeout)
    ask(target, by_chance(4, WORDS, prompt=64, answer=8, seed=1 << 20), streams=4)  # pages are touched, threads awake
    return ask(target, requests, streams=streams)


# ---- servers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def snello(threads: int) -> Iterator[str]:
    """Ours, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "lean", SHAPE, CONTEXT)
        command = [sys.executable, "-m", "snello", "serve", f"{folder}/lean", "--context", CONTEXT]
        command += ["--max-num-seqs", SEQUENCES, "--threads", threads, "--port"]
        with running(command, "/health/ready") as address:
            yield address


@contextlib.contextmanager
def llama(settings: Sequence[str], threads: int) -> Iterator[str]:
    """llama.cpp's, with its caches of prompts in its slots and, for those that had to leave them, in memory."""
    program = peers_folder() / "llama-server" / "llama-server"
    model = peers_folder() / "models" / "llamacpp" / f"{SHAPE}-q4_0.gguf"
    for path, hint in ((program, "bash scripts/llama_server.sh"), (model, "python -m benchmarks.streams_vs_peers")):
        if not path.exists():
            raise SnelloError(f"there is no {path}", hint)
    command = [program, "-m", model, "-t", threads, "-tb", threads, "-c", CACHE_TOKENS, "--kv-unified", *settings]
    command += ["--cache-ram", 2048, "--no-ui", "--host", "127.0.0.1", "--port"]
    with running(command, "/health") as address:
        yield address


@contextlib.contextmanager
def running(command: list[Any], health: str, seconds: float = 120.0) -> Iterator[str]:
    """A server in a process of its own, from when it answers `health`. `command` ends where its port goes."""
    with contextlib.closing(bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command), str(port)], stdout=log, stderr=log)
        try:
            until = time.monotonic() + seconds
            while not _healthy(port, health):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SnelloError(f"{command[0]} does not answer", log.read()[-2000:])
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(port: int, path: str) -> bool:
    plug = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        plug.request("GET", path)
        return plug.getresponse().status == 200
    except OSError:
        return False
    finally:
        plug.close()


# ---- results --------------------------------------------------------------------------------------------------------


def _results() -> dict[str, Any]:
    """Those of this processor."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return whole.get(cpu_name(), {})  # type: ignore[no-any-return]


def save(place: Sequence[str], row: dict[str, Any]) -> None:
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    inner = whole.setdefault(cpu_name(), {})
    for name in place[:-1]:
        inner = inner.setdefault(name, {})
    inner[place[-1]] = row
    beside = RESULTS.with_suffix(".new")
    beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    beside.rename(RESULTS)


if __name__ == "__main__":
    try:
        main()
    except SnelloError as error:
        raise SystemExit(f"{error.message} ({error.hint})") from None
