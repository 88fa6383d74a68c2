"""Which units deserve eight bits: each is rounded to four alone, and the model's answers are compared.

The clean states and one disturbed copy per unit travel through the blocks together, so every block's weights are read
once. At the end the distance of each copy's answers from the clean ones is the unit's sensitivity; a greedy knapsack
then spends the budget where a byte saves most. At eight bits a unit's squared error is about 300 times smaller, the
same for all: measuring that too would cost twice the time and leave the order as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from snello.models.model import Model
from snello.models.reference import Block, Tail, build_block, build_embedding, build_head
from snello.models.sizes import packed_bytes
from snello.models.spec import Format, Spec, linear_shape
from snello.techniques.calibration import Windows, check_windows
from snello.techniques.quantize import loudness
from snello.techniques.quantize.size import stored_bytes, widen
from snello.techniques.quantize.solve import solve
from snello.techniques.units import Unit, body_linears, units

MEASURED_TOKENS = 512
WINDOW = 256
TEXTLESS = "weights='int8'"


def distribute(planned: Spec, narrow: Format, wide: Format, sensitivity: Mapping[str, float]) -> Spec:
    """The planned bytes spent anew: eight bits first where they save most per byte."""
    body = body_linears(planned)
    base = planned.with_formats(dict.fromkeys(body, narrow))

    def gain_per_byte(unit: Unit) -> float:
        shapes = [linear_shape(base, linear) for linear in unit.linears]
        extra = sum(packed_bytes(wide, *shape) - packed_bytes(narrow, *shape) for shape in shapes)
        return sensitivity[unit.input] / extra

    order = sorted(units(base, body), key=gain_per_byte, reverse=True)
    return widen(base, wide, order, stored_bytes(planned, body))


def measure(model: Model, windows: Windows, format: Format, progress: Callable[[str, float], None]) -> dict[str, float]:
    """Distance of the answers, by input name of each unit rounded to nearest alone."""
    spec, weights = model.spec, model.weights
    embedding = build_embedding(spec, weights)
    tokens = [
        torch.from_numpy(w[:WINDOW].astype(np.int64))[None] for w in _few(check_windows(model, windows, TEXTLESS))
    ]
    states = {"": [embedding(window) for window in tokens]}  # "": the clean model; (1, T, D) each
    grouped = units(spec, body_linears(spec))
    for index in range(len(spec.layers)):
        progress(f"sensitivity of layer {index}", index / len(spec.layers))
        block = build_block(spec, index, weights)
        moved = {name: [block(x) for x in state] for name, state in states.items()}
        for unit in (unit for unit in grouped if unit.input.startswith(f"layers.{index}.")):
            moved[unit.input] = _disturbed(block, unit, format, loudness.estimate(model, unit.input), states[""])
        states = moved
    return _distances(build_head(spec, weights), states)


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


def _distances(tail: Tail, states: dict[str, list[Tensor]]) -> dict[str, float]:
    """KL of next-token distributions in nats where there are logits over words, else relative squared error."""
    clean = [tail(x) for x in states.pop("")]
    return {name: sum(map(_distance, clean, map(tail, state))) / len(state) for name, state in states.items()}


def _distance(clean: Tensor, other: Tensor) -> float:
    if clean.shape[-1] < 128:
        return ((other - clean).square().sum() / clean.square().sum().clamp(min=1e-30)).item()
    p, q = clean.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _few(windows: Windows) -> Windows:
    count = max(1, min(len(windows), MEASURED_TOKENS // min(WINDOW, len(windows[0]))))
    return [windows[i * len(windows) // count] for i in range(count)]
