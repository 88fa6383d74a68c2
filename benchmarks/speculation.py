"""Does guessing save time on real text, does it change a token, and what does it cost where nothing can be guessed?

Two copies of a model answer the same prompts in turn, one of them with guesses: identical tokens asserted, seconds of
whole answers compared pair by pair, the first of a pair changing with each. Copies are made anew every few pairs, in
case one of them lies better in memory. Every prompt is new to both, except in `asked again`, where each has answered
the same prompt once (with another seed). Tasks: `continue`, free continuation of novels or of Python source; `quote`, a
passage that has stood in the prompt begins again; `edit`, the same with every ninth word missing from the first;
`several`, four continuations at once. Drafts: prompt lookup, suffix, the model's own INT4, its first two layers, a
draft that is nearly always wrong, and none, which shows what noise makes of nothing. Where others share the machine a
few pairs say little: a task goes on until its median is told from the floor of 0.97, or has three times the pairs it
had to have.

    python -m benchmarks.speculation --novels FOLDER --text english_novels_valid.txt

writes benchmarks/results/speculation.json: per task, draft and temperature the median ratio of times without and with
guesses (over 1 is faster), its 95% interval by bootstrap, quartiles, guesses and how many were right.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file, save_file

from snello.engine.llm import LLM
from snello.engine.request import Output, SamplingParams
from snello.models import load
from snello.models.model import Model
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

RESULTS = Path(__file__).parent / "results" / "speculation.json"
TEMPERATURES = (0.0, 0.8)
FLOOR = 0.97
MOST_TIMES = 3  # as many pairs as at least
PAIRS_OF_COPIES = 8  # with the same two copies of a model
PASSAGE, AGAIN = 160, 24  # tokens of what is quoted, and of its second beginning
LAYERS = 2  # of the worst draft


class Task(NamedTuple):
    """One question: `prompts` are token ids, several where they are asked at once."""

    name: str
    prompts: list[list[list[int]]]
    primed: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", required=True, type=Path, help="a model of novels, in Hugging Face format")
    parser.add_argument("--text", required=True, type=Path, help="novels that it has not seen")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--only", action="append", help="a draft; repeatable [all]")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path, text in (("demo", None, _python_source()), ("novels", args.novels, args.text.read_text())):
            model = load(path or name)
            drafts = _drafts(model, path, Path(folder) / name)
            for kind, draft in drafts.items():
                if args.only is None or kind in args.only:
                    rows += _measure(name, model, text, kind, draft, args.pairs, args.tokens)
    command = f"python -m benchmarks.speculation --novels {args.novels.name} --text {args.text.name}"
    facts: dict[str, Any] = {
        "command": command,
        "machine": platform.processor() or platform.machine(),
        "threads": os.cpu_count(),
    }
    facts |= {"pairs": args.pairs, "answer_tokens": args.tokens, "identical": True, "worst": _worst(rows)}
    args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def _python_source() -> str:
    """The modules that every Python has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text() for path in sorted(library.glob("[a-z]*.py")))


def _drafts(model: Model, path: Path | None, folder: Path) -> dict[str, Any]:
    drafts: dict[str, Any] = {"none": None, "prompt-lookup": "prompt-lookup", "suffix": "suffix"}
    drafts["int4"] = Quantize().apply(model, Context(output=folder / "int4"))
    if path is not None:
        drafts["first layers"] = load(_first_layers(path, folder / "first"))
    return drafts


def _first_layers(path: Path, folder: Path) -> Path:
    """The same checkpoint with its first `LAYERS` layers alone."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((path / name).read_bytes())
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < LAYERS}
    save_file(kept, folder / "model.safetensors")
    return folder


# ---- tasks ----------------------------------------------------------------------------------------------------------


def _tasks(model: Model, text: str, pairs: int) -> Iterator[Task]:
    """Each from stretches of the text that no other has."""
    encode = model.tokenizer.encode
    words = text[len(text) // 7 :].split(" ")

    def stretch(number: int, length: int = 400) -> list[str]:
        start = number * length % (len(words) - length)
        return words[start : start + length]

    def passage(number: int) -> str:
        return " ".join(stretch(number))

    def continuation(number: int) -> list[int]:
        return encode(passage(number))[:PASSAGE]

    def quote(number: int) -> list[int]:
        ids = encode(passage(number))[:PASSAGE]
        return [*ids, *encode("\n\n"), *ids[:AGAIN]]

    def edit(number: int) -> list[int]:
        with_gaps = " ".join(word for place, word in enumerate(stretch(number)) if place % 9)
        return [*encode(with_gaps)[:PASSAGE], *encode("\n\n"), *encode(passage(number))[:AGAIN]]

    makers: dict[str, Callable[[int], list[int]]] = {"continue": continuation, "quote": quote, "edit": edit}
    first = 0
    for name, make in makers.items():
        yield Task(name, [[make(first + number)] for number in range(pairs)])
        first += pairs
    yield Task("several", [[continuation(first + 4 * number + each) for each in range(4)] for number in range(pairs)])
    first += 4 * pairs
    yield Task("asked again", [[continuation(first + number)] for number in range(pairs)], primed=True)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def _measure(
    name: str, model: Model, text: str, kind: str, draft: Any, pairs: int, tokens: int
) -> Iterator[dict[str, Any]]:
    for temperature in TEMPERATURES:
        for task in _tasks(model, text, MOST_TIMES * pairs):
            ratios: list[float] = []
            proposed = accepted = 0
            for first in range(0, len(task.prompts), PAIRS_OF_COPIES):
                with _both(model, draft, plain_first=first // PAIRS_OF_COPIES % 2 == 0) as (plain, guessing):
                    for number in range(first, min(first + PAIRS_OF_COPIES, len(task.prompts))):
                        ratios.append(_ratio(plain, guessing, task, number, temperature, tokens))
                    proposed += guessing.engine.governor.proposed
                    accepted += guessing.engine.governor.accepted
                if len(ratios) >= pairs and _decided(ratios):
                    break
            row = {"model": name, "task": task.name, "draft": kind, "temperature": temperature, **_spread(ratios)}
            row |= {"guesses": proposed, "right": accepted}
            print(json.dumps(row), flush=True)
            yield row


@contextmanager
def _both(model: Model, draft: Any, *, plain_first: bool) -> Iterator[tuple[LLM, LLM]]:
    """Fresh ones, which then read and say something that belongs to no task: how long steps take is known."""
    first = LLM(model, speculate=None if plain_first else draft)
    with first, LLM(model, speculate=draft if plain_first else None) as second:
        warm = SamplingParams(max_tokens=48, seed=1, ignore_eos=True)
        for llm in (first, second):
            llm.generate("The first thing that he saw was", warm)
        yield (first, second) if plain_first else (second, first)


def _ratio(plain: LLM, guessing: LLM, task: Task, number: int, temperature: float, tokens: int) -> float:
    """Seconds without guesses over seconds with them."""
    prompts = task.prompts[number]
    params = SamplingParams(temperature=temperature, seed=number, max_tokens=tokens, ignore_eos=True)
    if task.primed:
        before = SamplingParams(temperature=temperature, seed=number + 1000, max_tokens=tokens, ignore_eos=True)
        for llm in (plain, guessing):
            llm.answers(prompts, before)
    order = (plain, guessing) if number % 2 else (guessing, plain)
    took = {llm: _timed(llm, prompts, params) for llm in order}
    said, guessed = ([each.token_ids for each in took[llm][1]] for llm in (plain, guessing))
    assert said == guessed, "guesses changed a token"
    return took[plain][0] / took[guessing][0]


def _decided(ratios: list[float]) -> bool:
    """Whether the median is told from the floor."""
    low, high = _spread(ratios)["interval"]
    return bool(low > FLOOR or high < FLOOR)


def _timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[float, list[Output]]:
    llm.engine.clear_cache()
    started = time.perf_counter()
    outputs = llm.answers(prompts, params)
    return time.perf_counter() - started, outputs


def _spread(ratios: list[float]) -> dict[str, Any]:
    values = np.array(ratios)
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    quartiles = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "speedup": round(float(quartiles[1]), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
        "quartiles": [round(float(quartiles[0]), 3), round(float(quartiles[2]), 3)],
        "pairs": len(ratios),
    }


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the smallest speed-up, and how it stands to the floor."""
    worst = min((row for row in rows if row["draft"] != "none"), key=lambda row: float(row["speedup"]))
    keys = ("model", "task", "draft", "temperature", "speedup", "interval")
    return {**{key: worst[key] for key in keys}, "floor": FLOOR, "holds": worst["speedup"] >= FLOOR}


if __name__ == "__main__":
    main()
