"""Walks a model in the order of computation and writes its quantized copy, unit by unit.

Nothing but the unit at hand (and, when calibrating, the hidden rows and one block) is in memory; the source stays
memory-mapped and untouched. What is not rounded is copied: vectors as FP32, other matrices in the model's own type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from snello.errors import SnelloError
from snello.models import load, write_lean_folder
from snello.models.packed import matrix_format
from snello.models.parameters import matrix_names
from snello.models.spec import GROUPED, INTEGER, Spec, linear_names
from snello.techniques.calibration import Calibrator
from snello.techniques.quantize import DATA_FREE, loudness, sensitivity
from snello.techniques.quantize.rounding import Grouped, Int8, round_int8, static_step
from snello.techniques.quantize.size import distribute, parse_budget
from snello.techniques.quantize.solve import Solution, solve
from snello.techniques.units import Unit, units

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.quantize import Quantize

Array = npt.NDArray[Any]
TEXTLESS = "method='rtn' with activations='int8'"
LARGEST = {"fp32": 3.4028235e38, "bf16": 3.3895314e38, "fp16": 65504.0}


class Writer(Protocol):
    """The part of `PackedWriter` that this module uses."""

    def add_float(self, name: str, tensor: Array, format: Literal["fp32", "fp16", "bf16"]) -> None: ...
    def add_int8(self, name: str, q: Array, row_scale: Array) -> None: ...
    def add_grouped(
        self,
        name: str,
        format: str,
        q: Array,
        group_scale: Array,
        row_scale: Array,
        group_size: int,
    ) -> None: ...
    def add_vector(self, name: str, values: Array) -> None: ...


@torch.inference_mode()
def quantize(options: Quantize, model: Model, context: Context) -> Model:
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    spec, decided = decide(options, model, context)
    entry = {"technique": "quantize", "options": dataclasses.asdict(options), "seed": context.seed, **decided}
    history = (*model.history, entry)

    def write(writer: Writer) -> None:
        entry.update(fill(writer, options, model, spec, context))

    write_lean_folder(context.output, spec, model, history, write)
    return load(context.output)


@torch.inference_mode()
def decide(options: Quantize, model: Model, context: Context) -> tuple[Spec, dict[str, Any]]:
    """The spec of the result, and for the history what was measured to choose it."""
    planned = options.plan(model.spec)
    if options.weights in ("bf16", "fp16"):
        _check_cast(model, planned)
    if options.weights != "mixed":
        return planned, {}
    ladder, budget = options.ladder(model.spec), parse_budget(options.budget)
    measured = sensitivity.measure(model, context.windows, ladder[:2], context.progress)
    divergence = sensitivity.with_the_rest(measured, model.spec.default_format.weights)
    rounded = {name: {w: float(f"{value:.4g}") for w, value in widths.items()} for name, widths in measured.items()}
    return distribute(planned, ladder, divergence, budget), {"sensitivity": rounded}


@torch.inference_mode()
def fill(writer: Writer, options: Quantize, model: Model, spec: Spec, context: Context) -> dict[str, Any]:
    """Every tensor of the result, in the order of computation; for the history, how many rows each expert was sent."""
    integer = [name for name in linear_names(spec) if spec.format(name).weights in INTEGER]
    calibrator = Calibrator(model, context.windows, TEXTLESS) if integer and options.calibrates else None
    written = {"embedding.tokens.weight"} if "embedding" in dict(spec.formats) else set[str]()
    if written:
        _write_embedding(writer, model)
    work, sent = units(spec, integer), dict[str, list[int]]()
    for done, unit in enumerate(work):
        context.progress(f"quantize {unit.input}", done / len(work))
        if calibrator is not None and mixes(unit):
            sent[unit.input] = calibrator.num_sent(int(unit.input.split(".")[1]))
        written |= _write_unit(writer, options, model, spec, unit, calibrator)
    _copy_rest(writer, model, spec, written)
    return {"rows_sent": sent} if sent else {}


def mixes(unit: Unit) -> bool:
    """Whether this input is read by experts, each of which sees rows of its own."""
    return unit.input.endswith(".ffn.in") and ".experts." in unit.linears[0]


def _write_unit(
    writer: Writer, options: Quantize, model: Model, spec: Spec, unit: Unit, calibrator: Calibrator | None
) -> set[str]:
    parameters = {linear: parameter(spec, linear) for linear in unit.linears}
    weights = {linear: _finite(model, name) for linear, name in parameters.items()}
    formats = {linear: spec.format(linear) for linear in unit.linears}
    seen = calibrator if is_calibrated(spec, unit) else None
    statistic = seen.statistic(unit.input) if seen is not None and options.method not in DATA_FREE else None
    loud = loudness.estimate(model, unit.input)
    of_experts = seen if mixes(unit) else None
    solution = solve(weights, formats, loud, options.method, statistic, options.alpha, options.scales, of_experts)
    if seen is not None:
        if spec.format(unit.linears[0]).activations == "int8-static":
            step = static_step(seen.largest(unit.input, solution.basis.inputs))
            writer.add_vector(f"inputs.{unit.input}.step", np.array([step], np.float32))
        for linear, effective in solution.effective().items():
            seen.replace(linear, effective)
    _write_solution(writer, unit, parameters, solution)
    return set(parameters.values())


def is_calibrated(spec: Spec, unit: Unit) -> bool:
    """Blocks, and a head of four bits that is nothing but a head; the rest is eight bits, where nearest is enough."""
    if unit.input == "head.in":
        return spec.format("head").weights in GROUPED and not spec.head.tied
    return unit.input.startswith("layers.")


def _write_solution(writer: Writer, unit: Unit, parameters: Mapping[str, str], solution: Solution) -> None:
    scale = solution.basis.padded_scale
    if scale is not None:
        writer.add_vector(f"inputs.{unit.input}.scale", scale.numpy())
    for linear, matrix in solution.rounded.items():
        write_rounded(writer, parameters[linear], matrix, solution.basis.padded)


def write_rounded(writer: Writer, name: str, matrix: Grouped | Int8, padded: int) -> None:
    missing = padded - matrix.q.shape[1]
    q = torch.nn.functional.pad(matrix.q, (0, missing)) if missing else matrix.q
    row_scale = matrix.row_scale.float().numpy()
    if isinstance(matrix, Int8):
        writer.add_int8(name, q.to(torch.int8).numpy(), row_scale)
    else:
        format = "int4" if matrix.grid.bits == 4 else "int3"
        codes = (q - matrix.grid.low).to(torch.uint8).numpy()
        group_scale = matrix.group_scale.to(torch.int8).numpy()
        writer.add_grouped(name, format, codes, group_scale, row_scale, matrix.group_size)


def _write_embedding(writer: Writer, model: Model) -> None:
    table = _finite(model, "embedding.tokens.weight")
    write_rounded(writer, "embedding.tokens.weight", round_int8(table), -(-table.shape[1] // 64) * 64)


def _copy_rest(writer: Writer, model: Model, spec: Spec, written: set[str]) -> None:
    matrices = set(matrix_names(spec))
    for name in model.weights.names():
        if name in written or name.startswith("inputs."):
            continue
        values = model.weights.values(name)
        if name in matrices:
            kind = matrix_format(spec, name).weights
            assert kind != "int8" and kind != "int4" and kind != "int3", name
            _check_range(name, values, kind)
            writer.add_float(name, values, kind)
        else:
            writer.add_vector(name, values)


def _check_cast(model: Model, spec: Spec) -> None:
    """Before anything is written: a matrix that this type cannot hold would become infinite without a word."""
    for name in matrix_names(spec):
        _check_range(name, model.weights.values(name), matrix_format(spec, name).weights)


def _finite(model: Model, name: str) -> torch.Tensor:
    values = model.weights.values(name)
    _largest(name, values)
    return torch.from_numpy(values)


def _largest(name: str, values: npt.NDArray[np.float32]) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise SnelloError(f"{name} holds values that are not finite", "the checkpoint is damaged: get it again")
    return largest


def _check_range(name: str, values: npt.NDArray[np.float32], format: str) -> None:
    largest = _largest(name, values)
    if largest > LARGEST[format]:
        hint = "cast to weights='bf16', which reaches as far as FP32" if format == "fp16" else "keep it in FP32"
        raise SnelloError(f"{name} holds {largest:.3g}, {format.upper()} ends at {LARGEST[format]:.6g}", hint)


def parameter(spec: Spec, linear: str) -> str:
    """The name that a linear's matrix is stored under."""
    return "embedding.tokens.weight" if linear == "head" and spec.head.tied else f"{linear}.weight"
