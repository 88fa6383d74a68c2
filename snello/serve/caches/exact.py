"""The very same request again: its answer from disk, across restarts.

One SQLite file in a folder. The key is a digest of everything that can change the answer (`identity.py`), each row has
a checksum over its key and its bytes, and the oldest rows go when the bound is reached. A row that does not agree with
itself is a miss; a file that SQLite finds damaged is set aside, with one line in the log, and begun anew. A disk that
is full or slow costs hits and nothing else: no answer here is ever waited for or wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snello.engine.request import Chunk, TokenLogprob, Usage
from snello.errors import SnelloError

LOG = logging.getLogger("snello.cache")
NAME = "answers.sqlite"
FORMAT = 1  # of the table and of the bytes in it
APPLICATION = 0x534E4C4F  # "SNLO": the file says whose it is
ROW_BYTES = 160  # of a row beside its answer: key, checksum, numbers and their place in the tree
LARGEST_SHARE = 8  # an answer may take an eighth of the bound
TOUCHES = 64  # uses that are written down together
ROOM_SHARE = 20  # a twentieth of the bound is freed at once
BUSY_SECONDS = 0.05  # another process writes; an answer is not worth more waiting
DAMAGE = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CORRUPT_INDEX", "SQLITE_CORRUPT_VTAB", "SQLITE_CORRUPT_SEQUENCE"}
SCHEMA = """
CREATE TABLE answers (
  key BLOB PRIMARY KEY, answer BLOB NOT NULL, checksum BLOB NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_use ON answers (used);
"""


@dataclass
class ExactCounters:
    """Since the start. `bytes`: kept now; `damaged`: rows that did not agree with their checksum; `failed`: reads and
    writes that the disk refused; `set_aside`: damaged files."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    too_large: int = 0
    damaged: int = 0
    failed: int = 0
    set_aside: int = 0
    bytes: int = 0


class ExactAnswers:
    """Answers by key. Threads may share it; so may processes, each with the bound in mind.

    Args:
        folder: created if need be. limit_bytes: of all answers.

    Raises:
        SnelloError: the folder cannot be used.
    """

    def __init__(self, folder: Path, limit_bytes: int = 1_000_000_000) -> None:
        if limit_bytes < 1:
            raise SnelloError(f"limit_bytes is {limit_bytes}", "give at least one byte")
        self.path, self.limit_bytes, self.counters = folder / NAME, limit_bytes, ExactCounters()
        self._lock = threading.Lock()
        self._touched: dict[bytes, int] = {}
        self._clock = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            message = f"{folder} cannot hold answers: {error.strerror}"
            raise SnelloError(message, "give a folder that may be read and written") from None
        self._database: sqlite3.Connection | None = None
        with self._lock:
            self._begin()

    # ---- answers

    def get(self, key: bytes) -> bytes | None:
        """The answer of this key, checked; None where there is none."""
        with self._lock:
            row = self._try(lambda database: database.execute(
                "SELECT answer, checksum FROM answers WHERE key = ?", (key,)
            ).fetchone())  # fmt: skip
            if row is not None and not _agrees(key, *row):
                self.counters.damaged += 1
                LOG.warning("a stored answer was damaged and is not used: %s", self.path)
                self._try(lambda database: database.execute("DELETE FROM answers WHERE key = ?", (key,)))
                row = None
            if row is None:
                self.counters.misses += 1
                return None
            self.counters.hits += 1
            self._touch(key)
            return bytes(row[0])

    def put(self, key: bytes, answer: bytes) -> None:
        """Keeps an answer, unless it is out of proportion."""
        size = len(answer) + ROW_BYTES
        with self._lock:
            if size > self.limit_bytes // LARGEST_SHARE:
                self.counters.too_large += 1
                return
            if self.counters.bytes + size > self.limit_bytes:
                self._make_room(size)
            self._clock += 1
            row = (key, answer, _checksum(key, answer), size, self._clock)
            done = self._try(lambda database: _insert(database, row))
            if done is not None:
                self.counters.bytes += size - done
                self.counters.stored += 1

    def forget(self, key: bytes) -> None:
        """This answer is not given again."""
        with self._lock:
            self._try(lambda database: database.execute("DELETE FROM answers WHERE key = ?", (key,)))
            self._count()

    def clear(self) -> None:
        """Forgets all answers."""
        with self._lock:
            self._touched.clear()
            self._try(lambda database: database.execute("DELETE FROM answers"))
            self._count()

    def close(self) -> None:
        """Writes down what was used. Closing twice is harmless."""
        with self._lock:
            self._write_touches()
            self._close()

    def _close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    # ---- the bound

    def _touch(self, key: bytes) -> None:
        self._clock += 1
        self._touched[key] = self._clock
        if len(self._touched) >= TOUCHES:
            self._write_touches()

    def _write_touches(self) -> None:
        rows = [(used, key) for key, used in self._touched.items()]
        self._touched.clear()
        if rows:
            self._try(lambda database: _many(database, "UPDATE answers SET used = ? WHERE key = ?", rows))

    def _make_room(self, needed: int) -> None:
        """Removes the answers that were not used for longest. Counts anew first: others may have written."""
        self._write_touches()
        self._count()
        wanted = self.counters.bytes + needed - self.limit_bytes
        if wanted <= 0:
            return
        freed = self._try(lambda database: _evict(database, wanted + self.limit_bytes // ROOM_SHARE))
        self.counters.evicted += freed or 0
        self._try(lambda database: database.execute("PRAGMA incremental_vacuum").fetchall())
        self._count()

    def _count(self) -> None:
        total = self._try(lambda database: database.execute("SELECT total(bytes) FROM answers").fetchone())
        if total is not None:
            self.counters.bytes = int(total[0])

    # ---- the file

    def _begin(self) -> None:
        """Opens the file, and begins it anew where it is damaged or of another version."""
        for _ in range(2):
            try:
                self._database = _open(self.path)
                self._clock, self.counters.bytes = self._database.execute(
                    "SELECT coalesce(max(used), 0), cast(total(bytes) AS INTEGER) FROM answers"
                ).fetchone()
                return
            except sqlite3.Error as error:
                self._close()
                if error.__class__ is sqlite3.OperationalError and _name(error) not in DAMAGE:
                    self._fail(error)
                    return
                self._set_aside(str(error))

    def _try(self, action: Any) -> Any:
        """What an action on the database gives; None where it could not be done."""
        if self._database is None:
            return None
        try:
            return action(self._database)
        except sqlite3.Error as error:
            if _name(error) in DAMAGE:
                self._close()
                self._set_aside(str(error))
                self._begin()
            else:
                self._fail(error)
            return None

    def _fail(self, error: sqlite3.Error) -> None:
        if not self.counters.failed:
            LOG.warning("answers cannot be kept for now: %s: %s", self.path, error)
        self.counters.failed += 1

    def _set_aside(self, reason: str) -> None:
        """The damaged file stays under another name, one at most, for whoever wants to look at it."""
        aside = self.path.with_name(f"{NAME}.damaged")
        self.counters.set_aside += 1
        LOG.warning("%s was damaged (%s); it is now %s, and answers are kept anew", self.path, reason, aside.name)
        with suppress(OSError):
            os.replace(self.path, aside)
        for ending in ("-wal", "-shm"):
            with suppress(OSError):
                os.unlink(f"{self.path}{ending}")
        self._touched.clear()
        self.counters.bytes = 0
        with suppress(OSError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a file that is whole.

    Raises:
        sqlite3.DatabaseError: it is damaged, or not such a file.
    """
    database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(
                f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA application_id = {APPLICATION};PRAGMA user_version = {FORMAT};COMMIT;"
            )
        facts = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if facts != [APPLICATION, FORMAT]:
            raise sqlite3.DatabaseError("it is of another version, or of another program")
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the newest answers
        database.execute("PRAGMA journal_size_limit = 4000000")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _insert(database: sqlite3.Connection, row: tuple[bytes, bytes, bytes, int, int]) -> int:
    """Bytes of the row that it takes the place of."""
    database.execute("BEGIN IMMEDIATE")
    try:
        old = database.execute("SELECT bytes FROM answers WHERE key = ?", row[:1]).fetchone()
        database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)
        database.execute("COMMIT")
    except sqlite3.Error:
        _roll_back(database)
        raise
    return int(old[0]) if old else 0


def _many(database: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany(statement, rows)
        database.execute("COMMIT")
    except sqlite3.Error:
        _roll_back(database)
        raise


def _evict(database: sqlite3.Connection, wanted: int) -> int:
    """Removes rows, longest unused first, until `wanted` bytes are free; how many went."""
    chosen, freed = [], 0
    for key, size in database.execute("SELECT key, bytes FROM answers ORDER BY used"):
        chosen.append((key,))
        freed += size
        if freed >= wanted:
            break
    _many(database, "DELETE FROM answers WHERE key = ?", chosen)
    return len(chosen)


def _roll_back(database: sqlite3.Connection) -> None:
    if database.in_transaction:
        with suppress(sqlite3.Error):
            database.execute("ROLLBACK")


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", "")


def _checksum(key: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(key + answer).digest()


def _agrees(key: bytes, answer: object, checksum: object) -> bool:
    return isinstance(answer, bytes) and isinstance(checksum, bytes) and checksum == _checksum(key, answer)


# ---- answers as bytes -----------------------------------------------------------------------------------------------


def complete(chunks: Sequence[Chunk], n: int) -> bool:
    """Whether these are whole answers, none of which failed: only such are kept."""
    ended = [chunk for chunk in chunks if chunk.finish_reason is not None]
    return len(ended) == n and all(chunk.finish_reason in ("stop", "length") for chunk in ended)


def to_bytes(chunks: Sequence[Chunk]) -> bytes:
    """All that was said, without what only that moment knew (seconds, cached tokens)."""
    rows = []
    for chunk in chunks:
        assert chunk.error is None, "an error is not kept"
        logprob = chunk.logprob and [
            chunk.logprob.token_id,
            chunk.logprob.logprob,
            [list(x) for x in chunk.logprob.top],
        ]
        counts = chunk.usage and [chunk.usage.prompt_tokens, chunk.usage.completion_tokens]
        rows.append([chunk.text, chunk.index, chunk.token_id, logprob, chunk.finish_reason, counts])
    return json.dumps(rows, separators=(",", ":")).encode()


def from_bytes(answer: bytes) -> list[Chunk]:
    """The chunks again, as they were streamed. No prompt token was computed for them, and no time taken."""
    return [_chunk(*row) for row in json.loads(answer)]


def _chunk(text: str, index: int, token: int | None, logprob: Any, reason: Any, counts: Any) -> Chunk:
    drawn = usage = None
    if logprob is not None:
        top = tuple((token_id, value) for token_id, value in logprob[2])
        drawn = TokenLogprob(token_id=logprob[0], logprob=logprob[1], top=top)
    if counts is not None:
        prompt, completion = counts
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=prompt,
            first_token_seconds=0.0,
            seconds=0.0,
        )
    return Chunk(text=text, index=index, token_id=token, logprob=drawn, finish_reason=reason, usage=usage)
