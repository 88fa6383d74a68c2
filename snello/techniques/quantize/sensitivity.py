"""Which units deserve more bits: each is rounded alone, to three bits and to four, and the answers are compared.

The clean states and the disturbed copies of all units travel through the blocks together, so every block's weights are
read once. At the end the distance of each copy's answers from the clean ones is what that width costs there. At eight
bits a unit's squared error is smaller by much the same factor for all (138 to 200 for Gaussian rows of 4,096 down to
320 columns, in groups of 128 at four): measuring that too would take half as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from snello.models.model import Model
from snello.models.reference import Block, Tail, build_block, build_embedding, build_head
from snello.models.spec import Format, WeightFormat
from snello.techniques.calibration import Windows, check_windows
from snello.techniques.quantize import loudness
from snello.techniques.quantize.size import Divergence
from snello.techniques.quantize.solve import solve
from snello.techniques.units import Unit, body_linears, units

MEASURED_TOKENS = 512
WINDOW = 256
FINER_AT_EIGHT = 170.0
TEXTLESS = "weights='int8'"
States: TypeAlias = dict[tuple[str, WeightFormat], list[Tensor]]


def with_the_rest(measured: Mapping[str, Mapping[WeightFormat, float]], own: WeightFormat) -> Divergence:
    """What eight bits and the model's own type cost, besides the widths that were measured."""
    return {name: {**widths, "int8": widths["int4"] / FINER_AT_EIGHT, own: 0.0} for name, widths in measured.items()}


def measure(
    model: Model, windows: Windows, formats: Sequence[Format], progress: Callable[[str, float], None]
) -> dict[str, dict[WeightFormat, float]]:
    """Distance of the answers, by input name and width of each unit rounded to nearest alone."""
    spec, weights = model.spec, model.weights
    embedding = build_embedding(spec, weights)
    tokens = [
        torch.from_numpy(w[:WINDOW].astype(np.int64))[None] for w in _few(check_windows(model, windows, TEXTLESS))
    ]
    clean = [embedding(window) for window in tokens]  # (1, T, D) each
    states: States = {}
    grouped = units(spec, body_linears(spec))
    for index in range(len(spec.layers)):
        progress(f"sensitivity of layer {index}", index / len(spec.layers))
        block = build_block(spec, index, weights)
        states = {key: [block(x) for x in state] for key, state in states.items()}
        for unit in (unit for unit in grouped if unit.input.startswith(f"layers.{index}.")):
            loud = loudness.estimate(model, unit.input)
            for format in formats:
                states[unit.input, format.weights] = _disturbed(block, unit, format, loud, clean)
        clean = [block(x) for x in clean]
    found: dict[str, dict[WeightFormat, float]] = {unit.input: {} for unit in grouped}
    for (name, width), distance in _distances(build_head(spec, weights), clean, states).items():
        found[name][width] = distance
    return found


def _disturbed(block: Block, unit: Unit, format: Format, loud: Tensor, clean: list[Tensor]) -> list[Tensor]:
    modules = {name: block.get_submodule(name.split(".", 2)[2]) for name in unit.linears}
    originals = {name: module.weight for name, module in modules.items()}
    plain = {name: weight.detach() for name, weight in originals.items() if isinstance(weight, Tensor)}
    for name, values in solve(plain, dict.fromkeys(unit.linears, format), loud).effective().items():
        modules[name].weight = nn.Parameter(values, requires_grad=False)
    moved = [block(x) for x in clean]
    for name, module in modules.items():
        module.weight = originals[name]
    return moved


def _distances(tail: Tail, states_of_clean: list[Tensor], states: States) -> dict[tuple[str, WeightFormat], float]:
    """KL of next-token distributions in nats where there are logits over words, else relative squared error."""
    clean = [tail(x) for x in states_of_clean]
    return {key: sum(map(_distance, clean, map(tail, state))) / len(state) for key, state in states.items()}


def _distance(clean: Tensor, other: Tensor) -> float:
    if clean.shape[-1] < 128:
        return ((other - clean).square().sum() / clean.square().sum().clamp(min=1e-30)).item()
    p, q = clean.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _few(windows: Windows) -> Windows:
    count = max(1, min(len(windows), MEASURED_TOKENS // min(WINDOW, len(windows[0]))))
    return [windows[i * len(windows) // count] for i in range(count)]
