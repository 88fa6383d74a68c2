"""Small JSON files of a model folder, read with one clear error each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snello.errors import SnelloError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; a missing or broken file is one clear error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SnelloError(f"cannot read {path}: {error.strerror}", "is it there, and may you read it?") from None
    except RecursionError:
        raise SnelloError(f"{path} is nested too deeply", "copy or download the file again") from None
    except ValueError as error:
        raise SnelloError(f"{path} is not valid JSON: {error}", "copy or download the file again") from None
    if not isinstance(value, dict):
        raise SnelloError(f"{path} is not a JSON table", "copy or download the file again")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
