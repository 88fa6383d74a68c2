"""Receipts arranged in the order in which a sceptic asks: the claim, its limits, the worst, the ladder, the method.

One function a section. Nothing is measured or derived here; a number that a run could not give is named with its
reason.
"""

from __future__ import annotations

from snello.optimize.events import LadderRow
from snello.optimize.receipts import Passage, ProofReceipt, Receipts, RunReceipt
from snello.report import charts, numbers
from snello.report.blocks import Block, Command, Excerpt, Page, Section, Table, Text
from snello.report.cells import optional
from snello.report.measurements import method, pareto, quality, speed

NATS_PER_STEP = 1.0  # an underline of a token grows by one step per this much loss
NOT_SHOWN = (
    "Other kinds of text than this: a language, a domain or a style that the proof text does not hold.",
    "Contexts longer than the windows of the proof (at most 1,024 tokens).",
    "Other machines: every speed is this machine's, with this number of threads.",
    "Taste: a loss per token says how surprised the model is by your text, not which answer you prefer. Near "
    "zero loss candidates are equal here and are chosen by speed; give `--metric` to judge them by your own score.",
)


def page(receipts: Receipts) -> Page:
    """All sections of one run."""
    run, proof = receipts.run, receipts.proof
    sections = [_claim(run, proof), _limits(run, proof)]
    if proof is not None:
        sections.append(_worst(proof))
    sections += [_ladder(receipts), _controls(receipts)]
    if proof is not None:
        sections += [pareto(proof), speed(run, proof), quality(proof)]
    sections.append(method(receipts))
    return Page(title=f"{run.model.name}, made lean", sections=tuple(sections))


def ladder_rows(receipts: Receipts) -> tuple[LadderRow, ...]:
    """The proof's ladder; of a run that ended before it, the rows that were judged."""
    if receipts.proof is not None:
        return receipts.proof.ladder
    return tuple({step.stage: step.row for step in receipts.steps}.values())


# ---- 1: the claim ---------------------------------------------------------------------------------------------------


def _claim(run: RunReceipt, proof: ProofReceipt | None) -> Section:
    blocks: list[Block] = []
    if proof is None:
        blocks.append(Text("This run ended before its proof: nothing is claimed."))
    else:
        blocks.append(Text(proof.sentence))
        if proof.reason not in ("", proof.sentence):
            blocks.append(Text(proof.reason))
        blocks.append(_two_speeds(proof))
    digests = [("original", run.model.digest), ("text", run.text_sha256)]
    if proof is not None and proof.artifact_sha256:
        digests.insert(1, ("lean", proof.artifact_sha256))
    blocks.append(Table(columns=("what", "SHA-256"), rows=tuple(digests)))
    blocks += [Text("Replay it:"), Command(run.replay if proof is None else proof.replay)]
    about = (
        "The sentence holds for this text and this machine. The loss is an upper bound at 95% from paired "
        "differences on text that nothing was chosen on. The two speed-ups have different causes and are never "
        "multiplied."
    )
    return Section(key="claim", title="What is claimed", about=about, blocks=tuple(blocks))


def _two_speeds(proof: ProofReceipt) -> Table:
    engine = proof.engine_note or "not measured"
    rows = [
        ("techniques: lean over our original", optional(proof.speedup, numbers.times_interval)),
        (
            "engine: our original over Transformers",
            engine if proof.engine_speedup is None else numbers.times_interval(proof.engine_speedup),
        ),
        ("size: original over lean", "-" if proof.size_ratio is None else numbers.times(proof.size_ratio)),
    ]
    return Table(columns=("ratio", "value (95%)"), rows=tuple(rows), right=(1,))


# ---- 2: what it does not show ---------------------------------------------------------------------------------------


def _limits(run: RunReceipt, proof: ProofReceipt | None) -> Section:
    lines = list(NOT_SHOWN)
    if run.self_written:
        lines.insert(0, "Your text: none was given, so the original wrote the text that it was judged on.")
    rows = [(line,) for line in lines]
    if proof is not None:
        rows += [(f"Not measured in this run: {item}",) for item in proof.not_measured]
    about = "What would have to be measured before a wider claim. None of it is known to be bad; it is not known."
    return Section(
        key="limits",
        title="What this does not show",
        about=about,
        blocks=(Table(columns=("not shown",), rows=tuple(rows)),),
    )


# ---- 3: the worst passages ------------------------------------------------------------------------------------------


def _worst(proof: ProofReceipt) -> Section:
    blocks: list[Block] = [_excerpt(place, passage) for place, passage in enumerate(proof.worst[:10], 1)]
    about = (
        "The passages of the proof text where the lean model lost most, as each model read them: the thicker the "
        "line under a token, the more it surprised that model. If these read fine to you, the rest does. They are "
        "the extremes of many passages, so they look worse than the text as a whole."
    )
    nothing = Text("No passages were kept: there is no lean model, or nothing was lost.")
    return Section(key="worst", title="The worst passages", about=about, blocks=tuple(blocks) or (nothing,))


def _excerpt(place: int, passage: Passage) -> Excerpt:
    where = f"{passage.document} in {passage.source}, from token {numbers.count(passage.start)}"
    caption = f"{place}. {where}: {passage.difference:+.2f} nats over {numbers.count(len(passage.tokens))} tokens"
    return Excerpt(
        caption=caption,
        tokens=passage.tokens,
        original=tuple(map(_thickness, passage.original)),
        lean=tuple(map(_thickness, passage.lean)),
    )


def _thickness(nats: float) -> int:
    return max(0, min(5, int(nats / NATS_PER_STEP)))


# ---- 4: the ladder --------------------------------------------------------------------------------------------------


def _ladder(receipts: Receipts) -> Section:
    rows = ladder_rows(receipts)
    cells = tuple(_ladder_row(row) for row in rows)
    columns = ("stage", "loss (at most)", "added", receipts.run.goal, "over the best", "weights", "verdict")
    blocks = (charts.ladder(rows, receipts.run.max_loss), Table(columns=columns, rows=cells, right=(1, 2, 3, 4, 5)))
    about = (
        "Every stage in the order of judging, dropped and not-run ones included. Losses are cumulative against the "
        "original, on the selection text; 'added' is against what the stage was applied to. A stage is kept if its "
        "bound is within the budget and it pays."
    )
    return Section(key="ladder", title="The ladder", about=about, blocks=blocks)


def _ladder_row(row: LadderRow) -> tuple[str, ...]:
    return (
        row.name,
        optional(row.loss, numbers.loss),
        optional(row.increment, numbers.loss),
        optional(row.speedup, numbers.times_interval),
        optional(row.gain, numbers.times_interval),
        "-" if row.weights_bytes is None else numbers.size(row.weights_bytes),
        verdict(row),
    )


def verdict(row: LadderRow) -> str:
    """ "dropped: over 1%", "kept, replaces int8"."""
    text = row.verdict + (f": {row.reason}" if row.reason else "")
    return f"{text}, replaces {row.replaces}" if row.replaces else text


# ---- 5: controls ----------------------------------------------------------------------------------------------------


def _controls(receipts: Receipts) -> Section:
    rows: list[tuple[str, str, str]] = []
    for step in receipts.steps:
        if step.row.kind in ("again", "fault"):
            rows.append((step.row.name, optional(step.row.loss, numbers.loss), verdict(step.row)))
    proof = receipts.proof
    if proof is not None and proof.evidence is not None:
        caught = {True: "caught", False: "not caught", None: "not measured"}[proof.fault_caught]
        rows.append(("the original against itself, on the proof", optional(proof.again, numbers.loss), "A/A"))
        rows.append(("a planted fault just above the budget", optional(proof.fault, numbers.loss), caught))
    rows.append(("do nothing: keep the original", "0.00%", "always possible"))
    about = (
        "An instrument that cannot fail proves nothing. The original measured twice must show no difference; a small "
        "damage planted on purpose must be found. 'Do nothing' is the alternative that every stage has to beat."
    )
    table = Table(columns=("control", "loss (at most)", "outcome"), rows=tuple(rows), right=(1,))
    return Section(key="controls", title="Controls", about=about, blocks=(table,))
