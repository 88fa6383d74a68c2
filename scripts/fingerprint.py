"""One line per model and instruction set: a digest of its log-probabilities and answers, to compare machines by.

    python scripts/fingerprint.py MODEL...

Equal lines mean equal bits: of every token's score, and of the tokens and log-probabilities that were chosen, greedily
and at random, of one answer and of several at once. `scripts/arm.sh` compares an ARM machine's with this one's.
"""

from __future__ import annotations

import hashlib
import sys

from snello import LLM
from snello.native import core

PROMPTS = ("def area(radius):", "import os\n", "class Stack:\n    def push(self, item):")


def digest(model: str, isa: str) -> str:
    found = hashlib.sha256()
    with LLM(model, isa=isa, threads=2, context=256) as llm:
        found.update(llm.score(PROMPTS[2] * 4).log_probabilities.tobytes())
        for temperature in (0.0, 1.0):
            answers = llm.generate(list(PROMPTS), temperature=temperature, seed=1, max_tokens=24, logprobs=2)
            for answer in [
                *answers,
                llm.generate(PROMPTS[0], temperature=temperature, seed=1, max_tokens=24, logprobs=2),
            ]:
                found.update(repr(answer.outputs).encode())
    return found.hexdigest()[:16]


def main() -> None:
    for model in sys.argv[1:]:
        for isa in core.available_isas():
            print(digest(model, isa), model, isa, flush=True)


if __name__ == "__main__":
    main()
