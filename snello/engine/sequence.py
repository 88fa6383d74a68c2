"""One growing sequence, and a step: which rows of which sequences the executor runs next.

These are plain values between the scheduler, which makes a step, and the executor, which runs it; neither sees more of
the other. A row is a token at a position of a sequence.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from snello.engine.pages import GONE


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt, its answer so far, and where their keys and values are. Changed by the scheduler alone.

    Attributes:
        id: given by the caller, unique among those that live.
        tokens: prompt and answer; the first `num_virtual` are the adapter's own, past the vocabulary.
        max_length: positions that it may grow to, prompt included.
        priority: 0 is ordinary, a smaller number goes first. See `Scheduler`.
        salt: only sequences of the same salt share pages.
        adapter: the number of the adapter that its rows run with, -1: none. Another adapter needs another salt.
        num_computed: positions whose keys and values are in `pages`.
        pages: per page of positions its index in the cache; GONE where no later row can see it.
        drafts: guesses of the tokens that follow, verified in the next step.
    """

    id: int
    tokens: array[int]
    max_length: int
    priority: int = 0
    salt: str = ""
    adapter: int = -1
    num_virtual: int = 0
    rank: tuple[int, int] = (0, 0)  # smaller goes first
    num_computed: int = 0
    num_cached: int | None = None  # positions that were known when it first ran; None: it never did
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_gone: int = 0  # entries of `pages` that are GONE
    drafts: list[int] = field(default_factory=list)
    running: bool = False

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        """Only its newest token is not computed."""
        return self.running and self.num_pending == 1

    @property
    def num_held(self) -> int:
        """Pages that it holds."""
        return len(self.pages) - self.num_gone

    @property
    def held_pages(self) -> list[int]:
        return [page for page in self.pages if page != GONE]


@dataclass(kw_only=True)
class Piece:
    """Consecutive rows of one sequence in a step.

    Attributes:
        start: position of the first row.
        tokens: of the rows; the last `num_drafts` are guesses.
        num_outputs: so many of the last rows are followed by a token that is not known: their logits are wanted.
    """

    sequence: Sequence
    start: int
    tokens: array[int]
    num_drafts: int = 0
    num_outputs: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(kw_only=True)
class Step:
    """What the executor does next: `copies` of pages (from, to), in this order, then the rows of all pieces at once."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def num_outputs(self) -> int:
        return sum(piece.num_outputs for piece in self.pieces)

    @property
    def num_drafts(self) -> int:
        return sum(piece.num_drafts for piece in self.pieces)

    @property
    def has_prompts(self) -> bool:
        """Whether a piece is longer than a next token and its guesses."""
        return self.num_rows - self.num_drafts > len(self.pieces)

    def __bool__(self) -> bool:
        return bool(self.pieces or self.copies)

    def without(self, piece: Piece) -> Step:
        """The other rows, to be run again after a failure; the copies are done."""
        return Step(pieces=[other for other in self.pieces if other is not piece])

    def piece_of(self, row: int) -> Piece:
        """The piece that has this row of the batch."""
        for piece in self.pieces:
            if row < len(piece.tokens):
                return piece
            row -= len(piece.tokens)
        raise IndexError(row)
