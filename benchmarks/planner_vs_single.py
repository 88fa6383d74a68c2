"""Does the planner beat every single step on its own front of speed and loss?

    python -m benchmarks.planner_vs_single --model FOLDER --text held_out.txt [--goal latency] [--max-loss 2%]
    python -m benchmarks.planner_vs_single --model demo

runs `snello optimize` without a recipe and adds to benchmarks/results/planner_vs_single.json, under the model's name
and the goal: every step and chain that was measured, with its speed-up over the original (95%) and the upper bound of
its loss, what was not run and why, the planner's chain on the proof text, the chain over the chain without each of
its parts and over each single step that came near it, all timed in turn. `not_beaten` names the single steps within
the budget that the chain is not faster than: their intervals over the original meet, and so does the chain over them
with 1. It is empty where the planner beats them all. Needs a quiet machine for the minutes
of --time-budget. `demo` is judged on modules that it has never seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from snello.measure.interval import Interval
from snello.models.demo.held_out import read_held_out
from snello.optimize import receipts, run
from snello.optimize.receipts import ProofReceipt, Receipts, StepReceipt

RESULTS = Path(__file__).parent / "results" / "planner_vs_single.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="what to call it in the results [--model]")
    parser.add_argument("--text", type=Path, help="for all but demo")
    parser.add_argument("--goal", default="latency", choices=("latency", "throughput", "memory"))
    parser.add_argument("--max-loss", default="2%")
    parser.add_argument("--time-budget", type=float, default=180.0, metavar="SECONDS")
    args = parser.parse_args()
    name = args.name or Path(args.model).name
    with tempfile.TemporaryDirectory() as folder:
        text = args.text or write_held_out(Path(folder) / "text")
        found = study(args, text, Path(folder) / "lean")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(name, {})[args.goal] = {"command": command(args), **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def command(args: argparse.Namespace) -> str:
    text = f" --text {args.text}" if args.text else ""
    wishes = f"--goal {args.goal} --max-loss {args.max_loss} --time-budget {args.time_budget:g}"
    return f"python -m benchmarks.planner_vs_single --model {args.name or args.model}{text} {wishes}"


def write_held_out(folder: Path) -> Path:
    """One file a module."""
    folder.mkdir()
    for name, source in read_held_out():
        (folder / f"{name.replace('/', '.')}.txt").write_text(source, encoding="utf-8")
    return folder


def study(args: argparse.Namespace, text: Path, output: Path) -> dict[str, Any]:
    wishes = {"text": text, "goal": args.goal, "max_loss": args.max_loss, "time_budget": args.time_budget}
    result = run.run(args.model, output=output, on_event=tell, **wishes)
    return {"sentence": result.sentence, "exit": result.exit_code, **summary(receipts.read(output))}


def tell(event: Any) -> None:
    """A line for each judged stage, so that a long run is seen to move."""
    if event.name == "stage_judged":
        print(f"{event.used_seconds:6.1f} s  {event.row.name}: {event.row.verdict} {event.row.reason}", flush=True)


def summary(found: Receipts) -> dict[str, Any]:
    """Rows, the planner's own, and who was not beaten; computed from receipts alone."""
    assert found.proof is not None
    steps = [step for step in found.steps if step.row.kind == "stage"]
    rows = {step.step: row(step, found.proof) for step in steps}
    machine, seconds = str(found.run.machine["cpu"]), round(found.proof.seconds)
    facts = {"machine": machine, "seconds": seconds, "max_loss": found.run.max_loss, "workload": found.run.workload}
    if found.proof.speedup is None or found.proof.evidence is None:
        return {**facts, "planner": None, "rows": rows}
    planner = {
        "speedup": rounded(found.proof.speedup),
        "loss_at_most": round(found.proof.evidence.loss.high, 5),
        "parts": [part.without for part in found.proof.ablation],
        "over_the_chain_without": {
            part.without: rounded(part.gain) for part in found.proof.ablation if part.gain is not None
        },
        "over_the_single": {duel.single: rounded(duel.gain) for duel in found.proof.duels},
        "sequences_a_second": {
            str(lean.tokens): [round(one.sequences_per_second.mid, 1) for one in (original, lean)]
            for original, lean in zip(found.proof.sequences_original, found.proof.sequences_lean, strict=True)
        },
    }
    return {**facts, "planner": planner, "not_beaten": not_beaten(steps, found), "rows": rows}


def row(step: StepReceipt, proof: ProofReceipt) -> dict[str, Any]:
    if step.row.loss is None or step.row.speedup is None:
        return {"verdict": step.row.verdict, "reason": step.row.reason}
    front = {point.name for point in proof.pareto if point.on_front}
    return {
        "parts": parts(step),
        "speedup": rounded(step.row.speedup),
        "loss_at_most": round(step.row.loss.high, 5),
        "on_front": step.step in front,
        "verdict": step.row.verdict,
    }


def parts(step: StepReceipt) -> int:
    """Steps of the chain; an INT8 cache counts as one of its own."""
    return len(step.chain) + sum("cache" in options for options in step.chain)


def not_beaten(steps: list[StepReceipt], found: Receipts) -> list[str]:
    """Single steps within the budget whose interval reaches the chain's, and that it did not beat in turn either."""
    assert found.proof is not None and found.proof.speedup is not None
    least = found.proof.speedup.low
    beaten = {duel.single for duel in found.proof.duels if duel.gain.low > 1}
    return [
        step.step
        for step in steps
        if parts(step) == 1
        and step.row.loss is not None
        and step.row.speedup is not None
        and step.row.loss.high <= found.run.max_loss
        and step.row.speedup.high >= least
        and step.step not in beaten
    ]


def rounded(found: Interval) -> list[float]:
    return [round(value, 3) for value in (found.low, found.mid, found.high)]


if __name__ == "__main__":
    main()
