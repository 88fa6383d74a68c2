"""One technique alone: plan it (what would change, in bytes), apply it, ask the result something.

Run: python examples/quantize.py [MODEL [OUTPUT]]   (needs snello[optimize])
"""

import sys
from pathlib import Path

import snello
from snello.measure.sizes import linear_bytes
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

name, output = (*sys.argv[1:], *("demo", "lean/demo-int8")[len(sys.argv) - 1 :])
model = snello.load(name)
step = Quantize(weights="int8")
print(f"plan: {linear_bytes(model.spec):,} -> {linear_bytes(step.plan(model.spec)):,} bytes a token")

lean = step.apply(model, Context(output=Path(output), seed=0))
with snello.LLM(lean) as llm:
    print(llm.generate("def area(radius):", temperature=0, max_tokens=16).text)
