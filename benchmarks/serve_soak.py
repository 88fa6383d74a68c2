"""Does a server that is asked for more than it can do stay whole? Minutes of 1.5 times its capacity, then a count.

A server in a process of its own, with keys and a cache on disk. First its capacity: as many askers as it has slots,
each asking again as soon as it is answered. Then requests come by chance (Poisson) at `--load` times that rate: whole
and streamed, one answer or three, new and settled ones, prompts that share a beginning; some hang up, some are of a key
that asks too much. It fails where a status is not 200, 429 or 503, a refusal lacks Retry-After, a stream has no end, an
answer has not its tokens, a page or a slot is held when all have gone, a step failed, or memory still grows at the end.

    python -m benchmarks.serve_soak [--minutes 5]      writes benchmarks/results/serve_soak.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snello.measure.machine import cpu_name

RESULTS = Path(__file__).parent / "results" / "serve_soak.json"
KEYS = ("sk-one", "sk-two", "sk-three")  # the first asks most
MODEL, SLOTS, QUEUE_TOKENS = "demo", 4, 6000
TIMEOUT = 60.0  # seconds; who hears nothing for so long calls it a hang
MOST_THREADS = 200
GROWTH_SHARE = 0.05  # of its memory, that the last half of the time may add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (process, address):
        result = soak(process, address, args)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["faults"]:
        raise SystemExit(f"faults: {', '.join(result['faults'])}")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its address."""
    (folder / "keys").write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()} {key[3:]}\n" for key in KEYS))
    command = [sys.executable, "-m", "snello", "serve", MODEL, "--port", "0", "--json", "--keys", folder / "keys"]
    command += ["--threads", "1", "--max-num-seqs", str(SLOTS), "--queue-tokens", str(QUEUE_TOKENS)]
    command += ["--cache", folder / "cache", "--cache-bytes", "20000000"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["address"].removeprefix("http://")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def soak(process: subprocess.Popen[str], address: str, args: argparse.Namespace) -> dict[str, Any]:
    capacity = measure_capacity(address, args.capacity_seconds)
    people = People(address)
    memory = people.come(process.pid, capacity * args.load, args.minutes * 60)
    ended = settle(address)
    second_half = memory[len(memory) // 2 :]
    half = max(1, len(second_half) // 2)
    growth = statistics.median(second_half[-half:]) - statistics.median(second_half[:half])
    faults: dict[str, float] = dict(people.faults)
    if process.poll() is not None:
        faults["the server ended"] = 1
    faults |= {f"held at the end: {name}": value for name, value in ended.items() if value}
    if growth > GROWTH_SHARE * statistics.median(second_half):
        faults["memory grows"] = round(growth)
    return {
        "command": f"python -m benchmarks.serve_soak --minutes {args.minutes:g} --load {args.load:g}",
        "cpu": cpu_name(),
        "capacity_requests_per_second": capacity,
        "asked_per_second": capacity * args.load,
        "requests": sum(people.seen.values()),
        "seen": dict(sorted(people.seen.items())),
        "resident_bytes": {"first": memory[0], "most": max(memory), "last": memory[-1], "last_half_growth": growth},
        "at_the_end": ended,
        "faults": faults,
    }


# ---- requests -------------------------------------------------------------------------------------------------------


def body(source: random.Random) -> dict[str, Any]:
    """A request as some people's are: beginnings that many share, ends of their own."""
    beginning = [300 + source.randrange(3)] * source.choice([0, 64, 160])
    prompt = [*beginning, *(source.randrange(300, 3000) for _ in range(source.randint(4, 60)))]
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": source.choice([8, 24, 80]), "ignore_eos": True}
    if source.random() < 0.2:
        asked["n"] = 3
    if source.random() < 0.3:  # settled, and asked more than once
        asked |= {"prompt": [300 + source.randrange(20)] * 40, "temperature": 0}
    return asked | {"stream": source.random() < 0.5}


def ask(address: str, asked: dict[str, Any], key: str, leave: float | None = None) -> tuple[str, str | None]:
    """How it ended, and what was wrong with that. `leave`: seconds after which the asker hangs up."""
    plug = http.client.HTTPConnection(address, timeout=TIMEOUT if leave is None else leave)
    try:
        plug.request("POST", "/v1/completions", json.dumps(asked), {"authorization": f"Bearer {key}"})
        response = plug.getresponse()
        content = response.read()
    except TimeoutError:
        return ("hung up", None) if leave is not None else ("nothing", "an answer did not come")
    except (OSError, http.client.HTTPException) as error:
        return "broken", f"a connection broke: {type(error).__name__}"
    finally:
        plug.close()
    return judge(response, content, asked)


def judge(response: http.client.HTTPResponse, content: bytes, asked: dict[str, Any]) -> tuple[str, str | None]:
    how = str(response.status)
    if response.status in (429, 503):
        return how, None if response.headers.get("retry-after", "").isdecimal() else f"{how} without Retry-After"
    if response.status != 200:
        return how, f"a status of {how}"
    if asked["stream"]:
        return how, None if content.endswith(b"data: [DONE]\n\n") else "a stream without an end"
    tokens = json.loads(content)["usage"]["completion_tokens"]
    wanted = asked["max_tokens"] * asked.get("n", 1)
    return how, None if tokens == wanted else f"{tokens} tokens of {wanted}"


def measure_capacity(address: str, seconds: float) -> float:
    """Requests a second that are answered where an asker for each slot never rests."""
    until, done = time.monotonic() + seconds, collections.Counter[str]()

    def asker(number: int) -> None:
        source = random.Random(number)
        while time.monotonic() < until:
            done[ask(address, body(source), KEYS[number % len(KEYS)])[0]] += 1

    threads = [threading.Thread(target=asker, args=(number,)) for number in range(SLOTS)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done["200"], f"nothing was answered: {dict(done)}"
    return done["200"] / (time.monotonic() - started)


class People:
    """Who come by chance, each in a thread; what they saw."""

    def __init__(self, address: str) -> None:
        self._address, self._source = address, random.Random(0)
        self._lock, self._inside = threading.Lock(), threading.Semaphore(MOST_THREADS)
        self.seen, self.faults = collections.Counter[str](), collections.Counter[str]()

    def come(self, pid: int, rate: float, seconds: float) -> list[int]:
        """Bytes that the server has of memory, each second."""
        started = due = looked = time.monotonic()
        memory, threads = [resident(pid)], list[threading.Thread]()
        while due < started + seconds:
            due += self._source.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            if self._inside.acquire(timeout=TIMEOUT):
                threads.append(threading.Thread(target=self._one, args=(self._source.random(),)))
                threads[-1].start()
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                memory.append(resident(pid))
                threads = [thread for thread in threads if thread.is_alive()]
        for thread in threads:
            thread.join(2 * TIMEOUT)
        return [*memory, resident(pid)]

    def _one(self, seed: float) -> None:
        source = random.Random(seed)
        key = KEYS[0] if source.random() < 0.7 else source.choice(KEYS[1:])
        leave = source.uniform(0.005, 0.3) if source.random() < 0.1 else None
        try:
            how, wrong = ask(self._address, body(source), key, leave)
            with self._lock:
                self.seen[how] += 1
                if wrong is not None:
                    self.faults[wrong] += 1
        finally:
            self._inside.release()


# ---- the server -----------------------------------------------------------------------------------------------------


def settle(address: str, seconds: float = 20.0) -> dict[str, float]:
    """What is still held when all have gone: nothing, soon."""
    until = time.monotonic() + seconds
    while True:
        status = get(address, "/status")
        counts, queue = status["models"][0]["counts"], status["models"][0]["queue"]
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage", "failed_steps")
        held = {name: counts[name] for name in names}
        held |= {"queue_tokens": queue["tokens"], "requests_inside": status["requests_inside"]}
        if not any(held.values()) or time.monotonic() > until:
            return held
        time.sleep(0.1)


def get(address: str, path: str) -> Any:
    plug = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        plug.request("GET", path, headers={"authorization": f"Bearer {KEYS[1]}"})
        return json.loads(plug.getresponse().read())
    finally:
        plug.close()


def resident(pid: int) -> int:
    """Bytes of memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
