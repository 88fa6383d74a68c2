"""`snello check ORIGINAL OTHER`: the verdict on what was made elsewhere, and an exit code for CI."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.options import at_least, of_deployment, percent
from snello.report import numbers
from snello.terminal import Terminal, table

if TYPE_CHECKING:
    from snello.optimize.check import Check
    from snello.optimize.receipts import Guards, Passage

EXAMPLES = (
    "snello check Qwen/Qwen3-0.6B my/qwen3-gptq --text yours.txt --max-loss 1%",
    "snello check Qwen/Qwen3-0.6B qwen3-q4_k_m.gguf --text yours.txt",
    "snello check Qwen/Qwen3-0.6B http://127.0.0.1:8000/v1 --text yours.txt",
    "snello check demo lean/demo --text yours.txt --json",
)
SHOWN_PASSAGES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("original", metavar="ORIGINAL", help="a folder, a Hugging Face name, or demo")
    add(
        "other",
        metavar="OTHER",
        help="a version of it: a folder or a name, a GGUF file, or the address of a server of OpenAI's protocol "
        "(its key: OPENAI_API_KEY)",
    )
    add = parser.add_argument_group("most used").add_argument
    add("--text", type=Path, action="append", required=True, metavar="FILE", help="repeatable: the worst counts")
    add("--max-loss", type=percent, default=0.01, metavar="1%", help="most that it may be worse [1%%]")
    add = parser.add_argument_group("the rest").add_argument
    add("--strict", action="store_true", help="the guards decide too: divergence, looping, ending")
    add("--tokens", type=at_least(1_024), default=131_072, metavar="N", help="read of each text at most [131072]")
    add("--served-model", metavar="NAME", help="which of a server's models [its only one]")
    add("--seed", type=at_least(0), default=0, help="of the bound's redraws and the planted fault [0]")
    add("--threads", type=of_deployment("threads"), help="[the physical cores]")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello.optimize.check import check

    found = check(
        arguments.original,
        arguments.other,
        text=arguments.text,
        max_loss=arguments.max_loss,
        strict=arguments.strict,
        tokens=arguments.tokens,
        seed=arguments.seed,
        threads=arguments.threads,
        served_model=arguments.served_model,
        key=os.environ.get("OPENAI_API_KEY") or None,
        report=lambda what, done, total: terminal.footer([f" {what}  {done} of {total}"]),
    )
    terminal.clear_footer()
    for line in lines(found):
        terminal.product(line)
    from snello.optimize.events import plain

    fields = plain(found)
    return {"exit": fields.pop("exit_code"), **fields}


def lines(found: Check) -> list[str]:
    """The verdict as it is printed; its last line is the sentence."""
    kind = found.other["kind"]
    head = f"{found.other['name']}, {kind}, beside {found.original['name']}; {found.measure} (at most, 95%)"
    steady = "steady" if found.again.high == found.again.low == 0 else "unsteady: the same model differs from itself"
    rows = [["original again (A/A)", numbers.loss(found.again), steady]]
    rows.append(["planted fault", numbers.loss(found.fault), "made 1.1 times the budget"])
    if found.loss is not None:
        rows += [[source.source, numbers.loss(source.loss), f"{source.tokens:,} read"] for source in found.sources]
    text = [head, *table(rows, right=(1,), indent=" ")]
    if found.perplexity is not None:
        text.append(f"perplexity {found.perplexity[0]:.4g}, then {found.perplexity[1]:.4g}")
    if found.guards is not None:
        text += _guards(found.guards)
    lost = [one for one in found.worst if one.difference > 0][:SHOWN_PASSAGES]
    text += [_passage(place, one) for place, one in enumerate(lost, start=1)]
    return [*text, found.sentence]


def _guards(found: Guards) -> list[str]:
    said = []
    if found.mean_divergence is not None and found.divergence_p99 is not None:
        said.append(f"divergence {found.mean_divergence:.3g} nats, 99th percentile {found.divergence_p99:.3g}")
    for what, rates in (("loop", found.looping), ("end by themselves", found.ending)):
        if rates is not None:
            said.append(f"{100 * rates[1]:.0f}% of {found.prompts} answers {what} (original {100 * rates[0]:.0f}%)")
    if found.mean_cosine is not None:
        said.append(f"mean cosine {found.mean_cosine:.4f}")
    failed = [f"--strict would refuse: {one}" for one in found.failed]
    return [*(["; ".join(said)] if said else []), *failed]


def _passage(place: int, passage: Passage) -> str:
    words = " ".join("".join(passage.tokens).split())
    where = f"{passage.document}, from token {passage.start:,}"
    return f"worst {place}: {passage.difference:+.2f} nats in {len(passage.tokens)} tokens of {where}: {words}"
