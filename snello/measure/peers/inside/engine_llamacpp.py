"""llama.cpp on a GGUF file, through its C interface; runs in that peer's environment.

The loop is what its own programs do for greedy decoding, less their sampler: prompts one after the other, then one
token of every sequence a step, each the largest logit. A sequence keeps the keys and values of its last prompt, as
llama.cpp's server does: where the next prompt begins the same, only the rest of it is read.
"""

from __future__ import annotations

import ctypes
import re
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

CONTEXT_STEP = 256  # llama.cpp pads its cache to this
BATCH = 512


def bytes_per_token(path: Path) -> int:
    """All tensors once, except that an embedding which is not also the output head gives one row."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" in tensors:
        embedding = tensors["token_embd.weight"]
        total -= int(embedding.n_bytes) - int(embedding.n_bytes) // int(embedding.shape[1])
    return total


def instructions() -> list[str]:
    """Vector instructions that it was compiled for, by its own word."""
    return re.findall(r"(AVX\w*) = 1", llama_cpp.llama_print_system_info().decode())


def open_engine(setup: Any) -> LlamaCpp:
    return LlamaCpp(setup)


class LlamaCpp:
    """One model and one context of just the length that a measurement needs.

    Several sequences have caches of their own rather than one for all, in which each would look at everybody's. Where
    there are several, one more is for prompts that are read alone.
    """

    def __init__(self, setup: Any) -> None:
        path = Path(setup.model)
        repack = setup.options.get("repack", "yes") == "yes"
        sequences = setup.streams + (setup.streams > 1)
        length = -(-(setup.prompt + setup.generate) // CONTEXT_STEP) * CONTEXT_STEP
        self.model = self._load(path, repack)
        self.context = self._open(length * sequences, sequences, max(BATCH, setup.prompt), setup.threads)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(BATCH, setup.prompt, sequences), 0, 1)
        self.held: list[list[int]] = [[] for _ in range(sequences)]
        self.bytes_per_token = bytes_per_token(path)
        self.settings = {
            "file": path.name,
            "threads": setup.threads,
            "context": length,
            "sequences": sequences,
            "repack": repack,
            "instructions": instructions(),
        }

    def _load(self, path: Path, repack: bool) -> Any:
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = repack
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not model:
            raise OSError(f"llama.cpp cannot load {path}")
        return model

    def _open(self, positions: int, sequences: int, rows: int, threads: int) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = positions
        settings.n_seq_max = sequences
        settings.kv_unified = sequences == 1
        settings.n_batch = settings.n_ubatch = rows
        settings.n_threads = settings.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(self.model, settings)
        if not context:
            raise OSError("llama.cpp cannot make a context")
        return context

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "settings": self.settings,
            "bytes_per_token": self.bytes_per_token,
        }

    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        alone = len(prompts) == 1
        sequences = [len(self.held) - 1] if alone else list(range(len(prompts)))
        answers: list[tuple[list[int], list[float]]] = []
        for sequence, prompt in zip(sequences, prompts, strict=True):
            token = self.read(sequence, prompt)
            answers.append(([token], [time.perf_counter()]))
        for step in range(generate - 1):
            position = len(prompts[0]) + step
            rows = [
                (tokens[-1], position, sequence, True) for sequence, (tokens, _) in zip(sequences, answers, strict=True)
            ]
            chosen, moment = self.step(rows), time.perf_counter()
            for (tokens, moments), token in zip(answers, chosen, strict=True):
                tokens.append(token)
                moments.append(moment)
        return answers

    def read(self, sequence: int, prompt: list[int]) -> int:
        """Reads what of the prompt the sequence does not hold, its last token at least; the likeliest next token."""
        held = self.held[sequence]
        same = next(
            (i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), min(len(held), len(prompt))
        )
        start = min(same, len(prompt) - 1)
        self.forget(sequence, start)
        self.held[sequence] = prompt
        last = len(prompt) - 1
        return self.step([(prompt[i], i, sequence, i == last) for i in range(start, len(prompt))])[0]

    def forget(self, sequence: int, start: int) -> None:
        """Gives up the keys and values of a sequence from a position on."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), sequence, start, -1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Feeds (token, position, sequence, wanted); the likeliest next token of each row that is wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status}")
        return [int(self.logits(i).argmax()) for i, row in enumerate(rows) if row[3]]

    def logits(self, row: int) -> np.ndarray:
        """Its logits of a row of the last step, as they lie there until the next."""
        address = ctypes.cast(llama_cpp.llama_get_logits_ith(self.context, row), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(self.words,))

    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray:
        sequence = len(self.held) - 1
        self.held[sequence] = []
        self.read(sequence, prompt)
        found = [self.logits(-1).copy()]
        for position, token in enumerate(answer[:-1], start=len(prompt)):
            self.step([(token, position, sequence, True)])
            found.append(self.logits(-1).copy())
        return np.stack(found)
