"""One prompt, one answer; then the same answer as it is drawn. Run: python examples/generate.py [MODEL]"""

import sys

import snello

with snello.LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    output = llm.generate("def area(radius):", temperature=0, max_tokens=32)
    print(output.text)
    print(output.usage.completion_tokens, "tokens,", output.finish_reason)

    for chunk in llm.stream("def area(radius):", temperature=0.8, seed=1, max_tokens=32):
        print(chunk.text, end="", flush=True)
    print()
