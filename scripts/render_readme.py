"""Fills the marked blocks of README.md and docs/ from benchmarks/results, so that no figure there was typed by hand.

    python scripts/render_readme.py            rewrites the blocks
    python scripts/render_readme.py --check    exits 1 if a block is not what the results say

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. `demo` is what `make demo` printed, as recorded in
results/demo.txt; `peers` are ours over the best of others in results/decode_vs_peers.json, those that we lose included;
`methods` and `outliers`, of docs/quantize.md, are results/quantize_methods.json and results/outliers.json; `zeros`, of
docs/sparsify.md, is results/sparsify_methods.json; `skipping`, of docs/skip.md, is results/activation_sparsity.json;
`forgetting`, of docs/eviction.md, is results/eviction.json; `traces`, of docs/serve.md, is results/serve_traces.json;
the blocks of docs/compare.md are the results files of their names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHED = "-kv-int8"  # rows whose keys and values have as many bits as OpenVINO's default
LEAST_ANSWER = 8  # tokens: below, the row was about its prompt
NOT_RUN = re.compile(r"  not run: (cannot pay|its steps alone lose|less of it lost)")
PEERS_HEAD = (
    "| shape | weights | tokens a second | of the memory's limit | over llama.cpp (95%) | over OpenVINO (95%) |"
)
WEIGHTS = {"snello-int4": "INT4, head INT8", "snello-int4-all": "INT4", "snello-int8": "INT8"}


def demo() -> str:
    recorded = RESULTS / "demo.txt"
    if not recorded.exists():
        return "`make demo` shows it on your machine: the ladder, the proof, and both models side by side."
    lines = recorded.read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if not NOT_RUN.search(line)]
    count = len(lines) - len(shown)
    left_out = (
        [f" {count} stages were not run: they could not pay, or their steps alone lost too much"] if count else []
    )
    return "\n".join(["```text", *shown[:-2], *left_out, *shown[-2:], "```"])


def peers() -> str:
    measured = RESULTS / "decode_vs_peers.json"
    whole = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
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
    for shape, result in sorted(_read("decode_vs_peers.json").items(), reverse=True):
        measured = [(ours, bits) for ours, bits in WEIGHTS.items() if ours in result["rows"]]
        lines += [f"| {shape} | {_pairs(result['rows'], ours, bits)} |" for ours, bits in measured]
    return "\n".join(lines)


def _many() -> str:
    """Many streams and a prompt, in a sentence."""
    shape = "tinyllama-1.1b"
    machines = {name: bits for name, bits in _read("streams_vs_peers.json").items() if name.split(",")[0] == shape}
    found = next(iter(_best_machine(machines).values()))["int4"]
    counts = sorted(int(name.split("-")[1]) for name in found if re.fullmatch(rf"decode-\d+{CACHED}", name))
    at_once = [found[f"decode-{count}{CACHED}"]["rows"] for count in counts]
    prompt = found[f"prefill-512{CACHED}"]["rows"]
    over = []
    for peer, name in (("llamacpp", "llama.cpp"), ("openvino", "OpenVINO")):
        if all(any(row.startswith(peer) for row in rows) for rows in (*at_once, prompt)):
            ratios = ", ".join(f"{_best(rows, peer)['ours_over_this']:.2f}" for rows in at_once)
            read = _best(prompt, peer, "prefill")["prefill_ours_over_this"]
            over.append(f"{ratios} and {read:.2f} over {name}")
    many = f"{', '.join(map(str, counts[:-1]))} and {counts[-1]} answers at once"
    return (
        f"{shape}, INT4, keys and values INT8, {many}, and a prompt of 512: {'; '.join(over)}. "
        f"{_divergences()} [docs/compare.md](docs/compare.md) has the rest."
    )


def _divergences() -> str:
    """What INT4 by everybody's defaults costs, in a sentence."""
    model, twin = (recipes["int4"]["rows"] for recipes in _read("quality_vs_peers.json").values())
    names = {"Snello": "snello-int4", "llama.cpp": "llamacpp-q4_0", "OpenVINO": "openvino-int4-f32"}
    said = [f"{name} {model[row]['kl']['mean']:.4f} and {twin[row]['kl']['mean']:.4f}" for name, row in names.items()]
    return f"KL of INT4 from the original, of a small real model and its twin with outliers: {', '.join(said)}."


def _best(rows: Mapping[str, Any], peer: str, what: str = "decode") -> Mapping[str, Any]:
    """The fastest row of a peer."""
    return max((row for name, row in rows.items() if name.startswith(peer)), key=lambda row: row[what]["median"])


def streams() -> str:
    found = _read("streams_vs_peers.json")
    lines = ["| shape | | engine | answers, tokens a second | ours over it (95%) | prompt | ours over it (95%) |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for shape, bits in found.items():
        for result in (result for kinds in bits.values() for result in kinds.values()):
            at_once = result["streams"]
            what = f"prompt {result['prompt_tokens']:,}" + (f", {at_once} at once" if at_once > 1 else "")
            what += f"; {result['when']}"
            for name, row in sorted(result["rows"].items(), key=lambda item: -item[1]["decode"]["median"]):
                prompt = row["prefill"]["median"]
                answers = "-" if result["generated_tokens"] < LEAST_ANSWER else _speed(row)
                ratio = "-" if result["generated_tokens"] < LEAST_ANSWER else _ratio(row)
                lines.append(f"| {shape} | {what} | {name} | {answers} | {ratio} | {prompt:.0f} | {_prompts(row)} |")
    return "\n".join(lines)


def _prompts(row: Mapping[str, Any]) -> str:
    if "prefill_ours_over_this" not in row:
        return "-"
    low, high = row["prefill_ours_over_this_95"]
    return f"{row['prefill_ours_over_this']:.2f} ({low:.2f}-{high:.2f})"


def quality() -> str:
    lines = ["| model | weights | engine | KL from the original | ours less it | tokens a second | ours is |"]
    lines.append("|---|---|---|---:|---:|---:|---|")
    for model, recipes in _read("quality_vs_peers.json").items():
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
    measured = _read("speculation.json")
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
    measured = _read("mixed_load.json")
    lines = ["| engine | tokens a second | first token, p50 / p99 | between tokens, p50 / p99 | unloaded step |"]
    lines.append("|---|---:|---:|---:|---:|")
    for run in measured["runs"]:
        first, between = run["first_token_seconds"], run["between_tokens_seconds"]
        lines.append(
            f"| {run['engine']} | {run['tokens_per_second']:.1f} | {first['p50']:.2f} s / {first['p99']:.2f} s "
            f"| {between['p50'] * 1e3:.0f} ms / {between['p99'] * 1e3:.0f} ms "
            f"| {run['unloaded_step_seconds'] * 1e3:.0f} ms |"
        )
    said = f"{measured['requests']} requests, {measured['requests_per_minute']:.0f} a minute"
    return "\n".join([f"{said}; `{measured['command']}`:", "", *lines])


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


def methods() -> str:
    return "\n\n".join(_methods(model, measured) for model, measured in _read("quantize_methods.json").items())


def _methods(model: str, measured: Mapping[str, Any]) -> str:
    lines = [f"| {model} | added loss (95% bounds) | KL from the original | weights |", "|---|---:|---:|---:|"]
    lines.append(f"| original, BF16 | | | {measured['original_bytes'] / 1e6:.1f} MB |")
    lines += [
        f"| {name} | {_added(row)}{_draws(row)} | {row['kl_nats']:.4f} | {row['weights_bytes'] / 1e6:.1f} MB |"
        for name, row in measured["rows"].items()
    ]
    told = f"{measured['tokens']:,} held-out tokens, {measured['calibration_tokens']:,} of calibration"
    return "\n".join([f"{told}; `{measured['command']}`:", "", *lines, *_pairs_of_methods(measured.get("pairs", []))])


def _draws(row: Mapping[str, Any]) -> str:
    """Other draws of calibration text, where there were any."""
    others = row.get("other_draws", [])
    return f"; other text {', '.join(f'{value:+.4f}' for value in others)}" if others else ""


def _pairs_of_methods(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the second loses beyond the first; p over all pairs of the table together."""
    lines = (
        ["", "| two methods | the second loses more by (95% bounds) | p, Holm |", "|---|---:|---:|"] if pairs else []
    )
    for pair in pairs:
        bounds, (method, *kind) = pair["difference_nats"], _apart(pair["first"], pair["second"])
        said = f"{bounds['mid']:+.4f} ({bounds['low']:+.4f} to {bounds['high']:+.4f})"
        lines.append(f"| {', '.join(kind)}: {method} | {said} | {pair['p_holm']:.4f} |")
    return lines


def _apart(first: str, second: str) -> tuple[str, ...]:
    """What differs in two rows' names, "rtn; gptq", and then what they share."""
    words = list(zip(first.split(", "), second.split(", "), strict=True))
    return "; ".join(next(pair for pair in words if pair[0] != pair[1])), *(a for a, b in words if a == b)


def three_bits() -> str:
    """INT3 beside INT4: one matrix, then whole decodes."""
    found = _read("int3_beside_int4.json")
    lines = ["| in turn | INT4 | INT3 | INT3, times as fast (range) |", "|---|---:|---:|---:|"]
    for rows, row in found["products"].items():
        speeds = " | ".join(f"{row[f'{name}_gigaops']:.0f} GOP/s" for name in ("int4", "int3"))
        lines.append(
            f"| product of {rows} row{'s' if rows != '1' else ''} | {speeds} | {_range(row['int3_over_int4_speed'])} |"
        )
    for streams, row in found["decode"].items():
        speeds = " | ".join(f"{row[f'{name}_tokens_per_second']:.1f} tokens/s" for name in ("int4", "int3"))
        name = f"decode, {streams} stream{'s' if streams != '1' else ''}"
        lines.append(f"| {name} | {speeds} | {_range(row['int3_over_int4_speed'])} |")
    one = found["decode"]["1"]
    size = " and ".join(f"{one[f'{name}_bytes_per_token'] / 1e6:.0f}" for name in ("int4", "int3"))
    told = f"{found['processor']}; {found['matrix'][0]:,} x {found['matrix'][1]:,} on one thread, {found['shape']} on"
    told += f" {found['threads']} ({size} MB a token); `{found['command']}`:"
    return "\n".join([told, "", *lines])


def headline() -> str:
    """INT8 beside FP32, our own and Transformers', a table for each model."""
    parts = []
    for model, found in _read("int8_headline.json").items():
        told = f"`{model}`, prompt {found['prompt']}, answer {found['generate']}, {found['threads']} threads,"
        told += f" {found['processor']}; {found['tokens']:,} held-out tokens; `{found['command']}`:"
        parts += [told, "", "| | weights | first token | INT8, times as fast (range) | tokens/s |"]
        parts[-1] += " INT8, times as fast (range) | added loss (95% bounds) |"
        parts += ["|---|---:|---:|---:|---:|---:|---:|"]
        for name, row in found["rows"].items():
            ours = name == "int8"
            ratios = [row[f"int8_{part}_times_as_fast"] for part in ("first_token", "decode")]
            first, decode = ("-" if ours else _range(ratio) for ratio in ratios)
            size, seconds = f"{row['weights_bytes'] / 1e6:.1f} MB", f"{1e3 * row['first_token_seconds']:.0f} ms"
            rate = f"{row['tokens_per_second']:.0f}"
            parts.append(f"| {name} | {size} | {seconds} | {first} | {rate} | {decode} | {_added(row)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def scale() -> str:
    """Seconds and memory of quantizing published sizes."""
    lines = ["| | calibration | time | peak, anonymous | peak, resident | bound |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in _read("quantize_scale.json").items():
        seen = f"{row['calibration_tokens']:,} tokens" if row["calibration_tokens"] else "-"
        shared = ", cores shared" if row["cores_shared_with_others"] else ""
        shared += ", with the bound as its limit" if row.get("confined") else ""
        kinds = ("peak_anonymous_bytes", "peak_resident_bytes", "bound_bytes")
        sizes = " | ".join(f"{row[kind] / 1e9:.2f} GB" for kind in kinds)
        lines.append(f"| {name} | {seen} | {row['seconds'] / 60:.1f} min{shared} | {sizes} |")
    return "\n".join(lines)


def planned() -> str:
    """The planner's chain beside the best single step of the same run; then each part's own share."""
    lines = [
        "| model, goal, budget, processor | the chain over the original (95%) | loses at most |",
        "|---|---:|---:|",
    ]
    for name, goal, row in _plans():
        told, chain = f"{name}, {goal}, {row['max_loss']:.0%}, {row['machine']}", row["planner"]
        lines.append(f"| {told}: {' + '.join(chain['parts'])} | {_times(chain['speedup'])} | {_most(chain)} |")
        for single, found in row["rows"].items():
            if found.get("parts") == 1 and found["loss_at_most"] <= row["max_loss"]:
                lines.append(f"| - {single} alone | {_times(found['speedup'])} | {_most(found)} |")
    lines += ["", "| the chain over, in turn | times as fast (95%) |", "|---|---:|"]
    for name, _, row in _plans():
        chain = row["planner"]
        lines += [f"| {name}: itself without {k} | {_times(v)} |" for k, v in chain["over_the_chain_without"].items()]
        lines += [f"| {name}: {single} alone | {_times(v)} |" for single, v in chain["over_the_single"].items()]
    for name, _, row in _plans():
        for tokens, (before, after) in row["planner"]["sequences_a_second"].items():
            lines += ["", f"{name}, {tokens} tokens: {before:g} sequences a second, then {after:g}."]
    return "\n".join(lines)


def _plans() -> list[tuple[str, str, Any]]:
    return [
        (name, goal, row)
        for name, goals in _read("planner_vs_single.json").items()
        for goal, row in goals.items()
        if row["planner"] is not None
    ]


def _times(bounds: Sequence[float]) -> str:
    return f"{bounds[1]:.2f} ({bounds[0]:.2f}-{bounds[2]:.2f})"


def _most(row: Mapping[str, Any]) -> str:
    return f"{row['loss_at_most']:.2%}"


def convolved() -> str:
    """Converted and deleted layers by the share of attention that stays, before and after healing."""
    lines = []
    for model, measured in _read("convolutions.json").items():
        lines += [f"| {model} | added loss (95% bounds) | parameters | bytes of a page |", "|---|---:|---:|---:|"]
        for name, row in measured["rows"].items():
            page, size = row["cache_page_bytes"], f"{row['parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {_added(row)} | {size} | {page:,} |")
    return "\n".join(lines)


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def outliers() -> str:
    measured = _read("outliers.json")
    models = measured["rows"]
    lines = [f"| | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for recipe in next(iter(models.values())):
        lines.append(f"| {recipe} | {' | '.join(_added(rows[recipe]) for rows in models.values())} |")
    return "\n".join([f"Added loss on {measured['tokens']:,} tokens; `{measured['command']}`:", "", *lines])


def zeros() -> str:
    """A table for each model; methods that read text show what other draws of it gave."""
    parts = []
    for model, measured in _read("sparsify_methods.json").items():
        told = f"{measured['tokens']:,} held-out tokens, {measured['calibration_tokens']:,} of calibration"
        parts += [f"`{model}`, {told}; `{measured['command']}`:", ""]
        parts += ["| | zeros | added loss (95% bounds) | on other calibration text | weights |"]
        parts += ["|---|---:|---:|---:|---:|"]
        parts += [f"| original, BF16 | | | | {measured['original_bytes'] / 1e6:.1f} MB |"]
        for name, row in measured["rows"].items():
            others = ", ".join(f"{value:+.4f}" for value in row["draws"][1:]) or "-"
            size = f"{row['weights_bytes'] / 1e6:.1f} MB"
            parts.append(f"| {name} | {row['zeros']:.1%} | {_added(row)} | {others} | {size} |")
        parts += [*_pairs_of_methods(measured.get("pairs", [])), ""]
    return "\n".join(parts).rstrip()


def pruned() -> str:
    """A table for each model; a dimension that rounds to nothing at some share says so."""
    parts = []
    for model, measured in _read("prune_structured.json").items():
        told = f"{measured['tokens']:,} held-out tokens, {measured['calibration_tokens']:,} of calibration"
        parts += [f"`{model}`, {told}; `{measured['command']}`:", ""]
        parts += ["| removed | added loss (95% bounds) | parameters | decode, times as fast (range of turns) |"]
        parts += ["|---|---:|---:|---:|"]
        parts += [f"| nothing | | {measured['original']['parameters'] / 1e6:.1f} M | |"]
        for name, row in measured["rows"].items():
            if "refused" in row:
                parts.append(f"| {name} | rounds to nothing, or no config says it: refused | | |")
                continue
            fast = row.get("decode_speedup")
            speed = f"{fast['median']:.2f} ({fast['low']:.2f}-{fast['high']:.2f})" if fast else ""
            parts.append(f"| {name} | {_added(row)} | {row['parameters'] / 1e6:.1f} M | {speed} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def skipping() -> str:
    """Of each random shape how fast it decodes, of each trained model what skipping adds to its quantized self."""
    parts = []
    for model, measured in _read("activation_sparsity.json").items():
        if "threads" in measured:
            told = f"{measured['threads']} threads, {measured['patterns']} tokens"
            parts += [f"`{model}`, random INT4 weights, {told}; `{measured['command']}`:", ""]
            parts += [
                "| share | decode, times as fast (range of turns) | ms a token | MB to read | GB/s |",
                "|---|---:|---:|---:|---:|",
            ]
            for share, row in measured["rows"].items():
                fast, kinds = row["speedup"], ("milliseconds", "megabytes", "gigabytes_per_second")
                before_after = " | ".join(f"{row[kind]['original']} -> {row[kind]['skip']}" for kind in kinds)
                parts.append(
                    f"| {share} | {fast['median']:.2f} ({fast['low']:.2f}-{fast['high']:.2f}) | {before_after} |"
                )
        else:
            parts += [f"`{model}`, {measured['tokens']:,} held-out tokens; `{measured['command']}`:", ""]
            parts += ["| | added loss (95% bounds) |", "|---|---:|"]
            parts += [f"| {name} | {_added(row)} |" for name, row in measured["rows"].items()]
        parts.append("")
    return "\n".join(parts).rstrip()


def forgetting() -> str:
    """What the gate says of a trained model that forgets; what a long text costs with and without."""
    if not (RESULTS / "eviction.json").exists():
        return "`python -m benchmarks.eviction` measures it."
    parts, found = [], _read("eviction.json")
    for model, measured in found.get("loss", {}).items():
        told = f"{measured['tokens']:,} tokens in windows of {measured['length']:,}, budget {measured['max_loss']:.0%}"
        told += f" (this text can prove {measured['provable']:.2%})"
        parts += [f"`{model}`, {told}; `{measured['command']}`:", ""]
        parts += [
            "| first + newest | loss (95% bounds) | nats a token that forgets | the gate |",
            "|---|---:|---:|---|",
        ]
        for name, row in measured["rows"].items():
            loss = " to ".join(f"{row['loss'][bound]:+.2%}" for bound in ("low", "high"))
            behind = f"{row['nats_more_behind']:+.4f}"
            parts.append(f"| {name} | {row['loss']['mid']:+.2%} ({loss}) | {behind} | {row['verdict']} |")
        exact, fault = measured["again"]["mid"], measured["planted_fault"]
        parts += [f"| everything, again | {exact:+.2%} | | |"]
        parts += [f"| planted fault | {fault['loss']['mid']:+.2%} | | {fault['verdict']} |", ""]
    for shape, measured in found.get("speed", {}).items():
        told = f"{measured['context']:,} tokens, {measured['threads']} threads"
        parts += [f"`{shape}`, random weights, {told}; `{measured['command']}`:", ""]
        parts += ["| kept | decode, tokens a second | keys and values |", "|---|---:|---:|"]
        for name, row in measured["rows"].items():
            rate, size = row["decode_tokens_per_second"], row["cache_bytes"] / 1e6
            parts.append(f"| {name} | {rate:.1f} | {size:.1f} MB |")
        parts.append("")
    return "\n".join(parts).rstrip()


def healed() -> str:
    """A table for each model: pruned, healed and from scratch, beside the original and its control."""
    parts = []
    for model, measured in _read("distill_after_prune.json").items():
        text = measured["text"]
        told = f"{text['held_tokens']:,} held-out tokens, {text['train_tokens']:,} of training text"
        parts += [f"`{model}`, {told}; `{measured['command']}`:", ""]
        parts += ["| model | nats a token | over the original (95% bounds) | over the better of original and control |"]
        parts[-1] += " parameters | trained on | minutes | decode, times as fast |"
        parts += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for name, row in measured["rows"].items():
            if "refused" in row:
                parts.append(f"| {name} | refused: {row['refused']} | | | | | | |")
                continue
            fast = row.get("decode_speedup")
            cells = [
                f"{row['nats']:.4f}",
                _added(row),
                _added({"increase_nats": row["over_the_better"]}),
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['train_tokens']:,}" if "train_tokens" in row else "",
                f"{row['minutes']:.1f}" if "minutes" in row else "",
                f"{fast['median']:.2f} ({fast['low']:.2f}-{fast['high']:.2f})" if fast else "",
            ]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def taught() -> str:
    """Four ways to learn labels, a row for each number of phrases."""
    found = _read("lora_sst2.json")
    rows = [row for row in found["rows"].values() if "test" in row]
    ways = list(dict.fromkeys(row["way"] for row in sorted(rows, key=lambda row: row["trained_parameters"])))
    lines = [f"| phrases | {' | '.join(ways)} | LoRA over full, points (95% bounds) |"]
    lines.append("|---|" + "---:|" * (len(ways) + 1))
    for size in sorted(found["sizes"], key=lambda size: found["sizes"][size]["count"] or 1 << 60):
        own = {way: [row for row in rows if row["size"] == size and row["way"] == way] for way in ways}
        over = [row["over_full_points"] for row in own.get("LoRA", []) if "over_full_points" in row]
        beside = f"{over[0]['mid']:+.1f} ({over[0]['low']:+.1f} to {over[0]['high']:+.1f})" if over else ""
        lines.append(f"| {size} | {' | '.join(_learned(own[way]) for way in ways)} | {beside} |")
    first = {row["way"]: row for row in rows}
    shares = [f"{way} {first[way]['trained_parameters'] / first['full']['trained_parameters']:.2%}" for way in ways]
    told = f"Accuracy on the {found['phrases']['test']} test sentences, CPU minutes of one training in brackets."
    return "\n".join([*lines, "", f"{told} Parameters that learn: {', '.join(shares)}. `{found['command']}`."])


def _learned(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "not run"
    seconds = [row["cpu_seconds"] for row in rows if row["cpu_seconds"] is not None]
    minutes = f" ({sum(seconds) / len(seconds) / 60:.1f})" if seconds else ""
    return " / ".join(f"{row['test']:.1%}" for row in rows) + minutes


def halved() -> str:
    """Teacher, trimmed teacher, the student before and after it was taught."""
    if not (RESULTS / "distilbert.json").exists():
        return "Not measured yet: `python -m benchmarks.distilbert` does it."
    found = _read("distilbert.json")
    lines = ["| model | test | of the teacher's | points over the teacher (95% bounds) | parameters | in layers |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, row in found["rows"].items():
        if "test" not in row:
            continue
        over = row.get("over_teacher_points")
        cells = [
            f"{row['test']:.1%}",
            f"{row['ratio']:.1%}" if "ratio" in row else "",
            f"{over['mid']:+.1f} ({over['low']:+.1f} to {over['high']:+.1f})" if over else "",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['layer_parameters'] / 1e6:.2f} M",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds, times = found["rows"].get("ratio over seeds"), found["rows"].get("speed, student over teacher")
    said = [f"`{found['command']}`."]
    if seeds and seeds["seeds"] > 1:
        bounds = f"{seeds['mid']:.1%} ({seeds['low']:.1%} to {seeds['high']:.1%}, t over {seeds['seeds']} seeds)"
        said.insert(0, f"The student keeps {bounds} of the teacher's accuracy.")
    if times:
        rates = [found["rows"][f"speed, {name}"]["phrases_a_second"] for name in ("teacher", "student")]
        ratio = f"{times['median']:.2f} times as fast ({times['low']:.2f} to {times['high']:.2f})"
        said.insert(0, f"On our engine, one thread: {rates[0]:.0f} and {rates[1]:.0f} phrases a second, {ratio}.")
    return "\n".join([*lines, "", " ".join(said)])


def attended() -> str:
    """Time of a token by the length of its text, full attention beside a window."""
    found = _read("long_context.json").get("speed")
    if found is None:
        return "`python -m benchmarks.long_context speed` measures it on a quiet machine."
    lines = [
        "| | tokens | full, µs a token | window, µs a token | times as fast (range) |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, what in (("encoder", "encoder, a whole text"), ("decoder", "decoder, the next token")):
        for tokens, row in found[kind]["rows"].items():
            middle, low, high = row["times_as_fast"]
            cells = [f"{int(tokens):,}", f"{row['full_us_a_token']:,.1f}", f"{row['near_us_a_token']:,.1f}"]
            lines.append(f"| {what} | {' | '.join(cells)} | {middle:.2f} ({low:.2f}-{high:.2f}) |")
    windows = f"Windows of {found['encoder']['window']} (encoder) and {found['decoder']['window']:,} (decoder)"
    return "\n".join([*lines, "", f"{windows}, random weights; `{found['command']}`."])


def batched() -> str:
    """What adapters cost where many streams decode at once."""
    if not (RESULTS / "adapters_batch.json").exists():
        return "`python -m benchmarks.adapters_batch` measures what they cost, on a quiet machine."
    found = _read("adapters_batch.json")
    lines = ["| eight streams | tokens a second | time over none (range) |", "|---|---:|---:|"]
    for name, row in found["rows"].items():
        over = row["over_none"]
        cells = f"{row['tokens_per_second']:.0f} | {over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f})"
        lines.append(f"| {name} | {cells} |")
    told = f"`{found['shape']}` INT4 with random weights, {found['threads']} threads, {found['processor']}; adapters of"
    sizes = f"rank {found['rank']} on all linears of blocks, {found['adapter_bytes'] / 1e6:.0f} MB each"
    return "\n".join([*lines, "", f"{told} {sizes}; `{found['command']}`."])


TRACES = {"azure": "Azure, conversations", "mooncake": "Mooncake, conversations"}
LOADS = {
    "capacity": "16 askers without rest",
    "both": "0.7 of what llama.cpp's carries",
    "ours": "0.7 of what ours carries",
    "long": "the same, longer",
}


def traces() -> str:
    """Each server on the same requests, one after the other in one run; a table for each processor."""
    whole = json.loads(found.read_text()) if (found := RESULTS / "serve_traces.json").exists() else {}
    head = (
        "| trace, load | server | answered | tokens a second | first token p50 / p90 / p99 | between tokens | in time "
    )
    head = f"{head}| known of prompts (could be) |\n|---|---|---|---|---|---|---|---|"
    tables = []
    for processor, measured in whole.items():
        lines = [f"{processor}:", "", head]
        for trace, said in TRACES.items():
            for load, words in LOADS.items():
                servers = measured.get(trace, {}).get(load, {}).get("servers", {})
                lines += [f"| {said}; {words} | {_served(name, row)} |" for name, row in servers.items()]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or "`python -m benchmarks.serve_traces` replays both traces here and at llama.cpp's."


def _served(name: str, row: Mapping[str, Any]) -> str:
    speed = f"{row['prompt_tokens_per_second']:.0f} read, {row['answer_tokens_per_second']:.0f} drawn"
    in_time = f"{row['good']} ({row['goodput_requests_per_second']:.2f} a second)"
    known = "-" if row["cached_share"] is None else f"{row['cached_share']:.1%} ({row['shared_share']:.1%})"
    answered = f"{row['answered']} of {row['requests']}"
    cells = (name, answered, speed, _spread(row["first_token_seconds"]), _spread(row["between_tokens_seconds"]))
    return " | ".join((*cells, in_time, known))


def _spread(seconds: Mapping[str, float] | None) -> str:
    return "-" if seconds is None else " / ".join(f"{seconds[part]:.2f}" for part in ("p50", "p90", "p99")) + " s"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _added(row: Mapping[str, Any]) -> str:
    found = row["increase_nats"]
    return f"{found['mid']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo, "peers": peers},
    "docs/compare.md": {
        "one": one_stream,
        "streams": streams,
        "quality": quality,
        "mixed": mixed,
        "speculation": speculation,
    },
    "docs/quantize.md": {
        "methods": methods,
        "three_bits": three_bits,
        "headline": headline,
        "scale": scale,
        "outliers": outliers,
    },
    "docs/eviction.md": {"forgetting": forgetting},
    "docs/convolution.md": {"convolved": convolved},
    "docs/adapt.md": {"batched": batched, "taught": taught},
    "docs/attention.md": {"attended": attended},
    "docs/distill.md": {"healed": healed, "halved": halved},
    "docs/planner.md": {"planned": planned},
    "docs/prune.md": {"pruned": pruned},
    "docs/serve.md": {"traces": traces},
    "docs/skip.md": {"skipping": skipping},
    "docs/sparsify.md": {"zeros": zeros},
}


def rendered(name: str, text: str) -> str:
    """`text` of this file with every block filled anew."""
    for block, fill in BLOCKS[name].items():
        pattern = re.compile(rf"(<!-- begin {block} -->\n).*?(<!-- end {block} -->)", re.DOTALL)
        assert pattern.search(text), f"{name} has no block {block}"
        content = fill()
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    stale = 0
    for name in BLOCKS:
        before = (ROOT / name).read_text(encoding="utf-8")
        after = rendered(name, before)
        stale += before != after
        if "--check" not in sys.argv:
            (ROOT / name).write_text(after, encoding="utf-8")
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
