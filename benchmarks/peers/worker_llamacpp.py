"""Measures llama.cpp on a GGUF file, through its C interface; runs in that peer's environment.

The loop below is what its own programs do for greedy decoding, less their sampler: one batch for the prompt, then one
token at a time, each the largest logit.

    echo go | build/peers/llamacpp/bin/python -m benchmarks.peers.worker_llamacpp build/peers/models/llamacpp/X.gguf
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Measurement, arguments, claim_stdout, random_prompt, serve

CONTEXT_STEP = 256  # llama.cpp pads its cache to this


def bytes_per_token(path: Path) -> int:
    """All tensors once, except that an embedding which is not also the output head gives one row."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" in tensors:
        embedding = tensors["token_embd.weight"]
        total -= int(embedding.n_bytes) - int(embedding.n_bytes) // int(embedding.shape[1])
    return total


class LlamaCpp:
    """One model and one context of just the length that a measurement needs."""

    def __init__(self, path: Path, *, prompt: int, generate: int, threads: int, seed: int, repack: bool) -> None:
        self.prompt, self.generate, self.seed = prompt, generate, seed
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        model_settings.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        if not self.model:
            raise OSError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-(prompt + generate) // CONTEXT_STEP) * CONTEXT_STEP
        settings.n_batch = settings.n_ubatch = max(512, prompt)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise OSError("llama.cpp cannot make a context")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.bytes_per_token = bytes_per_token(path)
        self.settings = {"file": path.name, "threads": threads, "context": settings.n_ctx, "repack": repack}

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "settings": self.settings,
            "bytes_per_token": self.bytes_per_token,
        }

    def step(self, tokens: list[int]) -> int:
        """Feeds tokens and returns the likeliest next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(self.words,)).argmax())

    def measure(self, index: int) -> Measurement:
        prompt = random_prompt(self.prompt, self.seed, index)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens = [self.step(prompt)]
        first = time.perf_counter()
        while len(tokens) < self.generate:
            tokens.append(self.step(tokens[-1:]))
        end = time.perf_counter()
        return Measurement(
            prefill_tokens_per_second=len(prompt) / (first - start),
            decode_tokens_per_second=(len(tokens) - 1) / (end - first),
            tokens=tokens,
        )


def main() -> None:
    lines = claim_stdout()
    parser = arguments(__doc__)
    parser.add_argument("--no-repack", action="store_true", help="keep the weights in the file's own layout")
    options = parser.parse_args()
    engine = LlamaCpp(
        options.model,
        prompt=options.prompt,
        generate=options.generate,
        threads=options.threads,
        seed=options.seed,
        repack=not options.no_repack,
    )
    engine.measure(-1)
    serve(engine, options.repeats, lines)


if __name__ == "__main__":
    main()
