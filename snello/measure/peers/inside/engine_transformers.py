"""Transformers on the checkpoint itself; runs in that peer's environment.

All prompts are one batch, read in one call; then one token of each a call, over its cache. Its own `generate` does the
same calls and adds its bookkeeping to each.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def open_engine(setup: Any) -> Transformers:
    return Transformers(setup)


class Transformers:
    """One model in one type."""

    def __init__(self, setup: Any) -> None:
        torch.set_num_threads(setup.threads)
        self.settings = {
            "dtype": setup.options.get("dtype", "f32"),
            "attention": "sdpa",
            "threads": setup.threads,
            "torch": torch.__version__,
        }
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            setup.model, dtype=DTYPES[self.settings["dtype"]], attn_implementation="sdpa"
        ).eval()

    def bytes_per_token(self) -> int:
        """All parameters once, except that an embedding which is not also the output head gives one row."""
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        embedding = self.model.get_input_embeddings().weight
        if embedding is not self.model.get_output_embeddings().weight:
            total -= (embedding.shape[0] - 1) * embedding.shape[1] * embedding.element_size()
        return int(total)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "Transformers",
            "version": transformers.__version__,
            "settings": self.settings,
            "bytes_per_token": self.bytes_per_token(),
        }

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        cache, rows = transformers.DynamicCache(config=self.model.config), torch.tensor(prompts)
        for _ in range(generate):
            logits = self.model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            rows, moment = logits[:, -1].argmax(-1, keepdim=True), time.perf_counter()
            for (tokens, moments), token in zip(answers, rows[:, 0].tolist(), strict=True):
                tokens.append(token)
                moments.append(moment)
        return answers

    @torch.inference_mode()
    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray:
        cache, found, rows = transformers.DynamicCache(config=self.model.config), [], prompt
        for token in answer:
            logits = self.model(torch.tensor([rows]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            found.append(logits[0, -1].float().numpy())
            rows = [token]
        return np.stack(found)
