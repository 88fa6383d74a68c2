"""Guesses of a smaller model with the same vocabulary.

It reads what the large one has said, keeps keys and values of its own for that, and goes on alone for a few tokens, all
sequences in one batch. Each guess is drawn with the settings, the seed and the position of the answer that it is for:
the noise that the large model will draw with (Gumbel-max), so that equal logits give equal tokens at any temperature.
What the large model refuses is overwritten. Its threads are the large model's: they never run at the same time.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from snello.engine.cost import LearnedCost, StepTimes
from snello.engine.governor import MOST, Governor, Source
from snello.engine.native import NativeExecutor
from snello.engine.pages import Retention
from snello.engine.prefix import PAGE, PrefixTree
from snello.engine.sequence import Piece, Step
from snello.engine.sequence import Sequence as Known
from snello.engine.speculate import Ask
from snello.errors import SnelloError
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native.core import NotFinite

CHEAP_ROWS = 4  # to catch up with; more of them must be worth it
TAIL = 32  # newest tokens that are read where reading all is not worth it, or not yet
RECONSIDER = 32  # drafts after which it is asked again
TRIAL = 3
HOPE = 0.6
FIRST_GUESS_GB_PER_S = 15.0


def check_draft(model: Model, draft: Model) -> None:
    """Whether `draft` can guess for `model`: the same tokens under the same numbers.

    Raises:
        SnelloError: it cannot, and why.
    """
    hint = "a draft model must have been made with the tokenizer of the model that it guesses for"
    if not draft.spec.causal:
        raise SnelloError(f"{draft.name} is an encoder ({draft.spec.task}): it cannot guess what follows", hint)
    sizes = model.spec.vocab_size, draft.spec.vocab_size
    if sizes[0] != sizes[1]:
        message = f"{draft.name} cannot guess for {model.name}: it has {sizes[1]:,} tokens, the model {sizes[0]:,}"
        raise SnelloError(message, hint)
    ours, theirs = (each.tokenizer.backend.get_vocab(with_added_tokens=True) for each in (model, draft))
    if ours != theirs:
        differing = {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}
        message = (
            f"{draft.name} cannot guess for {model.name}: {len(differing):,} of their tokens differ, "
            f"such as {min(differing)!r}"
        )
        raise SnelloError(message, hint)


@dataclass(eq=False, kw_only=True)
class _Shadow:
    """What the draft has computed of one sequence, from the token `offset` on: `known`, guesses at its end included."""

    known: Known
    offset: int = 0
    agreed: int = 0  # tokens of it that are known to be the sequence's
    published: int = 0  # whole pages of those in the tree
    drafts: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """A drafter that is a model. Use `check_draft` first.

    Args:
        draft: the smaller model.
        target: who verifies; its threads are shared, so close this one first.

    Raises:
        SnelloError: it cannot be run, or does not fit beside the other.
    """

    num_matchers = 1  # guesses run ahead of what was said, and the grammar with them

    def __init__(self, draft: Model, target: NativeExecutor, *, max_num_seqs: int) -> None:
        self.name = draft.name
        context = min(target.context, draft.spec.max_positions)
        deployment = Deployment(context=context, isa=target.isa, max_num_seqs=max_num_seqs)
        self.executor = NativeExecutor(draft, deployment, pool=target.pool)
        self._pool = self.executor.pages
        self._tree = PrefixTree(self._pool, Retention())
        self._shadows: dict[int, _Shadow] = {}
        self._source = Source(f"draft model {draft.name}", HOPE)
        token = self.executor.bytes_per_token() / FIRST_GUESS_GB_PER_S / 1e6
        self._line = LearnedCost(token, token / 8, 0.0)
        self._times = StepTimes(self._line)

    @property
    def memory_bytes(self) -> int:
        """Weights, and keys and values that are in use."""
        held = self._pool.num_held + self._pool.num_idle
        return self.executor.weights_bytes + held * self.executor.page_bytes

    # ---- a drafter

    def draft(self, asks: Sequence[Ask], governor: Governor) -> Mapping[int, Sequence[int]]:
        wanted: dict[int, int] = {}
        pieces: dict[int, Piece] = {}
        for ask in asks:
            count, piece = self._begin(ask, len(asks), governor, pieces)
            if piece is not None:
                pieces[ask.id], wanted[ask.id] = piece, count
        by_id = {ask.id: ask for ask in asks}
        while pieces:
            following: dict[int, Piece] = {}
            for id, logits in self._run(list(pieces.values())).items():
                guesses, ask = self._shadows[id].guesses, by_id[id]
                try:
                    guesses.append(ask.draw(logits, guesses))
                except SnelloError:  # the settings exclude every token: the model will say so
                    continue
                if len(guesses) < wanted[id] and guesses[-1] not in ask.ends:
                    following[id] = self._piece(self._shadows[id], array("i", guesses[-1:]), outputs=1)
            pieces = following
        return {id: self._shadows[id].guesses for id in wanted if self._shadows[id].guesses}

    def finished(self, id: int, tokens: Sequence[int], num_prompt: int, salt: str) -> None:
        """What was read stays known to those that begin alike."""
        if shadow := self._shadows.get(id):
            self._follow(shadow, tokens)

    def forget(self, id: int) -> None:
        shadow = self._shadows.pop(id, None)
        if shadow is not None:
            self._pool.free(shadow.known.pages)

    def close(self) -> None:
        self.executor.close()

    # ---- keeping in step

    def _begin(
        self, ask: Ask, num_asks: int, governor: Governor, others: Mapping[int, Piece]
    ) -> tuple[int, Piece | None]:
        """Guesses of this sequence, and the rows that bring the draft to its newest token, or nearer to it."""
        most = min(ask.most, MOST, self.executor.context // 4, self.executor.retention.takes_back or MOST)
        rows_left = self.executor.chunk_rows - sum(len(piece.tokens) for piece in others.values()) - num_asks
        if min(most, rows_left) < 1:
            return 0, None
        price = self._times(num_asks, 0) / num_asks
        count = governor.worth(ask.id, self._source, most, price=price, trial=TRIAL)
        shadow = self._reader(ask, governor, price) if count else None
        if shadow is None:
            return 0, None
        shadow.guesses = []
        shadow.drafts += 1
        at = len(shadow.known.tokens)
        behind = len(ask.tokens) - shadow.offset - at
        rows = min(behind, rows_left)
        if not self._make_room(shadow, at + rows + count):
            return 0, None
        if rows > CHEAP_ROWS:
            governor.pay(self._line(rows, 0), ask.id)
        start = shadow.offset + at
        piece = self._piece(shadow, ask.tokens[start : start + rows], outputs=int(rows == behind))
        return (count if rows == behind else 0), piece

    def _reader(self, ask: Ask, governor: Governor, price: float) -> _Shadow | None:
        """Who goes on with this text: from where it was, or anew; None where reading it is not worth it."""
        length, shadow = len(ask.tokens), self._shadows.get(ask.id)
        whole = max(0, length - self.executor.context // 2) if length + MOST > self.executor.context else 0
        if shadow is not None:
            self._follow(shadow, ask.tokens)
            behind = length - shadow.offset - len(shadow.known.tokens)
            if length - shadow.offset + MOST <= self.executor.context:
                again = shadow.offset > whole and shadow.drafts % RECONSIDER == RECONSIDER - 1
                if not again and self._affords(ask, behind, governor, price):
                    return shadow
                if again and not self._affords(ask, length - whole, governor, price):
                    return shadow if behind <= CHEAP_ROWS else None
        for start in (whole, max(whole, length - TAIL)):
            if self._affords(ask, length - start, governor, price):
                return self._start(ask, start)
        return None

    def _affords(self, ask: Ask, rows: int, governor: Governor, price: float) -> bool:
        if rows <= CHEAP_ROWS:
            return True
        return governor.affords(ask.id, self._source, self._line(rows, 0), ask.remaining, price)

    def _follow(self, shadow: _Shadow, tokens: Sequence[int]) -> None:
        """What was computed and turned out to be wrong is dropped; whole pages of the rest become known."""
        mine, agreed, last = shadow.known.tokens, shadow.agreed, len(tokens) - 1 - shadow.offset
        while agreed < min(len(mine), last) and mine[agreed] == tokens[shadow.offset + agreed]:
            agreed += 1
        del mine[agreed:]
        shadow.agreed = agreed
        self._publish(shadow)

    def _start(self, ask: Ask, offset: int) -> _Shadow:
        """Begins with the pages that are known already."""
        self.forget(ask.id)
        text = ask.tokens[offset : len(ask.tokens) - 1]
        match = self._tree.match(text, salt=ask.salt)
        for page in match.pages:
            self._pool.share(page)
        tokens, pages = text[: match.num_tokens], array("i", match.pages)
        known = Known(id=ask.id, tokens=tokens, max_length=self.executor.context, salt=ask.salt, pages=pages)
        shadow = _Shadow(known=known, offset=offset, agreed=len(tokens), published=len(pages))
        self._shadows[ask.id] = shadow
        return shadow

    def _publish(self, shadow: _Shadow) -> None:
        known = shadow.known
        for index in range(shadow.published, shadow.agreed // PAGE):
            page = known.pages[index]
            same = self._tree.insert(known.tokens, (index + 1) * PAGE, page, salt=known.salt)
            if same != page:  # somebody computed the same: hold theirs
                self._pool.share(same)
                self._pool.free([page])
                known.pages[index] = same
        shadow.published = max(shadow.published, shadow.agreed // PAGE)

    def _make_room(self, shadow: _Shadow, length: int) -> bool:
        pages = shadow.known.pages
        while len(pages) * PAGE < length:
            if not self._pool.num_free:
                return False
            pages.append(self._pool.allocate())
        return True

    # ---- rows

    def _piece(self, shadow: _Shadow, tokens: array[int], *, outputs: int) -> Piece:
        start = len(shadow.known.tokens)
        shadow.known.tokens.extend(tokens)
        return Piece(sequence=shadow.known, start=start, tokens=tokens, num_outputs=outputs)

    def _run(self, pieces: list[Piece]) -> dict[int, np.ndarray]:
        """Logits after each piece that wants them. One that is not finite makes no guess and disturbs nobody."""
        step = Step(pieces=pieces)
        while step.pieces:
            started = time.perf_counter()
            try:
                logits = self.executor.run(step)
            except NotFinite as error:
                failed = step.piece_of(error.row)
                del failed.sequence.tokens[failed.start :]
                step = step.without(failed)
                continue
            milliseconds = (time.perf_counter() - started) * 1e3
            self._line.observe(step.num_rows, 0, milliseconds)
            self._times.observe(step.num_rows, 0, milliseconds)
            wanting = [piece.sequence.id for piece in step.pieces if piece.num_outputs]
            return dict(zip(wanting, logits, strict=True))
        return {}
