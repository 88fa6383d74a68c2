"""Snello, through the engine that serves; runs in our own environment, the one program here that imports snello.

The model is a folder, or the name of a published shape with random weights (`weights=int4`), whose answers are spelled
by the tokenizer of the checkpoint that the peers run (`tokenizer=FOLDER`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from snello import __version__
from snello.engine.engine import Engine, EngineOptions
from snello.engine.native import NativeExecutor
from snello.engine.request import SamplingParams
from snello.measure.sizes import bits_per_weight
from snello.models import load
from snello.models.shapes import random_model
from snello.models.spec import Deployment
from snello.models.tokenizer import load_tokenizer

SPARE_PROMPTS = 2  # room for prompts that are read alone, so that the kept ones are not driven out
WHOLE_STEPS_MS = 1e9  # prompts are read as fast as they can be, though others wait for next tokens


def open_engine(setup: Any) -> Snello:
    return Snello(setup)


class Snello:
    """One model, ready."""

    def __init__(self, setup: Any) -> None:
        weights, cache, spelling = (setup.options.get(name) for name in ("weights", "cache", "tokenizer"))
        context = setup.prompt + setup.generate
        model = random_model(setup.model, weights, positions=context, cache=cache) if weights else load(setup.model)
        room = setup.streams + (SPARE_PROMPTS if setup.streams > 1 else 0)
        deployment = Deployment(threads=setup.threads, context=context, streams=room, max_num_seqs=setup.streams)
        self.executor, self.model = NativeExecutor(model, deployment), model
        random = {"weights": weights, "cache": model.spec.cache_format} if weights else {}
        self.settings = {"model": setup.model, **random, "threads": setup.threads}
        tokenizer = load_tokenizer(Path(spelling)) if spelling else model.tokenizer
        options = EngineOptions(max_num_seqs=setup.streams, step_ms=WHOLE_STEPS_MS)
        self.engine = Engine(self.executor, tokenizer, options)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "snello",
            "version": __version__,
            "settings": {**self.settings, "isa": self.executor.isa},
            "bytes_per_token": self.executor.bytes_per_token(),
            "weights_bytes": self.executor.weights_bytes,
            "bits_per_weight": bits_per_weight(self.executor.weights_bytes, self.executor.spec),
        }

    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        params = SamplingParams(temperature=0.0, max_tokens=generate, ignore_eos=True)
        answers: dict[int, tuple[list[int], list[float]]] = {
            self.engine.add(prompt, params): ([], []) for prompt in prompts
        }
        while self.engine.has_work:
            events, moment = self.engine.step(), time.perf_counter()
            for request, chunk in events:
                if chunk.error is not None:
                    raise chunk.error
                if chunk.token_id is not None:
                    tokens, moments = answers[request]
                    tokens.append(chunk.token_id)
                    moments.append(moment)
        return list(answers.values())

    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray:
        """Read in one go, beside the engine and its pages: the bits are those of one step a token."""
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        deployment = Deployment(threads=self.settings["threads"], context=len(prompt) + len(answer))
        with NativeExecutor(self.model, deployment) as executor:
            return executor.logits([*prompt, *answer[:-1]], list(rows))
