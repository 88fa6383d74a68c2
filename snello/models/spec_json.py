"""Reading a `Spec` back from its JSON, strictly.

The types of `spec.py` are the schema: every key must be a field, every value must have the field's type. A file
made by a newer version therefore fails with the key's name instead of being half understood.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import lru_cache
from typing import Any, Literal, Union

from snello.errors import SnelloError
from snello.models import spec as specs
from snello.models.spec import Spec

_MIXERS: dict[str, type] = {kind.__name__: kind for kind in (specs.Attention, specs.ShortConvolution, specs.Recurrent)}
_HINT = "was the model made by another version of snello?"


def spec_from_json(value: Any) -> Spec:
    """The inverse of `Spec.to_json`.

    Raises:
        SnelloError: an unknown key, a missing one, or a value of the wrong type; names the place.
    """
    built = _read(Spec, value, "spec")
    assert isinstance(built, Spec)
    return built


def _read(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, place)
    if origin is Literal:
        return value if value in arguments and type(value) in map(type, arguments) else _refuse(place, value, arguments)
    if origin is tuple:
        return _read_tuple(arguments, value, place)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, value, place)
    if kind is float and type(value) in (int, float):
        return float(value)
    return value if type(value) is kind else _refuse(place, value, (kind.__name__,))


def _read_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if set(kinds) == set(_MIXERS.values()):
        return _read_mixer(value, place)
    if len(kinds) == 1:
        return _read(kinds[0], value, place)
    if type(value) is str and str in kinds:
        return value
    return _read(next(kind for kind in kinds if kind is not str), value, place)


def _read_mixer(value: Any, place: str) -> Any:
    fields = dict(value) if isinstance(value, dict) else _refuse(place, value, ("a table",))
    name = fields.pop("kind_of", None)
    if name not in _MIXERS:
        _refuse(f"{place}.kind_of", name, tuple(_MIXERS))
    return _read_fields(_MIXERS[name], fields, place)


def _read_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _refuse(place, value, ("a list",))
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if len(value) != len(kinds):
        _refuse(place, value, (f"{len(kinds)} values",))
    return tuple(
        _read(kind, item, f"{place}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _read_fields(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        _refuse(place, value, ("a table",))
    hints = _hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise SnelloError(f"{place}: unknown key {', '.join(map(repr, unknown))}", _HINT)
    missing = sorted(name for name in _required(kind) if name not in value)
    if missing:
        raise SnelloError(f"{place}: missing key {', '.join(map(repr, missing))}", _HINT)
    return kind(**{name: _read(hints[name], item, f"{place}.{name}") for name, item in value.items()})


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _required(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def _refuse(place: str, value: Any, expected: tuple[Any, ...]) -> Any:
    raise SnelloError(f"{place} is {value!r}, expected {' or '.join(map(str, expected))}", _HINT)
