"""A learned prompt as files: PEFT's PROMPT_TUNING, the embeddings of virtual tokens that stand before every text.

One tensor, `prompt_embeddings` (N, D), and a config that tells how many they are. Rows are taken as they are, behind
whatever a family multiplies its own embeddings with: what Transformers calls `inputs_embeds`. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models.model import Floats, Model
from snello.models.spec import Attention

KIND, TENSOR = "PROMPT_TUNING", "prompt_embeddings"
# How the rows began, whose they are, and how PEFT shapes what it makes of them: nothing that changes what they say.
HARMLESS = frozenset(
    [
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "num_attention_heads", "num_layers"),
        *("num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version", "prompt_tuning_init"),
        *("prompt_tuning_init_text", "revision", "task_type", "token_dim", "tokenizer_kwargs"),
        *("tokenizer_name_or_path",),
    ]
)


def read_prompt(path: Path, config: Mapping[str, Any], stored: Mapping[str, Floats], model: Model) -> Floats:
    """The rows (N, D) in a folder whose config is read and whose tensors are `stored`.

    Raises:
        SnelloError: they are not there, or of another shape than the config or the model says.
        Unsupported: it says something that is not computed here, or the model continues no text.
    """
    if config.get("task_type") != "CAUSAL_LM" or not model.spec.causal:
        kind = config.get("task_type")
        raise Unsupported(f"{path} is a prompt for {kind}, {model.name} a {model.spec.task} model", "CAUSAL_LM is read")
    for name, value in config.items():
        if name not in HARMLESS and value not in (None, False, [], {}):
            raise Unsupported(f"{path / 'adapter_config.json'} has {name}={value!r}", "train it without")
    rows = stored.get(TENSOR)
    if rows is None or len(stored) > 1:
        found = ", ".join(sorted(stored)[:3]) or "nothing"
        raise SnelloError(f"{path} holds {found}, not {TENSOR} alone", "copy the adapter again")
    wanted = (config.get("num_virtual_tokens"), model.spec.hidden_size)
    if rows.shape != wanted:
        raise SnelloError(f"{path}: {TENSOR} is {rows.shape}, not {wanted}", "it is of another base")
    return rows


def prompt_config(rows: Floats, model: Model) -> dict[str, Any]:
    """What PEFT reads beside the rows."""
    mixer = model.spec.layers[0].mixer
    return {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": mixer.num_heads if isinstance(mixer, Attention) else None,
        "num_layers": len(model.spec.layers),
        "prompt_tuning_init": "RANDOM",
        "inference_mode": False,
    }
