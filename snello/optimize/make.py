"""Making models: the steps of a stage applied one after the other, each into a folder that appears whole."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from snello.optimize.candidate import Candidate
from snello.optimize.events import Event
from snello.optimize.examine import Examiner
from snello.optimize.files import folder_bytes, sha256_file
from snello.optimize.journal import unit_key
from snello.optimize.recipe import Stage, Step
from snello.optimize.work import Answer, Report
from snello.techniques.base import Context

Run: TypeAlias = Generator[Event, None, Any]
Tokens: TypeAlias = npt.NDArray[np.int32]
MODEL_FILE = "model.safetensors"


def make(examiner: Examiner, stage: Stage, candidate: Candidate) -> Run:
    """Makes the candidate's model. A folder appears whole, so one that is there is finished."""
    for step in stage.steps:
        inputs = {
            "model": candidate.model.digest,
            "step": step.resolved(),
            "text": examiner.texts.sha256,
        }
        folder = examiner.worker.journal.artifacts / unit_key("artifact", {**examiner.worker.common, **inputs})
        unit = yield from examiner.worker.unit(
            stage.name, "apply", inputs, functools.partial(_make, examiner, step, candidate, folder)
        )
        if not folder.is_dir():  # dropped by a run with other wishes; the unit stays, the folder is made again
            _make(examiner, step, candidate, folder, lambda *_: None)
        candidate.model = examiner.bench.load(folder)
        candidate.artifact, candidate.artifact_sha256 = folder, unit.value["sha256"]
        candidate.prefixes = (*candidate.prefixes, candidate.model)


def _make(examiner: Examiner, step: Step, candidate: Candidate, folder: Path, report: Report) -> Answer:
    if not folder.is_dir():
        state = folder.with_name(f"{folder.name}.state")

        def progress(message: str, fraction: float) -> None:
            report("apply", round(1000 * min(max(fraction, 0.0), 1.0)), 1000, "share")

        in_its_tokens = functools.partial(_in_its_tokens, examiner, candidate)
        held_out = [block.tokens for cut in ("select", "proof") for block in examiner.texts.blocks(cut)]
        context = Context(
            output=folder,
            windows=[window[: candidate.spec.max_positions] for window in in_its_tokens(examiner.texts.calib)],
            held_out=in_its_tokens(held_out),
            original=examiner.original.model,
            seed=examiner.request.seed,
            work_dir=state,
            progress=progress,
        )
        examiner.bench.apply(step, candidate.model, context)
        shutil.rmtree(state, ignore_errors=True)
    return {"sha256": sha256_file(folder / MODEL_FILE), "bytes": folder_bytes(folder)}, {}


def _in_its_tokens(examiner: Examiner, candidate: Candidate, windows: Sequence[Tokens]) -> list[Tokens]:
    """Text in the tokens of the model that the step is applied to."""
    rule = examiner.rule(candidate)
    return list(windows) if rule is None else [rule.translate(window)[0] for window in windows]
