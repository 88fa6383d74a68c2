"""`snello batch`: OpenAI requests in a file, answers in another; what was stopped goes on with the same command."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.keeping import add_keeping, check_keeping, say_what_is_kept
from snello.cli.options import add_running
from snello.report import numbers
from snello.terminal import Terminal, bar

if TYPE_CHECKING:
    from snello.serve.batch import Progress

EXAMPLES = (
    "snello batch requests.jsonl --model demo -o answers.jsonl",
    "snello batch requests.jsonl -o answers.jsonl              the model that the lines name",
    "snello batch texts.jsonl --model lean/minilm -o vectors.jsonl",
)
DRAW_SECONDS = 0.1  # between footers
PLAIN_SECONDS = 60.0  # between progress lines where nothing can be redrawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("requests", type=Path, metavar="IN.jsonl", help="a request a line, in OpenAI's batch format")
    add("-o", "--output", type=Path, required=True, metavar="OUT.jsonl", help="the answers, in the same order")
    add("--model", metavar="MODEL", help="answers every line [the one that the lines name]")
    add_running(parser)
    add_keeping(parser)
    add("--fresh", action="store_true", help="do not continue a run that was stopped")
    add("--overwrite", action="store_true", help="replace the output if it is there")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    check_keeping(arguments)
    from snello.models.spec import Deployment
    from snello.serve.batch import BatchOptions, answer_file

    names = ["model", "context", "threads", "max_num_seqs", "speculate", "keep_first", "keep_last"]
    options = BatchOptions(**{name: getattr(arguments, name) for name in [*names, "fresh", "overwrite"]})
    say_what_is_kept(Deployment(keep_first=options.keep_first, keep_last=options.keep_last), terminal)
    shown, last = Shown(terminal), None
    try:
        for last in answer_file(arguments.requests, arguments.output, options):
            shown.show(last)
    except KeyboardInterrupt:
        terminal.clear_footer()
        kept = f"{numbers.count(last.done)} of {numbers.count(last.requests)} requests are kept; " if last else ""
        raise KeyboardInterrupt(f"{kept}the same command continues") from None
    assert last is not None, "the last progress is the whole"
    terminal.say(closing(last))
    terminal.product(str(arguments.output))
    return _document(last, arguments.output)


class Shown:
    """Progress as a footer, or as a line a minute where nothing can be redrawn."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._drawn, self._said = 0.0, time.monotonic()
        self._begun = False

    def show(self, progress: Progress) -> None:
        if not self._begun:
            self._begun = True
            if progress.known:
                known, total = numbers.count(progress.known), numbers.count(progress.requests)
                self.terminal.say(f"continuing: {known} of {total} requests are answered already")
            return
        now = time.monotonic()
        if self.terminal.live and now - self._drawn > DRAW_SECONDS:
            self._drawn = now
            self.terminal.footer(
                [f" {bar(share(progress))} {line(progress)}", "   Ctrl-C stops; the same command continues"]
            )
        elif not self.terminal.live and now - self._said > PLAIN_SECONDS:
            self._said = now
            self.terminal.say(line(progress))


def share(progress: Progress) -> float:
    return progress.done / progress.requests


def line(progress: Progress) -> str:
    """How far it is, how fast, and how long it still takes."""
    from snello.cli.ladder import time_left

    done = f"{numbers.count(progress.done)} of {numbers.count(progress.requests)} requests"
    rate = f"{numbers.rate(progress.tokens_per_second)} tokens/s" if progress.tokens else ""
    here = (progress.done - progress.known) / max(1, progress.requests - progress.known)
    return "   ".join(part for part in (done, rate, time_left(here, progress.seconds)) if part)


def closing(progress: Progress) -> str:
    """What became of the file, in one line."""
    parts = [f"{numbers.count(progress.requests)} requests"]
    if progress.failed:
        parts.append(f"{numbers.count(progress.failed)} failed (their lines say why)")
    prompt, cached = numbers.count(progress.prompt_tokens), numbers.count(progress.cached_tokens)
    parts.append(f"prompts {prompt} tokens" + (f" ({cached} known)" if progress.cached_tokens else ""))
    if progress.completion_tokens:
        parts.append(f"answers {numbers.count(progress.completion_tokens)} tokens")
    if progress.done > progress.known:
        parts.append(numbers.seconds(progress.seconds))
    if progress.tokens:
        parts[-1] += f", {numbers.rate(progress.tokens_per_second)} tokens/s"
    return "; ".join(parts)


def _document(progress: Progress, output: Path) -> dict[str, Any]:
    """Counts are of the whole file; tokens_per_second and seconds are of this call."""
    return {
        "exit": int(progress.failed == progress.requests),
        "model": progress.model,
        "output": str(output),
        "requests": progress.requests,
        "answered": progress.requests - progress.failed,
        "failed": progress.failed,
        "continued": progress.known,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "cached_tokens": progress.cached_tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens_per_second,
    }
