"""What is answered is never answered again: results of a file of requests, kept as they come, put in order at the end.

`OUT.partial` begins with a line that says what it belongs to; then come results in the order in which they were
finished, each with a checksum. A kill leaves at most one torn line, which is cut off. When all are there they are
written in order beside and renamed to `OUT`, which is therefore whole or not there. One call at a time holds the
journal.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from snello.errors import SnelloError, storage_error
from snello.optimize.files import flush_folder

BEGINNING = b'{"snello batch":'
SYNC_SECONDS = 5.0  # a kill loses nothing; after this a power cut neither
OTHER = {  # by the names of `Origin`
    "snello": "another version of snello",
    "input": "other requests",
    "model": "another model",
    "name": "a model of another name",
    "tokenizer": "another tokenizer",
    "defaults": "other sampling defaults",
    "seen": "other --keep-first or --keep-last",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Everything that the results depend on, as digests, but for the context, which is chosen later.

    `seen`: how much of a long text is, the first and the newest tokens.
    """

    snello: str
    input: str
    model: str
    name: str
    tokenizer: str
    defaults: str
    seen: str = "everything"


@dataclass(frozen=True, kw_only=True)
class Result:
    """An answered request: its line for the output, and counts."""

    place: int
    output: bytes
    failed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Totals:
    """Sums over results."""

    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, result: Result) -> None:
        self.done += 1
        self.failed += result.failed
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.cached_tokens += result.cached_tokens


class Journal:
    """The results of one output file. Use as a context manager.

    Args:
        output: where the results go in the end. count: of the requests.
        fresh: what an earlier call left is thrown away. overwrite: a file at `output` may be replaced.

    Raises:
        SnelloError: it belongs to something else, somebody is at work on it, or `output` is there and may not go.
    """

    def __init__(self, output: Path, count: int, origin: Origin, *, fresh: bool, overwrite: bool) -> None:
        self.output, self.path = output, output.with_name(output.name + ".partial")
        self.totals = Totals()
        self.context: int | None = None
        self.begun = False
        self._origin, self._overwrite = origin, overwrite
        self._places = array("q", [-1]) * count  # where each result begins
        self._synced = time.monotonic()
        self._file = self._open()
        try:
            if fresh:
                self._check_output()
                os.ftruncate(self._file, 0)
            self._read()
            self._check_output()
        except BaseException:
            self.close()
            raise

    # ---- opening

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            hint = "give an --output in a folder that can be written"
            raise SnelloError(f"{self.path} cannot be written: {error.strerror}", hint) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(file).st_nlink == 0  # another call has just finished with it
        except BlockingIOError:
            gone = True
        if gone:
            os.close(file)
            raise SnelloError(f"another call is at work on {self.output}", "wait for it, or give another --output")
        return file

    def _read(self) -> None:
        """Takes over what an earlier call has finished; a torn end is cut off."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            first = file.readline()
            if not first.endswith(b"\n") and BEGINNING.startswith(first[: len(BEGINNING)]):
                os.ftruncate(self._file, 0)
                return
            self._check_origin(self._head(first))
            end = len(first)
            for line in file:
                result = _parse(line)
                if result is None or not 0 <= result.place < len(self._places):
                    break
                self._note(result, end)
                end += len(line)
        os.ftruncate(self._file, end)

    def _head(self, first: bytes) -> dict[str, Any]:
        try:
            head: dict[str, Any] = json.loads(first)
            return {name: head[name] for name in ("origin", "context", "overwrite")}
        except (ValueError, KeyError, TypeError):
            hint = f"move it away, or give another --output; --fresh replaces {self.path}"
            raise SnelloError(f"{self.path} is not the journal of a batch", hint) from None

    def _check_origin(self, first: Mapping[str, Any]) -> None:
        """A journal of anything else is never gone on with."""
        mine, theirs = asdict(self._origin), first["origin"]
        differing = [words for name, words in OTHER.items() if theirs.get(name) != mine[name]]
        if differing:
            message = f"{self.path} was begun with {', '.join(differing)}"
            hint = "call as before to go on, --fresh to begin again, or give another --output"
            raise SnelloError(message, hint)
        self.begun, self.context = True, first["context"]
        self._overwrite = self._overwrite or first["overwrite"]

    def _check_output(self) -> None:
        """A file that was there before may only go if that was said; one that a killed call put there is finished."""
        if self.output.exists() and not self._overwrite and not (self.begun and self.complete):
            raise SnelloError(f"{self.output} exists already", "give another --output, or --overwrite to replace it")

    # ---- results

    def begin(self, context: int) -> None:
        """Says what the results belong to, unless an earlier call has said so."""
        if self.begun:
            return
        table = {"snello batch": 1, "origin": asdict(self._origin), "context": context, "overwrite": self._overwrite}
        self._append(json.dumps(table).encode() + b"\n")
        self.begun, self.context = True, context

    def keep(self, result: Result) -> None:
        """Writes a result down; when this returns a kill does not lose it."""
        place = os.fstat(self._file).st_size
        self._append(_format(result))
        self._note(result, place)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _append(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise self.full(error) from None

    def full(self, error: OSError) -> Exception:
        """A full disk in the user's words; anything else as it is."""
        hint = f"free some space; the same command goes on after {self.totals.done:,} finished requests"
        return storage_error(error, self.output, hint) or error

    def _note(self, result: Result, place: int) -> None:
        if self._places[result.place] < 0:
            self.totals.add(result)
            self._places[result.place] = place

    def __contains__(self, place: int) -> bool:
        return self._places[place] >= 0

    @property
    def complete(self) -> bool:
        return self.totals.done == len(self._places)

    # ---- the end

    def finish(self) -> None:
        """Puts the results in order at `output`; the journal goes."""
        assert self.complete
        staged = self.output.with_name(self.output.name + ".partial-ordered")
        try:
            with open(staged, "wb") as file:
                for line in self._ordered():
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, self.output)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise self.full(error) from None
        flush_folder(self.output.parent)
        self.path.unlink()

    def _ordered(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as file:
            for place in self._places:
                file.seek(place)
                result = _parse(file.readline())
                assert result is not None, "the journal was changed by somebody else"
                yield result.output + b"\n"

    def close(self) -> None:
        """Lets others in. A journal that holds nothing goes."""
        if self._file >= 0:
            if os.fstat(self._file).st_size == 0:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _format(result: Result) -> bytes:
    """`checksum place failed prompt completion cached output`"""
    counts = (result.place, int(result.failed), result.prompt_tokens, result.completion_tokens, result.cached_tokens)
    text = b" ".join([*(b"%d" % count for count in counts), result.output])
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Result | None:
    """A result from its line; None for a line that is torn or was changed."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    place, failed, prompt, completion, cached, output = text[:-1].split(b" ", 5)
    return Result(
        place=int(place),
        output=output,
        failed=failed == b"1",
        prompt_tokens=int(prompt),
        completion_tokens=int(completion),
        cached_tokens=int(cached),
    )
