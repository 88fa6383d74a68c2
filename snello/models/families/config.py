"""A strict reader of config.json: every key is read, known to be harmless, or says nothing.

A key that nobody reads may change what the model means (a soft cap, a window, a scale), so it is an error unless
its value is null, false or empty. Which keys are harmless is data, here for all families and in each family for its
own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from snello.errors import SnelloError, Unsupported
from snello.models.rope import inverse_frequencies
from snello.models.spec import Activation, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2", "tanh": "tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip

# Keys that say how a model was trained, saved or is sampled from, but not what its forward pass computes.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_from_model_config",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer", "n_layers"), 10_000  # before they fill the memory
MOST = 2**31 - 1  # what the core counts in
MOST_DIMS = 65_536  # of a head, before its rotation fills the memory
LARGEST = sys.float_info.max  # a whole number of JSON has no bound
DEFAULT_ROPE_BASE = 10_000.0  # what Transformers takes where a config is silent


class Config:
    """A config.json that remembers which of its keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._read: set[str] = set()

    def raw(self, key: str) -> Any:
        """The value or None; counts as read."""
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one."""
        value = self._value(key, default)
        if type(value) is not int or value < 1:
            self._refuse(key, value, "a whole number above zero")
        most = MOST_LAYERS if key in LAYERS else MOST
        if value > most:
            self._refuse(key, value, f"at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """One that is not negative."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 <= value <= LARGEST:
            self._refuse(key, value, "a number")
        return float(value)

    def optional(self, key: str, default: float | None) -> float | None:
        """A number above zero, or null for none; the default only where the key is absent."""
        if self.raw(key) is None:
            return None if key in self._values else default
        value = self.number(key)
        if not value > 0:
            self._refuse(key, value, "a number above zero, or null")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self._refuse(key, value, "true or false")
        return value

    def activation(self, key: str) -> Activation:
        value = self._value(key, None)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise Unsupported(f"config.json: {key} {json.dumps(value)[:80]} is not supported", _known(ACTIVATIONS))
        return ACTIVATIONS[value]

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses a key whose value is not one of these; absent is fine."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise Unsupported(
                f"config.json: {key} {json.dumps(value)[:80]} is not supported", _known(map(str, allowed))
            )

    def token(self, key: str, vocab_size: int) -> int | None:
        """One token id; an id outside the vocabulary (old configs say -1) means none."""
        tokens = token_ids(self.raw(key), key, vocab_size)
        return tokens[0] if tokens else None

    def tokens(self, key: str, vocab_size: int) -> tuple[int, ...]:
        return token_ids(self.raw(key), key, vocab_size)

    def refuse_unread(self, harmless: frozenset[str], family: str) -> None:
        """The last call: no key may be left that could mean something."""
        known = self._read | HARMLESS | harmless
        left = [
            f"{key} = {json.dumps(value)[:60]}"
            for key, value in self._values.items()
            if key not in known and not (value is None or value is False or value in ("", [], {}))
        ]
        if left:
            keys = ", ".join(sorted(left)[:12]) + (f" and {len(left) - 12} more" if len(left) > 12 else "")
            raise Unsupported(
                f"config.json says things that {family} models here do not know: {keys}",
                "if a key does not change what the model computes, remove it from config.json",
            )

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        if value is None and default is None:
            raise SnelloError(f"config.json lacks {key}", "is this the config.json that came with the checkpoint?")
        return default if value is None else value

    def _refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        """A value that is stated, or follows from others that are."""
        message = f"config.json: {key} is {json.dumps(value)[:80]}, expected {expected}"
        raise SnelloError(message, "copy or download the file again")


def token_ids(value: Any, key: str, vocab_size: int, *, file: str = "config.json") -> tuple[int, ...]:
    """One id, a list of ids or null -> ids inside the vocabulary; another can never be drawn."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in listed):
        message = f"{file}: {key} is {json.dumps(value)[:80]}, expected token ids"
        raise SnelloError(message, f"correct {key} there, or remove it")
    return tuple(dict.fromkeys(item for item in listed if 0 <= item < vocab_size))


def rope(
    config: Config,
    head_dim: int,
    *,
    fraction: float | None = None,
    base_key: str = "rope_theta",
    base: float | None = None,
    fraction_key: str = "partial_rotary_factor",
    called: Mapping[str, str] | None = None,
) -> Rope:
    """Rotary settings from `rope_parameters` (Transformers 5) or `rope_theta` + `rope_scaling` (before).

    `base_key` and `fraction_key` are what a family called those two before; `fraction` and `base` are what it takes
    unsaid. `fraction` None: a family whose heads rotate whole, which Transformers does whatever a config says.
    `called`: its other names of kinds of scaling.
    """
    before, settings = rope_table(config, "rope_scaling"), rope_table(config, "rope_parameters")
    if before and settings and before != settings:
        raise SnelloError("config.json: rope_scaling and rope_parameters differ", "keep the right one")
    settings = settings or before
    if any(isinstance(value, dict) for value in settings.values()):
        raise Unsupported(
            "config.json: rope_parameters differ by type of layer", "only one rotary setting is supported"
        )
    bases = [settings.pop("rope_theta", None), config.raw("rope_theta"), config.raw(base_key)]
    fractions = [settings.pop("partial_rotary_factor", None), config.raw("partial_rotary_factor")]
    part = agreed("partial_rotary_factor", [*fractions, config.raw(fraction_key)], fraction or 1.0)
    if fraction is None and part != 1:
        raise Unsupported(
            f"config.json: partial_rotary_factor {part:g} is not supported in models of this family",
            "their heads rotate whole",
        )
    base = agreed("rope_theta", bases, base or DEFAULT_ROPE_BASE)
    return rope_of(settings, base, rotary_dims(head_dim, part), called or {})


def rope_of(settings: Mapping[str, Any], base: float, dims: int, called: Mapping[str, str] | None = None) -> Rope:
    """What one table of rotary settings says, beside base and width; refuses what means nothing or cannot be meant."""
    if not 0 < base < math.inf:
        raise SnelloError(f"config.json: rope_theta is {base:g}, expected a number above zero", "keep the right one")
    left = {key: value for key, value in settings.items() if value is not None}
    named = [str(left.pop(key)) for key in ("rope_type", "type") if key in left]
    kinds = list(dict.fromkeys((called or {}).get(name, name) for name in named)) or ["default"]
    if len(kinds) > 1:
        raise SnelloError(f"config.json: RoPE scaling is both {kinds[0]} and {kinds[1]}", "keep the right one")
    if kinds == ["default"] and left:
        raise Unsupported(
            f"config.json: rope_parameters say {json.dumps(left)[:80]} beside type default",
            "say the rope_type that they belong to, or remove them",
        )
    scaled = () if kinds == ["default"] else (("rope_type", kinds[0]), *sorted(_scaling_items(left)))
    turned = Rope(base=base, dims=dims, scaling=scaled)
    inverse_frequencies(turned)
    return turned


def rope_table(config: Config, key: str) -> dict[str, Any]:
    """A table of rotary settings, empty where there is none."""
    value = config.raw(key)
    if value is not None and not isinstance(value, dict):
        message = f"config.json: {key} is {json.dumps(value)[:80]}, expected a table"
        raise SnelloError(message, "copy or download the file again")
    return dict(value or {})


def agreed(name: str, values: list[Any], default: float) -> float:
    """The one value that is said, however often; the default where none is."""
    stated = [value for value in values if value is not None]
    for value in stated:
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            message = f"config.json: {name} is {json.dumps(value)[:80]}, expected a number"
            raise SnelloError(message, "copy or download the file again")
    stated = list(dict.fromkeys(stated))
    if len(stated) > 1:
        raise SnelloError(f"config.json: {name} is both {stated[0]} and {stated[1]}", "keep the right one")
    return float(stated[0]) if stated else default


def rotary_dims(head_dim: int, fraction: float = 1.0) -> int:
    """How many of a head's dims are rotated; they come in pairs."""
    dims = int(head_dim * fraction) if head_dim * fraction <= MOST_DIMS else 0
    if dims < 2 or dims % 2 or dims > head_dim:
        raise Unsupported(
            f"config.json: {fraction:g} of a head's {head_dim} dims are to be rotated", "an even number is supported"
        )
    return dims


def _scaling_items(settings: Mapping[str, Any]) -> list[tuple[str, float | str]]:
    """The configuration's own names; what is no number is kept as its JSON text."""
    numbers = {key: type(value) in (int, float) and abs(value) <= LARGEST for key, value in settings.items()}
    return [(key, float(value) if numbers[key] else json.dumps(value)) for key, value in settings.items()]


def _known(names: Any) -> str:
    return f"supported: {', '.join(names)}"
