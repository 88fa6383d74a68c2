"""The log: a JSON table a line on standard error, one for each request, by the standard library's logging.

Lines are written by a thread of their own. Where nobody reads them (a pipe that is full, a collector that hangs) lines
are lost, and counted; no answer waits.

What people ask and are answered is never in it unless the server was told so; nor are keys.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from typing import Any

from snello.serve.answering import Record

MOST_WAITING = 10_000  # lines
CLOSE_SECONDS = 1.0
log = logging.getLogger("snello.serve")


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what is passed as `extra={"fields": {...}}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class Aside(logging.Handler):
    """Writes to a file descriptor, in a thread; at most `most` lines wait for it.

    The thread writes to a duplicate of its own, so that a line still to be written when the caller closes his
    descriptor never goes to another file that has taken its number.
    """

    def __init__(self, descriptor: int, most: int = MOST_WAITING) -> None:
        super().__init__()
        self._descriptor, self._lost, self._losing = os.dup(descriptor), 0, threading.Lock()
        self._closing = False
        self._lines: queue.Queue[str | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._write_all, name="snello log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            with self._losing:
                self._lost += 1
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Waits for what is still to be written, but not for long."""
        self._closing = True
        with contextlib.suppress(queue.Full):  # a full queue needs no mark: the thread leaves once it is empty
            self._lines.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        super().close()

    def _write_all(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._write(line)
                self._tell_lost()
                if self._closing and self._lines.empty():
                    break
        finally:
            os.close(self._descriptor)

    def _tell_lost(self) -> None:
        with self._losing:
            lost, self._lost = self._lost, 0
        if lost:
            words = "%d lines are missing here: nobody read the log"
            self._write(self.format(log.makeRecord(log.name, logging.WARNING, "", 0, words, (lost,), None)))

    def _write(self, line: str) -> None:
        rest = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:  # who should read it has gone
            pass


def set_up_logs(level: int = logging.INFO) -> None:
    """Sends the server's log and the web server's warnings to standard error."""
    handler = Aside(sys.stderr.fileno())
    handler.setFormatter(JsonLines())
    for name, least in (("snello.serve", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


def log_request(record: Record) -> None:
    """One line for a request that has ended."""
    now = time.monotonic()
    fields: dict[str, Any] = {
        "request": record.id,
        "path": record.path,
        "caller": record.caller,
        "status": record.status,
        "seconds": round(now - record.started, 4),
    }
    if record.model:
        first = None if record.first is None else round(record.first - record.started, 4)
        fields |= {
            "model": record.model,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "first_token_seconds": first,
            "finish": record.reasons,
            "source": record.source,
        }
    ended = None if record.ended == "done" else record.ended
    extras: dict[str, Any] = {"code": record.code, "ended": ended, "asked": record.asked}
    fields |= {name: value for name, value in extras.items() if value is not None}
    level = logging.ERROR if record.status == 500 else logging.INFO
    log.log(level, "request", extra={"fields": fields})
