"""From a config.json to a family, a task and a `Spec`.

Picks the family by the exact architecture name, refuses what is not in the table by naming what is, or a model_type
of another family beside it, and lets nothing in the config go unread.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models.families import FAMILIES, convolutions
from snello.models.families.config import Config, token_ids
from snello.models.families.family import Family
from snello.models.quantized import KEYS, scheme_of
from snello.models.spec import FloatFormat, Head, Spec, Task, own_format

TORCH_TYPES: dict[str, FloatFormat] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def resolve(
    values: Mapping[str, Any], *, task: Task | None = None, generation: Mapping[str, Any] | None = None
) -> tuple[Family, Spec]:
    """The family and the `Spec` that a config.json (and generation_config.json) describe.

    `task` None: the one that the checkpoint was saved for. The formats are those that the config states.
    """
    values, convolved = convolutions.unwrap(values)
    family, saved_for = _family(values)
    scheme_of(values)  # how integers are read is not this file's matter; a way that nobody here reads ends it
    task = task or saved_for
    pools = task == "embedding" and family.tasks == ["causal-lm"]
    if task not in family.tasks and not pools:
        raise Unsupported(f"a {family.name} model cannot be loaded for {task}", f"it does: {', '.join(family.tasks)}")
    config = Config({key: value for key, value in values.items() if key not in KEYS})
    spec = _pooled(family.spec(config, "causal-lm")) if pools else family.spec(config, task)
    config.refuse_unread(family.harmless, family.name)
    if convolved is not None:
        spec = convolutions.applied(spec, convolved)
    return family, _with_generation(with_type(spec, _stated_type(values)), generation or {})


def _pooled(spec: Spec) -> Spec:
    """A decoder that embeds: the same layers, and the last row as the vector unless a folder says otherwise."""
    return dataclasses.replace(spec, task="embedding", head=Head(kind="embed", pooling="last"))


def spec_from_config(
    values: Mapping[str, Any], *, task: Task | None = None, generation: Mapping[str, Any] | None = None
) -> Spec:
    """The `Spec` alone."""
    return resolve(values, task=task, generation=generation)[1]


def with_type(spec: Spec, weights: FloatFormat) -> Spec:
    """The same model with all weights, keys and values in this type, and linears' inputs where it is BF16."""
    return dataclasses.replace(spec, default_format=own_format(weights), cache_format=weights, formats=())


def _family(values: Mapping[str, Any]) -> tuple[Family, Task]:
    architectures, kind = values.get("architectures") or [], values.get("model_type") or None
    if not isinstance(architectures, list):
        expected = f"config.json: architectures is {json.dumps(architectures)[:80]}, expected a list of names"
        raise SnelloError(expected, "copy or download the file again")
    family, task = _named(str(architectures[0])) if architectures else _of_type(kind)
    if kind not in (None, family.name):
        raise Unsupported(
            f"config.json: model_type {json.dumps(kind)[:80]} does not go with architecture {architectures[0]}",
            f"its model_type is {family.name}; is this the config.json that came with the checkpoint?",
        )
    return family, task


def _named(architecture: str) -> tuple[Family, Task]:
    """By the exact name; a decoder's without its head is one that embeds."""
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family, family.architectures[architecture]
    for family in FAMILIES.values():
        if architecture == family.embedding:
            return family, "embedding"
    raise Unsupported(f"architecture {architecture} is not supported", _supported())


def _of_type(kind: Any) -> tuple[Family, Task]:
    """Of a config that names no architecture: clear where its family does one thing."""
    if kind is None:
        raise Unsupported("config.json names neither architectures nor model_type", _supported())
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or len(family.tasks) > 1:
        raise Unsupported(f"model_type {kind} without architectures is not supported", _supported())
    return family, family.tasks[0]


def _supported() -> str:
    return f"supported: {', '.join(name for family in FAMILIES.values() for name in family.architectures)}"


def _stated_type(values: Mapping[str, Any]) -> FloatFormat:
    stated = values.get("dtype") or values.get("torch_dtype") or "float32"
    if not isinstance(stated, str) or stated not in TORCH_TYPES:
        raise Unsupported(
            f"config.json: dtype {json.dumps(stated)[:80]} is not supported", f"supported: {', '.join(TORCH_TYPES)}"
        )
    return TORCH_TYPES[stated]


def _with_generation(spec: Spec, generation: Mapping[str, Any]) -> Spec:
    """generation_config.json knows more ends (a chat's) than config.json does; both count."""
    ends = token_ids(generation.get("eos_token_id"), "eos_token_id", spec.vocab_size, file="generation_config.json")
    return dataclasses.replace(spec, eos_tokens=tuple(dict.fromkeys((*ends, *spec.eos_tokens))))
