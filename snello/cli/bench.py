"""`snello bench`: tokens a second of a model, or of a published shape with random weights, beside the ceiling here;
or a server under load.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from snello.cli import against, load
from snello.cli.keeping import add_keeping, check_keeping, say_what_is_kept
from snello.cli.opening import open_model
from snello.cli.options import at_least, of_deployment
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal, bar, table

if TYPE_CHECKING:
    from snello.engine.native import NativeExecutor
    from snello.measure.machine import Machine
    from snello.measure.profile import Profile
    from snello.models.model import Model

EXAMPLES = (
    "snello bench demo",
    "snello bench --shape tinyllama-1.1b --weights int4 --prompt 512 --generate 128",
    "snello bench lean/qwen3-0.6b --streams 16 --json",
    "snello bench demo --profile",
    "snello bench --shape tinyllama-1.1b --against openvino,llama.cpp --streams 8",
    "snello bench --serve http://127.0.0.1:8080 --rate 2 --requests 200",
    "snello bench lean/qwen3-0.6b --against openvino,llama.cpp,ctranslate2,transformers --text held_out.txt",
)

PROFILED_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, a Hugging Face name, or demo")
    parser.add_argument(
        "--shape", metavar="NAME", help="instead of MODEL: tinyllama-1.1b, qwen3-0.6b, llama-3.2-1b, ..."
    )
    parser.add_argument(
        "--weights",
        choices=("bf16", "int8", "int4", "int4-all", "int3"),
        default="int4",
        help="of --shape [int4, whose head is INT8, as int3's is]",
    )
    parser.add_argument("--cache", choices=("int8",), help="keys and values of --shape [as the shape has them, BF16]")
    parser.add_argument("--prompt", type=at_least(1), metavar="N", help="prompt tokens [512, or what fits]")
    parser.add_argument("--generate", type=at_least(2), metavar="N", help="answer tokens [128, or what fits]")
    parser.add_argument("--streams", type=of_deployment("streams"), default=1, metavar="N", help="answers at once [1]")
    parser.add_argument("--threads", type=of_deployment("threads"), metavar="N", help="[the physical cores]")
    add_keeping(parser)
    parser.add_argument("--profile", action="store_true", help="each operation's time beside its own ceiling")
    parser.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="timed runs [5]")
    parser.add_argument("--against", metavar="PEERS", help="in turn with others: openvino,llama.cpp,...")
    parser.add_argument(
        "--text", metavar="FILE", help="with --against: also each engine's KL divergence from the FP32 original on it"
    )
    parser.add_argument(
        "--isa",
        choices=("avx512vnni", "avxvnni", "avx2"),
        help="with --against: hold all to these instructions, as a lesser processor would",
    )
    parser.add_argument("--original", metavar="MODEL", help="with --against: what the lean MODEL was made from")
    parser.add_argument(
        "--install-peers", metavar="PEERS", help="make what --against needs: up to 2 GB, and as much for a model"
    )
    load.add_arguments(parser)


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.engine.native import NativeExecutor
    from snello.measure.machine import machine
    from snello.models.spec import Deployment

    if arguments.serve is not None:
        return load.execute(arguments, terminal)
    load.refuse_without_serve(arguments)
    if arguments.cache is not None and arguments.shape is None:
        raise SnelloError("--cache goes with --shape", "a MODEL has a type of its own", exit_code=2)
    if arguments.against is not None or arguments.install_peers is not None:
        if arguments.keep_last is not None:
            raise SnelloError("--keep-last does not go with --against", "peers see whole texts", exit_code=2)
        return against.execute(arguments, terminal)
    check_keeping(arguments)
    for flag in ("text", "original", "isa"):
        if getattr(arguments, flag) is not None:
            raise SnelloError(f"--{flag} goes with --against", f"name the peers, or leave out --{flag}", exit_code=2)
    model = _model(arguments, terminal)
    here = machine(threads=arguments.threads)
    context = _context(model, arguments)
    deployment = Deployment(
        threads=arguments.threads,
        context=context,
        streams=arguments.streams,
        keep_first=arguments.keep_first,
        keep_last=arguments.keep_last,
    )
    if arguments.profile and not model.spec.causal:
        raise SnelloError("--profile times prompts and answers, and an encoder has none", "leave it out", exit_code=2)
    with NativeExecutor(model, deployment) as executor:
        say_what_is_kept(deployment, terminal)
        facts = {
            "model": model.name,
            "isa": executor.isa,
            "threads": executor.threads,
            "streams": arguments.streams,
            "machine": here.cpu,
            **({"keep_first": arguments.keep_first, "keep_last": arguments.keep_last} if arguments.keep_last else {}),
        }
        measured = (
            _decoder(executor, here, arguments, terminal) if model.spec.causal else _encoder(executor, here, arguments)
        )
        profiles = _profiles(executor, here, arguments, measured) if arguments.profile else {}
    _print(terminal, {**facts, **measured})
    for name, profile in profiles.items():
        _print_profile(terminal, name, profile)
    if profiles:
        measured["profile"] = {name: profile.to_json() for name, profile in profiles.items()}
    return {**facts, **measured}


def _model(arguments: argparse.Namespace, terminal: Terminal) -> Model:
    from snello.models.shapes import random_model

    if (arguments.model is None) == (arguments.shape is None):
        raise SnelloError("bench needs a MODEL or a --shape", "snello bench --shape tinyllama-1.1b", exit_code=2)
    if arguments.shape is None:
        return open_model(arguments.model, terminal)
    asked = (arguments.prompt or 0) + (arguments.generate or 0)
    return random_model(arguments.shape, arguments.weights, positions=asked, cache=arguments.cache)


def _context(model: Model, arguments: argparse.Namespace) -> int | None:
    """Room for the prompt and the answer, and no more: what is not used costs memory."""
    from snello.measure.speed import Workload

    if not model.spec.causal:
        return None
    standard, most = Workload.fitting(model.spec), model.spec.max_positions
    prompt, generate = arguments.prompt or standard.prompt, arguments.generate or standard.generate
    if prompt + generate > most:
        message = f"a prompt of {prompt:,} tokens and an answer of {generate:,}: the model was made for {most:,}"
        raise SnelloError(message, "give a smaller --prompt or --generate", exit_code=2)
    return int(prompt + generate)


def _decoder(
    executor: NativeExecutor, here: Machine, arguments: argparse.Namespace, terminal: Terminal
) -> dict[str, Any]:
    from snello.measure.machine import bandwidth_now, probe_again
    from snello.measure.memory import resident_bytes
    from snello.measure.speed import Clock, Workload, bench, ceiling_facts, ceiling_of

    resident: list[int] = []

    def step(done: int, total: int) -> None:
        resident.append(resident_bytes("VmRSS"))  # the peak of the process would count the machine's probe
        terminal.footer([f" {bar(done / total)}  run {done} of {total}"])

    read = executor.bytes_per_token(0)
    gave = [bandwidth_now(here.threads, read)]
    measured = bench(
        executor, here, prompt=arguments.prompt, generate=arguments.generate, repeats=arguments.repeats, step=step
    )
    gave.append(bandwidth_now(here.threads, read))
    terminal.clear_footer()
    standard = Workload.fitting(executor.spec)
    prompt, generate = arguments.prompt or standard.prompt, arguments.generate or standard.generate
    if any(measured[name]["median"] > limit for name, limit in measured["ceiling"].items()):
        here = probe_again(here)  # what was measured is possible: the probe saw a busy machine
        measured["ceiling"] = ceiling_facts(ceiling_of(executor, here, Workload(prompt, generate)))
    measured |= {"prompt": prompt, "generate": generate, "resident_bytes": max(resident)}
    gave_bytes = sum(gave) / len(gave)
    measured["memory"] = {"bytes_per_second": gave_bytes, "best_bytes_per_second": here.bandwidth_at(read)}
    if one_row := executor.program.one_row():
        measured["one_row"] = asdict(one_row)
    if arguments.streams > 1:
        clock = Clock(executor, Workload(prompt, generate, arguments.streams))
        rates = sorted(1 / clock.throughput() for _ in range(arguments.repeats))
        measured["streams_tokens_per_second"] = _spread(rates)
        measured["ceiling"]["streams_tokens_per_second"] = _streams_ceiling(executor, here, arguments.streams)
    return measured


def _streams_ceiling(executor: NativeExecutor, here: Machine, streams: int) -> float:
    """All streams together, from the short prompts that the clock uses."""
    from snello.measure.machine import ceiling

    weights = executor.bytes_per_token()
    limit = ceiling(executor.spec, here, prompt=32, generate=24, streams=streams, measured_bytes=weights)
    return limit.decode_tokens_per_second


def _profiles(
    executor: NativeExecutor, here: Machine, arguments: argparse.Namespace, measured: dict[str, Any]
) -> dict[str, Profile]:
    """Of the prompt, of one answer's token, and of the tokens of all streams."""
    from snello.measure.profile import profile_answer, profile_prompt

    prompt, steps = measured["prompt"], max(1, min(PROFILED_STEPS, measured["generate"] // 2 - 1))
    found = {"prompt": profile_prompt(executor, here, prompt, min(3, arguments.repeats))}
    for streams in sorted({1, arguments.streams}):
        found[f"answer, {streams} at once"] = profile_answer(executor, here, prompt, streams, steps)
    return found


def _encoder(executor: NativeExecutor, here: Machine, arguments: argparse.Namespace) -> dict[str, Any]:
    """Texts of `prompt` tokens, one at a time."""
    from snello.measure.machine import ceiling
    from snello.measure.speed import Clock, Workload

    workload = Workload(min(arguments.prompt or 128, executor.context), 2, 1)
    clock = Clock(executor, workload)
    clock.encode_seconds()
    rates = sorted(workload.prompt / clock.encode_seconds() for _ in range(arguments.repeats))
    limit = ceiling(executor.spec, here, prompt=workload.prompt, generate=2, measured_bytes=executor.bytes_per_token())
    return {
        "prompt": workload.prompt,
        "prefill_tokens_per_second": _spread(rates),
        "ceiling": {"prefill_tokens_per_second": limit.prefill_tokens_per_second},
    }


def _spread(ordered: list[float]) -> dict[str, float]:
    return {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}


# ---- the table ------------------------------------------------------------------------------------------------------

SLOW_MEMORY = 0.9  # of the best that was seen
ROWS = {
    "prefill_tokens_per_second": "prompt, tokens a second",
    "decode_tokens_per_second": "answer, tokens a second",
    "streams_tokens_per_second": "all streams, tokens a second",
}


def _print(terminal: Terminal, facts: dict[str, Any]) -> None:
    sizes = f"prompt {facts['prompt']}" + (f", answer {facts['generate']}" if "generate" in facts else "")
    terminal.product(f"{facts['model']}: {sizes}; {facts['threads']} threads, {facts['isa']}, {facts['machine']}")
    rows = [["", "median", "min..max", "possible here", ""]]
    for key, name in ROWS.items():
        if key in facts:
            value, limit = facts[key], facts["ceiling"][key]
            extremes = f"{numbers.rate(value['min'])}..{numbers.rate(value['max'])}"
            share = f"{value['median'] / limit:.0%}"
            rows.append([name, numbers.rate(value["median"]), extremes, numbers.rate(limit), share])
    terminal.product("\n".join(table(rows, right=(1, 2, 3, 4), indent="  ")))
    if "bytes_per_token" in facts:
        read, held = numbers.size(facts["bytes_per_token"]), numbers.size(facts["weights_bytes"])
        bits, peak = facts["bits_per_weight"], numbers.size(facts["resident_bytes"])
        terminal.product(f"  reads {read} a token; weights {held}, {bits:.2f} bits each; peak memory {peak}")
    if "memory" in facts and (slow := said_of_slow_memory(facts)):
        terminal.product("  " + slow)
    if "one_row" in facts:
        terminal.product("  " + said_of_one_row(**facts["one_row"]))


def said_of_slow_memory(facts: dict[str, Any]) -> str:
    """Where memory gave clearly less around the runs than it can: other tenants read it too, and the share of what is
    possible is theirs as well. Else nothing.
    """
    gave, best = facts["memory"]["bytes_per_second"], facts["memory"]["best_bytes_per_second"]
    if gave >= SLOW_MEMORY * best:
        return ""
    used = facts["decode_tokens_per_second"]["median"] * facts["bytes_per_token"] / gave
    return (
        f"memory gave {gave / 1e9:.0f} GB/s around the runs, not {best / 1e9:.0f}: answers read at {used:.0%} of that"
    )


def said_of_one_row(*, on_tiles: bool, tiles_seconds: float, vectors_seconds: float) -> str:
    tried = f"tried: {numbers.seconds(tiles_seconds)} a step on tiles, {numbers.seconds(vectors_seconds)} on vectors"
    return f"one answer at a time is multiplied on {'tiles' if on_tiles else 'vectors'} ({tried})"


def _print_profile(terminal: Terminal, name: str, profile: Profile) -> None:
    step, parts = numbers.seconds(profile.step_seconds), numbers.seconds(profile.seconds)
    terminal.product(f"\n{name}: {profile.rows} rows in {step}; its parts, timed one by one, {parts}")
    rows = [["", "count", "time", "of all", "moves", "computes", "GB/s", "GOP/s", "of possible"]]
    for part in profile.parts:
        seconds = max(part.seconds, 1e-12)
        rows.append(
            [
                part.name,
                str(part.count),
                numbers.seconds(part.seconds),
                f"{part.seconds / max(profile.seconds, 1e-12):.0%}",
                numbers.size(part.bytes),
                f"{part.operations / 1e9:.3g} GOP" if part.operations else "-",
                f"{part.bytes / seconds / 1e9:,.1f}",
                f"{part.operations / seconds / 1e9:,.0f}" if part.operations else "-",
                f"{part.share_of_ceiling:.0%}",
            ]
        )
    terminal.product("\n".join(table(rows, right=range(1, 9), indent="  ")))
