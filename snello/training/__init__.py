"""The one training loop, for everything here that trains: distillation, healing, adapters, the shipped model.

`train` owns the steps and promises one thing: the same seed, data and options give the same weights, whether the run
was interrupted or not. `options` says how, `data` packs text and finds the batch of any step, `checkpoint` keeps what a
run needs to go on. The names below are loaded when they are asked for: options are read before torch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snello.training.data import Batches as Batches
    from snello.training.data import Rows as Rows
    from snello.training.data import pack as pack
    from snello.training.loop import Trained as Trained
    from snello.training.loop import train as train
    from snello.training.options import TrainOptions as TrainOptions

__all__ = ["Batches", "Rows", "TrainOptions", "Trained", "pack", "train"]

_HOME = {
    "Batches": "snello.training.data",
    "Rows": "snello.training.data",
    "TrainOptions": "snello.training.options",
    "Trained": "snello.training.loop",
    "pack": "snello.training.data",
    "train": "snello.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'snello.training' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
