"""Our original beside Transformers on the same workload: the first of the two numbers that a speed-up is.

Imports torch and transformers only when asked. Both sides run with the same threads; Transformers in the checkpoint's
own type, through `generate`'s own cache, without gradients.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from snello.engine.resources import free_memory_bytes, physical_cores
from snello.measure.speed import TIMED_STEPS

if TYPE_CHECKING:
    from snello.models.model import Model


def transformers_latency(
    model: Model, prompt: int, generate: int, *, threads: int | None = None
) -> Callable[[], float] | str:
    """A cost like `Clock.latency`, of Transformers; or why there is none."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return "transformers is not installed"
    if not model.spec.causal or not (model.path / "config.json").exists() or (model.path / "snello.json").exists():
        return "not a checkpoint that Transformers reads as a decoder"
    if 5 * model.num_parameters > free_memory_bytes():
        return "not enough free memory for a second copy"
    peer = _load(model, threads or physical_cores())
    generator = np.random.default_rng(0)

    def cost() -> float:
        tokens = generator.integers(0, model.spec.vocab_size, (1, prompt), dtype=np.int64)
        first, between = _one_stream(peer, tokens, min(TIMED_STEPS, generate - 1))
        return first + (generate - 1) * float(np.median(between))

    return cost


def _load(model: Model, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(model.path, dtype="auto", local_files_only=True).eval()


def _one_stream(peer: Any, tokens: np.ndarray, steps: int) -> tuple[float, list[float]]:
    import torch

    with torch.inference_mode():
        begin = time.perf_counter()
        output = peer(torch.from_numpy(tokens), use_cache=True, logits_to_keep=1)
        moments = [time.perf_counter()]
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = peer(token, past_key_values=output.past_key_values, use_cache=True)
            moments.append(time.perf_counter())
    return moments[0] - begin, np.diff(moments).tolist()
