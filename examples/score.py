"""How surprised a model is by a text: its perplexity, and the token that surprised it most.

Run: python examples/score.py [MODEL]
"""

import sys

import numpy as np

import snello

TEXT = "def area(radius):\n    return 3.14159 * radius * radius\n"

with snello.LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    tokens = llm.encode(TEXT)
    scores = llm.score(TEXT)  # of tokens[1:]
    worst = int(np.argmin(scores.log_probabilities))
    print(f"perplexity {np.exp(-scores.log_probabilities.mean()):.2f} over {len(tokens) - 1} tokens")
    print(f"most surprising: {llm.tokenizer.decode([tokens[worst + 1]])!r}")
