"""Models: from files to a `Spec`, weights and a tokenizer, and back into a lean folder. Nothing here imports torch."""

from __future__ import annotations

from snello.models.lean import write_lean_folder
from snello.models.loading import load
from snello.models.model import Model, StoredTensor, Weights
from snello.models.packed import PackedWeights
from snello.models.packed_writer import PackedWriter

__all__ = ["Model", "PackedWeights", "PackedWriter", "StoredTensor", "Weights", "load", "write_lean_folder"]
