"""The native executor: a model on this CPU, through the C++ core.

Opens a model (packing a checkpoint on first use), lowers its `Spec` once, and answers four kinds of question: steps of
many requests (`run`), sessions (one growing sequence: `feed` returns the next logits), whole texts (`score`, `logits`)
and encoders (`encode`). All of them are batches of rows over pages, so they agree to the bit. Shapes: T tokens, V
vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from snello.engine.adapters import NONE, Adapters
from snello.engine.eviction import as_kept
from snello.engine.generate import top_of
from snello.engine.lowering import cache_layers, lower
from snello.engine.pages import PagePool, PageTable, Retention, retention_of
from snello.engine.request import TokenLogprob
from snello.engine.resources import choose_context, choose_pages, choose_threads
from snello.engine.rows import batch_of
from snello.engine.sequence import Step
from snello.errors import SnelloError, Unsupported
from snello.models.adapter import Adapter
from snello.models.model import Model
from snello.models.pack_cache import packed
from snello.models.spec import MOST_ROWS, Attention, Deployment, ShortConvolution, Spec
from snello.native import core
from snello.native.logits import compare

HEAD_ROWS = 32  # output rows whose logits are in memory at once while scoring
TOP_ROWS = 64  # the same where the likeliest tokens are wanted


@dataclass(frozen=True)
class TokenScores:
    """Of tokens[1:], each given those before it."""

    log_probabilities: np.ndarray  # (T - 1,) float32
    top1: np.ndarray  # (T - 1,) int32, the most likely token


class NativeExecutor:
    """A model ready to run here. Use as a context manager or call `close`.

    Args:
        pool: threads of another executor, to be shared with it; they must outlive this one.
        adapters: by name, a folder or one that is read; a row runs with one of them or with none.

    Raises:
        SnelloError: the model cannot be run (Unsupported), does not fit, or cannot be packed.
    """

    def __init__(
        self,
        model: Model,
        deployment: Deployment | None = None,
        *,
        pool: core.Pool | None = None,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
    ) -> None:
        self.model = model
        self.deployment = deployment or Deployment()
        self.spec: Spec = as_kept(model.spec, self.deployment)
        self.retention = retention_of(self.spec)
        self.isa = core.select_isa(self.deployment.isa)
        self.threads = choose_threads(self.deployment) if pool is None else pool.num_threads
        self.adapters = Adapters(model, adapters or {})
        self.weights = packed(model)
        self.page_bytes = core.cache_page_bytes(cache_layers(self.spec))
        self.context = self._choose_context()
        chosen = self.adapters if self.adapters.names else None
        lowered = self.lowered = lower(self.spec, self.weights, positions=self.context, adapters=chosen)
        rows = self.chunk_rows = self._chunk_rows()
        num_pages = choose_pages(self.deployment, self._held().peak(self.context, rows), self.page_bytes)
        self.pages = PagePool(num_pages)
        self.pool, self._owns_pool = pool or core.Pool(self.threads), pool is None
        self._cache = core.Cache(lowered.cache_layers, num_pages)
        self.program = core.Program(
            self.pool,
            lowered.ops,
            lowered.tensors,
            lowered.registers,
            self._cache,
            max_rows=rows,
            head_rows=min(rows, HEAD_ROWS),
        )

    def _choose_context(self) -> int:
        """Encoders see whole texts, so their context is the model's own."""
        if not self.spec.causal:
            if self.spec.max_positions > MOST_ROWS:
                message = (
                    f"this encoder reads {self.spec.max_positions:,} positions at once, and the core {MOST_ROWS:,}"
                )
                raise Unsupported(message, "convert it with fewer positions in its config.json")
            return self.spec.max_positions
        return choose_context(self.deployment, self.spec, self.page_bytes * self.deployment.streams, self._held())

    def _held(self) -> Retention:
        """What to make room for: with windows of the model's own there is room for what others may share."""
        return self.retention if self.deployment.keep_last is not None else Retention()

    def _chunk_rows(self) -> int:
        rows, streams = self.deployment.chunk_rows, self.deployment.streams
        return max(min(rows, self.context), streams) if self.spec.causal else self.context

    # ---- facts

    @property
    def weights_bytes(self) -> int:
        """Bytes of all packed matrices and vectors."""
        return self.weights.total_bytes

    def bytes_per_token(self, context: int = 0) -> int:
        """Bytes that one decoded token must read: linears, head, and keys and values at this context."""
        cached = sum(_cached_bytes(layer.mixer, self.spec, context) for layer in self.spec.layers)
        return self.weights.linear_bytes + cached

    # ---- steps of many requests

    def run(self, step: Step) -> np.ndarray:
        """Copies pages, then runs all rows at once; logits (outputs, V) float32, piece by piece.

        Raises:
            NotFinite: a row's activations are not finite; the other sequences' rows can be run again without it.
        """
        for source, destination in step.copies:
            self._cache.copy_page(destination, source)
        if not step.pieces:
            return np.empty((0, self.program.output_width), np.float32)
        logits: np.ndarray = self.program.step(batch_of(step))
        return logits

    def page(self, page: int) -> np.ndarray:
        """The bytes of a page of keys and values (page_bytes,) uint8, no copy, to be read or written between steps."""
        return self._cache.page(page)

    # ---- sessions

    def session(self) -> Session:
        """A new sequence. Close it to free its pages."""
        return Session(self)

    def step(self, sessions: Sequence[Session], tokens: Sequence[int]) -> np.ndarray:
        """Appends one token to each session, all in one batch; logits (sessions, V) float32."""
        for session in sessions:
            session.make_room(session.length + 1)
            session.length += 1
        width = max(len(session.pages) for session in sessions)
        lengths = np.array([session.length for session in sessions], np.int32)
        count = np.arange(len(sessions), dtype=np.int32)
        batch = core.Batch(
            tokens=self.check_ids(tokens),
            types=None,
            positions=lengths - 1,
            sequences=count,
            page_tables=np.array([session.table.entries(width) for session in sessions], np.int32),
            lengths=lengths,
            output_rows=count,
        )
        logits: np.ndarray = self.program.step(batch)
        for session in sessions:
            session.table.leave(session.length)
        return logits

    # ---- whole texts

    def score(self, tokens: Sequence[int] | np.ndarray, *, adapter: str | None = None) -> TokenScores:
        """Log-probabilities of tokens[1:] and the most likely tokens, in a fresh context, logits never materialized."""
        ids, before = self._behind_prompt(tokens, adapter)
        count = len(ids) - before - 1
        scores, top1 = np.empty(count, np.float32), np.empty(count, np.int32)
        with self._table() as table:
            for start, end in self._chunks(len(ids)):
                first = max(start, before)
                last = max(first, min(end, len(ids) - 1))
                batch = self._batch(ids, start, end, table, np.arange(first, last) - start, adapter=adapter)
                found = slice(first - before, last - before)
                scores[found], top1[found] = self.program.score(batch, ids[first + 1 : last + 1])
                table.leave(end)
        return TokenScores(scores, top1)

    def score_top(
        self, tokens: Sequence[int] | np.ndarray, count: int, *, adapter: str | None = None
    ) -> list[TokenLogprob]:
        """Log-probabilities of tokens[1:], each beside the `count` most likely ones; logits of few rows at a time."""
        ids, before = self._behind_prompt(tokens, adapter)
        scores: list[TokenLogprob] = []
        with self._table() as table:
            rows = min(TOP_ROWS, self.chunk_rows)
            for start in range(0, len(ids) - 1, rows):
                end = min(len(ids) - 1, start + rows)
                first = min(end, max(start, before))
                batch = self._batch(ids, start, end, table, np.arange(first, end) - start, adapter=adapter)
                logits, following = self.program.step(batch), ids[first + 1 : end + 1]  # (rows, V)
                if len(following):
                    found = compare(logits, logits, following).log_probability_a
                    scores += [
                        TokenLogprob(token_id=int(token), logprob=float(value), top=top_of(row, count))
                        for token, value, row in zip(following, found, logits, strict=True)
                    ]
                table.leave(end)
        return scores

    def logits(
        self,
        tokens: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray | None = None,
        *,
        adapter: str | None = None,
    ) -> np.ndarray:
        """Logits (len(rows), V) float32 at these rows (all, if None), in a fresh context."""
        ids, before = self._behind_prompt(tokens, adapter)
        wanted = np.arange(before, len(ids)) if rows is None else np.asarray(rows) + before
        parts = []
        with self._table() as table:
            for start, end in self._chunks(len(ids)):
                outputs = wanted[(wanted >= start) & (wanted < end)] - start
                parts.append(self.program.step(self._batch(ids, start, end, table, outputs, adapter=adapter)))
                table.leave(end)
        return np.concatenate(parts)

    def encode(self, tokens: Sequence[int] | np.ndarray, types: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """An encoder's answer: logits (T, V), label logits (labels,), or the pooled embedding (D,)."""
        ids, head, row = self.check(tokens), self.spec.head, self.spec.answer_row
        outputs = np.arange(len(ids)) if row is None else np.array([row % len(ids)])
        with self._table() as table:
            rows: np.ndarray = self.program.step(self._batch(ids, 0, len(ids), table, outputs, types))
        if head.kind == "classify":
            rows = rows[0]
        if head.kind != "embed":
            return rows
        return _pool(rows, head.pooling, head.normalize)

    # ---- batches

    def check(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids as int32, each in the vocabulary, all within the context."""
        ids = self.check_ids(tokens)
        if len(ids) > self.context:
            raise self.overflow(len(ids))
        return ids

    def _behind_prompt(self, tokens: Sequence[int] | np.ndarray, adapter: str | None) -> tuple[np.ndarray, int]:
        """Token ids, checked, behind the prompt of the adapter; and how many that has."""
        ids, prompt = self.check(tokens), self.adapters.prompt(self.adapters.number(adapter))
        if len(prompt) + len(ids) > self.context:
            raise self.overflow(len(prompt) + len(ids))
        return (np.array([*prompt, *ids], np.int32) if prompt else ids), len(prompt)

    def check_ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids as int32, each in the vocabulary."""
        ids = np.asarray(tokens, np.int32)
        if ids.ndim != 1 or not len(ids):
            raise SnelloError("there are no tokens to run", "give a text that is not empty")
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            hint = "was the text encoded with another tokenizer?"
            raise SnelloError(f"a token id is outside the vocabulary of {self.spec.vocab_size:,}", hint)
        return ids

    def overflow(self, length: int) -> SnelloError:
        hint = f"shorten it, or use --context {length}; the model was made for {self.spec.max_positions:,}"
        return SnelloError(f"this text is {length:,} tokens and the context here is {self.context:,}", hint)

    def _chunks(self, length: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, self.chunk_rows):
            yield start, min(length, start + self.chunk_rows)

    @contextmanager
    def _table(self) -> Iterator[PageTable]:
        table = PageTable(self.pages, self.retention)
        try:
            yield table
        finally:
            table.close()

    def _batch(
        self,
        ids: np.ndarray,
        start: int,
        end: int,
        table: PageTable,
        outputs: np.ndarray,
        types: Sequence[int] | np.ndarray | None = None,
        adapter: str | None = None,
    ) -> core.Batch:
        rows, number = end - start, self.adapters.row_number(self.adapters.number(adapter))
        table.grow(end)
        return core.Batch(
            tokens=ids[start:end],
            types=None if types is None else np.asarray(types, np.int32),
            positions=np.arange(start, end, dtype=np.int32),
            sequences=np.zeros(rows, np.int32),
            page_tables=np.array([table.entries()], np.int32),
            lengths=np.array([end], np.int32),
            output_rows=outputs.astype(np.int32),
            adapters=None if number == NONE else np.full(rows, number, np.int32),
        )

    # ---- end

    def close(self) -> None:
        """Frees the program, the cache and its own threads. Closing twice is harmless."""
        self.program.close()
        self._cache.close()
        if self._owns_pool:
            self.pool.close()

    def __enter__(self) -> NativeExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session:
    """One growing sequence on a `NativeExecutor`: feed tokens, get the logits after the last of them."""

    def __init__(self, executor: NativeExecutor) -> None:
        self._executor = executor
        self.table = PageTable(executor.pages, executor.retention)
        self.length = 0

    @property
    def pages(self) -> list[int]:
        """Its pages in order; one that no later row can see is `GONE`."""
        return self.table.pages

    def feed(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Appends tokens (chunk by chunk) and returns the logits (V,) float32 after the last."""
        executor = self._executor
        ids = np.asarray(tokens, np.int32)
        if self.length + len(ids) > executor.context:
            raise executor.overflow(self.length + len(ids))
        executor.check(ids)
        logits = np.empty(0, np.float32)
        for start, end in executor._chunks(len(ids)):
            logits = self._step(ids[start:end], last=end == len(ids))
        return logits

    def _step(self, ids: np.ndarray, *, last: bool) -> np.ndarray:
        rows = len(ids)
        self.make_room(self.length + rows)
        self.length += rows
        outputs = np.array([rows - 1] if last else [], np.int32)
        batch = core.Batch(
            tokens=ids,
            types=None,
            positions=np.arange(self.length - rows, self.length, dtype=np.int32),
            sequences=np.zeros(rows, np.int32),
            page_tables=np.array([self.table.entries()], np.int32),
            lengths=np.array([self.length], np.int32),
            output_rows=outputs,
        )
        logits: np.ndarray = self._executor.program.step(batch)
        self.table.leave(self.length)
        return logits[0] if last else logits

    def make_room(self, length: int) -> None:
        self.table.grow(length)

    def close(self) -> None:
        self.table.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cached_bytes(mixer: object, spec: Spec, context: int) -> int:
    """Bytes of keys and values that one row reads in this layer."""
    if isinstance(mixer, ShortConvolution):
        return 4 * (min(context, mixer.kernel - 1)) * spec.hidden_size
    if not isinstance(mixer, Attention):
        return 0
    seen = context if mixer.window is None else min(context, mixer.window + mixer.sinks)
    value_bytes = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1 + 8 / mixer.head_dim}[spec.cache_format]
    return int(2 * seen * mixer.num_kv_heads * mixer.head_dim * value_bytes)


def _pool(rows: np.ndarray, pooling: str | None, normalize: bool) -> np.ndarray:
    """Hidden rows (T, D) to one embedding (D,)."""
    pooled = {"mean": lambda: rows.mean(axis=0, dtype=np.float64), "cls": lambda: rows[0], "last": lambda: rows[-1]}
    vector = np.asarray(pooled[pooling or "mean"](), np.float64)
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector.astype(np.float32)
