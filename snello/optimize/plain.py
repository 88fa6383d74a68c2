"""Typed values back from what JSON held: the inverse of `events.plain`, strict about unknown fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def revive(kind: Any, value: Any) -> Any:
    """A value of type `kind` from what JSON held; the inverse of `plain`. Unknown fields are refused."""
    if kind is Any or value is None:
        return value
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        wanted = [option for option in typing.get_args(kind) if option is not type(None)]
        return revive(wanted[0], value) if len(wanted) == 1 else value
    if origin is list:
        return [revive(typing.get_args(kind)[0], item) for item in value]
    if origin is tuple:
        items = typing.get_args(kind)
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(revive(items[0], item) for item in value)
        return tuple(revive(item_kind, item) for item_kind, item in zip(items, value, strict=True))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} in {kind.__name__}")
        return kind(**{key: revive(hints[key], item) for key, item in value.items()})
    return kind(value) if kind in (float, Path) else value
