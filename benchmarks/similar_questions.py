"""How often may the answer to a similar question be given, and how often is it wrong?

    python -m benchmarks.similar_questions --pairs similar_questions_qqp.json --keep DIR

writes benchmarks/results/similar_questions.json. Pairs of questions with a label are used as a cache is: of each pair
the first question is inserted, then the second is asked and gets its nearest. That is right only where these very two
are labelled as equal; a nearest without a label counts as wrong. Pairs are split in two by connected component, so that
no question is in both halves. On one half a threshold is certified (at most 1, 2 or 5% of hits wrong, at 95%), on the
other it is held to it; then the halves change places. `plain` is a cosine cache at 0.8 without any of it. `splits`
repeats that on 200 random halves of 10,000 pairs. `swaps`: questions into which a negation, another number or another
name was put. Vectors are kept in DIR. all-MiniLM-L6-v2 was trained on pairs of this source, so its figures are
optimistic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.llm import LLM
from snello.serve.caches.certify import Certificate, certify, interval
from snello.serve.caches.embed import Embedder, EncoderEmbedder, NgramEmbedder, Vectors, minilm_folder
from snello.serve.caches.guard import Guard, words_of

RESULTS = Path(__file__).parent / "results" / "similar_questions.json"
GUARDS: dict[str, Guard | None] = {"off": None, "edits 0": Guard(max_edits=0), "edits 1": Guard(max_edits=1)}
EPSILONS = (0.01, 0.02, 0.05)
SIZES = (1_000, 10_000)
PLAIN = 0.8
SPLITS, SPLIT_PAIRS = 200, 10_000
SWAPS = 500
BLOCK = 2_000
LISTED = 64  # nearest ones that are kept of each question
AUXILIARY = re.compile(r"\b(is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Pairs:
    """Questions (sorted, each once), and pairs of places among them (P, 2) with their labels (P,)."""

    texts: list[str]
    places: np.ndarray
    labels: np.ndarray

    @property
    def equal(self) -> set[tuple[int, int]]:
        return {(int(x), int(y)) for a, b in self.places[self.labels == 1] for x, y in ((a, b), (b, a))}


def read(path: Path) -> Pairs:
    rows = json.loads(path.read_text())
    texts = sorted({text for row in rows for text in (row["text_a"], row["text_b"])})
    place = {text: at for at, text in enumerate(texts)}
    places = np.array([[place[row["text_a"]], place[row["text_b"]]] for row in rows])
    return Pairs(texts, places, np.array([row["label"] for row in rows]))


def components(pairs: Pairs) -> np.ndarray:
    """Of every pair, a number that it shares with all pairs that it hangs together with."""
    parent = list(range(len(pairs.texts)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for a, b in pairs.places:
        parent[root(int(a))] = root(int(b))
    return np.array([root(int(a)) for a, _ in pairs.places])


class Judge:
    """Right or wrong, and what the guard says, for questions and their nearest."""

    def __init__(self, pairs: Pairs) -> None:
        self._texts, self._equal = pairs.texts, pairs.equal
        self._refused: dict[tuple[str, int, int], bool] = {}

    def right(self, asked: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        return np.array([(int(a), int(b)) in self._equal for a, b in zip(asked, nearest, strict=True)], bool)

    def guarded(self, name: str, asked: np.ndarray, nearest: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Similarities (questions,), -inf where this guard refuses."""
        guard = GUARDS[name]
        if guard is None:
            return near
        result = near.copy()
        for row in np.flatnonzero(near >= 0.5):
            a, b = int(asked[row]), int(nearest[row])
            if (name, a, b) not in self._refused:
                self._refused[name, a, b] = guard.refuses(self._texts[a], self._texts[b]) is not None
            if self._refused[name, a, b]:
                result[row] = -np.inf
        return result


@dataclass(frozen=True)
class Asked:
    """A half, used as a cache: questions asked, their nearest among those inserted, how near, and whether right."""

    asked: np.ndarray
    nearest: np.ndarray
    near: np.ndarray
    right: np.ndarray


Nearest = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# (places asked, places inserted, sorted) -> (their nearest, how near)


def by_force(vectors: Vectors) -> Nearest:
    """Compares each with all."""

    def nearest_of(asked: np.ndarray, inserted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nearest, near = np.empty(len(asked), np.int64), np.empty(len(asked), np.float32)
        for start in range(0, len(asked), BLOCK):
            part = slice(start, start + BLOCK)
            products = vectors[asked[part]] @ vectors[inserted].T
            best = products.argmax(axis=1)
            nearest[part], near[part] = inserted[best], products[np.arange(len(best)), best]
        return nearest, near

    return nearest_of


def by_list(vectors: Vectors, pairs: Pairs) -> Nearest:
    """The same for parts of these pairs: the first of each question's nearest ones that is in the part."""
    first, second = np.unique(pairs.places[:, 0]), np.unique(pairs.places[:, 1])
    listed, products = np.empty((len(second), LISTED), np.int64), np.empty((len(second), LISTED), np.float32)
    for start in range(0, len(second), BLOCK):
        part = slice(start, start + BLOCK)
        block = vectors[second[part]] @ vectors[first].T
        top = np.argpartition(-block, LISTED, axis=1)[:, :LISTED] if len(first) > LISTED else np.argsort(-block, axis=1)
        values = np.take_along_axis(block, top, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        listed[part, : top.shape[1]] = first[np.take_along_axis(top, order, axis=1)]
        products[part, : top.shape[1]] = np.take_along_axis(values, order, axis=1)
    force = by_force(vectors)

    def nearest_of(asked: np.ndarray, inserted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.searchsorted(second, asked)
        there = np.isin(listed[rows], inserted)
        best = there.argmax(axis=1)
        nearest, near = listed[rows, best], products[rows, best]
        rest = ~there.any(axis=1)
        if rest.any():
            nearest[rest], near[rest] = force(asked[rest], inserted)
        return nearest, near

    return nearest_of


def use(pairs: Pairs, chosen: np.ndarray, nearest_of: Nearest, judge: Judge) -> Asked:
    """Inserts the first questions of these pairs, then asks the second ones that are not among them."""
    inserted = np.unique(pairs.places[chosen, 0])
    asked = np.setdiff1d(pairs.places[chosen, 1], inserted)
    nearest, near = nearest_of(asked, inserted)
    return Asked(asked, nearest, near, judge.right(asked, nearest))


def counts(near: np.ndarray, right: np.ndarray, threshold: float) -> dict[str, Any]:
    hit = near >= threshold
    hits, wrong = int(hit.sum()), int((hit & ~right).sum())
    share = [round(x, 5) for x in interval(wrong, hits)]
    return {
        "hits": hits,
        "hit_rate": round(hits / len(near), 5),
        "wrong": wrong,
        "wrong_among_hits": round(wrong / hits, 5) if hits else None,
        "interval_95": share if hits else None,
    }


def prove(near: np.ndarray, right: np.ndarray, epsilon: float) -> Certificate | None:
    return certify(near, right, epsilon=epsilon, embedder="", guard="")


def rows_of(name: str, vectors: Vectors, pairs: Pairs, component: np.ndarray, judge: Judge) -> list[dict[str, Any]]:
    """By size, guard and bound: certified on one half, held to it on the other, both ways."""
    rows: list[dict[str, Any]] = []
    for size in (*SIZES, None):
        halves = split(component, np.random.default_rng(1), size)
        uses = [use(pairs, half, by_force(vectors), judge) for half in halves]
        for guard in GUARDS:
            near = [judge.guarded(guard, each.asked, each.nearest, each.near) for each in uses]
            shared = {"embedder": name, "pairs": size or "all", "inserted_and_asked": len(halves[1]), "guard": guard}
            rows.append({**shared, "way": "plain 0.8", **counts(near[1], uses[1].right, PLAIN)})
            for epsilon in EPSILONS:
                for mine, other in ((0, 1), (1, 0)):
                    found = prove(near[mine], uses[mine].right, epsilon)
                    row = {**shared, "way": "certified", "epsilon": epsilon, "turn": mine}
                    held = counts(near[other], uses[other].right, found.threshold) if found else {}
                    rows.append({**row, "threshold": found.threshold if found else None, **held})
    return rows


def split(component: np.ndarray, source: np.random.Generator, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of pairs, `size` in each if there are as many, that share no question."""
    names = np.unique(component)
    first = set(source.permutation(names)[: len(names) // 2].tolist())
    mine = np.array([name in first for name in component])
    halves = [source.permutation(np.flatnonzero(which)) for which in (mine, ~mine)]
    return halves[0][:size], halves[1][:size]


def many_splits(vectors: Vectors, pairs: Pairs, component: np.ndarray, judge: Judge) -> list[dict[str, Any]]:
    """How often what one half certified is broken by the other, over random halves."""
    source = np.random.default_rng(2)
    some = source.permutation(len(component))[:SPLIT_PAIRS]
    part = Pairs(pairs.texts, pairs.places[some], pairs.labels[some])
    nearest_of = by_list(vectors, part)
    outcomes: dict[tuple[str, float], list[dict[str, Any] | None]] = {(g, e): [] for g in GUARDS for e in EPSILONS}
    for _ in range(SPLITS):
        uses = [use(part, half, nearest_of, judge) for half in split(component[some], source, None)]
        for guard in GUARDS:
            near = [judge.guarded(guard, each.asked, each.nearest, each.near) for each in uses]
            for epsilon in EPSILONS:
                found = prove(near[0], uses[0].right, epsilon)
                held = counts(near[1], uses[1].right, found.threshold) if found else None
                outcomes[guard, epsilon].append(held)
    return [
        {"guard": guard, "epsilon": epsilon, **_summary(each, epsilon)} for (guard, epsilon), each in outcomes.items()
    ]


def _summary(outcomes: Sequence[dict[str, Any] | None], epsilon: float) -> dict[str, Any]:
    held = [each for each in outcomes if each and each["hits"]]
    return {
        "splits": len(outcomes),
        "certified": len(held),
        "held_out_share_above_epsilon": sum(each["wrong_among_hits"] > epsilon for each in held),
        "held_out_proved_above_epsilon": sum(each["interval_95"][0] > epsilon for each in held),
        "median_hit_rate": round(float(np.median([each["hit_rate"] for each in held])), 5) if held else None,
    }


# ---- swaps ----------------------------------------------------------------------------------------------------------


def swaps(texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(kind, question, the same with one thing changed), in turn a negation, a number, a name."""
    source = random.Random(3)
    order = source.sample(list(texts), len(texts))
    names = sorted({name for text in order[:4000] for name in re.findall(r"(?<=[a-z] )[A-Z][a-z]{3,}\b", text)})
    made: dict[str, list[tuple[str, str, str]]] = {"negation": [], "number": [], "name": []}
    for text in order:
        changed = {
            "negation": None if words_of(text).negations else AUXILIARY.sub(r"\1 not", text, count=1),
            "number": re.sub(r"\d+", lambda found: str(int(found.group()) + 1), text, count=1),
            "name": re.sub(r"(?<=[a-z] )[A-Z][a-z]{3,}\b", lambda _: source.choice(names), text, count=1),
        }
        for kind, other in changed.items():
            if other is not None and other.casefold() != text.casefold() and len(made[kind]) < -(-SWAPS // 3):
                made[kind].append((kind, text, other))
                break
    return [each for kind in made.values() for each in kind][:SWAPS]


def swap_rows(embedders: dict[str, Embedder], texts: Sequence[str]) -> dict[str, Any]:
    made = swaps(texts)
    near = {}
    for name, embedder in embedders.items():
        one, other = (embedder.embed([each[place] for each in made]) for place in (1, 2))
        near[name] = np.einsum("ij,ij->i", one, other)
    rows: dict[str, Any] = {"swaps": len(made)}
    for kind in ("negation", "number", "name"):
        which = np.array([each[0] == kind for each in made])
        passed = {name: [g.refuses(a, b) is None for _, a, b in made] for name, g in GUARDS.items() if g is not None}
        rows[kind] = {
            "count": int(which.sum()),
            **{f"{name} at least {PLAIN}": int((which & (each >= PLAIN)).sum()) for name, each in near.items()},
            **{f"through guard {name}": int((which & np.array(each)).sum()) for name, each in passed.items()},
        }
    return rows


# ---- all of it ------------------------------------------------------------------------------------------------------


def vectors_of(name: str, embedder: Embedder, texts: Sequence[str], folder: Path) -> Vectors:
    path = folder / f"{name}-{embedder.digest[:16]}.npy"
    if not path.exists():
        np.save(path, embedder.embed(texts))
    vectors: Vectors = np.load(path)
    assert vectors.shape == (len(texts), embedder.dimension)
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where vectors are left, or found")
    parser.add_argument("--encoder", type=Path, help="a folder [the extra `similar`]")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    pairs = read(args.pairs)
    component, judge = components(pairs), Judge(pairs)
    command = f"python -m benchmarks.similar_questions --pairs {args.pairs.name} --keep DIR"
    results: dict[str, Any] = {"command": command, "questions": len(pairs.texts), "rows": [], "splits": {}}
    with LLM(args.encoder or minilm_folder()) as llm:
        embedders: dict[str, Embedder] = {"minilm": EncoderEmbedder(llm), "ngrams": NgramEmbedder()}
        results["swaps"] = swap_rows(embedders, pairs.texts)
        for name, embedder in embedders.items():
            vectors = vectors_of(name, embedder, pairs.texts, args.keep)
            results["rows"] += rows_of(name, vectors, pairs, component, judge)
            results["splits"][name] = many_splits(vectors, pairs, component, judge)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
