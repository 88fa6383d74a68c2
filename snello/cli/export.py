"""`snello export MODEL --to hf`: the folder that other tools load, proved by reading it back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from snello.cli.opening import open_model
from snello.report import numbers
from snello.terminal import Terminal

EXAMPLES = (
    "snello export lean/qwen3-0.6b --to hf -o hf/qwen3-0.6b",
    "snello export demo --to hf --dtype bf16 -o hf/demo",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face name, or demo")
    parser.add_argument(
        "--to", choices=("hf",), required=True, help="hf: safetensors and config.json, as Transformers loads"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the folder goes")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="numbers of the file [fp32]")
    parser.add_argument("--shard-size", type=gigabytes, default=5.0, metavar="GB", help="most of one file [5]")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def gigabytes(text: str) -> float:
    """A size for argparse; less than a thousandth would be a file a tensor."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.001 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes of at least 0.001")
    return value


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.interop.huggingface import export

    exported = export(
        open_model(arguments.model, terminal),
        arguments.output,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_size * 1e9),
        overwrite=arguments.overwrite,
    )
    terminal.say(f"{numbers.size(exported.num_bytes)} in {arguments.dtype}; {exported.proof}")
    terminal.product(str(exported.path))
    return {"path": str(exported.path), "bytes": exported.num_bytes, "proof": exported.proof}
