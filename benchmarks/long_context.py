"""What attention that costs less saves on long texts, and what it loses, on our own engine and without healing.

    python -m benchmarks.long_context speed
    python -m benchmarks.long_context loss --model FOLDER --text held_out.txt

each replaces its part of benchmarks/results/long_context.json. `speed` needs a quiet machine for two minutes: an
encoder of MiniLM's shape (random weights) at 512 to 4,096 tokens with full attention and as a Longformer, in turn, and
a decoder's next token behind 512 to 32,768 others with full attention and with a window. `loss` reads one long text by
position: full attention, a window with and without sinks, and truncation (a new beginning every so many tokens).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.native import NativeExecutor
from snello.engine.pages import Retention
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native import core
from snello.techniques.attention import CheaperAttention
from snello.techniques.base import Context

RESULTS = Path(__file__).parent / "results" / "long_context.json"
ENCODER = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
ENCODER |= {"intermediate_size": 1536, "max_position_embeddings": 512}
DECODER = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "intermediate_size": 768, "max_position_embeddings": 40_960}
LENGTHS, BEHIND = (512, 1024, 2048, 4096), (512, 2048, 8192, 32_768)
ENCODER_WINDOW, DECODER_WINDOW, SINKS, TURNS, STEPS = 512, 1024, 4, 5, 16
LOSS_WINDOW, TEXTS, EDGES = 256, 8, (0, 256, 512, 1024, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("speed", "loss"))
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        part = {"speed": speed, "loss": loss}[args.part]
        results[args.part] = part(args, Path(folder))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


# ---- speed ----


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = {"command": "python -m benchmarks.long_context speed", "turns": TURNS}
    return {**command, "encoder": encoder_speed(folder), "decoder": decoder_speed(folder)}


def encoder_speed(folder: Path) -> dict[str, Any]:
    """Seconds and bytes per token, by length: the full one is the same weights with its positions repeated alike."""
    random_checkpoint(folder / "short", "BertModel", ENCODER)
    random_checkpoint(folder / "full", "BertModel", ENCODER | {"max_position_embeddings": LENGTHS[-1]})
    options = CheaperAttention(window=ENCODER_WINDOW, positions=LENGTHS[-1])
    near = options.apply(load(folder / "short"), Context(output=folder / "near"))
    rows: dict[str, Any] = {}
    with NativeExecutor(load(folder / "full")) as full, NativeExecutor(near) as other:
        for length in LENGTHS:
            tokens = np.random.default_rng(0).integers(1, 8192, length).astype(np.int32)
            turns = in_turn(partial(full.encode, tokens), partial(other.encode, tokens))
            rows[str(length)] = timed(turns, length)
        memory = {"full": memory_bytes(full), "near": memory_bytes(other)}
    return {"window": ENCODER_WINDOW, "shape": ENCODER, "rows": rows, "memory_for_the_longest": memory}


def memory_bytes(executor: NativeExecutor) -> dict[str, int]:
    """What an executor keeps for a text of its whole context, besides weights: both grow with it alone."""
    pages = -(-executor.context // core.PAGE_POSITIONS)
    return {"pages": executor.page_bytes * pages, "registers": executor.program.arena_bytes}


def decoder_speed(folder: Path) -> dict[str, Any]:
    """Seconds of the next token behind others, and the pages that a sequence must hold."""
    random_checkpoint(folder / "decoder", "LlamaForCausalLM", DECODER)
    model = load(folder / "decoder")
    options = CheaperAttention(window=DECODER_WINDOW, sinks=SINKS)
    near = options.apply(model, Context(output=folder / "near-decoder"))
    rows: dict[str, Any] = {}
    deployment = Deployment(context=BEHIND[-1] + 2 * TURNS * STEPS + 1024)
    with NativeExecutor(model, deployment) as full, NativeExecutor(near, deployment) as other:
        for behind in BEHIND:
            tokens = np.random.default_rng(0).integers(1, 8192, behind).astype(np.int32)
            with full.session() as one, other.session() as two:
                one.feed(tokens), two.feed(tokens)
                turns = in_turn(partial(steps, one), partial(steps, two))
            needed = [Retention().peak(behind, 1), Retention(window=DECODER_WINDOW, sinks=SINKS).peak(behind, 1)]
            rows[str(behind)] = {**timed(turns, STEPS), "pages_needed": needed}
    return {"window": DECODER_WINDOW, "sinks": SINKS, "shape": DECODER, "rows": rows}


def steps(session: Any) -> None:
    for _ in range(STEPS):
        session.feed([7])


def in_turn(full: Callable[[], Any], near: Callable[[], Any]) -> list[tuple[float, float]]:
    full(), near()
    return [(seconds(full), seconds(near)) for _ in range(TURNS)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed(turns: list[tuple[float, float]], tokens: int) -> dict[str, Any]:
    ratios = sorted(full / near for full, near in turns)
    medians = [statistics.median(turn[side] for turn in turns) / tokens * 1e6 for side in (0, 1)]
    return {
        "full_us_a_token": round(medians[0], 2),
        "near_us_a_token": round(medians[1], 2),
        "times_as_fast": [round(statistics.median(ratios), 3), round(ratios[0], 3), round(ratios[-1], 3)],
    }


def random_checkpoint(path: Path, architecture: str, options: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    kind(kind.config_class(**options)).save_pretrained(path)


# ---- loss ----


def loss(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Nats a token by position in one text of EDGES[-1] tokens after another."""
    model = load(args.model)
    ids = np.array(model.tokenizer.encode(args.text.read_text(encoding="utf-8")), np.int32)
    length = EDGES[-1]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, len(ids) // TEXTS)][:TEXTS]
    made = {"full attention": model}
    for sinks in (0, SINKS):
        options = CheaperAttention(window=LOSS_WINDOW, sinks=sinks)
        made[f"window {LOSS_WINDOW}, {sinks} sinks"] = options.apply(model, Context(output=folder / f"sinks{sinks}"))
    rows = {name: by_position(score(each, pieces)) for name, each in made.items()}
    rows[f"cut every {LOSS_WINDOW}"] = by_position(score(model, pieces, cut=LOSS_WINDOW))
    names = [f"{begin}-{end}" for begin, end in itertools.pairwise(EDGES)]
    command = f"python -m benchmarks.long_context loss --model {args.model} --text {args.text}"
    facts = {"texts": len(pieces), "positions": names, "trained_positions": model.spec.max_positions}
    return {"command": command, **facts, "rows": rows}


def score(model: Model, pieces: list[np.ndarray], cut: int | None = None) -> np.ndarray:
    """(texts, positions - 1): minus log-probabilities; with `cut` each token sees what came since the last cut."""
    longer = dataclasses.replace(model, spec=dataclasses.replace(model.spec, max_positions=EDGES[-1]))
    found = []
    with NativeExecutor(longer, Deployment(context=EDGES[-1])) as executor:
        for piece in pieces:
            parts = [piece] if cut is None else [piece[max(0, at - 1) : at + cut] for at in range(0, len(piece), cut)]
            found.append(-np.concatenate([executor.score(part).log_probabilities for part in parts]))
    return np.stack(found)


def by_position(nats: np.ndarray) -> list[float]:
    return [round(float(nats[:, max(0, a - 1) : b - 1].mean()), 4) for a, b in itertools.pairwise(EDGES)]


if __name__ == "__main__":
    main()
