"""A `Spec` survives its JSON, and nothing strange gets in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from snello.errors import SnelloError
from snello.models.shapes import SHAPES, spec_of_shape
from snello.models.spec import Attention, Experts, Recurrent, Rope, ShortConvolution, Spec
from snello.models.spec_json import spec_from_json


def _varied() -> Spec:
    """Every optional part of the tree present at least once."""
    from dataclasses import replace

    spec = spec_of_shape("llama-3.2-1b", "int4")
    layers = list(spec.layers)
    layers[0] = replace(layers[0], mixer=ShortConvolution(kernel=3, bias=True))
    layers[1] = replace(layers[1], mixer=Recurrent(kind="mamba", num_heads=2, state_dim=16))
    experts = Experts(num_experts=8, num_active=2)
    layers[2] = replace(layers[2], feed_forward=replace(layers[2].feed_forward, experts=experts), norms="both")
    attention = layers[3].mixer
    assert isinstance(attention, Attention)
    layers[3] = replace(layers[3], mixer=replace(attention, window=64, sinks=4, qk_norm=spec.norm, soft_cap=50.0))
    rope = Rope(base=1e6, dims=8, scaling=(("rope_type", "yarn"), ("factor", 4.0)))
    layers[4] = replace(layers[4], mixer=replace(attention, rope=rope, scale=0.1))
    return replace(spec, layers=tuple(layers), eos_tokens=(3, 4), pad_token=None)


@pytest.mark.parametrize("spec", [*map(spec_of_shape, SHAPES), _varied()], ids=[*SHAPES, "varied"])
def test_round_trip(spec: Spec) -> None:
    again = spec_from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.digest == spec.digest


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        node: Any = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (_set("colour", value=1), "spec: unknown key 'colour'"),
    "unknown deep key": (_set("layers", 1, "mixer", "flavour", value=1), r"spec.layers\[1\].mixer: unknown key"),
    "missing key": (lambda tree: tree.pop("hidden_size"), "spec: missing key 'hidden_size'"),
    "text for a number": (_set("hidden_size", value="64"), "spec.hidden_size is '64', expected int"),
    "true for a number": (_set("hidden_size", value=True), "spec.hidden_size is True"),
    "float for a whole number": (_set("hidden_size", value=64.0), "spec.hidden_size is 64.0"),
    "number for a flag": (_set("final_norm", value=1), "spec.final_norm is 1"),
    "unknown choice": (_set("task", value="poetry"), "spec.task is 'poetry'"),
    "unknown mixer": (_set("layers", 0, "mixer", "kind_of", value="Magic"), "kind_of is 'Magic'"),
    "mixer no table": (_set("layers", 0, "mixer", value=3), "expected a table"),
    "layers no list": (_set("layers", value={}), "spec.layers is {}, expected a list"),
    "formats of three": (_set("formats", value=[["head", {}, 1]]), "expected 2 values"),
    "null where none may be": (_set("norm", value=None), "spec.norm is None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_names_its_place(case: str) -> None:
    change, message = WRONG[case]
    tree = copy.deepcopy(json.loads(json.dumps(spec_of_shape("smollm2-135m").to_json())))
    change(tree)
    with pytest.raises(SnelloError, match=message):
        spec_from_json(tree)
