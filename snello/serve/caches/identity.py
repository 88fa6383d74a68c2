"""What an answer depends on, as one key: the model as it runs, and every field of the request with its default.

Fields are taken from the dataclass, so one that is added later is in the key by itself. A number is written in one way
(`1` and `1.0` as the field's type says), tables are sorted: the order of a client's JSON does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from snello.engine.native import NativeExecutor
from snello.engine.request import SamplingParams
from snello.models.tokenizer import Tokenizer
from snello.native import core

KEY_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """A model as it answers, in digests. Two that are equal give equal answers to equal requests.

    Attributes:
        weights: of the spec and all weights. runs: of the spec as it runs here, which a deployment may have changed.
        recipe: of the steps that made it from its original. adapter: empty for none.
        context: positions; an answer may end where it does.
        numerics: of the core; instruction set, threads and what else runs change nothing (law 7).
        executor: of another kind, other bits.
    """

    weights: str
    runs: str
    tokenizer: str
    recipe: str
    context: int
    adapter: str = ""
    numerics: int = core.NUMERICS_VERSION
    executor: str = "native"

    @classmethod
    def of(cls, executor: NativeExecutor, *, adapter: str = "") -> ModelIdentity:
        """Reads all weights once, where nobody has asked for `model.digest` before."""
        model = executor.model
        return cls(
            weights=model.digest,
            runs=executor.spec.digest,
            tokenizer=tokenizer_digest(model.tokenizer),
            recipe=digest([dict(step) for step in model.history]),
            context=executor.context,
            adapter=adapter,
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as the engine gets it.

    Attributes:
        tokens: of the rendered prompt. params: settings, defaults filled in.
        url: what kind of answer. salt: the tenant's.
        fields: every other field that may change the answer (tools, tool_choice, response_format, echo, ...).
    """

    tokens: Sequence[int]
    params: SamplingParams
    url: str = ""
    salt: str = ""
    fields: Mapping[str, Any] | None = None

    @property
    def deterministic(self) -> bool:
        """Whether asking again gives the same answer: greedy, or with a seed."""
        return self.params.temperature == 0 or self.params.seed is not None


def key_of(identity: ModelIdentity, asked: Asked) -> bytes:
    """The key of an answer, 32 bytes (SHA-256 over everything that can change it)."""
    facts = {
        "version": KEY_VERSION,
        "model": asdict(identity),
        "url": asked.url,
        "salt": asked.salt,
        "tokens": list(asked.tokens),
        "params": plain_params(asked.params),
        "fields": dict(asked.fields or {}),
    }
    return bytes.fromhex(digest(facts))


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """All settings as JSON holds them, numbers by the types of their fields."""
    plain = {field.name: _plain(getattr(params, field.name)) for field in fields(params)}
    for name in plain:
        if type(getattr(_DEFAULTS, name)) is float:
            plain[name] = float(plain[name])
    plain["logit_bias"] = sorted([int(token), float(bias)] for token, bias in params.logit_bias.items())
    return plain


def _plain(value: Any) -> Any:
    """A setting's value; one that is an object says by its `source` what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return [type(value).__name__, str(value.source)]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of the vocabulary, the special tokens and the chat templates."""
    return digest([tokenizer.backend.to_str(), dict(tokenizer.special_tokens), dict(tokenizer.chat_templates)])


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON; half surrogates, which JSON can say, included."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_DEFAULTS = SamplingParams()
