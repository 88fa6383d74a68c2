"""Finding a technique by the name that a person typed, and the extra that applying one needs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any

from snello.errors import SnelloError

INSTALL = "pip install 'snello[optimize]'"


def lookup(name: str) -> type[Any]:
    """The dataclass of a technique.

    Raises:
        SnelloError: there is none of this name; the nearest is named.
    """
    from snello.techniques.table import TECHNIQUES

    if name not in TECHNIQUES:
        near = difflib.get_close_matches(name, TECHNIQUES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TECHNIQUES)}"
        raise SnelloError(f"there is no technique {name!r}", hint, exit_code=2)
    return TECHNIQUES[name]


def names() -> str:
    """ "prune, quantize or sparsify"."""
    from snello.techniques.table import TECHNIQUES

    *others, last = TECHNIQUES
    return f"{', '.join(others)} or {last}"


def require_torch(purpose: str) -> None:
    """Calibration and training use torch, which the base install leaves out.

    Raises:
        SnelloError: torch is not installed, or does not load; the hint is the line that installs it.
    """
    lines = (
        f"{INSTALL}",
        "on Linux without a GPU this is 10 times smaller: uv pip install 'snello[optimize]' --torch-backend=cpu",
    )
    if importlib.util.find_spec("torch") is None:
        raise SnelloError(f"{purpose} needs torch, which is not installed", "\n".join(lines))
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # half installed, or for another machine: said now, not after minutes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SnelloError(f"{purpose} needs torch, which does not load: {first}", "\n".join(lines)) from error
