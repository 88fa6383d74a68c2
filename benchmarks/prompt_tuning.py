"""A learned prompt beside LoRA, on a real decoder: a task of style, and one of labels.

    python -m benchmarks.prompt_tuning style --model FOLDER --data tinyshakespeare.txt
    python -m benchmarks.prompt_tuning labels --model FOLDER --data sst2_train.tsv

adds to benchmarks/results/prompt_tuning.json what `snello adapt` with its defaults says of each method, one seed:
the measure on held-out examples before and after, its gain with two one-sided 95% bounds, how many numbers learned, and
whether the adapter was written. *Style* is speeches, each after its speaker's name (60 to 400 characters, the first
1,500); *labels* the first 1,500 phrases.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoders import Table
from benchmarks.lora_sst2 import tell
from snello.errors import SnelloError
from snello.models import load
from snello.optimize.adapt import REFUSED, adapt
from snello.techniques.adapt import Adapt

RESULTS = Path(__file__).parent / "results" / "prompt_tuning.json"
MOST, SHORTEST, LONGEST = 1500, 60, 400
SPEECH = re.compile(r"([A-Z][A-Za-z ]+:)\n(.+)", re.DOTALL)
RATES: dict[str, tuple[float | None, ...]] = {"prompt": (None, 0.01, 0.1), "lora": (None,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["style", "labels"])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--all-rates", action="store_true", help="of the prompt, other rates than the default too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rest = f"--model {args.model} --data DATA"
    table = Table(RESULTS, command=f"python -m benchmarks.prompt_tuning style|labels {rest}, labels with --all-rates")
    model = load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        data = (speeches if args.task == "style" else phrases)(args.data, Path(folder))
        for method, rates in RATES.items():
            for rate in rates if args.all_rates else rates[:1]:
                options = Adapt(method=method, rate=rate)  # type: ignore[arg-type]
                row: dict[str, Any] = {"task": args.task, "method": method, "rate": options.largest_rate}
                try:
                    done = adapt(model, data, options, Path(folder) / f"{method}-{rate}", threads=1, progress=tell)
                    row |= {"written": True, "said": done.verdict.sentence(), "parameters": done.parameters}
                except SnelloError as error:
                    if error.exit_code != REFUSED:
                        raise
                    row |= {"written": False, "said": error.message.partition(": ")[2]}
                table.add(f"{args.task}, {method}, rate {options.largest_rate:g}", row)


def speeches(path: Path, folder: Path) -> Path:
    """JSONL of a speaker's name and what is said."""
    found = (SPEECH.match(part) for part in path.read_text(encoding="utf-8").split("\n\n"))
    said = [part for part in found if part is not None and SHORTEST < len(part[2]) < LONGEST][:MOST]
    output = folder / "speeches.jsonl"
    output.write_text("\n".join(json.dumps({"prompt": f"{part[1]}\n", "completion": part[2]}) for part in said))
    return output


def phrases(path: Path, folder: Path) -> Path:
    output = folder / "phrases.tsv"
    output.write_text("\n".join(path.read_text(encoding="utf-8").split("\n")[:MOST]) + "\n", encoding="utf-8")
    return output


if __name__ == "__main__":
    main()
