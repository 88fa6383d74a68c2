"""A whole run's receipts, made up: every field filled, names that would break a careless page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snello.measure import timing
from snello.measure.interval import Interval
from snello.optimize import receipts
from snello.optimize.events import LadderRow, PlannedStage, TextSource
from snello.optimize.examine import cost_ratio

EVIL = "<script>alert('x')</script> | `tick` *star*"
VERSIONS = {"snello": "0.1.0", "python": "3.11.7"}


def rows() -> tuple[LadderRow, ...]:
    return (
        LadderRow(index=1, name="original", kind="original", verdict="original", reason="23 of 24 possible"),
        LadderRow(
            index=2,
            name="original again",
            kind="again",
            verdict="steady",
            reason="",
            loss=Interval(-0.0003, 0.0, 0.0003),
        ),
        LadderRow(
            index=3,
            name="planted fault",
            kind="fault",
            verdict="caught",
            reason="",
            loss=Interval(0.011, 0.0131, 0.0152),
        ),
        LadderRow(
            index=4,
            name="quantize int8",
            kind="stage",
            verdict="kept",
            reason="",
            loss=Interval(0.0001, 0.0005, 0.0011),
            increment=Interval(0.0001, 0.0005, 0.0011),
            speedup=Interval(1.84, 1.86, 1.88),
            gain=Interval(1.84, 1.86, 1.88),
            weights_bytes=620_000_000,
            seconds=14.2,
        ),
        LadderRow(
            index=5,
            name=f"quantize {EVIL}",
            kind="stage",
            verdict="dropped",
            reason="over 1%",
            loss=Interval(0.02, 0.0231, 0.0262),
            speedup=Interval(3.0, 3.02, 3.05),
            weights_bytes=352_000_000,
        ),
        LadderRow(index=6, name="sliding window", kind="stage", verdict="not run", reason="cannot pay at 640 tokens"),
    )


def model(digest: str = "ab" * 32) -> receipts.ModelFacts:
    return receipts.ModelFacts(
        name="Qwen3-0.6B",
        digest=digest,
        spec_digest="cd" * 32,
        num_parameters=596_049_920,
        weights="bf16",
        weights_bytes=1_192_000_000,
        bits_per_weight=16.0,
    )


def run() -> receipts.RunReceipt:
    plan = PlannedStage(
        name="quantize int8",
        steps=({"use": "quantize", "weights": "int8"},),
        predicted_speedup=1.9,
        predicted_bytes=620_000_000,
        predicted_seconds=12.5,
        runs=True,
    )
    source = TextSource(
        name="support.txt",
        documents=412,
        calib_tokens=32_768,
        select_tokens=65_021,
        proof_tokens=61_204,
        dropped_blocks=7,
        smallest_provable=0.004,
    )
    return receipts.RunReceipt(
        model=model(),
        machine={"cpu": "a processor", "cores": 2, "bandwidth": [[262144, 5.5e10], [1073741824, 2.9e10]]},
        versions=VERSIONS,
        command=("snello", "optimize", "Qwen/Qwen3-0.6B", "--text", "support.txt"),
        replay="snello optimize Qwen/Qwen3-0.6B --recipe recipe.toml --text support.txt",
        seed=0,
        created="2026-05-01T12:00:00Z",
        text=(source,),
        text_sha256="ef" * 32,
        self_written=False,
        measure="loss",
        max_loss=0.01,
        goal="latency",
        strict=False,
        metric=None,
        target=None,
        time_budget_seconds=1800.0,
        smallest_provable=0.004,
        power_rule="1.645 standard errors of the A/A",
        workload="512 prompt tokens, 128 answer tokens, one stream",
        plan=(plan,),
    )


def speed(decode: float) -> receipts.Speed:
    return receipts.Speed(
        prefill_tokens_per_second=Interval(590, 601, 612),
        decode_tokens_per_second=Interval(decode - 0.4, decode, decode + 0.3),
        ceiling_prefill_tokens_per_second=1100.0,
        ceiling_decode_tokens_per_second=decode + 2.0,
        bytes_per_token=1_190_000_000,
        first_token_seconds=0.851,
        latency_seconds=5.71,
        throughput_tokens_per_second=141.0,
        peak_resident_bytes=1_610_000_000,
    )


def evidence() -> receipts.Evidence:
    loss = Interval(0.0034, 0.0052, 0.0071)
    guards = receipts.Guards(
        mean_divergence=0.0031,
        divergence_p99=0.042,
        divergence_quantiles=((0.5, 0.0008), (0.9, 0.006), (0.99, 0.042), (1.0, 1.7)),
        top1_agreement=0.969,
        looping=(0.02, 0.02),
        ending=(0.91, 0.9),
        prompts=48,
    )
    part = receipts.SourceLoss(source="support.txt", tokens=61_204, blocks=64, loss=loss)
    return receipts.Evidence(
        cut="proof",
        measure="loss",
        loss=loss,
        sources=(part,),
        guards=guards,
        weights_only=Interval(0.003, 0.0044, 0.0058),
        weights_only_note="on 8,192 tokens",
    )


def proof() -> receipts.ProofReceipt:
    tokens = ("def", " area", f"({EVIL}", "):", "\n", "    return")
    passage = receipts.Passage(
        source="support.txt",
        document="support.txt#17",
        start=448,
        tokens=tokens,
        original=(0.1, 0.4, 2.2, 0.1, 0.0, 1.1),
        lean=(0.1, 0.6, 5.4, 0.1, 0.0, 1.3),
        difference=3.6,
    )
    points = (
        receipts.ParetoPoint(
            name="quantize int8",
            speedup=Interval(1.84, 1.86, 1.88),
            loss=Interval(0.0001, 0.0005, 0.0011),
            weights_bytes=620_000_000,
            verdict="kept",
            on_front=True,
            tied_with=("quantize int4",),
        ),
        receipts.ParetoPoint(
            name="quantize int4",
            speedup=Interval(3.0, 3.02, 3.05),
            loss=Interval(0.0034, 0.0052, 0.0071),
            weights_bytes=352_000_000,
            verdict="kept",
            on_front=True,
        ),
    )
    pairs = [(5.71, 1.89), (5.73, 1.9), (5.7, 1.88), (5.72, 1.89), (5.71, 1.9), (5.7, 1.89)]  # original, lean
    ratio = cost_ratio("latency", "original", timing.summarize(pairs))
    return receipts.ProofReceipt(
        index=7,
        exit_code=0,
        sentence="3.0x faster (3.0-3.1) and 3.4x smaller; on your text at most 0.72% worse (95%).",
        reason="",
        proved=True,
        tokens=61_204,
        evidence=evidence(),
        again=Interval(-0.0002, 0.0, 0.0002),
        fault=Interval(0.011, 0.013, 0.015),
        fault_caught=True,
        perplexity=receipts.Perplexity(source="support.txt", original=14.3312, lean=14.4059),
        sharper=13.2,
        speedup=Interval(3.0, 3.02, 3.05),
        engine_speedup=None,
        engine_note="Transformers was not measured",
        size_ratio=3.39,
        speed_original=speed(23.1),
        speed_lean=speed(69.4),
        costs=(ratio,),
        ladder=rows(),
        pareto=points,
        ablation=(
            receipts.Ablation(
                without="rotate", speedup=Interval(3.0, 3.03, 3.06), loss=Interval(0.007, 0.0092, 0.0114), note="-"
            ),
        ),
        duels=(receipts.Duel(single="quantize int4, gptq", gain=Interval(1.04, 1.05, 1.06), steady=True),),
        worst=(passage,),
        documents=(
            receipts.DocumentLoss(source="support.txt", document="support.txt#17", tokens=1_402, loss=0.031),
            receipts.DocumentLoss(source="support.txt", document="support.txt#3", tokens=902, loss=-0.002),
        ),
        not_measured=("the smaller sibling: no model of this family is smaller",),
        artifact_sha256="12" * 32,
        files={"model.safetensors": "34" * 32},
        seconds=1062.0,
        replay="snello optimize Qwen/Qwen3-0.6B --recipe recipe.toml --text support.txt",
    )


def step(row: LadderRow) -> receipts.StepReceipt:
    return receipts.StepReceipt(
        index=row.index,
        step=row.name,
        stage=row.name,
        row=row,
        technique="quantize",
        options={"weights": "int8"},
        applied_to="original",
        spec_before="cd" * 32,
        spec_after="ce" * 32,
        model=model("ac" * 32),
        seconds=row.seconds,
        margin="kept by a factor of 4.1 of the budget",
        machine="a processor",
        versions=VERSIONS,
        seed=0,
        command=("snello", "optimize"),
    )


def write(folder: Path, *, proved: bool = True) -> Path:
    """A folder as `optimize` leaves it, receipts only."""
    parts: list[tuple[int, str, Any]] = [(0, "run", run())]
    parts += [(row.index, row.name, step(row)) for row in rows()]
    parts += [(7, "proof", proof())] if proved else []
    for index, name, receipt in parts:
        receipts.write(folder / "receipts", index, name, receipt)
    return folder
