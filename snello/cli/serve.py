"""`snello serve`: models behind OpenAI's protocol, for programs on this machine, or with keys for others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from snello.cli.keeping import add_keeping, check_keeping, say_what_is_kept
from snello.cli.options import add_running, at_least, duration, percent
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal

EXAMPLES = (
    "snello serve demo",
    "snello serve lean/qwen3-0.6b small=lean/demo          two models, the second under another name",
    "snello serve demo --adapter answers=adapters/answers  the model, and with an adapter, in one batch",
    "snello serve lean/qwen3-0.6b --host 0.0.0.0 --keys keys.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a folder, a Hugging Face name, or demo; NAME=MODEL names it")
    add("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="served too, under its name; repeatable")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="[127.0.0.1: this machine alone]")
    add("--port", type=at_least(0), default=8080, metavar="N", help="0 takes a free one [8080]")
    add("--keys", type=Path, metavar="FILE", help="a SHA-256 of a key a line: who has none of them is refused")
    add("--open", action="store_true", help="other machines may call without a key")
    add_running(parser)
    add_keeping(parser)
    add("--cache", type=Path, metavar="FOLDER", help="answers and prefixes on disk, kept across restarts [none]")
    add("--cache-bytes", type=at_least(1), default=4_000_000_000, metavar="N", help="of each of the two [4000000000]")
    similar = parser.add_argument_group("similar questions (off; what the bound means is in docs/cache.md)")
    similar.add_argument("--similar", metavar="ENCODER", help="a folder, minilm (an extra), or words: no model")
    similar.add_argument("--similar-pairs", type=Path, metavar="FILE", help="labelled, to certify on; kept in --cache")
    similar.add_argument("--similar-bound", type=percent, metavar="1%", help="most wrong ones among hits [1%%]")
    similar.add_argument("--similar-confidence", type=percent, metavar="95%", help="[95%%]")
    similar.add_argument("--similar-audit", type=percent, metavar="5%", help="hits that are computed too [5%%]")
    group = parser.add_argument_group("limits")
    group.add_argument("--queue-tokens", type=at_least(1), metavar="N", help="asked for at once [3 x the cache]")
    group.add_argument("--timeout", type=duration, default=600.0, metavar="TIME", help="of one request [10m]")
    group.add_argument("--drain", type=duration, default=30.0, metavar="TIME", help="to finish when stopped [30s]")
    group.add_argument("--log-prompts", action="store_true", help="the log holds what is asked")
    group.add_argument("--no-vllm-names", action="store_true", help="metrics by our own names only")


def _similar(arguments: argparse.Namespace) -> Any:
    """The settings of similar questions, of what was given."""
    from snello.serve.caches.proof import SimilarSettings

    given = {name: getattr(arguments, f"similar_{name}") for name in ("pairs", "bound", "confidence", "audit")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.similar is not None:
        return SimilarSettings(encoder=arguments.similar, **given)
    for name in given:
        raise SnelloError(f"--similar-{name} needs --similar", "--similar words, minilm or an encoder", exit_code=2)
    return None


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    check_keeping(arguments)
    from snello.serve.options import Limits, ServeOptions
    from snello.serve.server import serve

    names: tuple[str, ...] = (
        "host",
        "port",
        "keys",
        "open",
        "context",
        "threads",
        "max_num_seqs",
        "speculate",
        "log_prompts",
    )
    names += ("keep_first", "keep_last", "cache", "cache_bytes")
    options = ServeOptions(
        models=tuple(arguments.models),
        adapters=tuple(arguments.adapter),
        drain_seconds=arguments.drain,
        vllm_names=not arguments.no_vllm_names,
        similar=_similar(arguments),
        limits=Limits(queue_tokens=arguments.queue_tokens, seconds=arguments.timeout),
        **{name: getattr(arguments, name) for name in names},
    )

    def started(address: str, models: Any) -> None:
        for served in models.values():
            terminal.say(_line(served))
            if served.parent is None:
                say_what_is_kept(served.llm.executor.deployment, terminal)
        if options.similar is not None:
            terminal.say(f"similar questions: {options.similar.outcome(models.similar)}")
        terminal.say(f"{address}/v1   Ctrl-C finishes what runs, then stops; again: at once")
        if terminal.json:
            terminal.document({"event": "serving", "address": address, "models": list(models)})

    finished = serve(options, started, verbose=terminal.verbose)
    return {"exit": 0 if finished else 1, "finished": finished}


def _line(served: Any) -> str:
    """What is served under one name."""
    executor, answers = served.llm.executor, ", ".join(served.urls) or "nothing"
    if served.parent is not None:
        return f"{served.name}: an adapter of {served.parent}, answers {answers}"
    count, held = len(executor.adapters), numbers.size(executor.adapters.num_bytes)
    beside = f", {count} adapters of {held}" if count else ""
    return f"{served.name}: context {numbers.count(executor.context)}{beside}, answers {answers}"
