"""Blocks about what trains, and about attention that costs less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.values import added, by_seed, read, times


def convolved() -> str:
    """Converted and deleted layers by the share of attention that stays, before and after healing."""
    lines: list[str] = []
    for model, measured in read("convolutions.json").items():
        lines += [""] if lines else []
        lines += [f"| {model} | added loss (95% bounds) | parameters | bytes of a page |", "|---|---:|---:|---:|"]
        for name, (row, *others) in by_seed(measured["rows"]).items():
            page, size = row["cache_page_bytes"], f"{row['parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {added(row, *others)} | {size} | {page:,} |")
        lines += _convolved_speed(measured)
    return "\n".join(lines)


def _convolved_speed(measured: Mapping[str, Any]) -> list[str]:
    timed = {name: row["speed_over_original"] for name, row in measured["rows"].items() if "speed_over_original" in row}
    if not timed:
        return []
    jobs = list(next(iter(timed.values())))
    lines = ["", f"| times as fast (range) | {' | '.join(jobs)} |", "|---|" + "---:|" * len(jobs)]
    for name, found in timed.items():
        cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"`{measured['speed']['command']}`, instruction set {measured['speed']['core']}."]


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
        for name, (row, *others) in by_seed(measured["rows"]).items():
            if "refused" in row:
                parts.append(f"| {name} | refused: {row['refused']} | | | | | | |")
                continue
            fast = row.get("decode_speedup")
            cells = [
                f"{row['nats']:.4f}",
                added(row, *others),
                added(row, *others, key="over_the_better"),
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
        over = found["rows"].get(f"LoRA over full, {size}", {}).get("points")
        beside = f"{over['mid']:+.1f} ({over['low']:+.1f} to {over['high']:+.1f})" if over else ""
        lines.append(f"| {size} | {' | '.join(_learned(own[way]) for way in ways)} | {beside} |")
    first = {row["way"]: row for row in rows}
    shares = [f"{way} {first[way]['trained_parameters'] / first['full']['trained_parameters']:.2%}" for way in ways]
    told = f"Accuracy on the {found['phrases']['test']} test sentences, seed by seed; CPU minutes of one training."
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
    longest, row = list(found["decoder"]["rows"].items())[-1]
    held = " and ".join(map(str, row["pages_needed"]))
    pages = f"Behind {int(longest):,} tokens a decoder holds {held} pages of keys and values."
    kinds = found["encoder"]["memory_for_the_longest"].values()
    full, near = (f"{sum(kind.values()) / 1e6:.0f} MB" for kind in kinds)
    told = f"For its longest text the encoder takes {full} with full attention and {near} as a Longformer."
    return "\n".join([*lines, "", f"{windows}, random weights; `{found['command']}`. {pages} {told}"])


def prompted() -> str:
    """A learned prompt beside LoRA, as `snello adapt` judged them."""
    found = read("prompt_tuning.json")
    if not found:
        return "`python -m benchmarks.prompt_tuning` measures it."
    lines = ["| task | method, rate | on held-out examples | numbers learned | written |", "|---|---|---|---:|---|"]
    for row in found["rows"].values():
        count = f"{row['parameters']:,}" if row["written"] else ""
        cells = [row["task"], f"{row['method']}, {row['rate']:g}", row["said"], count]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['written'] else 'no'} |")
    return "\n".join([*lines, "", f"`{found['command']}`."])


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


def recipe() -> str:
    """DistilBERT's own recipe: the student beside what it has to be compared with."""
    found = read("distilbert_recipe.json")
    if not found:
        return "Not measured yet: `python -m benchmarks.distilbert_recipe` does it."
    lines = [
        "| model | nats a hidden word | over the BERT (95% bounds) | likeliest word right | parameters | in layers |"
    ]
    lines[-1] += " learned from | CPU minutes |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, rows in by_seed(found["rows"]).items():
        row = rows[0]
        if "nats" not in row:
            continue
        cells = [
            f"{row['nats']:.3f}",
            added(*rows, key="over_bert_nats"),
            " / ".join(f"{each['right']:.1%}" for each in rows),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['layer_parameters'] / 1e6:.2f} M",
            f"{row['train_tokens']:,}" if "train_tokens" in row else "",
            f"{row['cpu_seconds'] / 60:.1f}" if "cpu_seconds" in row else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    fast = found["rows"].get("speed, student over BERT")
    said = (
        f"The student is {fast['median']:.2f} times as fast ({fast['low']:.2f} to {fast['high']:.2f}). " if fast else ""
    )
    return "\n".join([*lines, "", f"{said}`{found['command']}`."])


def recalled() -> str:
    """Nats that a first copy saves on rare tokens of the second, by distance."""
    parts = []
    for model, found in read("recall.json").items():
        distances = list(next(iter(found["rows"].values())))
        lines = [f"| {model}, nats saved a rare token | {' | '.join(distances)} |", "|---|" + "---:|" * len(distances)]
        for name, row in found["rows"].items():
            cells = [f"{cell['mid']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})" for cell in row.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        told = f"{found['passages']} passages, the {found['rare_tokens']} rarest tokens of each; `{found['command']}`."
        parts += ["\n".join([*lines, "", told])]
    return "\n\n".join(parts) or "`python -m benchmarks.recall` measures it."


def grouped() -> str:
    """Pooled heads before and after the same healing."""
    found = read("grouped_queries.json").get("demo")
    if not found:
        return "`python -m benchmarks.grouped_queries` measures it."
    lines = ["| heads, pooled by | nats a token | over the better of original and control | over the mean's, healed |"]
    lines[-1] += " bytes of a page |"
    lines.append("|---|---:|---:|---:|---:|")
    for name, (row, *others) in by_seed(found["rows"]).items():
        better = added(row, *others, key="over_the_better")
        mean = added(row, *others, key="over_the_mean") if "over_the_mean" in row else ""
        lines.append(f"| {name} | {row['nats']:.4f} | {better} | {mean} | {row['cache_page_bytes']:,} |")
    text = found["text"]
    told = f"{text['held_tokens']:,} held-out tokens, {text['train_tokens']:,} of training text"
    return "\n".join([*lines, "", f"{told}; `{found['command']}`."])


def stacked() -> str:
    """A trained chain as two numbers, and what each of its parts brings and costs."""
    parts = []
    for model, found in read("stack.json").items():
        if found.get("techniques") is None:
            continue
        engine = found["engine"]
        said = f"{times(engine)} times as fast as Transformers" if isinstance(engine, list) else f"not known: {engine}"
        low, middle, high = found["loss"]
        told = f"{model}, {found['machine']}: engine {said}, techniques {times(found['techniques'])}, loss over "
        told += f"{found['against']} {middle:.2%} ({low:.2%} to {high:.2%}) on {found['proof_tokens']:,} tokens."
        gone = [
            f"{name} ({times(row['speedup'])} times as fast, loss {row['loss'][1]:.1%})"
            for name, row in found["stages"].items()
            if row["verdict"] != "kept"
        ]
        lines = [told + (f" Dropped: {', '.join(gone)}." if gone else ""), ""]
        if found["parts"]:
            lines += [
                "| part | the chain over the chain without it, times as fast (95%) | loss that it adds |",
                "|---|---:|---:|",
            ]
        for name, part in found["parts"].items():
            low, middle, high = part["added_loss"]
            lines.append(f"| {name} | {times(part['gain'])} | {middle:+.2%} ({low:+.2%} to {high:+.2%}) |")
        parts.append("\n".join([*lines, *([""] if found["parts"] else []), f"`{found['command']}`."]))
    return "\n\n".join(parts) or "`python -m benchmarks.stack` measures it."
