"""Blocks about what makes a model lean without training: fewer bits, fewer parts, the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.values import RESULTS, added, read, span, times


def methods() -> str:
    return "\n\n".join(_methods(model, measured) for model, measured in read("quantize_methods.json").items())


def _methods(model: str, measured: Mapping[str, Any]) -> str:
    lines = [f"| {model} | added loss (95% bounds) | KL from the original | weights |", "|---|---:|---:|---:|"]
    lines.append(f"| original, BF16 | | | {measured['original_bytes'] / 1e6:.1f} MB |")
    lines += [
        f"| {name} | {added(row)}{_draws(row)} | {row['kl_nats']:.4f} | {row['weights_bytes'] / 1e6:.1f} MB |"
        for name, row in measured["rows"].items()
    ]
    return "\n".join([f"{_texts(measured)}:", "", *lines, *_pairs_of_methods(measured.get("pairs", []))])


def _texts(measured: Mapping[str, Any]) -> str:
    """What was read, and the command."""
    told = f"{measured['tokens']:,} held-out tokens, {measured['calibration_tokens']:,} of calibration"
    return f"{told}; `{measured['command']}`"


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
    found = read("int3_beside_int4.json")
    lines = ["| in turn | INT4 | INT3 | INT3, times as fast (range) |", "|---|---:|---:|---:|"]
    for rows, row in found["products"].items():
        speeds = " | ".join(f"{row[f'{name}_gigaops']:.0f} GOP/s" for name in ("int4", "int3"))
        lines.append(
            f"| product of {rows} row{'s' if rows != '1' else ''} | {speeds} | {span(row['int3_over_int4_speed'])} |"
        )
    for streams, row in found["decode"].items():
        speeds = " | ".join(f"{row[f'{name}_tokens_per_second']:.1f} tokens/s" for name in ("int4", "int3"))
        name = f"decode, {streams} stream{'s' if streams != '1' else ''}"
        lines.append(f"| {name} | {speeds} | {span(row['int3_over_int4_speed'])} |")
    one = found["decode"]["1"]
    size = " and ".join(f"{one[f'{name}_bytes_per_token'] / 1e6:.0f}" for name in ("int4", "int3"))
    told = f"{found['processor']}; {found['matrix'][0]:,} x {found['matrix'][1]:,} on one thread, {found['shape']} on"
    told += f" {found['threads']} ({size} MB a token); `{found['command']}`:"
    return "\n".join([told, "", *lines])


def headline() -> str:
    """INT8 beside FP32, our own and Transformers', a table for each model."""
    parts = []
    for model, found in read("int8_headline.json").items():
        told = f"`{model}`, prompt {found['prompt']}, answer {found['generate']}, {found['threads']} threads,"
        told += f" {found['processor']}; {found['tokens']:,} held-out tokens; `{found['command']}`:"
        parts += [told, "", "| | weights | first token | INT8, times as fast (range) | tokens/s |"]
        parts[-1] += " INT8, times as fast (range) | added loss (95% bounds) |"
        parts += ["|---|---:|---:|---:|---:|---:|---:|"]
        for name, row in found["rows"].items():
            ours = name == "int8"
            ratios = [row[f"int8_{part}_times_as_fast"] for part in ("first_token", "decode")]
            first, decode = ("-" if ours else span(ratio) for ratio in ratios)
            size, seconds = f"{row['weights_bytes'] / 1e6:.1f} MB", f"{1e3 * row['first_token_seconds']:.0f} ms"
            rate = f"{row['tokens_per_second']:.0f}"
            parts.append(f"| {name} | {size} | {seconds} | {first} | {rate} | {decode} | {added(row)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def scale() -> str:
    """Seconds and memory of quantizing published sizes."""
    lines = ["| | calibration | time | peak, anonymous | peak, resident | bound |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in read("quantize_scale.json").items():
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
        lines.append(f"| {told}: {' + '.join(chain['parts'])} | {times(chain['speedup'])} | {_most(chain)} |")
        for single, found in row["rows"].items():
            if found.get("parts") == 1 and found["loss_at_most"] <= row["max_loss"]:
                lines.append(f"| - {single} alone | {times(found['speedup'])} | {_most(found)} |")
    lines += ["", "| the chain over, in turn | times as fast (95%) |", "|---|---:|"]
    for name, _, row in _plans():
        chain = row["planner"]
        lines += [f"| {name}: itself without {k} | {times(v)} |" for k, v in chain["over_the_chain_without"].items()]
        lines += [f"| {name}: {single} alone | {times(v)} |" for single, v in chain["over_the_single"].items()]
    for name, _, row in _plans():
        for tokens, (before, after) in row["planner"]["sequences_a_second"].items():
            lines += ["", f"{name}, {tokens} tokens: {before:g} sequences a second, then {after:g}."]
    return "\n".join(lines)


def _plans() -> list[tuple[str, str, Any]]:
    return [
        (name, goal, row)
        for name, goals in read("planner_vs_single.json").items()
        for goal, row in goals.items()
        if row["planner"] is not None
    ]


def _most(row: Mapping[str, Any]) -> str:
    return f"{row['loss_at_most']:.2%}"


def outliers() -> str:
    measured = read("outliers.json")
    models = measured["rows"]
    lines = [f"| | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for recipe in next(iter(models.values())):
        lines.append(f"| {recipe} | {' | '.join(added(rows[recipe]) for rows in models.values())} |")
    return "\n".join([f"Added loss on {measured['tokens']:,} tokens; `{measured['command']}`:", "", *lines])


def zeros() -> str:
    """A table for each model; methods that read text show what other draws of it gave."""
    parts = []
    for model, measured in read("sparsify_methods.json").items():
        parts += [f"`{model}`, {_texts(measured)}:", ""]
        parts += ["| | zeros | added loss (95% bounds) | on other calibration text | weights |"]
        parts += ["|---|---:|---:|---:|---:|"]
        parts += [f"| original, BF16 | | | | {measured['original_bytes'] / 1e6:.1f} MB |"]
        for name, row in measured["rows"].items():
            others = ", ".join(f"{value:+.4f}" for value in row["draws"][1:]) or "-"
            size = f"{row['weights_bytes'] / 1e6:.1f} MB"
            parts.append(f"| {name} | {row['zeros']:.1%} | {added(row)} | {others} | {size} |")
        parts += [*_pairs_of_methods(measured.get("pairs", [])), ""]
    return "\n".join(parts).rstrip()


def pruned() -> str:
    """A table for each model; a dimension that rounds to nothing at some share says so."""
    parts = []
    for model, measured in read("prune_structured.json").items():
        parts += [f"`{model}`, {_texts(measured)}:", ""]
        parts += ["| removed | added loss (95% bounds) | parameters | decode, times as fast (range of turns) |"]
        parts += ["|---|---:|---:|---:|"]
        parts += [f"| nothing | | {measured['original']['parameters'] / 1e6:.1f} M | |"]
        for name, row in measured["rows"].items():
            if "refused" in row:
                parts.append(f"| {name} | rounds to nothing, or no config says it: refused | | |")
                continue
            fast = row.get("decode_speedup")
            speed = f"{fast['median']:.2f} ({fast['low']:.2f}-{fast['high']:.2f})" if fast else ""
            parts.append(f"| {name} | {added(row)} | {row['parameters'] / 1e6:.1f} M | {speed} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def skipping() -> str:
    """Of each random shape how fast it decodes, of each trained model what skipping adds to its quantized self."""
    parts = []
    for model, measured in read("activation_sparsity.json").items():
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
            parts += [f"| {name} | {added(row)} |" for name, row in measured["rows"].items()]
        parts.append("")
    return "\n".join(parts).rstrip()


def forgetting() -> str:
    """What the gate says of a trained model that forgets; what a long text costs with and without."""
    if not (RESULTS / "eviction.json").exists():
        return "`python -m benchmarks.eviction` measures it."
    parts, found = [], read("eviction.json")
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
