"""One engine under a load of requests that arrive by the clock; runs in the environment of that engine.

Reads one JSON document from standard input, {"requests": [[arrival seconds, [token ids], tokens to answer], ...]}, and
writes one: {"engine", "settings", "requests": [[arrival, seconds of each token], ...], "seconds", "step_seconds"}, all
times since the start. The process is alone and one thread feeds the engine between its steps, as a server would.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Protocol

import numpy as np

IDLE_SECONDS = 0.0005
WARM_TOKENS = 24


class Served(Protocol):
    """What the loop needs of an engine."""

    def add(self, number: int, prompt: list[int], generate: int) -> None: ...
    def step(self) -> dict[int, int]: ...  # tokens that each request got
    def busy(self) -> bool: ...
    def describe(self) -> dict[str, Any]: ...


class NoText:
    """A tokenizer for random models: nobody reads their answers."""

    def stream(self) -> NoText:
        return self

    def feed(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Snello:
    def __init__(self, model: str, threads: int, context: int, step_ms: float) -> None:
        from snello.engine.engine import Engine, EngineOptions
        from snello.engine.native import NativeExecutor
        from snello.engine.request import SamplingParams
        from snello.models.shapes import random_model
        from snello.models.spec import Deployment

        shape, weights = model.split(":")
        deployment = Deployment(threads=threads, context=context, streams=32)
        executor = NativeExecutor(random_model(shape, weights), deployment)  # type: ignore[arg-type]
        self.settings = {"model": model, "threads": threads, "step_ms": step_ms, "isa": executor.isa}
        self.engine = Engine(executor, NoText(), EngineOptions(step_ms=step_ms))  # type: ignore[arg-type]
        self.params = SamplingParams
        self.numbers: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], generate: int) -> None:
        params = self.params(max_tokens=generate, ignore_eos=True, temperature=0.0)
        self.numbers[self.engine.add(prompt, params, salt=str(number))] = number  # the salt: nothing is shared

    def step(self) -> dict[int, int]:
        got: dict[int, int] = {}
        for request, chunk in self.engine.step():
            if chunk.error is not None:
                raise chunk.error
            if chunk.token_id is not None:
                got[self.numbers[request]] = got.get(self.numbers[request], 0) + 1
        return got

    def busy(self) -> bool:
        return self.engine.has_work

    def describe(self) -> dict[str, Any]:
        return {"engine": "Snello", "settings": self.settings}


class OpenVino:
    def __init__(self, model: str, threads: int, precision: str) -> None:
        import openvino_genai

        self.genai = openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 4  # GB
        scheduling.max_num_seqs = 32
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduling, "CPU", properties)
        self.settings = {"model": model.rsplit("/", 1)[-1], **properties, "batched": scheduling.max_num_batched_tokens}
        self.handles: dict[int, Any] = {}

    def add(self, number: int, prompt: list[int], generate: int) -> None:
        import openvino

        config = self.genai.GenerationConfig(
            max_new_tokens=generate, min_new_tokens=generate, ignore_eos=True, do_sample=False
        )
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self.handles[number] = self.pipeline.add_request(number, ids, config)

    def step(self) -> dict[int, int]:
        self.pipeline.step()
        got: dict[int, int] = {}
        for number, handle in self.handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    got[number] = got.get(number, 0) + len(output.generated_ids)
        return got

    def busy(self) -> bool:
        return bool(self.pipeline.has_non_finished_requests())

    def describe(self) -> dict[str, Any]:
        version = self.genai.__version__
        return {"engine": "OpenVINO GenAI", "version": version, "settings": self.settings}


def serve(engine: Served, requests: list[tuple[float, list[int], int]]) -> dict[str, Any]:
    """All requests, each added when its time has come."""
    moments: list[list[float]] = [[] for _ in requests]
    start, due = time.perf_counter(), 0
    while due < len(requests) or engine.busy():
        now = time.perf_counter() - start
        while due < len(requests) and requests[due][0] <= now:
            engine.add(due, requests[due][1], requests[due][2])
            due += 1
        if not engine.busy():
            time.sleep(IDLE_SECONDS)
            continue
        got = engine.step()
        now = time.perf_counter() - start
        for number, count in got.items():
            moments[number] += [now] * count
    for (_, _, wanted), times in zip(requests, moments, strict=True):
        if len(times) != wanted:
            raise RuntimeError(f"asked for {wanted} tokens, got {len(times)}")
    seconds = time.perf_counter() - start
    answers = [[request[0], times] for request, times in zip(requests, moments, strict=True)]
    return {"requests": answers, "seconds": seconds}


def unloaded_step(engine: Served, prompt: list[int]) -> float:
    """Seconds between tokens of one answer with nobody else there: the median."""
    engine.add(10**6, prompt, WARM_TOKENS)
    moments: list[float] = []
    while engine.busy():
        if engine.step():
            moments.append(time.perf_counter())
    return float(np.median(np.diff(moments)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("snello", "openvino"))
    parser.add_argument("model", help="SHAPE:WEIGHTS, or the folder of an exported model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    options = parser.parse_args()
    requests = json.load(sys.stdin)["requests"]
    engine: Served
    if options.engine == "snello":
        engine = Snello(options.model, options.threads, options.context, options.step_ms)
    else:
        engine = OpenVino(options.model, options.threads, options.precision)
    step = unloaded_step(engine, requests[0][1])
    json.dump({**engine.describe(), "step_seconds": step, **serve(engine, requests)}, sys.stdout)


if __name__ == "__main__":
    main()
