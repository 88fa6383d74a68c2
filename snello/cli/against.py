"""`snello bench --against`: ours and other engines on one model, in turn; and `--install-peers`, which makes them."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal, table

if TYPE_CHECKING:
    from snello.measure.peers.comparison import Lengths
    from snello.measure.peers.contenders import Subject
    from snello.measure.peers.quality import Quality

PROBE_BYTES = 1 << 29


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """What `snello bench` does where one of the two flags is given."""
    if arguments.profile:
        raise SnelloError("--profile looks at our own engine alone", "leave out --profile", exit_code=2)
    if arguments.install_peers is not None:
        return _install(arguments, terminal)
    return _against(arguments, terminal)


def _install(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.measure.peers.contenders import contenders, peers_named
    from snello.measure.peers.conversions import install
    from snello.measure.peers.environments import peers_folder

    if arguments.against is not None:
        raise SnelloError("--install-peers and --against are two runs", "first install, then compare", exit_code=2)
    if arguments.text is not None:
        raise SnelloError("--text goes with --against", "leave it out of --install-peers", exit_code=2)
    peers = peers_named(arguments.install_peers, arguments.isa)
    subject = _subject(arguments) if arguments.model or arguments.shape else None
    asked = contenders(peers, subject.weights, arguments.cache) if subject else []
    install(peers, asked, subject, terminal.say)
    names = ", ".join(peer.name for peer in peers)
    terminal.product(f"{names}: ready in {peers_folder()}" + (f", with {subject.name}" if subject else ""))
    return {"installed": [peer.name for peer in peers], "folder": str(peers_folder())}


def _against(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.engine.resources import physical_cores
    from snello.measure.peers.comparison import Lengths, compare
    from snello.measure.peers.contenders import contenders, peers_named
    from snello.measure.peers.conversions import check
    from snello.measure.speed import GENERATE, PROMPT
    from snello.native import core

    if arguments.isa is not None and arguments.isa not in core.available_isas():
        hint = f"it runs: {', '.join(core.available_isas())}"
        raise SnelloError(f"this processor has no {arguments.isa}", hint, exit_code=2)
    peers, subject = peers_named(arguments.against, arguments.isa), _subject(arguments)
    asked = contenders(peers, subject.weights, arguments.cache)
    check(subject, asked)
    generate = arguments.generate or min(GENERATE, max(2, subject.positions // 4))
    lengths = Lengths(
        prompt=arguments.prompt or max(1, min(PROMPT, subject.positions - generate)),
        generate=generate,
        threads=arguments.threads or physical_cores(),
        streams=arguments.streams,
        rounds=arguments.repeats,
    )
    _check_room(subject, lengths)
    judged = _quality(arguments, subject, lengths, terminal)
    pool = core.Pool(lengths.threads)
    try:
        looked = functools.partial(core.probe_bandwidth, pool, PROBE_BYTES, 3)
        result = compare(subject, asked, lengths, looked, terminal.say, judged)
    finally:
        pool.close()
    _print(terminal, subject, result)
    return {"model": subject.model, "weights": subject.weights, **result}


def _quality(arguments: argparse.Namespace, subject: Subject, lengths: Lengths, terminal: Terminal) -> Quality | None:
    from snello.measure.peers.quality import quality
    from snello.models import load

    if arguments.text is None:
        return None
    if subject.random:
        raise SnelloError("random weights say nothing of a text", "give a MODEL, or leave out --text", exit_code=2)
    original = load(str(subject.checkpoint))
    return quality(original, Path(arguments.text), lengths.prompt, lengths.generate, terminal.say)


def _check_room(subject: Subject, lengths: Lengths) -> None:
    if lengths.prompt + lengths.generate > subject.positions:
        message = f"a prompt of {lengths.prompt} and an answer of {lengths.generate} tokens are too long together"
        hint = f"{subject.model} was made for {subject.positions:,}: give a smaller --prompt or --generate"
        raise SnelloError(message, hint, exit_code=2)


def _subject(arguments: argparse.Namespace) -> Subject:
    from snello.measure.peers.contenders import subject_of_model, subject_of_shape
    from snello.models import load

    if (arguments.model is None) == (arguments.shape is None):
        raise SnelloError("bench needs a MODEL or a --shape", "snello bench --shape tinyllama-1.1b", exit_code=2)
    if arguments.shape is not None:
        if arguments.original is not None:
            raise SnelloError("a --shape has random weights and no original", "leave out --original", exit_code=2)
        return subject_of_shape(arguments.shape, arguments.weights)
    return subject_of_model(load(arguments.model), arguments.model, arguments.original)


# ---- the table ------------------------------------------------------------------------------------------------------


def _print(terminal: Terminal, subject: Subject, result: dict[str, Any]) -> None:
    streams = f", {result['streams']} at once" if result["streams"] > 1 else ""
    limit = result["bandwidth_gigabytes_per_second"]
    held = f", all held to {result['held_to']}" if "held_to" in result else ""
    terminal.product(
        f"{subject.asked}: prompt {result['prompt_tokens']}, answer {result['generated_tokens']}{streams}; "
        f"{result['threads']} threads, {result['processor']}{held}; in turn, {2 * result['rounds']} runs each"
    )
    terminal.product("\n".join(peer_table(result["rows"])))
    if "kl_positions" in result:
        terminal.product("\n".join(quality_table(result["rows"])))
        terminal.product(f"  KL from the original in FP32, nats at {result['kl_positions']:,} tokens; ahead: faster at")
        terminal.product("  a KL shown to be no worse (95%)")
    terminal.product(
        f"  memory reads {limit['median']:.1f} GB/s meanwhile ({limit['min']:.1f}..{limit['max']:.1f}); "
        "`ours over it` with the 95% interval of paired runs"
    )


def peer_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The rows as aligned text, fastest answers first."""
    lines = [
        ["", "answer tok/s", "min..max", "ours over it", "prompt tok/s", "ours over it", "a step reads", "of memory"]
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["decode"]["median"]):
        decode, prefill = row["decode"], row["prefill"]
        reads, share = "-", "-"
        if "share_of_bandwidth" in row:
            reads, share = numbers.size(row["bytes_per_token"]), f"{row['share_of_bandwidth']:.0%}"
        lines.append(
            [
                name,
                numbers.rate(decode["median"]),
                f"{numbers.rate(decode['min'])}..{numbers.rate(decode['max'])}",
                _ratio(row, ""),
                numbers.rate(prefill["median"]),
                _ratio(row, "prefill_"),
                reads,
                share,
            ]
        )
    return table(lines, right=range(1, 8), indent="  ")


def quality_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Each engine's divergence as aligned text, the least first."""
    lines = [["", "KL", "95% between", "ours less it", "ours is"]]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["kl"]["mean"]):
        found, differs = row["kl"], "-"
        if "ours_less_this" in found:
            low, high = found["ours_less_this_90"]
            differs = f"{found['ours_less_this']:+.4f} ({low:+.4f} to {high:+.4f})"
        between = f"{found['low']:.4f}..{found['high']:.4f}"
        lines.append([name, f"{found['mean']:.4f}", between, differs, row.get("verdict", "-")])
    return table(lines, right=range(1, 4), indent="  ")


def _ratio(row: dict[str, Any], what: str) -> str:
    if f"{what}ours_over_this" not in row:
        return "-"
    low, high = row[f"{what}ours_over_this_95"]
    return f"{row[f'{what}ours_over_this']:.2f}x ({low:.2f}-{high:.2f})"
