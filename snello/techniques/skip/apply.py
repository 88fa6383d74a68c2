"""Measures every input once, spreads the share, and writes the copy whose weights are stored by channel.

Integers and scales are those of the source, moved; what is not skipped is copied as it lies. One block and one matrix
are in memory, and a curve of a hundred numbers for each input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from snello.errors import SnelloError
from snello.models import load, write_lean_folder
from snello.models.packed import VECTOR, PackedWeights
from snello.models.packed_writer import PackedWriter
from snello.models.reference_skip import basis_of
from snello.models.spec import Spec, linear_names
from snello.native import core
from snello.techniques.calibration import Calibrator
from snello.techniques.skip import shares
from snello.techniques.skip.shares import Curve
from snello.techniques.units import Unit, units

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.skip import Skip

SAMPLED_ROWS = 256


@torch.inference_mode()
def skip(options: Skip, model: Model, context: Context) -> Model:
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    planned, weights = options.plan(model.spec), model.weights
    assert isinstance(weights, PackedWeights), "a quantized model is a packed one"
    curves = measure(options, model, weights, planned, context)
    spread = shares.greedy if options.shares == "greedy" else shares.uniform
    given = spread(curves, options.share)
    spec = decided(planned, given)
    if not skipping(spec):  # shares of single inputs are hundredths
        raise SnelloError(f"share={options.share:g} is too little to skip anything", "share=0.25 skips a quarter")
    entry = {
        "technique": "skip",
        "options": dataclasses.asdict(options),
        "seed": context.seed,
        "shares": {name: round(share, 3) for name, share in given.items()},
        "lost_energy": {name: float(f"{_loss(curves[name], given[name]):.4g}") for name in curves},
    }
    thresholds = {
        name: threshold(options, model.spec, weights, unit, shares.threshold_at(curves[name], given[name]))
        for name, unit in skipping(planned).items()
        if given[name]
    }
    write_lean_folder(
        context.output, spec, model, (*model.history, entry), lambda writer: fill(writer, weights, spec, thresholds)
    )
    return load(context.output)


def skipping(spec: Spec) -> dict[str, Unit]:
    """The inputs that skip something, with the linears that read them, in the order of computation."""
    linears = [linear for linear in linear_names(spec) if spec.format(linear).skip]
    return {unit.input: unit for unit in units(spec, linears)}


def decided(planned: Spec, given: Mapping[str, float]) -> Spec:
    formats = {}
    for name, unit in skipping(planned).items():
        for linear in unit.linears:
            formats[linear] = dataclasses.replace(planned.format(linear), skip=round(given[name], 3))
    return planned.with_formats(formats)


def measure(options: Skip, model: Model, weights: PackedWeights, planned: Spec, context: Context) -> dict[str, Curve]:
    """What each input loses by its share, on the model as it is."""
    calibrator, work = Calibrator(model, context.windows), skipping(planned)
    curves = {}
    for done, (name, unit) in enumerate(work.items()):
        context.progress(f"skip: {name}", done / len(work))
        basis = basis_of(model.spec, weights, unit.linears[0])
        rows = basis.enter(calibrator.sample(name, SAMPLED_ROWS))
        norms = stored_norms(weights, unit)
        size = sum(weights.layouts[f"{linear}.weight"].num_bytes for linear in unit.linears)
        curves[name] = shares.curve(rows, norms, options.rank == "weighted", float(size))
    return curves


def stored_norms(weights: PackedWeights, unit: Unit) -> Tensor:
    """Of the channels as they are stored, in the basis of the input."""
    matrices = [torch.from_numpy(core.unpack(weights.tensor(f"{linear}.weight")).values) for linear in unit.linears]
    return shares.column_norms(matrices)


def threshold(options: Skip, spec: Spec, weights: PackedWeights, unit: Unit, value: float) -> Tensor:
    """Per padded channel. A channel that no weight reads is never missed."""
    norms = stored_norms(weights, unit)
    if options.rank == "magnitude":
        return torch.full_like(norms, value)
    return value / norms.clamp(min=1e-30)


def fill(writer: PackedWriter, weights: PackedWeights, spec: Spec, thresholds: Mapping[str, Tensor]) -> None:
    """Every tensor of the result."""
    moved = {f"{linear}.weight" for linear in linear_names(spec) if spec.format(linear).skip}
    for name, layout in weights.layouts.items():
        if layout.format == VECTOR:
            writer.add_vector(name, weights.vector(name))
        else:
            tensor = weights.tensor(name)
            writer.add_packed(name, core.to_channels(tensor) if name in moved else tensor)
    for name, values in thresholds.items():
        writer.add_vector(f"inputs.{name}.threshold", np.minimum(values.numpy(), np.float32(3e38)))


def _loss(each: Curve, share: float) -> float:
    return each.loss[round(share * shares.STEPS)].item()
