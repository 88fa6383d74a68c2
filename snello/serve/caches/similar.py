"""Questions that mean the same, off by default: the answer to the nearest one, where that was proved to be safe.

Five gates. (1) Namespace: the same tenant, model, settings and everything said before the question, exactly.
(2) Admission: a whole answer (`stop`), one of it, no tools, nothing of the moment. (3) The nearest question, by brute
force. (4) The guard: the words that carry meaning (`guard.py`). (5) A certified threshold (`certify.py`): without a
certificate for this very embedder and guard nothing is served. A share of hits is generated too and judged, and when
they show more wrong ones than was certified, the cache demotes itself and only exact answers are left.

Answers lie in the exact cache; here are questions, their vectors and their keys, in memory.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from snello.errors import SnelloError
from snello.serve.caches.certify import Certificate, Watch
from snello.serve.caches.embed import Embedder, Vectors
from snello.serve.caches.exact import LOG
from snello.serve.caches.guard import Guard, of_the_moment
from snello.serve.caches.identity import Asked, ModelIdentity, digest, plain_params

RECENT = 64  # vectors of the newest questions
LONGEST_QUESTION = 2000  # characters: what is longer is no question, and no embedder reads it whole


@dataclass(frozen=True, kw_only=True)
class SimilarOptions:
    """Attributes:
    max_entries: questions that are kept; the least recently used go.
    ttl_seconds: a question is forgotten so long after it was answered.
    audit: share of hits that are generated too, and judged.
    """

    max_entries: int = 20_000
    ttl_seconds: float = 86_400.0
    audit: float = 0.05

    def __post_init__(self) -> None:
        if self.max_entries < 1 or not self.ttl_seconds > 0 or not 0 <= self.audit <= 1:
            message = f"max_entries is {self.max_entries}, ttl_seconds {self.ttl_seconds} and audit {self.audit}"
            raise SnelloError(message, "at least one entry, a time over 0, and a share from 0 to 1")


@dataclass
class SimilarCounters:
    """Since the start. `asked` = `hits` + `silent` (not certified, or demoted) + `empty` + `far` + `guarded`.

    `busy`: not looked up or learned, because too many waited; `late`: looked up for longer than a request waits (`hits`
    may hold some of them); `failed`: by a bug; `unaudited`: audits that were due and not made; `embedded`, and how long
    that took.
    """

    asked: int = 0
    hits: int = 0
    silent: int = 0
    empty: int = 0
    far: int = 0
    guarded: int = 0
    busy: int = 0
    late: int = 0
    failed: int = 0
    kept: int = 0
    refused: int = 0
    expired: int = 0
    evicted: int = 0
    audited: int = 0
    audited_wrong: int = 0
    unaudited: int = 0
    embedded: int = 0
    embed_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where an answer comes from.

    Attributes:
        key: of the answer in the exact cache. question: what it was given to.
        similarity, epsilon, confidence: of the two questions; what is certified for such hits.
        audit: generate the answer too, when this one was given, and tell `judged` whether this one was right.
    """

    key: bytes
    question: str
    similarity: float
    epsilon: float
    confidence: float
    audit: bool = False

    @property
    def header(self) -> str:
        """For a response header: source, similarity and bound, nothing of what was asked."""
        return (
            f"similar; source={self.key.hex()[:16]}; similarity={self.similarity:.4f}; "
            f"wrong-among-hits<={self.epsilon:g}; confidence={self.confidence:g}"
        )


@dataclass
class _Entry:
    text: str
    key: bytes
    born: float
    row: int


class _Space:
    """The questions of one namespace: vectors in one growing array, rows without holes."""

    def __init__(self, dimension: int) -> None:
        self.vectors: Vectors = np.empty((1, dimension), np.float32)  # most conversations ask one question
        self.texts: list[str] = []  # by row

    def add(self, text: str, vector: np.ndarray) -> int:
        row = len(self.texts)
        if row == len(self.vectors):
            self.vectors = np.concatenate([self.vectors, np.empty_like(self.vectors)])
        self.vectors[row] = vector
        self.texts.append(text)
        return row

    def remove(self, row: int) -> str | None:
        """Fills the hole with the last row; returns the text that moved."""
        last = self.texts.pop()
        moved = row < len(self.texts)
        if moved:
            self.vectors[row] = self.vectors[len(self.texts)]
            self.texts[row] = last
        if 4 * len(self.texts) < len(self.vectors):
            self.vectors = self.vectors[: max(1, len(self.vectors) // 2)].copy()
        return last if moved else None

    def nearest(self, vector: np.ndarray) -> tuple[int, float]:
        similarities = self.vectors[: len(self.texts)] @ vector
        row = int(similarities.argmax())
        return row, float(similarities[row])


class SimilarAnswers:
    """Keys of answers by questions that mean the same. Threads may share it.

    Args:
        certificate: None: it learns questions, and serves nothing. path: where a demotion is written down, if anywhere.
        clock: seconds. seed: of the choice of hits that are audited.

    Raises:
        SnelloError: the certificate is for another embedder or guard.
    """

    def __init__(
        self,
        embedder: Embedder,
        guard: Guard | None = None,
        certificate: Certificate | None = None,
        options: SimilarOptions | None = None,
        *,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.embedder, self.guard, self.options = embedder, guard or Guard(), options or SimilarOptions()
        self.counters = SimilarCounters()
        self.certificate = _fitting(certificate, embedder, self.guard)
        self.watch = Watch(certificate.epsilon, certificate.confidence) if certificate else None
        self._path, self._clock, self._random = path, clock, random.Random(seed)
        self._spaces: dict[bytes, _Space] = {}
        self._entries: OrderedDict[tuple[bytes, str], _Entry] = OrderedDict()  # least recently used first
        self._births: deque[tuple[float, tuple[bytes, str]]] = deque()  # oldest first; some are gone or born again
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()  # what was looked up is soon kept
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def serves(self) -> bool:
        """Whether it is certified and has not demoted itself."""
        return self.certificate is not None and not self.certificate.revoked

    # ---- questions

    def find(self, namespace: bytes, question: str) -> Found | None:
        """The answer of the nearest question, if all gates let it through."""
        self.counters.asked += 1
        certificate = self.certificate
        if certificate is None or certificate.revoked or not _is_question(question):
            self.counters.silent += 1
            return None
        vector = self._vector(question)
        with self._lock:
            self._expire()
            space = self._spaces.get(namespace)
            if space is None:
                self.counters.empty += 1
                return None
            row, similarity = space.nearest(vector)
            text = space.texts[row]
            if similarity < certificate.threshold:
                self.counters.far += 1
                return None
            if self.guard.refuses(question, text) is not None:
                self.counters.guarded += 1
                return None
            self.counters.hits += 1
            self._entries.move_to_end((namespace, text))
            return Found(
                key=self._entries[namespace, text].key,
                question=text,
                similarity=similarity,
                epsilon=certificate.epsilon,
                confidence=certificate.confidence,
                audit=self._random.random() < self.options.audit,
            )

    def keep(self, namespace: bytes, question: str, key: bytes, *, finish_reason: str | None) -> bool:
        """Learns a question whose answer lies in the exact cache under `key`; whether it was admitted."""
        demoted = self.certificate is not None and self.certificate.revoked
        if finish_reason != "stop" or demoted or not _is_question(question):
            self.counters.refused += 1
            return False
        vector = self._vector(question)
        if not vector.any():
            self.counters.refused += 1
            return False
        with self._lock:
            self._expire()
            self._remove((namespace, question))
            while len(self._entries) >= self.options.max_entries:
                self._remove(next(iter(self._entries)))
                self.counters.evicted += 1
            space = self._spaces.setdefault(namespace, _Space(self.embedder.dimension))
            row = space.add(question, vector)
            entry = self._entries[namespace, question] = _Entry(question, key, self._clock(), row)
            self._births.append((entry.born, (namespace, question)))
            self.counters.kept += 1
        return True

    def _vector(self, question: str) -> np.ndarray:
        with self._lock:
            known = self._recent.get(question)
        if known is not None:
            return known
        started = time.perf_counter()
        vector: np.ndarray = self.embedder.embed([question])[0]
        with self._lock:
            self.counters.embedded += 1
            self.counters.embed_seconds += time.perf_counter() - started
            self._recent[question] = vector
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return vector

    def forget(self, namespace: bytes, question: str) -> None:
        """Its answer is gone from the exact cache."""
        with self._lock:
            self._remove((namespace, question))

    def clear(self) -> None:
        """Forgets all questions: what was right may have become wrong."""
        with self._lock:
            self._spaces.clear()
            self._entries.clear()
            self._births.clear()
            self._recent.clear()

    def _expire(self) -> None:
        oldest = self._clock() - self.options.ttl_seconds
        while self._births and self._births[0][0] < oldest:
            born, name = self._births.popleft()
            entry = self._entries.get(name)
            if entry is not None and entry.born == born:
                self._remove(name)
                self.counters.expired += 1
        if len(self._births) > 2 * self.options.max_entries:  # mostly of entries that are gone
            self._births = deque(sorted((entry.born, name) for name, entry in self._entries.items()))

    def _remove(self, name: tuple[bytes, str]) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        space = self._spaces[name[0]]
        moved = space.remove(entry.row)
        if moved is not None:
            self._entries[name[0], moved].row = entry.row
        if not space.texts:
            del self._spaces[name[0]]

    # ---- the audit

    def judged(self, *, right: bool) -> None:
        """An audited hit was right or wrong. Too many wrong ones, and nothing is served from now on."""
        with self._lock:
            self.counters.audited += 1
            self.counters.audited_wrong += not right
            if self.watch is None or self.certificate is None or self.certificate.revoked:
                return
            if self.watch.see(right=right):
                self._demote(f"{self.watch.wrong} of {self.watch.audited} audited hits were wrong")

    def _demote(self, reason: str) -> None:
        assert self.certificate is not None
        self.certificate = replace(self.certificate, revoked=reason)
        LOG.error("answers of similar questions are not served any more: %s", reason)
        if self._path is not None:
            _write_down(self.certificate, self._path)


def _write_down(revoked: Certificate, path: Path) -> None:
    """A full disk cannot hold a revocation, but it can lose a certificate: without one nothing is served either."""
    try:
        revoked.save(path)
    except OSError as error:
        LOG.warning("that could not be written down, so the certificate goes: %s: %s", path, error.strerror)
        with suppress(OSError):
            path.unlink()


def same_answer(one: str, other: str) -> bool:
    """The strictest judge: the same words, whatever their case and spacing. It errs towards demotion; who has a better
    one gives `judged` its verdict."""
    return one.casefold().split() == other.casefold().split()


def _fitting(certificate: Certificate | None, embedder: Embedder, guard: Guard) -> Certificate | None:
    if certificate is None:
        return None
    if (certificate.embedder, certificate.guard) != (embedder.digest, guard.digest):
        message = "the certificate was made for another embedder or other rules"
        raise SnelloError(message, "certify anew with what is to serve")
    return certificate


def _is_question(text: str) -> bool:
    return len(text.strip()) > 0 and len(text) <= LONGEST_QUESTION and not of_the_moment(text)


def question_of(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str] | None:
    """What was said before, and the question; None where the last message is no plain text of the user."""
    last = messages[-1] if messages else {}
    if last.get("role") != "user" or not isinstance(last.get("content"), str) or set(last) - {"role", "content"}:
        return None
    return list(messages[:-1]), last["content"]


def namespace_of(identity: ModelIdentity, asked: Asked, history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Everything that must be equal for one question to answer another, but the question; None where none may: several
    answers, tools, a form of answer, or an answer that would not be given again."""
    fields = {name: value for name, value in (asked.fields or {}).items() if value}
    if not asked.deterministic or asked.params.n != 1 or asked.params.logprobs is not None or fields:
        return None
    facts = [asdict(identity), asked.url, asked.salt, plain_params(asked.params), list(history)]
    return bytes.fromhex(digest(facts))
