"""What the calibration text says about a smaller vocabulary, before one is made: what it uses, and what will be missed.

Tokens are kept as `techniques/trim` keeps them: those that the text holds, then the tokenizer's earliest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def seen(windows: Sequence[np.ndarray]) -> int:
    """How many different tokens there are."""
    return len(np.unique(np.concatenate(windows)))


def leaving(windows: Sequence[np.ndarray], keep: int) -> float:
    """Of every second window's tokens, the share that is not among `keep` chosen by the others.

    Half of the text chooses, so this is rather too much than too little. 1.0 where there is nothing to compare.
    """
    chosen = np.unique(np.concatenate([*windows[::2]])) if windows else np.array([], np.int32)
    asked = np.concatenate(windows[1::2]) if len(windows) > 1 else np.array([], np.int32)
    if not len(asked):
        return 1.0
    missing = np.setdiff1d(np.arange(keep, dtype=chosen.dtype), chosen)  # earliest of those that were not chosen
    kept = np.union1d(chosen, missing[: max(0, keep - len(chosen))])
    return float(np.mean(~np.isin(asked, kept)))
