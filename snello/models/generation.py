"""generation_config.json: how a checkpoint would be sampled from, and its end tokens.

What samples or ends a text is checked when the model is opened, so that nonsense is named beside its file and not
beside a request. A null is as if absent; keys that say nothing of that here are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snello.errors import SnelloError
from snello.models.files import read_json_if_there

FILE = "generation_config.json"
WHOLE = {"top_k": -1, "max_length": 1, "max_new_tokens": 1, "min_length": 0, "min_new_tokens": 0}  # and the least
NUMBERS = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0, 100)}  # least, most
ABOVE_ZERO = ("top_p", "repetition_penalty")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(folder: Path) -> dict[str, Any]:
    """The file of this folder, checked; empty where there is none."""
    values = read_json_if_there(folder / FILE)
    check_generation(values, str(folder / FILE))
    return values


def check_generation(values: Mapping[str, Any], place: str) -> None:
    """Refuses what cannot be meant, by the key and the file (`place`) that says it."""
    for key, value in values.items():
        expected = None if value is None else _expected(key, value)
        if expected is not None:
            message = f"{place}: {key} is {json.dumps(value)[:80]}, expected {expected}"
            raise SnelloError(message, f"correct {key} there, or remove it")


def _expected(key: str, value: Any) -> str | None:
    """What this key should say; None: it does, or says nothing here."""
    if key == "do_sample":
        return None if type(value) is bool else "true or false"
    if key in TOKENS:
        listed = value if isinstance(value, list) else [value]
        return None if all(type(item) is int for item in listed) else "token ids"
    if key in WHOLE:
        least = WHOLE[key]
        return None if type(value) is int and value >= least else f"a whole number of at least {least}"
    if key in NUMBERS:
        low, high = NUMBERS[key]
        open_low = key in ABOVE_ZERO
        fits = type(value) in (int, float) and low <= value <= high
        bound = "above" if open_low else "of at least"
        return None if fits and not (open_low and value == low) else f"a number {bound} {low} and at most {high}"
    return None
