"""The table of families: what can be read, at a glance."""

from __future__ import annotations

from snello.models.families.bert import BERT, DISTILBERT
from snello.models.families.family import Family
from snello.models.families.gemma import GEMMA2, GEMMA3
from snello.models.families.gpt import GPT2, GPT_NEOX, OPT
from snello.models.families.lfm2 import LFM2
from snello.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from snello.models.families.longformer import LONGFORMER
from snello.models.families.moe import MIXTRAL, QWEN3_MOE
from snello.models.families.phi import PHI3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        LFM2,
        MIXTRAL,
        QWEN3_MOE,
        GPT2,
        OPT,
        GPT_NEOX,
        PHI3,
        GEMMA2,
        GEMMA3,
        BERT,
        DISTILBERT,
        LONGFORMER,
    )
}
