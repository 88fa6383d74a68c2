"""`snello bench --serve`: a running server under load, ours or any other of OpenAI's protocol."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.options import at_least, duration
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal, bar, table

if TYPE_CHECKING:
    from snello.measure.load.client import Target
    from snello.measure.load.plans import Request

FLAGS = (
    *("trace", "rate", "requests", "skip", "longest", "shrink", "name", "key_file"),
    *("first_within", "between_within", "timeout", "words", "seed", "cache_tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server under load")
    group.add_argument("--serve", metavar="URL", help="measure this running server, of OpenAI's protocol")
    group.add_argument("--trace", metavar="FILE", help="requests of a service: Azure's CSV, Mooncake's JSON lines")
    group.add_argument("--rate", type=_above_zero, metavar="R", help="requests a second, by chance or by the trace")
    group.add_argument("--requests", type=at_least(1), metavar="N", help="how many [100]")
    group.add_argument("--skip", type=at_least(0), metavar="N", help="of the trace, before the first [0]")
    group.add_argument("--longest", type=at_least(4), metavar="N", help="leave out longer ones of the trace [2048]")
    group.add_argument("--shrink", type=at_least(1), metavar="N", help="divide the trace's lengths [1]")
    group.add_argument("--cache-tokens", type=at_least(1), metavar="N", help="of its prefix cache, for a second bound")
    group.add_argument("--name", metavar="MODEL", help="which of the server's models [its only one]")
    group.add_argument("--key-file", metavar="FILE", help="a file with the server's key")
    group.add_argument("--first-within", type=duration, metavar="T", help="the first token is in time [1s]")
    group.add_argument("--between-within", type=duration, metavar="T", help="each further one, on average [0.1s]")
    group.add_argument("--timeout", type=duration, metavar="T", help="of one request [600s]")
    group.add_argument("--words", type=_range, metavar="LOW:HIGH", help="token ids of prompts [300:4000]")
    group.add_argument("--seed", type=at_least(0), metavar="N", help="of prompts and arrivals [another each time]")


def refuse_without_serve(arguments: argparse.Namespace) -> None:
    for flag in FLAGS:
        if getattr(arguments, flag) is not None:
            raise SnelloError(f"--{flag.replace('_', '-')} goes with --serve", "name the server", exit_code=2)


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    _refuse(arguments)
    try:
        from snello.measure.load.client import ask
    except ModuleNotFoundError as error:
        raise SnelloError("bench --serve needs h11, which is not installed", "pip install 'snello[serve]'") from error
    from snello.measure.load.outcome import Objective, summary

    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed  # else a second run meets its cache
    requests, target = _requests(arguments, seed), _target(arguments)
    open_loop = arguments.trace is not None or arguments.rate is not None
    objective = Objective(first=arguments.first_within or 1.0, between=arguments.between_within or 0.1)

    def step(done: int) -> None:
        terminal.footer([f" {bar(done / len(requests))}  {done} of {len(requests)} answered"])

    run = ask(target, requests, streams=None if open_loop else arguments.streams, step=step)
    terminal.clear_footer()
    found = {
        "server": target.url,
        "model": target.model,
        "arrivals": _arrivals(arguments),
        "seed": seed,
        **summary(requests, run, objective, open_loop=open_loop),
    }
    _print(terminal, found)
    if not found["answered"]:
        problem = next(iter(found["failed"]), "all were refused")
        raise SnelloError(f"no request was answered: {problem}", "look at the server's log")
    return found


def _refuse(arguments: argparse.Namespace) -> None:
    """What says something about a model that is opened here says nothing about a server."""
    given = {"MODEL": arguments.model, "--shape": arguments.shape, "--against": arguments.against}
    given |= {"--isa": arguments.isa, "--profile": arguments.profile, "--threads": arguments.threads}
    given |= {"--keep-last": arguments.keep_last}
    for name, value in given.items():
        if value:
            raise SnelloError(f"{name} does not go with --serve", "the server has its model already", exit_code=2)
    if arguments.trace is None:
        for flag in ("skip", "longest", "shrink", "cache_tokens"):
            if getattr(arguments, flag) is not None:
                raise SnelloError(
                    f"--{flag.replace('_', '-')} goes with --trace", "--prompt and --generate say lengths", exit_code=2
                )
    elif arguments.prompt or arguments.generate:
        raise SnelloError("--prompt and --generate do not go with --trace", "it says its lengths", exit_code=2)
    if arguments.streams > 1 and (arguments.trace is not None or arguments.rate is not None):
        raise SnelloError("--streams does not go with arrivals by the clock", "leave out --rate", exit_code=2)


def _requests(arguments: argparse.Namespace, seed: int) -> list[Request]:
    from snello.measure.load.plans import by_chance, chosen, from_trace, read_trace

    count, words = arguments.requests or 100, arguments.words or range(300, 4000)
    if arguments.trace is None:
        prompt, answer = arguments.prompt or 512, arguments.generate or 128
        return by_chance(count, words, prompt=prompt, answer=answer, rate=arguments.rate, seed=seed)
    shrink = arguments.shrink or 1
    longest, rows = arguments.longest or 2048, read_trace(Path(arguments.trace))
    fitting = chosen(rows, count, skip=arguments.skip or 0, longest=longest, shrink=shrink)
    return from_trace(
        fitting, words, rate=arguments.rate, shrink=shrink, seed=seed, cache_tokens=arguments.cache_tokens
    )


def _target(arguments: argparse.Namespace) -> Target:
    from dataclasses import replace

    from snello.measure.load.client import Target, model_of

    key = None
    if arguments.key_file is not None:
        try:
            key = Path(arguments.key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SnelloError(
                f"{arguments.key_file} cannot be read: {error.strerror}", "a file with the key"
            ) from error
    target = Target(url=arguments.serve, model=arguments.name, key=key, timeout=arguments.timeout or 600.0)
    return replace(target, model=arguments.name or model_of(target))


def _arrivals(arguments: argparse.Namespace) -> str:
    rate = f"{arguments.rate:g} a second" if arguments.rate else ""
    if arguments.trace is not None:
        return f"as in {Path(arguments.trace).name}" + (f", scaled to {rate}" if rate else "")
    return f"by chance, {rate}" if rate else f"{arguments.streams} at a time"


def _print(terminal: Terminal, found: dict[str, Any]) -> None:
    terminal.product(f"{found['model']} at {found['server']}: {found['requests']} requests, {found['arrivals']}")
    rows = [["", "p50", "p90", "p99", "most"]]
    names = {"first_token": "first token", "between_tokens": "between tokens", "whole_answer": "whole answer"}
    for key, name in names.items():
        if (spread := found[f"{key}_seconds"]) is not None:
            rows.append([name, *(numbers.seconds(spread[part]) for part in ("p50", "p90", "p99", "max"))])
    if len(rows) > 1:
        terminal.product("\n".join(table(rows, right=(1, 2, 3, 4), indent="  ")))
    prompts, answers = numbers.rate(found["prompt_tokens_per_second"]), numbers.rate(found["answer_tokens_per_second"])
    terminal.product(f"  {found['answered']} answered, {prompts} prompt and {answers} answer tokens a second")
    first, between = (numbers.seconds(found["objective_seconds"][part]) for part in ("first", "between"))
    rate = found["goodput_requests_per_second"]
    terminal.product(f"  {found['good']} in time ({first}, then {between} a token): {rate:.3g} a second")
    if found["cached_share"] is not None:
        bound = f", {found['shared_share']:.1%} could be" if found["shared_share"] else ""
        bound += "" if found["held_share"] is None else f", {found['held_share']:.1%} in a cache of that size"
        terminal.product(f"  {found['cached_share']:.1%} of prompt tokens were known{bound}")
    if found["refused"]:
        terminal.product(f"  {found['refused']} refused, {found['refused_without_retry_after']} without Retry-After")
    for problem, count in found["failed"].items():
        terminal.product(f"  {count} failed: {problem}")
    _warn(terminal, found)


def _warn(terminal: Terminal, found: dict[str, Any]) -> None:
    from snello.measure.load.outcome import LATE

    late = found["client"]["late_seconds_p99"]
    if late > LATE:
        terminal.say(f"requests were sent up to {numbers.seconds(late)} late: this client is too slow for the load")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def _range(text: str) -> range:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of token ids: write 300:4000")
    return range(int(low), int(high))
