"""A folder, or a model of the Hub, run by our own engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snello.errors import Unsupported
from snello.measure import guards
from snello.measure.guards import Divergence, Habits
from snello.measure.rulers import MaskedTokens, Reading, Ruler
from snello.measure.runner import Runner, Step
from snello.measure.sizes import bits_per_weight
from snello.measure.text import Block
from snello.measure.translation import Gathered, Translated, Translation, translation


class NativeJudged:
    """`runner` runs `model`, and is closed with it; `rule` tells it the original's tokens, where its own are others."""

    kind = "run by Snello"

    def __init__(self, model: Any, runner: Runner, rule: Translation | None) -> None:
        self.model, self.runner, self.rule = model, runner, rule
        self.longest: int | None = runner.context

    def facts(self) -> dict[str, Any]:
        weights = self.runner.weights_bytes
        return {
            "kind": self.kind,
            "name": str(self.model.name),
            "digest": str(self.model.digest),
            "weights_bytes": weights,
            "bits_per_weight": bits_per_weight(weights, self.model.spec),
        }

    def read(self, ruler: Ruler, blocks: Sequence[Block], step: Step) -> Reading:
        if self.rule is None:
            return ruler.read(self.runner, blocks, step)
        if isinstance(ruler, MaskedTokens):
            hint = "check compares it with an original of the same vocabulary only"
            raise Unsupported("the loss of hidden words cannot be compared with another vocabulary's", hint)
        return ruler.read(Translated(self.runner, self.rule), blocks, step)

    def divergence(self, original: Runner, blocks: Sequence[Block], *, seed: int, step: Step) -> Divergence | None:
        if self.rule is None:
            return guards.divergence(original, self.runner, blocks, seed=seed, step=step)
        gathered = Gathered(original, self.rule, self.model.spec.vocab_size)
        return guards.divergence(gathered, Translated(self.runner, self.rule), blocks, seed=seed, step=step)

    def habits(self, prompts: Sequence[Sequence[int]], *, most: int, step: Step) -> Habits:
        own = prompts if self.rule is None else [self.rule.translate(prompt)[0].tolist() for prompt in prompts]
        return guards.habits(self.runner, own, max_tokens=most, step=step)

    def close(self) -> None:
        self.runner.close()


def rule_between(original: Any, other: Any) -> Translation | None:
    """How a trimmed vocabulary is told the original's tokens; None where both are the same.

    Raises:
        Unsupported: the tokens are others, so losses do not pair.
    """
    rule = translation(original.tokenizer, other.tokenizer)
    if rule is None:
        return None
    words, own = (set(one.tokenizer.backend.get_vocab(with_added_tokens=True)) for one in (original, other))
    if not own <= words:
        hint = "check compares a model with versions of itself"
        strange = min(own - words)
        message = f"{other.name} has another tokenizer ({strange!r} is no token of the original)"
        raise Unsupported(f"{message}: losses do not pair token by token", hint)
    return rule
