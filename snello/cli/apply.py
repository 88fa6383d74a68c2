"""`snello apply TECHNIQUE MODEL`: one step alone, without a gate. Flags are the fields of the technique's dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.opening import open_model
from snello.cli.options import Parser, add_options, at_least, build, of_deployment
from snello.cli.techniques import lookup, names, require_torch
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal, bar

if TYPE_CHECKING:
    import numpy as np

    from snello.models.model import Model
    from snello.techniques.base import Technique

EXAMPLES = (
    "snello apply quantize demo --weights int8 -o lean/demo-int8",
    "snello apply quantize Qwen/Qwen3-0.6B --method gptq --text yours.txt -o lean/qwen3",
    "snello apply prune demo --ffn 0.25 --text yours.txt -o lean/demo-narrow",
    "snello apply distill lean/demo-narrow --teacher demo --text yours.txt -o lean/demo-healed",
    "snello apply skip lean/demo-int8 --share 0.25 --text yours.txt -o lean/demo-skip",
    "snello apply sparsify demo --sparsity 0.5 -o lean/demo-half",
    "snello apply attention Qwen/Qwen3-0.6B --window 1024 --layers 0-13 -o lean/qwen3-near",
    "snello apply convolution Qwen/Qwen3-0.6B --keep 0.5 --text yours.txt -o lean/qwen3-conv",
    "snello apply trim Qwen/Qwen3-0.6B --keep 0.5 --text yours.txt -o models/qwen3-trimmed",
    "snello apply quantize --help",
)


def choose(parser: Parser, words: Sequence[str]) -> list[str]:
    """Takes the technique's name off the words: it decides which flags there are."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        if "-h" in words or "--help" in words:
            parser.add_argument("technique", metavar="TECHNIQUE", help=names())
            return list(words)
        raise SnelloError("which technique?", "snello apply quantize MODEL -o DIR", exit_code=2)
    technique = lookup(name)
    parser.prog += f" {name}"
    add_options(parser, technique, f"{name}: snello explain {name} says more")
    parser.set_defaults(technique=name)
    rest = list(words)
    rest.remove(name)
    return rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face name, or demo")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the lean folder goes")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="text to calibrate or train on; repeatable"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="[0]")
    parser.add_argument("--threads", type=of_deployment("threads"), help="[the physical cores]")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    require_torch(f"apply {arguments.technique}")
    from snello.techniques.base import Context

    technique = build(lookup(arguments.technique), arguments)
    output: Path = arguments.output
    if output.exists() and not arguments.overwrite:
        raise SnelloError(f"{output} is there already", "--overwrite replaces it")
    model = open_model(arguments.model, terminal)
    technique.plan(model.spec)  # what cannot work fails before a text is read

    def progress(message: str, fraction: float) -> None:
        terminal.footer([f"  {bar(fraction)} {fraction:4.0%}  {message}"])

    context = Context(
        output=output,
        windows=_calibration(arguments.text, model, _useful(technique)),
        seed=arguments.seed,
        threads=arguments.threads,
        progress=progress,
    )
    before = _bytes(model)  # it may lie where the result goes
    lean = technique.apply(model, context)
    terminal.clear_footer()
    after = _bytes(lean)
    terminal.say(f"{arguments.technique}: {numbers.size(before)} -> {numbers.size(after)}; no quality was measured")
    if note := lean.history[-1].get("note"):
        terminal.say(note)
    terminal.product(str(output))
    terminal.say(f"try it: snello run {output}")
    fields = {"technique": arguments.technique, "path": str(output), "bytes_before": before, "bytes_after": after}
    return {**fields, "digest": lean.digest}


def _bytes(model: Model) -> int:
    return sum(file.stat().st_size for file in model.files)


def _useful(technique: Technique) -> int:
    """As many tokens as a technique has a use for, to train on or to count."""
    from snello.techniques.base import wanted_tokens

    return max(wanted_tokens(technique), getattr(technique, "counted_tokens", 0))


def _calibration(paths: Sequence[Path], model: Model, wanted: int) -> list[np.ndarray]:
    """As much of these texts as is useful, as windows: alone, a step holds nothing back to judge itself.

    `wanted`: tokens, if that is more than a calibration's.
    """
    import numpy as np

    from snello.measure.documents import read_source
    from snello.measure.text import Limits

    most, window = max(Limits().calib, wanted), min(Limits().calib_window, model.spec.max_positions)
    ids: list[int] = []
    for document in (document for path in paths for document in read_source(path)):
        ids += model.tokenizer.encode(document.text)
        if len(ids) >= most:
            break
    whole = range(0, min(len(ids), most) - window + 1, window)
    return [np.array(ids[start : start + window], np.int32) for start in whole] or [np.array(ids, np.int32)] * bool(ids)
