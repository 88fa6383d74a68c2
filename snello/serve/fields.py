"""Fields of a request body: which there are, what type each has, and which change nothing.

A request says what its sender wants. A field that is unknown, of another type, or set to something that is not done
here is refused by name; only fields that cannot change an answer pass unread. A null is a field left out, as in
OpenAI's own interface.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from snello.serve.errors import RequestError

# Who sent it, where it is kept, what it is billed as: nothing of this changes an answer.
WITHOUT_EFFECT = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
     "service_tier", "store", "user")
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A type of values: how it is named to people, whether a value is one, and the same as a JSON schema."""

    name: str
    holds: Callable[[Any], bool]
    schema: Mapping[str, Any]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any, bits: int = 32) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_integer, value))


def _prompts(value: Any) -> bool:
    if not isinstance(value, list):
        return _text(value)
    return bool(value) and (_texts(value) or _tokens(value) or all(item and _tokens(item) for item in value))


def _biases(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 10 and _number(bias) and -100 <= bias <= 100
        for key, bias in value.items()
    )


_TOKEN = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_TEXT = {"type": "string"}


def _list(items: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


NUMBER = Kind("a number", _number, {"type": "number"})
INTEGER = Kind("a whole number", _integer, _TOKEN)
SEED = Kind(
    "a whole number", lambda value: _integer(value, 64), {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
TEXT = Kind("a string", _text, _TEXT)
STOPS = Kind(
    "a string or a list of strings",
    lambda value: _text(value) or _texts(value),
    {"anyOf": [_TEXT, _list(_TEXT)]},
)
TOKENS = Kind("a list of token ids", _tokens, _list(_TOKEN))
TABLE = Kind("a table", lambda value: isinstance(value, dict), {"type": "object"})
LIST = Kind(
    "a list that is not empty",
    lambda value: isinstance(value, list) and bool(value),
    {"type": "array", "items": {}, "minItems": 1},
)
PROMPTS = Kind(
    "a string, a list of token ids, or a list of either",
    _prompts,
    {"anyOf": [_TEXT, _list(_TEXT, 1), _list(_TOKEN, 1), _list(_list(_TOKEN, 1), 1)]},
)
BIASES = Kind(
    "a table from token ids to numbers from -100 to 100",
    _biases,
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
)


def read_fields(
    body: Mapping[str, Any],
    known: Mapping[str, Kind],
    *,
    neutral: Mapping[str, Collection[Any]],
    required: Collection[str],
) -> dict[str, Any]:
    """The fields of `known` that are set.

    Args:
        neutral: fields that are not done here, with the values that ask for nothing.

    Raises:
        RequestError: a field is unknown, of another type, not done here, or missing.
    """
    check_unicode(body)
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known:
            if not known[name].holds(value):
                raise RequestError(f"{name} must be {known[name].name}", param=name, code="invalid_type")
        elif name in neutral:
            if not any(_same(value, allowed) for allowed in neutral[name]):
                raise RequestError(f"{name} is not supported here", param=name, code="unsupported_parameter")
        elif name not in WITHOUT_EFFECT:
            raise unknown_field(name, [*known, *neutral, *WITHOUT_EFFECT])
    for name in required:
        if name not in given:
            raise RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
    return {name: value for name, value in given.items() if name in known}


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: a number is no truth."""
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def unknown_field(name: str, known: Collection[str]) -> RequestError:
    near = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return RequestError(f"there is no field {name!r}{meant}", param=name, code="unknown_parameter")


def check_unicode(body: Mapping[str, Any]) -> None:
    """JSON can say half a character (a lone surrogate); no tokenizer reads it."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("a string holds half of a surrogate pair", code="invalid_unicode") from None
    except RecursionError:  # what is read may still be too deep to be written
        raise RequestError("the body is nested too deeply", code="invalid_json") from None


def finite(digits: str) -> float:
    """A number of JSON, which can say 1e999: no float, and no JSON when it is repeated.

    Raises:
        ValueError: it is too large.
    """
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value
