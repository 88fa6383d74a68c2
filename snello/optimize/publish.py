"""The end of a run: the proof, the sentence, and a folder that appears whole or not at all.

With an artefact the folder holds the lean model, `recipe.toml`, `receipts/` and whatever the report hook adds; without
one (nothing paid, the proof failed, the target was missed) it holds everything but the model, so that the reason can be
read. It is put together in the work folder and exchanged for what was there.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shlex
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeAlias

from snello.errors import SnelloError
from snello.measure.limits import above, below, exact
from snello.measure.quality import POWER_RULE
from snello.models.pair import link_folder
from snello.optimize import receipts, sentence
from snello.optimize.ablate import Ablated, ablate
from snello.optimize.candidate import Candidate, facts, within_budget
from snello.optimize.climb import TOO_LONG, Climb, in_words
from snello.optimize.events import Event, ProofRead, Result, StageStarted
from snello.optimize.files import publish_folder, sha256_file, write_atomically
from snello.optimize.gate import PAYS
from snello.optimize.lossless_proof import prove_lossless
from snello.optimize.proof import Proof, pareto, prove
from snello.optimize.receipts import ProofReceipt, RunReceipt
from snello.optimize.recipe import Recipe, Replay, Stage
from snello.optimize.request import PUBLISHING

Run: TypeAlias = Generator[Event, None, Any]
ANSWERS = {"causal-lm": "next words", "masked-lm": "hidden words"}  # what two models agree on; else whole answers


def conclude(climb: Climb, finish: Callable[[Path], None] | None) -> Run:
    """Proof (if anything was kept), receipts, folder; the run's result."""
    found: Proof | None = None
    if not climb.best.is_original:
        yield StageStarted(index=climb.ledger.next_index, stage="proof", predicted_seconds=climb.proof_seconds)
        found = yield from (prove_lossless if climb.request.lossless else prove)(climb)
        _check_replayed(climb)
    result = outcome(climb, found)
    if found is not None:
        yield ProofRead(
            tokens=found.tokens,
            loss=found.evidence.loss,
            top1_agreement=found.evidence.guards.top1_agreement,
            proved=found.proved,
            fault_caught=found.fault_caught,
            sentence=result.sentence,
            unit=_unit(climb),
        )
    ablated = Ablated()
    if found is not None and found.same is None and result.exit_code == 0:
        ablated = yield from ablate(climb)
    climb.worker.check()
    return write(climb, found, result, ablated, finish)


def _check_replayed(climb: Climb) -> None:
    replay = climb.request.recipe.replay
    if replay is None or replay.artifact_sha256 in (None, climb.best.artifact_sha256):
        return
    message = "the replay gave another artefact than the recorded one"
    raise SnelloError(message, f"recorded with snello {replay.snello}; versions or threads may differ")


# ---- what it came to ----


def outcome(climb: Climb, found: Proof | None) -> Result:
    """Exit code, sentence and reason."""
    request, worker = climb.request, climb.worker
    if found is None:
        reason = nothing_paid(climb)
        code = 0 if request.target is None or climb.reached else 3
        text = f"{nearest_to_target(climb)}; {reason}" if code else reason
        return Result(
            exit_code=code, sentence=text, reason=reason, ladder=tuple(climb.ledger.rows), seconds=worker.used_seconds
        )
    size = size_ratio(climb)
    text = _sentence(climb, found, size)
    code, reason = 0, ""
    if found.same is None and not found.fault_caught:
        code, reason = 3, "the proof failed: it would not have caught a planted fault, so it shows nothing"
    elif not found.proved:
        code, reason = 3, _not_proved(climb, found)
    elif found.same is not None and found.speedup.low <= 1:
        code, reason = 3, f"the draft does not pay on unseen text: {sentence.speedup(request.goal, found.speedup)}"
    elif not found.steady and found.speedup.low <= 1:
        code, reason = 3, "the speed-up could not be measured: the machine is too noisy"
    elif request.target is not None and not request.target.reached(found.speedup, found.peak):
        code, reason = 3, request.target.missed(request.goal, found.speedup, found.peak, climb.best.name)
    return Result(
        exit_code=code,
        sentence=text if code == 0 else reason,
        reason=reason,
        speedup=found.speedup,
        engine_speedup=found.engine,
        size_ratio=size,
        loss=found.evidence.loss,
        ladder=tuple(climb.ledger.rows),
        artifact_sha256=climb.best.artifact_sha256 if code == 0 else None,
        seconds=worker.used_seconds,
    )


def _sentence(climb: Climb, found: Proof, size: float) -> str:
    request = climb.request
    if found.same is not None:
        return sentence.lossless(goal=request.goal, found=found.speedup, same=found.same, weights=1 / size)
    return sentence.proved(
        goal=request.goal,
        found=found.speedup,
        size_ratio=size,
        loss=found.evidence.loss,
        measure=found.evidence.measure,
        agreement=found.evidence.guards.top1_agreement,
        answers=ANSWERS.get(climb.original.spec.task, "answers"),
        neighbours=found.evidence.guards.neighbours_kept,
        tokens=found.tokens,
        unit=_unit(climb),
        sequences=not climb.original.spec.causal,
        self_written=climb.examiner.texts.self_written,
    )


def _not_proved(climb: Climb, found: Proof) -> str:
    """The loss where that was too large; else what did refuse it."""
    if found.same is not None:
        return found.refused
    high = found.evidence.loss.high
    most = climb.request.max_loss
    if not most < high < math.inf:
        return f"the proof failed: {found.refused}"
    return f"the proof failed: at most {above(high, most)} worse on unseen text"


def nearest_to_target(climb: Climb) -> str:
    """How near the best came of what loses little enough; the original where there is nothing else."""
    target = climb.request.target
    assert target is not None
    within = [one for one in climb.judged if within_budget(climb.request, one)]
    best = max(within, key=lambda one: one.speedup.mid, default=climb.original)
    return target.missed(climb.request.goal, best.speedup, best.peak, best.name)


def _unit(climb: Climb) -> str:
    """What is scored: words of a text, or whole texts."""
    if climb.request.lossless:
        return "tokens of answers"
    return "tokens" if climb.original.spec.task in ANSWERS else "texts"


def size_ratio(climb: Climb) -> float:
    runners = climb.examiner.runners
    return runners.weights_bytes(climb.original) / runners.weights_bytes(climb.best)


def nothing_paid(climb: Climb) -> str:
    """Why there is no artefact, from the numbers."""
    speed = climb.original.speed
    now = ""
    if speed is not None:
        reached = speed.decode_tokens_per_second.mid
        now = f": it runs at {reached:,.0f} of {speed.ceiling_decode_tokens_per_second:,.0f} possible tokens a second"
    if climb.reached:
        assert climb.original.peak is not None and climb.request.target is not None
        return f"keep your model: it serves in {climb.original.peak / 1e6:,.1f} MB, within {climb.request.target}"
    within = [one for one in climb.judged if one.loss.high <= climb.request.max_loss]
    if within:
        return f"keep your model{now}; {_why_not_kept(climb, within)}"
    if climb.judged:
        least = min(climb.judged, key=lambda one: one.loss.high)
        most = climb.request.max_loss
        found = above(least.loss.high, most)
        return f"keep your model{now}; the most careful stage loses up to {found}, over {exact(most)}"
    if any(row.reason.startswith(TOO_LONG) for row in climb.ledger.rows):
        assert climb.planned is not None
        needed = math.ceil((climb.worker.used_seconds + climb.planned.predicted_seconds) / 60)
        budget = in_words(climb.request.time_budget)
        return f"nothing was tried: no stage fits into a time budget of {budget}; --time-budget {needed}m fits all"
    return f"keep your model{now}; no stage could pay"


def _why_not_kept(climb: Climb, within: list[Candidate]) -> str:
    """Of the stages that lose little enough, the one that came nearest, and what its verdict was."""
    rows = {row.name: row for row in climb.ledger.rows}
    best = max(within, key=lambda one: one.speedup.mid)
    gain = best.speedup.mid - 1
    unclear = [one for one in within if rows[one.name].verdict == "cannot tell"]
    if unclear:
        first = max(unclear, key=lambda one: one.speedup.mid)
        between = f"{first.speedup.low:.2f}x-{first.speedup.high:.2f}x"
        return f"{first.name} is within budget, but this machine is too noisy to say whether it pays ({between})"
    if 0 <= gain < 1 - PAYS:
        return f"the best within budget gains {below(gain, 1 - PAYS)}, below the {exact(1 - PAYS)} that pays"
    return f"the best within budget, {best.name}, was dropped: {rows[best.name].reason}"


# ---- the folder ----


def write(
    climb: Climb, found: Proof | None, result: Result, ablated: Ablated, finish: Callable[[Path], None] | None
) -> Result:
    """Puts the folder together, lets the report be written into it, and exchanges it for what was there."""
    request = climb.request
    staged = request.work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if result.exit_code == 0 and climb.best.artifact is not None:
        link_folder(climb.best.artifact, staged)
    write_atomically(staged / "recipe.toml", resolved_recipe(climb, result).to_toml())
    if found is not None and found.windows is not None and found.perplexity is not None and result.exit_code == 0:
        facts_to_check = {**found.windows, "perplexity_original": found.perplexity.original}
        write_atomically(staged / "proof.json", json.dumps(facts_to_check) + "\n")
    _write_receipts(climb, found, result, ablated, staged)
    if finish is not None:
        finish(staged)
    write_atomically(request.work / PUBLISHING, "")
    publish_folder(staged, request.output)
    shutil.rmtree(request.work, ignore_errors=True)
    output = request.output
    report = output / "report.html"
    return dataclasses.replace(
        result,
        path=output if result.exit_code == 0 and not climb.best.is_original else None,
        receipts=output / "receipts",
        recipe=output / "recipe.toml",
        report=report if report.exists() else None,
    )


def resolved_recipe(climb: Climb, result: Result) -> Recipe:
    """What gives the same artefact: the final chain, every option spelt out, and all decisions."""
    request, texts = climb.request, climb.examiner.texts
    assert request.limits is not None
    best = climb.best
    decisions = tuple(
        {"stage": row.name, "verdict": str(row.verdict), "reason": row.reason}
        for row in climb.ledger.rows
        if row.kind == "stage"
    )
    return Recipe(
        model=request.model,
        text=tuple(str(path.resolve()) for path in request.text),
        seed=request.seed,
        max_loss=request.max_loss,
        goal=request.goal,
        target=request.target,
        time_seconds=request.time_budget,
        strict=request.strict,
        metric=request.metric,
        lossless=request.lossless or None,
        data={
            "calib_tokens": request.limits.calib,
            "select_tokens": request.limits.select,
            "proof_tokens": request.limits.proof,
        },
        stages=() if best.is_original else (Stage(best.name, best.steps),),
        replay=Replay(
            model_digest=climb.original.digest,
            text_sha256=texts.sha256,
            artifact_sha256=result.artifact_sha256,
            snello=climb.ledger.versions.get("snello", ""),
            decisions=decisions,
        ),
    )


def _write_receipts(climb: Climb, found: Proof | None, result: Result, ablated: Ablated, staged: Path) -> None:
    folder = staged / "receipts"
    receipts.write(folder, 0, "run", run_receipt(climb))
    for receipt in climb.ledger.receipts:
        receipts.write(folder, receipt.index, receipt.step, receipt)
    index = climb.ledger.next_index
    files = {path.name: sha256_file(path) for path in sorted(staged.iterdir()) if path.is_file()}
    proof = proof_receipt(climb, found, result, ablated, index)
    receipts.write(folder, index, "proof", dataclasses.replace(proof, files=files))


def run_receipt(climb: Climb) -> RunReceipt:
    request, examiner = climb.request, climb.examiner
    target = request.target
    assert climb.power is not None and climb.planned is not None
    return RunReceipt(
        model=facts(climb.original, examiner.runners.weights_bytes(climb.original)),
        machine=examiner.machine.to_json(),
        versions=climb.ledger.versions,
        command=request.command,
        replay=replay_command(climb),
        seed=request.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        text=climb.sources,
        text_sha256=examiner.texts.sha256,
        self_written=examiner.texts.self_written,
        measure=examiner.ruler.name,
        max_loss=request.max_loss,
        goal=request.goal,
        strict=request.strict,
        metric=request.metric,
        target=target.value if target is not None and target.unit == "x" else None,
        target_bytes=int(target.value) if target is not None and target.unit == "bytes" else None,
        time_budget_seconds=request.time_budget,
        smallest_provable=climb.power.worst,
        power_rule=POWER_RULE,
        workload=str(examiner.workload),
        plan=climb.planned.stages,
    )


def replay_command(climb: Climb) -> str:
    request = climb.request
    recipe, again = str(request.output / "recipe.toml"), f"{request.output}-again"
    return shlex.join(["snello", "optimize", request.model, "--recipe", recipe, "-o", again])


def proof_receipt(climb: Climb, found: Proof | None, result: Result, ablated: Ablated, index: int) -> ProofReceipt:
    missing = [
        "the smaller sibling: no model was named for it",
        *(["the control: nothing was trained"] if found is None or not found.evidence.controls else []),
        *ablated.missing,
    ]
    if found is None or found.engine is None:
        note = found.engine_note if found is not None else "nothing was kept"
        missing.append(f"our original over Transformers: {note}")
    return ProofReceipt(
        index=index,
        exit_code=result.exit_code,
        sentence=result.sentence,
        reason=result.reason,
        proved=found is not None and found.proved,
        tokens=found.tokens if found else 0,
        evidence=found.evidence if found else None,
        again=found.again if found else climb.ledger.rows[1].loss,
        fault=found.fault if found else climb.ledger.rows[2].loss,
        fault_caught=found.fault_caught if found else climb.ledger.rows[2].verdict == "caught",
        perplexity=found.perplexity if found else None,
        sharper=found.sharper if found else None,
        speedup=found.speedup if found else None,
        engine_speedup=found.engine if found else None,
        engine_note=found.engine_note if found else "",
        size_ratio=result.size_ratio,
        speed_original=climb.original.speed,
        speed_lean=climb.best.speed if found else None,
        sequences_original=climb.original.sequences,
        sequences_lean=climb.best.sequences if found else (),
        costs=(found.cost,) if found else (),
        ladder=tuple(climb.ledger.rows),
        pareto=pareto(climb),
        ablation=ablated.rows,
        duels=ablated.duels,
        worst=found.worst if found else (),
        documents=found.documents if found else (),
        not_measured=tuple(missing),
        artifact_sha256=result.artifact_sha256,
        seconds=result.seconds,
        replay=replay_command(climb),
    )
