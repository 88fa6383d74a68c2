"""How soon does `snello run` of a packed 1.1 B model say its first word, and how much memory does it hold?

Makes a lean folder of the shape with random INT4 weights (and a tokenizer of made-up words), then runs the command line
in fresh processes with a warm page cache: seconds from the start of the process to the first token, peak resident bytes
beside 1.15 x (weights + keys and values) + 150 MB, and that torch and transformers were not imported.

    python -m benchmarks.run_startup [--shape tinyllama-1.1b]     writes benchmarks/results/run_startup.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from snello.models.lean import write_lean_folder
from snello.models.pack_cache import packed
from snello.models.packed import VECTOR
from snello.models.packed_writer import PackedWriter
from snello.models.shapes import random_model
from snello.models.spec import Attention

RESULTS = Path(__file__).parent / "results" / "run_startup.json"

# Runs in the child: the real command line, with a clock around the first token and a look at what was imported.
CHILD = """
import json, resource, sys, time
from snello.engine import generate as module
first = []
inner = module.Answer._draw
def draw(self, logits):
    result = inner(self, logits)
    first.append(time.time())
    return result
module.Answer._draw = draw
from snello.cli import main
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"code": code, "first_token": first[0], "peak": peak, "loaded": loaded}), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lean"
        sizes = make_folder(path, args.shape, args.context)
        runs = [run_once(path, args.context) for _ in range(args.repeats + 1)][1:]  # the first one warms the page cache
    result = {"command": f"python -m benchmarks.run_startup --shape {args.shape}", **sizes, **summary(runs, sizes)}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def make_folder(path: Path, shape: str, context: int) -> dict[str, int | str]:
    """A lean folder that `snello run` opens; returns its sizes in bytes."""
    model = random_model(shape, "int4")
    weights = packed(model)

    def fill(writer: PackedWriter) -> None:
        for name, layout in weights.layouts.items():
            if layout.format == VECTOR:
                writer.add_vector(name, weights.vector(name))
            else:
                writer.add_packed(name, weights.tensor(name))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_lean_folder(path, model.spec, model, [], fill)
    write_words(path / "tokenizer.json", model.spec.vocab_size)
    mixers = [layer.mixer for layer in model.spec.layers if isinstance(layer.mixer, Attention)]
    cache = sum(2 * 2 * context * mixer.num_kv_heads * mixer.head_dim for mixer in mixers)
    return {"shape": shape, "context": context, "weights_bytes": weights.total_bytes, "cache_bytes": cache}


def write_words(path: Path, vocabulary: int) -> None:
    """A byte-level tokenizer with as many ids as the model: the letters, then made-up words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    vocab |= {f"w{index}": index for index in range(len(letters), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def run_once(path: Path, context: int) -> dict[str, float]:
    words = ["run", str(path), "It was a dark night", "--max-tokens", "8", "--context", str(context), "--seed", "1"]
    before = time.time()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
    facts = json.loads(done.stderr.strip().splitlines()[-1])
    assert facts["code"] in (0, None), done.stderr
    assert facts["loaded"] == [], facts
    return {"seconds": facts["first_token"] - before, "peak": facts["peak"]}


def summary(runs: list[dict[str, float]], sizes: dict[str, int | str]) -> dict[str, object]:
    seconds = [run["seconds"] for run in runs]
    allowed = 1.15 * (int(sizes["weights_bytes"]) + int(sizes["cache_bytes"])) + 150e6
    return {
        "first_token_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "peak_resident_bytes": int(max(run["peak"] for run in runs)),
        "allowed_resident_bytes": int(allowed),
        "torch_or_transformers_imported": False,
    }


if __name__ == "__main__":
    main()
