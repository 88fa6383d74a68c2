"""CTranslate2 on a converted model; runs in that peer's environment.

One call answers all prompts together, as its own callers batch; it reads them anew each time, for it keeps no prompts
from one call to the next. The moment of a token is that of its callback.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

import ctranslate2
import numpy as np

EMBEDDING, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"


def variables(path: Path) -> dict[str, tuple[int, int]]:
    """Rows and bytes of each variable in a `model.bin`, in the order of the file."""

    def number(file: BinaryIO, kind: str) -> int:
        return int(struct.unpack(kind, file.read(struct.calcsize(kind)))[0])

    found: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        number(file, "I")  # version of the format
        file.seek(number(file, "H"), 1)  # what kind of model
        number(file, "I")  # its revision
        for _ in range(number(file, "I")):
            name = file.read(number(file, "H"))[:-1].decode()
            shape = [number(file, "I") for _ in range(number(file, "B"))]
            number(file, "B")  # type
            size = number(file, "I")
            found[name] = (shape[0] if shape else 1, size)
            file.seek(size, 1)
    return found


def bytes_per_token(path: Path) -> int:
    """All variables once, except that an embedding which is not also the output head gives one row."""
    found = variables(path)
    total = sum(size for _, size in found.values())
    if EMBEDDING in found and HEAD in found:
        rows, size = found[EMBEDDING]
        total -= size - size // rows
    return total


def open_engine(setup: Any) -> CTranslate2:
    return CTranslate2(setup)


class CTranslate2:
    """One model, computed in the type that it was converted to."""

    def __init__(self, setup: Any) -> None:
        self.folder = Path(setup.model)
        self.threads = setup.threads
        self.generator = ctranslate2.Generator(
            str(self.folder), device="cpu", compute_type="default", inter_threads=1, intra_threads=setup.threads
        )
        self.words: list[str] = json.loads((self.folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.bytes_per_token = bytes_per_token(self.folder / "model.bin")

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "CTranslate2",
            "version": ctranslate2.__version__,
            "settings": {
                "model": self.folder.name,
                "compute_type": self.generator.compute_type,
                "intra_threads": self.threads,
            },
            "bytes_per_token": self.bytes_per_token,
        }

    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]

        def came(result: Any) -> bool:
            tokens, moments = answers[result.batch_id]
            tokens.append(result.token_id)
            moments.append(time.perf_counter())
            return False

        self.generator.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            max_length=generate,
            min_length=generate,
            include_prompt_in_result=False,
            callback=came,
        )
        return answers

    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray:
        """Read in one go: it offers no step with a given token, and its cache is of the type that it computes in."""
        logits = np.array(self.generator.forward_batch([[*prompt, *answer[:-1]]]), dtype=np.float32)
        return logits[0, len(prompt) - 1 :]
