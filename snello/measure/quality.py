"""The verdict on quality: how much worse on the user's text, with a bound; what the text can prove; does the test work.

Two readings of the same blocks are paired token by token; the loss and its one-sided 95% bound come from redrawing
whole documents (windows, where a few documents are most of the text); of right and wrong answers, from a score test,
because redraws know nothing of a change that no example has. Beside every verdict stand the instrument's own
checks: the original against itself, which must be exactly zero, and a planted fault whose loss on this very text is 1.1
times the budget, which must be caught.

Power. The noise of a candidate is not known before it exists, so it is taken from the planted fault: its differences,
centred, bound a candidate without any loss at h. That noise grows with the root of the loss (a disturbance of size s
costs s squared), so the smallest loss that this text can prove is h * h / budget, and proving the budget needs
(h / budget) squared times the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snello.measure.bootstrap import LEAST_CLUSTERS, Clusters, mean_interval
from snello.measure.interval import Interval
from snello.measure.limits import above, exact, percent
from snello.measure.proportions import flips_interval
from snello.measure.rulers import Embeddings, Labels, NextTokens, Pairs, Reading, Ruler
from snello.measure.text import Block

FAULT = 1.1
POWER_RULE = (
    "noise of a planted fault of 1.1 times the budget, centred: its one-sided 95% bound h; the smallest provable "
    "loss is h * h / budget, because noise grows with the root of the loss"
)


@dataclass(frozen=True)
class SourceVerdict:
    """The loss on one source: L and its one-sided bounds."""

    source: str
    loss: Interval
    tokens: int
    blocks: int


@dataclass(frozen=True)
class Comparison:
    """The loss on every source. The worst one, by its bound, counts."""

    sources: tuple[SourceVerdict, ...]

    @property
    def worst(self) -> SourceVerdict:
        return max(self.sources, key=lambda source: (source.loss.high, source.loss.mid))

    @property
    def loss(self) -> Interval:
        return self.worst.loss

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)


def compare(
    ruler: Ruler, original: Reading, other: Reading, blocks: Sequence[Block], *, seed: int, same_model: bool = False
) -> Comparison:
    """How much worse `other` is than `original` on these blocks, per source.

    Args:
        same_model: one model read twice; equal answers then leave nothing open, however few.
    """
    differences = ruler.differences(original, other, blocks)
    return compare_differences(ruler, differences, blocks, seed=seed, same_model=same_model)


def compare_differences(
    ruler: Ruler, differences: Sequence[np.ndarray], blocks: Sequence[Block], *, seed: int, same_model: bool = False
) -> Comparison:
    verdicts = []
    for source in dict.fromkeys(block.source for block in blocks):
        chosen = [i for i, block in enumerate(blocks) if block.source == source]
        own = [differences[i] for i in chosen]
        if same_model and not any(map(np.any, own)):
            mean = Interval.exact(0.0)
        else:
            mean = _bounded_mean(ruler, own, [blocks[i] for i in chosen], seed)
        verdicts.append(SourceVerdict(source, ruler.loss(mean), sum(map(len, own)), len(own)))
    return Comparison(tuple(verdicts))


def _bounded_mean(ruler: Ruler, differences: Sequence[np.ndarray], blocks: Sequence[Block], seed: int) -> Interval:
    if isinstance(ruler, Labels):
        return flips_interval(np.concatenate(differences))
    return mean_interval(Clusters.of(list(differences), clusters(blocks)), seed=seed)


def clusters(blocks: Sequence[Block]) -> list[int]:
    """The unit of resampling: the document, or the window where too few documents carry the text.

    Two long documents among six short ones are hardly more than two, so they are counted by Kish's effective number,
    (sum n)^2 / sum n^2 of their tokens.
    """
    numbers: dict[tuple[str, int], int] = {}  # each text counts its documents from 0
    documents = [numbers.setdefault((block.source, block.cluster), len(numbers)) for block in blocks]
    sizes = np.bincount(np.unique(documents, return_inverse=True)[1], [block.num_scored for block in blocks])
    effective = float(sizes.sum()) ** 2 / max(1.0, float((sizes**2).sum()))
    return documents if effective >= LEAST_CLUSTERS else list(range(len(blocks)))


def sharpness(ruler: Ruler, original: Reading, other: Reading, blocks: Sequence[Block], *, seed: int) -> float | None:
    """How many times narrower the paired interval is than one of two unpaired runs."""
    if not isinstance(ruler, NextTokens):
        return None
    names = clusters(blocks)
    paired = mean_interval(Clusters.of(ruler.differences(original, other, blocks), names), seed=seed)
    alone = [mean_interval(Clusters.of(list(r.values), names), seed=seed) for r in (original, other)]
    unpaired = math.hypot(*(interval.half_width for interval in alone))
    return unpaired / paired.half_width if paired.half_width > 0 else None


# ---- the planted fault ----


def plant(ruler: Ruler, original: Reading, blocks: Sequence[Block], *, max_loss: float, seed: int) -> Reading:
    """A reading of a damaged model: its loss on every source is exactly 1.1 times the budget."""
    values = list(original.values)
    for number, source in enumerate(dict.fromkeys(block.source for block in blocks)):
        chosen = [i for i, block in enumerate(blocks) if block.source == source]
        generator = np.random.default_rng([seed, number, 0xFA017])
        own, group = [original.values[i] for i in chosen], [blocks[i] for i in chosen]
        faulty = _damage(ruler, own, group, FAULT * max_loss, generator)
        for i, value in zip(chosen, faulty, strict=True):
            values[i] = value
    return Reading(tuple(values), original.choices)


def _damage(
    ruler: Ruler,
    values: list[np.ndarray],
    blocks: Sequence[Block],
    loss: float,
    generator: np.random.Generator,
) -> list[np.ndarray]:
    if isinstance(ruler, NextTokens):
        return disturb(values, math.log1p(loss), generator)
    if isinstance(ruler, Pairs):
        return _blur(ruler, values, blocks, loss, generator)
    if isinstance(ruler, Embeddings):
        return _turn(values, loss, generator)
    return _flip(values, loss, generator)


def disturb(losses: list[np.ndarray], nats: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Gaussian noise on the log-odds of each next token against all others, as large as costs `nats` on average."""
    flat = np.concatenate(losses).astype(np.float64)
    odds = -flat - np.log(-np.expm1(-np.maximum(flat, 1e-9)))
    noise = generator.standard_normal(len(flat))

    def disturbed(size: float) -> np.ndarray:
        return np.logaddexp(0.0, -(odds + size * noise)) - np.logaddexp(0.0, -odds)

    low, high = 0.0, 1.0
    while disturbed(high).mean() < nats and high < 1e6:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if disturbed(middle).mean() < nats else (low, middle)
    faulty = flat + disturbed(high)
    return np.split(faulty, np.cumsum([len(piece) for piece in losses])[:-1])


def _flip(values: list[np.ndarray], points: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Wrong answers for right ones, and a third as many the other way."""
    flat = np.concatenate(values).astype(np.float64)
    wanted = max(1, math.ceil(points * len(flat) - 1e-9))
    right, wrong = np.flatnonzero(flat == 0), np.flatnonzero(flat == 1)
    back = min(len(wrong), wanted // 3)
    flat[generator.choice(right, min(len(right), wanted + back), replace=False)] = 1.0
    flat[generator.choice(wrong, back, replace=False)] = 0.0
    return list(np.split(flat, len(flat)))


def _blur(
    ruler: Ruler,
    values: list[np.ndarray],
    blocks: Sequence[Block],
    points: float,
    generator: np.random.Generator,
) -> list[np.ndarray]:
    """Noise on the cosines of pairs, as large as costs these points of AUC."""
    flat = np.concatenate(values).astype(np.float64)
    noise = generator.standard_normal(len(flat)) * flat.std()

    def blurred(size: float) -> list[np.ndarray]:
        return list(np.split(flat + size * noise, len(flat)))

    def cost(size: float) -> float:
        original, other = Reading(tuple(values)), Reading(tuple(blurred(size)))
        return float(np.mean(ruler.differences(original, other, blocks)))

    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < points else (low, middle)
    return blurred(high)


def _turn(vectors: list[np.ndarray], loss: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Each vector turned in a random direction, by 1 - cosine = loss on average.

    Texts differ in it by a fifth of it, skewed to the right, as rounding turns them (all-MiniLM-L6-v2: 0.17 to 0.20
    from BF16 to INT4).
    """
    shares = generator.gamma(25.0, size=len(vectors))
    turned = []
    for vector, share in zip(vectors, shares / shares.mean(), strict=True):
        cosine = max(-1.0, 1 - loss * share)
        across = generator.standard_normal(len(vector))
        across -= np.dot(across, vector) * vector
        turned.append(cosine * vector + math.sqrt(1 - cosine**2) * across / np.linalg.norm(across))
    return turned


# ---- power ----


@dataclass(frozen=True)
class Power:
    """The smallest loss that this text can prove, per source, and tokens that would do for the budget.

    `reading`: what else it takes to have so many read, where not the text was too short but what was read of it.
    """

    smallest: dict[str, float]
    tokens_needed: int
    max_loss: float
    reading: str = ""

    @property
    def worst(self) -> float:
        return max(self.smallest.values())

    @property
    def enough(self) -> bool:
        return self.worst <= self.max_loss

    @property
    def sentence(self) -> str:
        can = percent(self.worst) if self.enough else above(self.worst, self.max_loss)
        can = can if math.isfinite(self.worst) else "nothing"
        needed = f"about {round_up(self.tokens_needed):,} tokens" if self.tokens_needed else "a longer text"
        advice = f"it takes {needed}, and {self.reading} to read them" if self.reading else f"give {needed}"
        return f"this text can prove {can}, you asked for {exact(self.max_loss)}: {advice}"


def power(
    ruler: Ruler,
    original: Reading,
    fault: Reading,
    blocks: Sequence[Block],
    *,
    max_loss: float,
    total_tokens: int,
    seed: int,
) -> Power:
    """What these blocks can prove. `total_tokens`: of the whole text, whose part the blocks are."""
    differences = ruler.differences(original, fault, blocks)
    smallest: dict[str, float] = {}
    for source in dict.fromkeys(block.source for block in blocks):
        chosen = [i for i, block in enumerate(blocks) if block.source == source]
        own = [differences[i] for i in chosen]
        mean = _bounded_mean(ruler, own, [blocks[i] for i in chosen], seed)
        bound = ruler.loss(Interval.exact(mean.high - mean.mid)).mid if math.isfinite(mean.high) else math.inf
        smallest[source] = bound * bound / max_loss
        if isinstance(ruler, Labels):  # no candidate is bounded by less than one that changes no answer
            smallest[source] = max(smallest[source], flips_interval(np.zeros(len(own))).high)
    worst = max(smallest.values())
    needed = math.ceil(total_tokens * worst / max_loss) if math.isfinite(worst) else 0
    return Power(smallest, needed, max_loss)


def round_up(count: int) -> int:
    """Two significant digits, upwards: 61,204 -> 62,000."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return int(-(-count // unit) * unit)
