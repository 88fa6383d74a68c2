"""Guesses of what comes next, and how many of them are worth a row.

A guess is verified in the step that follows: its row draws what it would have drawn anyway, so a right guess saves a
step and a wrong one costs a row (speculative decoding: Leviathan et al. 2023, arXiv 2211.17192; here the drafter is a
lookup, and the verifier draws the model's own token, so greedy and sampled answers keep their bits). Guesses come from
the text itself: what followed the last time that these tokens stood here (prompt lookup: Saxena 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snello.engine.plan import StepCost

Drafter = Callable[[Sequence[int]], Sequence[int]]  # tokens so far -> guesses of those that follow

FIRST_ACCEPTANCE = 0.5  # before anything was seen
MEMORY = 0.85  # of the acceptance rate, a guess
RETRY_STEPS = 24  # after which one guess is tried again where guessing has not paid


class PromptLookup:
    """Looks for the newest tokens earlier in the same text.

    Args:
        longest, shortest: tokens that must agree; more are tried first.
        most: guesses at once.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2, most: int = 10) -> None:
        assert 1 <= shortest <= longest and most >= 1
        self._lengths = range(longest, shortest - 1, -1)
        self._most = most

    def __call__(self, tokens: Sequence[int]) -> Sequence[int]:
        """What followed the latest earlier occurrence of the last tokens; empty where there is none."""
        text = array("i", tokens)
        data, size = text.tobytes(), text.itemsize
        for length in self._lengths:
            if length >= len(text):
                continue
            start = _last_before(data, data[len(data) - length * size :], size)
            if start is not None:
                return text[start + length : start + length + self._most]
        return ()


def _last_before(data: bytes, wanted: bytes, size: int) -> int | None:
    """The item where `wanted` begins for the last time before the end of `data`."""
    end = len(data) - size  # an occurrence must be followed by something
    while (at := data.rfind(wanted, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + len(wanted) - 1
    return None


@dataclass
class _Record:
    """Of one sequence: how often guesses were right lately, and steps since the last one."""

    acceptance: float = FIRST_ACCEPTANCE
    idle: int = 0


class Governor:
    """Decides how many guesses a sequence gets, from what they cost in time and how often they have been right.

    With acceptance p, k guesses bring p + p^2 + ... + p^k tokens more, in expectation; each is worth what a token costs
    in a step without guesses. The k with the greatest gain is taken; 0 where none pays.
    """

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self.proposed = self.accepted = 0

    def choose(self, id: int, most: int, sequences: int, reads: int, cost: StepCost) -> int:
        """Guesses of this sequence, 0 to `most`, in a step of `sequences` next tokens that read `reads` positions."""
        record = self._records.setdefault(id, _Record())
        base = cost(sequences, reads)
        own = reads // sequences
        best, gain, expected = 0, 0.0, 0.0
        for count in range(1, most + 1):
            expected += record.acceptance**count
            extra = cost(sequences + count, reads + count * own) - base
            if (value := expected * base / sequences - extra) > gain:
                best, gain = count, value
        if best == 0 and most:
            record.idle += 1
            if record.idle > RETRY_STEPS:
                return 1
        return best

    def observe(self, id: int, proposed: int, accepted: int) -> None:
        """So many guesses ran, and so many of the first were right; those after a wrong one say nothing."""
        if not proposed:
            return
        record = self._records.setdefault(id, _Record())
        record.idle = 0
        for right in [True] * accepted + [False] * (accepted < proposed):
            record.acceptance = MEMORY * record.acceptance + (1 - MEMORY) * right
        self.proposed += proposed
        self.accepted += accepted

    def forget(self, id: int) -> None:
        self._records.pop(id, None)
