"""What does the server cost beside the engine that it runs? Streams of a 1.1 B shape, both in turn, on one machine.

One process opens the model once. In turn (A B B A) the engine alone answers `--streams` prompts that it is handed, and
the server answers as many, streamed over sockets to a client in a process of its own, which only counts bytes and so
takes as little of the machine as a client can. Prompts are random tokens, new in every run.

    python -m benchmarks.serve_overhead [--shape tinyllama-1.1b]      writes benchmarks/results/serve_overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvicorn

from benchmarks.run_startup import make_folder
from snello.engine.engine import Engine, EngineOptions
from snello.engine.request import SamplingParams
from snello.measure.machine import cpu_name
from snello.serve.app import App
from snello.serve.options import ServeOptions
from snello.serve.served import Served, open_models
from snello.serve.server import bind

RESULTS = Path(__file__).parent / "results" / "serve_overhead.json"
FIRST_WORD = 300  # tokens below are single letters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--generate", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client(args.client)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "lean", args.shape, 1024)
        result = measure(f"lean={folder}/lean", args)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(model: str, args: argparse.Namespace) -> dict[str, object]:
    options = ServeOptions(models=(model,), context=1024)
    models = open_models(options)
    app, taken = App(options, models), bind("127.0.0.1", 0)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[taken])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    random = np.random.default_rng(0)

    def prompts() -> list[list[int]]:
        return random.integers(FIRST_WORD, 30000, (args.streams, args.prompt)).tolist()  # type: ignore[no-any-return]

    ways: dict[str, Callable[[], float]] = {
        "engine": lambda: alone(models["lean"], prompts(), args.generate),
        "server": lambda: served(address, prompts(), args.generate),
    }
    for run in ways.values():
        run()
    rates: dict[str, list[float]] = {"engine": [], "server": []}
    for _ in range(args.rounds):
        for name in ("engine", "server", "server", "engine"):
            rates[name].append(args.streams * args.generate / ways[name]())
    server.should_exit = True
    thread.join(10)
    models.close()
    pairs = [server / engine for server, engine in zip(rates["server"], rates["engine"], strict=True)]
    words = f"--shape {args.shape} --streams {args.streams} --prompt {args.prompt} --generate {args.generate}"
    return {
        "command": f"python -m benchmarks.serve_overhead {words}",
        "cpu": cpu_name(),
        "threads": models["lean"].llm.executor.threads,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "all": rates,
        "server_over_engine": {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)},
    }


def alone(served: Served, prompts: list[list[int]], generate: int) -> float:
    """Seconds of the engine by itself, in this thread."""
    engine = Engine(served.llm.executor, served.llm.tokenizer, EngineOptions(max_num_seqs=32))
    started = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=generate, ignore_eos=True, seed=1))
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - started
    engine.clear_cache()
    return seconds


def served(address: str, prompts: list[list[int]], generate: int) -> float:
    """Seconds of the server, as a client of its own process sees them."""
    bodies = [
        {"prompt": prompt, "max_tokens": generate, "ignore_eos": True, "seed": 1, "stream": True} for prompt in prompts
    ]
    command = [sys.executable, "-m", "benchmarks.serve_overhead", "--client", address]
    done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
    return float(done.stdout)


def client(address: str) -> None:
    """Sends all requests of standard input at once, reads until every stream has ended, and writes the seconds."""
    host, port = address.split(":")
    bodies = [json.dumps(body).encode() for body in json.load(sys.stdin)]
    plugs = [socket.create_connection((host, int(port))) for _ in bodies]
    watch, ends = selectors.DefaultSelector(), dict[socket.socket, bytes]()
    started = time.perf_counter()
    for one, body in zip(plugs, bodies, strict=True):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        one.sendall(head.encode() + body)
        watch.register(one, selectors.EVENT_READ)
        ends[one] = b""
    while ends:
        for key, _ in watch.select():
            plug: socket.socket = key.fileobj  # type: ignore[assignment]
            data = plug.recv(1 << 16)
            ends[plug] = (ends[plug] + data)[-64:]
            assert data, f"a stream broke: {ends[plug]!r}"
            if b"data: [DONE]" in ends[plug]:
                watch.unregister(plug)
                del ends[plug]
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
