"""Walks a model in the order of computation and writes its copy with zeros, unit by unit, in its own number type.

Nothing but the unit at hand (and, when calibrating, the hidden rows and one block) is in memory; the source stays
mapped and untouched. What is not a linear of a block is copied. Calibration sees each pruned linear as it is stored,
rounded to the model's type, before anything that comes after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snello.errors import SnelloError
from snello.models import load, write_lean_folder
from snello.models.packed import matrix_format
from snello.models.packed_writer import PackedWriter
from snello.models.parameters import matrix_names
from snello.techniques.calibration import Calibrator, check_windows
from snello.techniques.curvature import inverse_factor
from snello.techniques.sparsify import LINES, masks
from snello.techniques.sparsify.cut import global_counts
from snello.techniques.sparsify.sparsegpt import sparsegpt
from snello.techniques.units import Unit, body_linears, units

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.models.spec import FloatFormat
    from snello.techniques.base import Context
    from snello.techniques.sparsify import Sparsify

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXTLESS = "method='magnitude'"


@torch.inference_mode()
def sparsify(options: Sparsify, model: Model, context: Context) -> Model:
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    spec = options.plan(model.spec)
    if options.method != "magnitude":
        check_windows(model, context.windows, TEXTLESS)  # before a folder is begun
    entry = {"technique": "sparsify", "options": dataclasses.asdict(options), "seed": context.seed}
    history = (*model.history, entry)
    write_lean_folder(context.output, spec, model, history, lambda writer: fill(writer, options, model, context))
    return load(context.output)


@torch.inference_mode()
def fill(writer: PackedWriter, options: Sparsify, model: Model, context: Context) -> None:
    """Every tensor of the result, in the order of computation."""
    pruner = Pruner(options, model, context)
    work = units(model.spec, body_linears(model.spec))
    for done, unit in enumerate(work):
        context.progress(f"sparsify {unit.input}", done / len(work))
        for linear, weights in pruner.prune(unit).items():
            writer.add_float(f"{linear}.weight", weights.numpy(), own_type(model, f"{linear}.weight"))
    _copy_rest(writer, model)


class Pruner:
    """The method with what it has to know: calibration as far as it has walked, or the counts of a global cut."""

    def __init__(self, options: Sparsify, model: Model, context: Context) -> None:
        self.options, self.model = options, model
        calibrated = options.method != "magnitude"
        self.calibrator = Calibrator(model, context.windows, TEXTLESS) if calibrated else None
        self.counts: Mapping[str, int] = {}
        if options.ranked_over == "global":
            context.progress("rank all weights", 0.0)
            self.counts = global_counts(body_linears(model.spec), self.read, options.sparsity)

    def read(self, linear: str) -> Tensor:
        return torch.from_numpy(self.model.weights.values(f"{linear}.weight"))

    def prune(self, unit: Unit) -> dict[str, Tensor]:
        """The linears of a unit with zeros, as they will be stored; whatever is calibrated later sees them."""
        pruned = self._solve(unit, {linear: self.read(linear) for linear in unit.linears})
        stored = {linear: as_stored(self.model, f"{linear}.weight", weights) for linear, weights in pruned.items()}
        if self.calibrator is not None:
            for linear, weights in stored.items():
                self.calibrator.replace(linear, weights)
        return stored

    def _solve(self, unit: Unit, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.calibrator is None:
            if self.options.pattern in LINES:
                share, dim = self.options.sparsity, LINES[self.options.pattern]
                return {k: w.masked_fill(masks.weakest_lines(w, share, dim), 0.0) for k, w in weights.items()}
            return {linear: w.masked_fill(self._mask(linear, w.abs()), 0.0) for linear, w in weights.items()}
        if self.options.method == "wanda":
            energy = self.calibrator.energy(unit.input)
            scores = {linear: masks.wanda_scores(w, energy) for linear, w in weights.items()}
            return {linear: w.masked_fill(self._mask(linear, scores[linear]), 0.0) for linear, w in weights.items()}
        factor = inverse_factor(self.calibrator.statistic(unit.input).gram)
        share, group = self.options.sparsity, self.options.group
        return {linear: sparsegpt(w, factor, share, group) for linear, w in weights.items()}

    def _mask(self, linear: str, scores: Tensor) -> Tensor:
        options = self.options
        if options.group:
            return masks.lowest_of_groups(scores, options.group)
        if options.ranked_over == "row":
            return masks.share_of_rows(scores, options.sparsity)
        if options.ranked_over == "global":
            return masks.lowest(scores, self.counts[linear])
        return masks.share_of_matrix(scores, options.sparsity)


def own_type(model: Model, name: str) -> FloatFormat:
    """The number type that a matrix has and keeps."""
    kind = matrix_format(model.spec, name).weights
    assert kind != "int8" and kind != "int4" and kind != "int3"
    return kind


def as_stored(model: Model, name: str, weights: Tensor) -> Tensor:
    """FP32 values that the model's own type holds exactly."""
    rounded = weights.to(TYPES[own_type(model, name)]).float()
    if not rounded.isfinite().all():
        raise SnelloError(
            f"{name} does not fit its number type once repaired", "use method='wanda', which moves nothing"
        )
    return rounded


def _copy_rest(writer: PackedWriter, model: Model) -> None:
    """All but the blocks' linears, each in its own type."""
    matrices, pruned = set(matrix_names(model.spec)), {f"{linear}.weight" for linear in body_linears(model.spec)}
    for name in model.weights.names():
        if name in pruned:
            continue
        if name in matrices:
            writer.add_float(name, model.weights.values(name), own_type(model, name))
        else:
            writer.add_vector(name, model.weights.values(name))
