"""SmoothQuant (arXiv:2211.10438): the difficulty of 8-bit activations moves into the weights, channel by channel.

`s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`, over all rows of calibration text and all weights that read the channel:
inputs are divided by s, weights multiplied. The paper folds 1 / s into the norm before; here it is the input scale
that every format carries, so it also holds where no norm comes before, at `o` and `down`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snello.techniques.quantize.basis import away_from_zero


def smooth_scale(peaks: Tensor, consumers: Sequence[Tensor], alpha: float) -> Tensor:
    """s (K), from the largest magnitude `peaks` (K) of each input channel and the weights (N, K) that read it.

    Channels that are never loud, or that nobody reads, are held away from zero, so that s stays finite.
    """
    weights = torch.stack([w.abs().amax(0) for w in consumers]).amax(0)
    return away_from_zero(peaks) ** alpha / away_from_zero(weights) ** (1 - alpha)
