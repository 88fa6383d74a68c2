"""Techniques stacked on a real decoder: what each part of the chain brings, and engine and techniques as two numbers.

    python -m benchmarks.stack --model FOLDER --text held_out.txt [--tokens 300000]
    python -m benchmarks.stack --model demo
    python -m benchmarks.stack --model FOLDER

runs `snello optimize` on one chain: an eighth of the feed-forward channels goes, with `--tokens` what is left is healed
by the original and the text, then INT4 by GPTQ (or INT8) with INT8 keys and values. Adds to
benchmarks/results/stack.json, under the model's name: each stage as it was judged; the chain proved on text that
nothing else read; the chain without each of its parts, with what that part brings in speed (in turn) and costs in loss
(paired); and two numbers for the whole, *engine*, our original over Transformers with as many threads, and
*techniques*, the lean model over our original. The loss is against the original or, of what trains, its control,
whichever is better. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.planner_vs_single import tell, write_held_out
from snello.measure.interval import Interval
from snello.optimize import receipts, run
from snello.optimize.receipts import Receipts
from snello.optimize.recipe import Recipe, Stage, Step

RESULTS = Path(__file__).parent / "results" / "stack.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, help="[modules that demo has never seen; of others what they write]")
    parser.add_argument("--ffn", type=float, default=0.125, help="fraction of the channels that goes")
    parser.add_argument("--weights", choices=["int4", "int8"], default="int4")
    parser.add_argument("--tokens", type=int, default=0, help="of healing; 0 heals nothing")
    parser.add_argument("--rate", type=float, default=2e-4, help="of healing")
    parser.add_argument("--max-loss", default="5%")
    parser.add_argument("--time-budget", type=float, default=1200.0, metavar="SECONDS")
    parser.add_argument("--keep", type=Path, help="a folder for the run, from which it goes on [none]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = (args.keep or Path(folder)) / "lean"
        wishes = {
            "text": write_held_out(Path(folder) / "text") if args.model == "demo" else args.text,
            "goal": "latency",
            "max_loss": args.max_loss,
            "time_budget": args.time_budget,
        }
        result = run.run(args.model, output=output, recipe=recipe(args), on_event=tell, **wishes)
        found = {"sentence": result.sentence, "exit": result.exit_code, **summary(receipts.read(output))}
    chain = f"--ffn {args.ffn:g} --max-loss {args.max_loss}"
    chain += "" if args.weights == "int4" else f" --weights {args.weights}"
    chain += f" --tokens {args.tokens} --rate {args.rate:g}" if args.tokens else ""
    text = f" --text {args.text}" if args.text else ""
    command = f"python -m benchmarks.stack --model {args.model}{text} {chain}"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[Path(args.model).name + (", healed" if args.tokens else "")] = {
        "command": f"{command} --time-budget {args.time_budget:g}",
        **found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def recipe(args: argparse.Namespace) -> Recipe:
    heal = {"tokens": args.tokens, "rate": args.rate, "batch_tokens": 2048, "loss": "forward,text"}
    smaller = (Step("prune", {"ffn": args.ffn}), *([Step("distill", heal)] if args.tokens else []))
    method = {"method": "gptq"} if args.weights == "int4" else {}
    lean = {"weights": args.weights, **method, "cache": "int8"}
    stages = (
        Stage("prune and heal" if args.tokens else "prune", smaller),
        Stage(f"{', '.join(lean.values())} cache", (Step("quantize", lean),)),
    )
    return Recipe(stages=stages)


def summary(found: Receipts) -> dict[str, Any]:
    """From receipts alone."""
    assert found.proof is not None
    proof = found.proof
    facts = {"machine": str(found.run.machine["cpu"]), "seconds": round(proof.seconds)}
    facts |= {"workload": found.run.workload, "max_loss": found.run.max_loss, "proof_tokens": proof.tokens}
    stages = {
        row.name: {"speedup": interval(row.speedup), "loss": interval(row.loss), "verdict": row.verdict}
        for row in proof.ladder
        if row.kind == "stage"
    }
    if proof.evidence is None:
        return {**facts, "stages": stages}
    parts = {part.without: {"gain": interval(part.gain), "added_loss": interval(part.added)} for part in proof.ablation}
    return {
        **facts,
        "engine": interval(proof.engine_speedup) or proof.engine_note,
        "techniques": interval(proof.speedup),
        "loss": interval(proof.evidence.loss),
        "against": proof.evidence.against,
        "controls": {control.name: interval(control.loss) for control in proof.evidence.controls},
        "size_ratio": proof.size_ratio,
        "stages": stages,
        "parts": parts,
        "not_measured": list(proof.not_measured),
    }


def interval(found: Interval | None) -> list[float] | None:
    return None if found is None else [round(value, 5) for value in (found.low, found.mid, found.high)]


if __name__ == "__main__":
    main()
