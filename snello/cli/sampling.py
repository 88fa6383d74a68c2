"""The flags of drawing tokens, which `run` reads into a `SamplingParams`. Names are the server's and the API's."""

from __future__ import annotations

import argparse
from typing import Any

FLAGS: dict[str, tuple[type, str]] = {  # field of SamplingParams -> (type, help)
    "temperature": (float, "0 takes the most likely token"),
    "top_k": (int, "draw among this many; 0: all"),
    "top_p": (float, "draw among the tokens that hold this share"),
    "min_p": (float, "drop tokens below this share of the best"),
    "repetition_penalty": (float, "over 1 repeats less; prompt and answer"),
    "presence_penalty": (float, "-2 to 2; over the answer"),
    "frequency_penalty": (float, "-2 to 2; over the answer"),
    "seed": (int, "the same seed gives the same tokens"),
    "max_tokens": (int, "most tokens of the answer"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drawing tokens (the checkpoint's own settings where it states them)")
    for name, (kind, text) in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; repeatable")


def sampling_names(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by the names of `SamplingParams`."""
    given = {name: getattr(arguments, name) for name in FLAGS if hasattr(arguments, name)}
    return {**given, "stop": tuple(arguments.stop)} if arguments.stop else given
