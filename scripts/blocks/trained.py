"""Blocks about what trains, and about attention that costs less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.values import added, read


def convolved() -> str:
    """Converted and deleted layers by the share of attention that stays, before and after healing."""
    lines = []
    for model, measured in read("convolutions.json").items():
        lines += [f"| {model} | added loss (95% bounds) | parameters | bytes of a page |", "|---|---:|---:|---:|"]
        for name, row in measured["rows"].items():
            page, size = row["cache_page_bytes"], f"{row['parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {added(row)} | {size} | {page:,} |")
    return "\n".join(lines)


def healed() -> str:
    """A table for each model: pruned, healed and from scratch, beside the original and its control."""
    parts = []
    for model, measured in read("distill_after_prune.json").items():
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
                added(row),
                added({"increase_nats": row["over_the_better"]}),
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
    found = read("lora_sst2.json")
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
    found = read("distilbert.json")
    if not found:
        return "Not measured yet: `python -m benchmarks.distilbert` does it."
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
    found = read("long_context.json").get("speed")
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
    found = read("adapters_batch.json")
    if not found:
        return "`python -m benchmarks.adapters_batch` measures what they cost, on a quiet machine."
    lines = ["| eight streams | tokens a second | time over none (range) |", "|---|---:|---:|"]
    for name, row in found["rows"].items():
        over = row["over_none"]
        cells = f"{row['tokens_per_second']:.0f} | {over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f})"
        lines.append(f"| {name} | {cells} |")
    told = f"`{found['shape']}` INT4 with random weights, {found['threads']} threads, {found['processor']}; adapters of"
    sizes = f"rank {found['rank']} on all linears of blocks, {found['adapter_bytes'] / 1e6:.0f} MB each"
    return "\n".join([*lines, "", f"{told} {sizes}; `{found['command']}`."])
