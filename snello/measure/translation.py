"""Reading a model whose tokens are others than the original's, so that both can be paired on the same text.

Token by token: what the other tokenizer still has is its own token there, what it has not is the pieces that it makes
of that token. So every token of the original stands for the same bytes on both sides, its loss is the sum over its
pieces, `-log P(piece 1) - log P(piece 2 | piece 1) ...`, and a difference per token of the original stays what it is
where nothing changed. Means, blocks and documents need no other rule. Divergence compares how the next *piece* is
distributed: the original's tokens are gathered by their first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snello.errors import Unsupported
from snello.measure.runner import Runner, Scores
from snello.models.tokenizer import Tokenizer

LEAST_ODDS = 1e-300  # of a row that begins no token: no infinity times nothing
LEAST_CONTEXT = 64  # tokens before the first one that is scored in a later window


@dataclass(frozen=True)
class Translation:
    """From the tokens of one tokenizer to those of another."""

    original: Tokenizer
    other: Tokenizer
    _pieces: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def pieces(self, token: int) -> tuple[int, ...]:
        """What the other tokenizer has for a token: itself, or several.

        Raises:
            Unsupported: the other one has no way to write it.
        """
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> tuple[int, ...]:
        text = self.original.backend.id_to_token(token)
        if text is None:
            raise Unsupported(f"token {token} of the original has no text", "its tokenizer does not know it")
        same = self.other.token_id(text)
        if same is not None:
            return (same,)
        made = tuple(piece.id for piece in self.other.backend.model.tokenize(text))
        unknown = {self.other.special_tokens.get("unk_token")} - {None}
        if not made or {self.other.backend.id_to_token(piece) for piece in made} & unknown:
            raise Unsupported(f"the other tokenizer cannot write {text!r}", "compare models with related tokenizers")
        return made

    def translate(self, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T) -> those of the other (T'), and for each of the T where its pieces end."""
        parts = [self.pieces(int(token)) for token in tokens]
        ends = np.cumsum([len(part) for part in parts])
        return np.array([piece for part in parts for piece in part], np.int32), ends

    def back(self, token: int) -> int:
        """A token of the other as the original's of the same text; -1 if there is none."""
        text = self.other.backend.id_to_token(token)
        same = None if text is None else self.original.token_id(text)
        return -1 if same is None else same

    def stretch(self, blocks: Sequence[Sequence[int] | np.ndarray]) -> float:
        """How many tokens the other needs for one of the original's, over this text."""
        return sum(len(self.translate(block)[0]) for block in blocks) / max(1, sum(map(len, blocks)))

    def first_pieces(self, size: int) -> np.ndarray:
        """(size,) the first piece of every token; rows without a text are -1."""
        known = [self.original.backend.id_to_token(token) is not None for token in range(size)]
        return np.array([self.pieces(token)[0] if known[token] else -1 for token in range(size)], np.int64)


def translation(original: Tokenizer, other: Tokenizer) -> Translation | None:
    """None where both tokenizers have the same tokens under the same numbers."""
    if original is other:
        return None
    vocabularies = [tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (original, other)]
    return None if vocabularies[0] == vocabularies[1] else Translation(original, other)


@dataclass(frozen=True)
class _Read:
    """`Scores` of tokens[1:] of the original."""

    log_probabilities: np.ndarray
    top1: np.ndarray


class Translated:
    """A runner that is asked in the original's tokens and answers for them. What is no reading is the runner's own."""

    def __init__(self, runner: Runner, rule: Translation) -> None:
        self.runner, self.rule = runner, rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def score(self, tokens: Any) -> Scores:
        """Of tokens[1:]: log-probabilities summed over pieces; the first choice of the first piece, -1 if it is none of
        the original's tokens.
        """
        ids, ends = self.rule.translate(tokens)
        values, chosen = self._windows(ids)
        starts = ends[:-1] - 1  # the scores of tokens[1:] begin here: scores are of ids[1:]
        sums = np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.empty(0)
        first = [self.rule.back(int(token)) for token in chosen[starts]]
        return _Read(sums.astype(np.float32), np.array(first, np.int32))

    def logits(self, tokens: Any, rows: Any = None) -> np.ndarray:
        """Logits (R, V') of the other's tokens after these positions of the original's."""
        ids, ends = self.rule.translate(tokens)
        picked = np.arange(len(ends)) if rows is None else np.asarray(rows)
        places = ends[picked] - 1
        limit = self.runner.context
        inside = places < limit
        found = [self.runner.logits(ids[:limit], places[inside])]
        if not inside.all():  # the rest in a window that ends with the text
            skip = len(ids) - limit
            found.append(self.runner.logits(ids[skip:], places[~inside] - skip))
        return np.concatenate(found)

    def encode(self, tokens: Any) -> np.ndarray:
        """A vector or labels of a whole text; its closing token stays where it is too long."""
        ids, _ = self.rule.translate(tokens)
        longest = self.runner.spec.max_positions
        return self.runner.encode(ids if len(ids) <= longest else np.append(ids[: longest - 1], ids[-1]))

    def _windows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of ids[1:]; what is longer than the context is read on in windows that overlap."""
        limit = self.runner.context
        values, chosen = [], []
        begin, done = 0, 1  # tokens before `done` are scored
        while done < len(ids):
            scores = self.runner.score(ids[begin : begin + limit])
            values.append(np.asarray(scores.log_probabilities)[done - begin - 1 :])
            chosen.append(np.asarray(scores.top1)[done - begin - 1 :])
            done = min(len(ids), begin + limit)
            begin = min(len(ids) - limit, done - min(LEAST_CONTEXT, limit // 2))
        return np.concatenate(values), np.concatenate(chosen)


class Gathered:
    """The original, whose distribution is told over first pieces: what `Translated` is compared with."""

    def __init__(self, runner: Runner, rule: Translation, size: int) -> None:
        self.runner, self.size = runner, size
        self.first = rule.first_pieces(runner.spec.vocab_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def logits(self, tokens: Any, rows: Any = None) -> np.ndarray:
        """(R, V') log of the summed odds of all tokens that begin with each piece."""
        found = self.runner.logits(tokens, rows).astype(np.float64)
        known = self.first >= 0
        top = found[:, known].max(-1, keepdims=True)
        gathered = np.zeros((len(found), self.size))
        for row, odds in zip(gathered, np.exp(found - top), strict=True):
            np.add.at(row, self.first[known], odds[known])
        return np.asarray(np.log(np.maximum(gathered, LEAST_ODDS)) + top)
