"""From which similarity on wrong answers among hits stay under a bound, and whether that still holds.

Beforehand, on labelled questions: thresholds are tried from strict to lax, each by the Clopper-Pearson bound of the
wrong ones among its hits, until one fails; the last that passed is certified (fixed-sequence testing: no correction is
needed, because the order is fixed beforehand). Thresholds with so few hits that one error would end the search are left
out; that looks at how many hits there are, never at whether they are right. Later, on audited hits: a test by betting
(Waudby-Smith and Ramdas 2020, arXiv 2010.09686) that may be looked at after every one of them.

All of it holds for questions that come as those labelled came, for whoever judged them, and without an adversary.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snello.errors import SnelloError
from snello.optimize.files import write_atomically
from snello.serve.caches.identity import digest

THRESHOLDS = tuple(round(0.995 - 0.005 * step, 3) for step in range(100))  # 0.995 down to 0.5
ROOM = 2  # times the hits that pass without an error


def upper_bound(wrong: int, hits: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson: the largest share of wrong ones that `wrong` of `hits` do not contradict."""
    assert 0 <= wrong <= hits
    if wrong == hits:
        return 1.0
    low, high = wrong / hits, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(wrong, hits, middle) > 1 - confidence else (low, middle)
    return high


def interval(wrong: int, hits: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson on both sides; (0, 1) of nothing."""
    if hits == 0:
        return 0.0, 1.0
    each = (1 + confidence) / 2
    return 1 - upper_bound(hits - wrong, hits, each), upper_bound(wrong, hits, each)


def hits_needed(epsilon: float, confidence: float = 0.95) -> int:
    """Hits without an error that prove `epsilon`."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-epsilon))


def _at_most(wrong: int, hits: int, share: float) -> float:
    """Probability of at most `wrong` of `hits`."""
    counts = np.arange(wrong + 1)
    choose = np.concatenate(([0.0], np.cumsum(np.log((hits - counts[:-1]) / (counts[:-1] + 1)))))
    logs = choose + counts * math.log(share) + (hits - counts) * math.log1p(-share)
    return float(np.exp(logs - logs.max()).sum() * math.exp(logs.max()))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A threshold, and what was shown for it.

    Attributes:
        epsilon, confidence: at most this share of hits is wrong, with this confidence.
        hits, wrong, questions: on which it was shown.
        embedder, guard: digests of what it was shown for. labels: of the labelled questions that it was shown on.
        revoked: why it does not hold any more; empty while it does.
    """

    threshold: float
    epsilon: float
    confidence: float
    hits: int
    wrong: int
    questions: int
    embedder: str
    guard: str
    labels: str = ""
    revoked: str = ""

    @property
    def bound(self) -> float:
        """The upper bound that these hits gave."""
        return upper_bound(self.wrong, self.hits, self.confidence)

    def save(self, path: Path) -> None:
        fields = dataclasses.asdict(self)
        write_atomically(path, json.dumps({**fields, "checksum": digest(fields)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Raises:
        SnelloError: there is none, or it was changed, or does not follow from its own counts.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            checksum = fields.pop("checksum")
            found = cls(**fields)
            sound = (
                checksum == digest(dataclasses.asdict(found))
                and found.bound <= found.epsilon
                and 0 < found.confidence < 1
                and -1 <= found.threshold <= 1
            )
        except FileNotFoundError:
            raise SnelloError(f"there is no certificate at {path}", "certify on labelled questions first") from None
        except (OSError, ValueError, KeyError, TypeError, AssertionError, AttributeError):
            sound = False
        if not sound:
            raise SnelloError(f"{path} is no sound certificate", "remove it, and certify anew")
        return found


def certify(
    similarity: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    *,
    epsilon: float,
    embedder: str,
    guard: str,
    labels: str = "",
    confidence: float = 0.95,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Certificate | None:
    """The laxest threshold that is proved; None: none is, and the cache stays off.

    Args:
        similarity: of each question to its nearest (questions,); -inf where the guard refused.
        right: whether the nearest's answer was right for it (questions,).
        epsilon: most wrong ones among hits. thresholds: chosen without a look at these questions, strict to lax.

    Raises:
        SnelloError: numbers that cannot be.
    """
    if not 0 < epsilon < 1 or not 0 < confidence < 1:
        raise SnelloError(f"epsilon is {epsilon} and confidence {confidence}", "give shares between 0 and 1")
    if list(thresholds) != sorted(set(thresholds), reverse=True):
        raise SnelloError("thresholds are not in falling order", "give each once, the strictest first")
    near, correct = np.asarray(similarity, np.float64), np.asarray(right, bool)
    assert near.shape == correct.shape and near.ndim == 1
    least, best = _first_hits(near, thresholds[-1], hits_needed(epsilon, confidence)), None
    for threshold in thresholds:
        hit = near >= threshold
        hits, wrong = int(hit.sum()), int((hit & ~correct).sum())
        if hits < least:
            continue
        if upper_bound(wrong, hits, confidence) > epsilon:
            break
        best = Certificate(
            threshold=threshold,
            epsilon=epsilon,
            confidence=confidence,
            hits=hits,
            wrong=wrong,
            questions=len(near),
            embedder=embedder,
            guard=guard,
            labels=labels,
        )
    return best


def _first_hits(near: np.ndarray, laxest: float, needed: int) -> int:
    """Hits to begin with: room for an error or two, unless there are not as many at all."""
    return ROOM * needed if int((near >= laxest).sum()) >= ROOM * needed else needed


class Watch:
    """Whether wrong hits have become more than `epsilon`, told after any number of audited ones.

    A gambler bets on wrong hits at odds that are fair if their share is `epsilon`. Under that, or fewer, his wealth
    passes 1 / (1 - confidence) with a probability of at most 1 - confidence, ever (Ville). Several stakes, one purse.
    """

    def __init__(self, epsilon: float, confidence: float = 0.95) -> None:
        stakes, stake = [], 0.5
        while stake < 0.9 / epsilon:
            stakes.append(stake)
            stake *= 2
        self._stakes = np.array([*stakes, 0.9 / epsilon])
        self._log_wealth = np.zeros(len(self._stakes))
        self._epsilon, self._limit = epsilon, -math.log(1 - confidence)
        self.audited = self.wrong = 0
        self.breached = False

    @property
    def log_evidence(self) -> float:
        """Logarithm of the purse."""
        top = float(self._log_wealth.max())
        return top + math.log(float(np.exp(self._log_wealth - top).mean()))

    def see(self, *, right: bool) -> bool:
        """One more audited hit; returns whether the bound is broken, which never heals by itself."""
        self.audited += 1
        self.wrong += not right
        self._log_wealth += np.log1p(self._stakes * ((not right) - self._epsilon))
        self.breached = self.breached or self.log_evidence >= self._limit
        return self.breached
