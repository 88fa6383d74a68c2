"""Pages of keys and values on disk: one file each, found by a digest of everything that they depend on.

A file carries the fingerprint of what computed it, its own key, the tokens that it holds and a checksum over all of
that and the bytes. Whatever does not agree is thrown away and counted, never used. Files are written beside and
renamed, by a thread of their own that drops work rather than fall behind; the least recently used ones go when the
bound is reached. They hold what was asked and answered, so nobody but their owner may read them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snello.errors import SnelloError

LOG = logging.getLogger("snello.cache")
MAGIC = b"SNELLOKV"
HEADER = struct.Struct("<8s32s32sQQ32s")  # magic, fingerprint, key, bytes of tokens, bytes of the page, checksum
ENDING, PARTIAL = ".kv", ".partial"
MISTRUSTED = "MISTRUSTED"  # a file of this name: what lies beside it was found to be wrong
QUEUE_BYTES = 64_000_000  # pages that wait to be written
LOOK_AGAIN = 256  # writes after which the folder is listed anew: others may write too


@dataclass
class FileCounters:
    """Since the start. `damaged`: files that did not agree with themselves; `dropped`: pages not written for want of
    time; `failed`: writes that the disk refused."""

    written: int = 0
    written_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    evicted: int = 0
    damaged: int = 0
    dropped: int = 0
    failed: int = 0


class PageFiles:
    """Pages of one fingerprint in a folder that others may share; the bound holds for all of them.

    Args:
        fingerprint: of what computes pages, 32 bytes. page_bytes: of each of them.
        limit_bytes: of all files in `folder`, those of other fingerprints included.

    Raises:
        SnelloError: the folder cannot be used.
    """

    def __init__(self, folder: Path, fingerprint: bytes, page_bytes: int, limit_bytes: int) -> None:
        self.folder, self.own = folder, folder / fingerprint.hex()[:32]
        self.page_bytes, self.limit_bytes = page_bytes, limit_bytes
        self.counters = FileCounters()
        self._fingerprint = fingerprint
        self._known: OrderedDict[Path, int] = OrderedDict()  # bytes, least recently used first
        self._total = 0
        self._queued: set[bytes] = set()
        self._queue: queue.Queue[tuple[bytes, bytes, bytes] | None] = queue.Queue(max(1, QUEUE_BYTES // page_bytes))
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._writable = True
        try:
            self.own.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._lock:
                self._look()
        except OSError as error:
            message = f"{self.own} cannot hold pages: {error.strerror}"
            raise SnelloError(message, "give a folder that may be read and written") from None

    # ---- facts

    def __contains__(self, key: bytes) -> bool:
        """Whether a file is there; what is in it may still turn out to be damaged."""
        with self._lock:
            return self._path(key) in self._known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def total_bytes(self) -> int:
        return self._total

    # ---- reading

    def get(self, key: bytes, tokens: array[int]) -> np.ndarray | None:
        """The bytes of a page (page_bytes,) uint8, checked; None where there is none, or a damaged one, which goes."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            self._drop(path)
            return None
        if not self._agrees(content, key, tokens):
            self.counters.damaged += 1
            LOG.warning("a stored page of keys and values was damaged and is not used: %s", path)
            path.unlink(missing_ok=True)
            self._drop(path)
            return None
        self.counters.read += 1
        self.counters.read_bytes += len(content)
        self._touch(path)
        return np.frombuffer(content, np.uint8, self.page_bytes, len(content) - self.page_bytes)

    def _agrees(self, content: bytes, key: bytes, tokens: array[int]) -> bool:
        said = tokens.tobytes()
        if len(content) != HEADER.size + len(said) + self.page_bytes:
            return False
        magic, fingerprint, own, num_said, num_bytes, checksum = HEADER.unpack_from(content)
        facts = (magic, fingerprint, own, num_said, num_bytes)
        if facts != (MAGIC, self._fingerprint, key, len(said), self.page_bytes):
            return False
        body = memoryview(content)[HEADER.size :]
        return bytes(body[: len(said)]) == said and checksum == _checksum(content[: HEADER.size - 32], body)

    def _touch(self, path: Path) -> None:
        with self._lock:
            if path in self._known:
                self._known.move_to_end(path)
        with suppress(OSError):
            os.utime(path)

    def _drop(self, path: Path) -> None:
        with self._lock:
            self._total -= self._known.pop(path, 0)

    # ---- writing

    def put(self, key: bytes, tokens: array[int], page: np.ndarray) -> None:
        """Has a page written soon, from a copy; drops it where the disk does not keep up."""
        with self._lock:
            if not self._writable or key in self._queued or self._path(key) in self._known:
                return
            if self._queue.full():
                self.counters.dropped += 1
                return
            self._queued.add(key)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="snello-pages", daemon=True)
                self._writer.start()
        self._queue.put((key, tokens.tobytes(), page.tobytes()))

    def flush(self) -> None:
        """Returns when everything that was put is written."""
        self._queue.join()

    def close(self) -> None:
        """Writes what is waiting and ends the thread."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            key, tokens, page = item
            try:
                self._write(key, tokens, page)
            except OSError as error:
                self._give_up(error)
            finally:
                with self._lock:
                    self._queued.discard(key)
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, key: bytes, tokens: bytes, page: bytes) -> None:
        path = self._path(key)
        size = HEADER.size + len(tokens) + len(page)
        self._make_room(size)
        if not self._writable or size > self.limit_bytes:
            return
        path.parent.mkdir(exist_ok=True, mode=0o700)
        start = HEADER.pack(MAGIC, self._fingerprint, key, len(tokens), len(page), bytes(32))[: HEADER.size - 32]
        staged = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(start + _checksum(start, tokens, page))
                file.write(tokens)
                file.write(page)
            os.replace(staged, path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        with self._lock:
            self._known[path] = size
            self._total += size
        self.counters.written += 1
        self.counters.written_bytes += size

    def _give_up(self, error: OSError) -> None:
        """A full or failing disk costs what would have been gained, and nothing else."""
        self.counters.failed += 1
        if self._writable:
            LOG.warning("pages of keys and values are not stored any more: %s: %s", self.own, error.strerror)
        self._writable = False

    def _make_room(self, needed: int) -> None:
        with self._lock:
            if self.counters.written % LOOK_AGAIN == LOOK_AGAIN - 1:
                self._look()
            while self._known and self._total + needed > self.limit_bytes:
                path, size = self._known.popitem(last=False)
                self._total -= size
                self.counters.evicted += 1
                path.unlink(missing_ok=True)

    # ---- the folder

    def mistrust(self, reason: str) -> None:
        """What is here was found to be wrong: it is not used again, by nobody, until somebody looked at it."""
        self._writable = False
        with suppress(OSError):
            (self.own / MISTRUSTED).write_text(reason + "\n", encoding="utf-8")

    @property
    def mistrusted(self) -> bool:
        return (self.own / MISTRUSTED).exists()

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.own / name[:2] / f"{name}{ENDING}"

    def _look(self) -> None:
        """Lists all files, oldest use first; half-written ones whose writer is gone are removed."""
        found = sorted(_list(self.folder), key=lambda entry: entry[1])
        self._known = OrderedDict((path, size) for path, _, size in found)
        self._total = sum(self._known.values())


def _list(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Path, time of last use and size of every page."""
    for path in folder.glob("*/*/*"):
        with suppress(FileNotFoundError):
            if path.name.endswith(PARTIAL) and not _alive(path):
                path.unlink()
            elif path.name.endswith(ENDING):
                status = path.stat()
                yield path, status.st_mtime_ns, status.st_size


def _alive(partial: Path) -> bool:
    """Whether the process that writes this file is there."""
    number = partial.name.removesuffix(PARTIAL).rpartition(".")[2]
    return number.isdecimal() and Path("/proc", number).exists()


def _checksum(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
