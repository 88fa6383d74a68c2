"""Snello takes a trained language model, makes it lean, proves that it is still good, and runs it fast.

    import snello
    result = snello.optimize("Qwen/Qwen3-0.6B", text="yours.txt", max_loss=0.01)
    print(snello.LLM(result.path).generate("Once upon").text)

Public names are loaded when they are first used: importing this package imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snello.engine.llm import LLM as LLM
    from snello.engine.request import SamplingParams as SamplingParams
    from snello.errors import SnelloError as SnelloError
    from snello.models import load as load
    from snello.models.spec import Deployment as Deployment
    from snello.models.spec import Spec as Spec
    from snello.optimize import Recipe as Recipe
    from snello.optimize import optimize as optimize
    from snello.optimize.check import check as check

__version__ = "0.1.0"

_HOME = {
    "LLM": "snello.engine.llm",
    "SamplingParams": "snello.engine.request",
    "SnelloError": "snello.errors",
    "load": "snello.models",
    "Deployment": "snello.models.spec",
    "Spec": "snello.models.spec",
    "Recipe": "snello.optimize",
    "optimize": "snello.optimize",
    "check": "snello.optimize.check",
}

__all__ = ["LLM", "Deployment", "Recipe", "SamplingParams", "SnelloError", "Spec", "check", "load", "optimize"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'snello' has no attribute {name!r}")
    home = import_module(_HOME[name])
    return home if home.__name__ == f"snello.{name}" else getattr(home, name)  # snello.optimize is callable itself


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
