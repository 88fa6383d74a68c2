"""The other side of an export, in a process of its own: does the folder hold this model?

`python -m snello.interop.round_trip EXPORTED SOURCE TASK DTYPE` prints one line and exits 0, or says what differs and
exits 1. Values are compared bit by bit after rounding to the file's numbers; logits against Transformers where it is
installed and the model is small enough to load twice.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, cast

import numpy as np

from snello.models import load
from snello.models.model import Model
from snello.models.spec import Task
from snello.models.tensor_writer import DType, narrow, widen

MOST_PARAMETERS = 2_000_000_000  # above it, loading twice in FP32 would fill the memory of ordinary machines
NUM_TOKENS = 24
LARGEST_DIFFERENCE = 2e-3  # of logits whose spread is a few units; FP32 sums in another order


def compare_values(exported: Model, source: Model, dtype: DType) -> str | None:
    """None if all values are the same, else the first that is not."""
    if sorted(exported.weights.names()) != sorted(source.weights.names()):
        return "the parameters are not the same"
    for name in source.weights.names():
        wanted = widen(narrow(name, source.weights.values(name), dtype), dtype)
        if not np.array_equal(exported.weights.values(name), wanted):
            return f"{name} differs"
    return None


def compare_logits(exported: Model) -> str:
    """Our reference against Transformers on a few tokens, both in FP32; what was compared, in words.

    Raises:
        ArithmeticError: they differ.
    """
    import torch

    from snello.models.reference import Reference

    count = min(NUM_TOKENS, exported.spec.max_positions)
    ids = torch.tensor([[(7 + 31 * i) % exported.spec.vocab_size for i in range(count)]])
    with torch.inference_mode():
        theirs = _transformers(exported, ids)
        ours = Reference.from_model(exported).eval()(ids)
    difference = float((ours - theirs).abs().max())
    scale = max(1.0, float(theirs.abs().max()))
    if not difference <= LARGEST_DIFFERENCE * scale:
        raise ArithmeticError(f"answers differ from Transformers' by {difference:.2g} of {scale:.2g}")
    return f"answers as in Transformers to {difference:.1g} of {scale:.2g}"


def _transformers(exported: Model, ids: Any) -> Any:
    import torch
    import transformers

    classes = {
        "causal-lm": "AutoModelForCausalLM",
        "masked-lm": "AutoModelForMaskedLM",
        "sequence-classification": "AutoModelForSequenceClassification",
        "embedding": "AutoModel",
    }
    auto = getattr(transformers, classes[exported.spec.task])
    mixes = any(layer.feed_forward.experts for layer in exported.spec.layers)
    eager = {"experts_implementation": "eager"} if mixes else {}  # the usual one knows widths of whole 16 bytes only
    model = auto.from_pretrained(str(exported.path), dtype=torch.float32, **eager).eval()
    output = model(ids)
    return output.last_hidden_state if exported.spec.task == "embedding" else output.logits


def main(folder: str, source: str, task: str, dtype: str) -> int:
    wanted = load(source, task=cast(Task, task))
    exported = load(folder, task=cast(Task, task))
    fault = compare_values(exported, wanted, cast(DType, dtype))
    if fault is not None:
        print(fault)
        return 1
    said = f"read back in a fresh process: all {len(wanted.weights.names())} tensors equal"
    installed = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    if installed and exported.num_parameters <= MOST_PARAMETERS:
        said += f"; {compare_logits(exported)}"
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
