"""Blocks about other engines: one stream, many, quality, speculation, a mixed load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from blocks.values import read

CACHED = "-kv-int8"  # rows whose keys and values have as many bits as OpenVINO's default
OWN = "bf16"  # weights that nobody rounded
LEAST_ANSWER = 8  # tokens: below, the row was about its prompt
PEERS_HEAD = (
    "| shape | weights | tokens a second | of the memory's limit | over llama.cpp (95%) | over OpenVINO (95%) |"
)
WEIGHTS = {"snello-int4": "INT4, head INT8", "snello-int4-all": "INT4", "snello-int8": "INT8"}


def peers() -> str:
    whole = read("decode_vs_peers.json")
    if not whole:
        return "`python -m benchmarks.decode_vs_peers` measures Snello and its peers in turn, on your machine."
    whole = _best_machine(whole)
    one = next(iter(whole.values()))
    said = f"One stream, {one['threads']} threads, {one['processor']}, {one['when']}; each shape in turn in one run."
    lines = [PEERS_HEAD, "|---|---|---:|---:|---:|---:|"]
    for shape, result in sorted(whole.items(), reverse=True):
        lines.append(f"| {shape.split(',')[0]} | {_pairs(result['rows'], 'snello-int4', WEIGHTS['snello-int4'])} |")
    beside = f"Ratios at the same bits, the other at its best settings, llama.cpp built without AMX. {_many()}"
    return "\n".join([said, "", *lines, "", beside])


def _best_machine(whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """The shapes that were measured on AMX, if any were."""
    return {name: result for name, result in whole.items() if name.endswith(", amx")} or whole


def one_stream() -> str:
    """Every number of bits, those that we lose included."""
    lines = [PEERS_HEAD, "|---|---|---:|---:|---:|---:|"]
    for shape, result in sorted(read("decode_vs_peers.json").items(), reverse=True):
        measured = [(ours, bits) for ours, bits in WEIGHTS.items() if ours in result["rows"]]
        lines += [f"| {_held(shape)} | {_pairs(result['rows'], ours, bits)} |" for ours, bits in measured]
    return "\n".join(lines)


def _many() -> str:
    """Many streams and a prompt, in a sentence."""
    shape = "tinyllama-1.1b"
    machines = {name: bits for name, bits in read("streams_vs_peers.json").items() if name.split(",")[0] == shape}
    found = next(iter(_best_machine(machines).values()))["int4"]
    counts = sorted(int(name.split("-")[1]) for name in found if re.fullmatch(rf"decode-\d+{CACHED}", name))
    at_once = [found[f"decode-{count}{CACHED}"]["rows"] for count in counts]
    prompt = found[f"prefill-512{CACHED}"]["rows"]
    over = []
    for peer, name in (("llamacpp", "llama.cpp"), ("openvino", "OpenVINO")):
        if all(any(row.startswith(peer) for row in rows) for rows in (*at_once, prompt)):
            ratios = ", ".join(f"{_best(rows, peer)['ours_over_this']:.2f}" for rows in at_once)
            prompts = _best(prompt, peer, "prefill")["prefill_ours_over_this"]
            over.append(f"{ratios} and {prompts:.2f} over {name}")
    many = f"{', '.join(map(str, counts[:-1]))} and {counts[-1]} answers at once"
    return (
        f"{shape}, INT4, keys and values INT8, {many}, and a prompt of 512: {'; '.join(over)}. "
        f"{_divergences()} [docs/compare.md](docs/compare.md) has the rest."
    )


def _divergences() -> str:
    """What INT4 by everybody's defaults costs, in a sentence."""
    model, twin = (recipes["int4"]["rows"] for recipes in read("quality_vs_peers.json").values())
    names = {"Snello": "snello-int4", "llama.cpp": "llamacpp-q4_0", "OpenVINO": "openvino-int4-f32"}
    said = [f"{name} {model[row]['kl']['mean']:.4f} and {twin[row]['kl']['mean']:.4f}" for name, row in names.items()]
    return f"KL of INT4 from the original, of a small real model and its twin with outliers: {', '.join(said)}."


def _best(rows: Mapping[str, Any], peer: str, what: str = "decode") -> Mapping[str, Any]:
    """The fastest row of a peer."""
    return max((row for name, row in rows.items() if name.startswith(peer)), key=lambda row: row[what]["median"])


def streams() -> str:
    """Ours, and how much faster it is than the fastest row of each peer, for answers and for prompts apart."""
    over = "over OpenVINO | over llama.cpp"
    lines = [f"| shape | | weights, cache | answers, tokens a second | {over} | prompt | {over} |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for shape, bits in read("streams_vs_peers.json").items():
        for result in (result for weights, kinds in bits.items() if weights != OWN for result in kinds.values()):
            lines.append(f"| {_held(shape)} | {_asked(result)} | {' | '.join(_sides(result))} |")
    return "\n".join(lines)


def unrounded() -> str:
    """Models in the type that they came in, ours beside each peer's."""
    over = "over OpenVINO | over Transformers | over llama.cpp"
    lines = [
        f"| shape | | answers, tokens a second | {over} | prompt | {over} |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, bits in read("streams_vs_peers.json").items():
        for result in bits.get(OWN, {}).values():
            sides = _sides(result, ("openvino", "transformers", "llamacpp"))[1:]
            lines.append(f"| {_held(shape)} | {_asked(result)} | {' | '.join(sides)} |")
    return "\n".join(lines)


def _held(place: str) -> str:
    """A place in the results, saying whether the instruction set in it was forced upon ours alone."""
    shape, _, isa = place.partition(", ")
    return place if not isa or isa == "amx" or isa.startswith("all ") else f"{shape}, ours {isa}"


def _asked(result: Mapping[str, Any]) -> str:
    at_once = f", {result['streams']} at once" if result["streams"] > 1 else ""
    return f"prompt {result['prompt_tokens']:,}{at_once}; {result['when']}"


def _sides(result: Mapping[str, Any], peers: Sequence[str] = ("openvino", "llamacpp")) -> list[str]:
    """Bits and cache of ours; its answers and its prompts, each with the ratios."""
    rows = result["rows"]
    (ours,) = (name for name in rows if name.startswith("snello"))
    weights, _, cache = ours.removeprefix("snello-").partition("-kv-")
    answered = result["generated_tokens"] >= LEAST_ANSWER
    return [
        f"{weights.upper()}, {(cache or 'bf16').upper()}",
        _speed(rows[ours]) if answered else "-",
        *(_over(rows, peer, "decode", "") if answered else "-" for peer in peers),
        f"{rows[ours]['prefill']['median']:.0f}",
        *(_over(rows, peer, "prefill", "prefill_") for peer in peers),
    ]


def _over(rows: Mapping[str, Any], peer: str, what: str, prefix: str) -> str:
    if not any(name.startswith(peer) for name in rows):
        return "-"
    row = _best(rows, peer, what)
    low, high = row[f"{prefix}ours_over_this_95"]
    return f"{row[f'{prefix}ours_over_this']:.2f} ({low:.2f}-{high:.2f})"


def quality() -> str:
    lines = ["| model | weights | engine | KL from the original | ours less it | tokens a second | ours is |"]
    lines.append("|---|---|---|---:|---:|---:|---|")
    for model, recipes in read("quality_vs_peers.json").items():
        for recipe, result in recipes.items():
            for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["kl"]["mean"]):
                kl, less = row["kl"], "-"
                if "ours_less_this" in kl:
                    low, high = kl["ours_less_this_90"]
                    less = f"{kl['ours_less_this']:+.4f} ({low:+.4f} to {high:+.4f})"
                speed = f"{row['decode']['median']:,.0f}"
                lines.append(
                    f"| {model} | {recipe} | {name} | {kl['mean']:.4f} | {less} | {speed} | {row.get('verdict', '-')} |"
                )
    return "\n".join(lines)


def speculation() -> str:
    measured = read("speculation.json")
    rows = {(row["model"], row["task"], row["temperature"], row["draft"]): row for row in measured["rows"]}
    drafts = list(dict.fromkeys(row["draft"] for row in measured["rows"]))
    lines = [f"| model | task | temperature | {' | '.join(drafts)} |", "|---|---|---:|" + "---:|" * len(drafts)]
    for model, task, temperature in dict.fromkeys(key[:3] for key in rows):
        cells = [
            f"{row['speedup']:.2f} ({row['interval'][0]:.2f}-{row['interval'][1]:.2f})" if row else "-"
            for row in (rows.get((model, task, temperature, draft)) for draft in drafts)
        ]
        lines.append(f"| {model} | {task} | {temperature} | {' | '.join(cells)} |")
    return "\n".join([f"`{measured['command']}`:", "", *lines])


def mixed() -> str:
    by_isa = read("mixed_load.json")
    lines = ["| | engine | tokens a second | first token, p50 / p99 | between tokens, p50 / p99 | unloaded step |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for isa, measured in by_isa.items():
        for run in measured["runs"]:
            first, between = run["first_token_seconds"], run["between_tokens_seconds"]
            lines.append(
                f"| {isa} | {run['engine']} | {run['tokens_per_second']:.1f} "
                f"| {first['p50']:.2f} s / {first['p99']:.2f} s "
                f"| {between['p50'] * 1e3:.0f} ms / {between['p99'] * 1e3:.0f} ms "
                f"| {run['unloaded_step_seconds'] * 1e3:.0f} ms |"
            )
    one = next(iter(by_isa.values()))
    said = f"{one['requests']} requests, {one['requests_per_minute']:.0f} a minute"
    return "\n".join([f"{said}; `{one['command']}`:", "", *lines])


def _pairs(rows: Mapping[str, Any], ours: str, bits: str) -> str:
    """Our row, and how much faster it is than the fastest row of each peer with as many bits."""
    alike = {name: row for name, row in rows.items() if row.get("ours") == ours}
    against = [_best(alike, peer) for peer in ("llamacpp", "openvino")]
    row = rows[ours]
    return " | ".join([bits, _speed(row), _share(row), *map(_ratio, against)])


def _speed(row: Mapping[str, Any]) -> str:
    decode = row["decode"]
    return f"{decode['median']:.1f} ({decode['min']:.1f}-{decode['max']:.1f})"


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else "-"


def _ratio(row: Mapping[str, Any]) -> str:
    if "ours_over_this" not in row:
        return "-"
    low, high = row["ours_over_this_95"]
    return f"{row['ours_over_this']:.2f} ({low:.2f}-{high:.2f})"
