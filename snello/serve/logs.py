"""The log: a JSON table a line on standard error, one for each request, by the standard library's logging.

What people ask and are answered is never in it unless the server was told so; nor are keys.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

from snello.serve.answering import Record

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


def set_up_logs(level: int = logging.INFO) -> None:
    """Sends the server's log and the web server's warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
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
