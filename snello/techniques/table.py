"""Every technique by the name that recipes and the command line use: a literal table, and the only one."""

from __future__ import annotations

from snello.techniques.attention import CheaperAttention
from snello.techniques.base import Technique
from snello.techniques.convolution import Convolution
from snello.techniques.distill import Distill
from snello.techniques.prune import Prune
from snello.techniques.quantize import Quantize
from snello.techniques.skip import Skip
from snello.techniques.sparsify import Sparsify
from snello.techniques.trim import Trim

TECHNIQUES: dict[str, type[Technique]] = {
    "attention": CheaperAttention,
    "convolution": Convolution,
    "distill": Distill,
    "prune": Prune,
    "quantize": Quantize,
    "skip": Skip,
    "sparsify": Sparsify,
    "trim": Trim,
}
