"""`optimize`: a model in, a lean model and its proof out.

    for event in snello.optimize.optimize("Qwen/Qwen3-0.6B", text="yours.txt", max_loss="1%"): ...
    result = snello.optimize("Qwen/Qwen3-0.6B", text="yours.txt", max_loss="1%")

`optimize` is the stream of events. The package itself can be called: that takes the stream to its end and gives the
result.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snello.optimize.events import Result as Result
    from snello.optimize.recipe import Recipe as Recipe
    from snello.optimize.run import optimize as optimize

__all__ = ["Recipe", "Result", "optimize"]

_HOME = {
    "Recipe": "snello.optimize.recipe",
    "Result": "snello.optimize.events",
    "optimize": "snello.optimize.run",
}


class _Package(ModuleType):
    """The package as something that can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("snello.optimize.run").run(*arguments, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'snello.optimize' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


sys.modules[__name__].__class__ = _Package
