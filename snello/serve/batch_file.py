"""A file of requests in OpenAI's batch format: a JSON table a line, read once before any work and once while answering.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

A line that is no request keeps its place and becomes an error there; a file without a single good line, or whose lines
name different models, is refused before a model is loaded. Blank lines are no requests. Only digests and numbers of the
file are kept in memory, so its length does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from snello.errors import SnelloError
from snello.serve.errors import RequestError
from snello.serve.fields import finite, unknown_field
from snello.serve.openai import EmbeddingRequest, Request, read_request

LINE_FIELDS = ("custom_id", "method", "url", "body")
FORM = '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "..."}}'
LOOK_BYTES = 1 << 16  # where a zero byte tells that a file is no text


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line that is not blank: a request, or what is wrong with it.

    Attributes:
        place: which of the items, from 0. line: in the file, from 1.
    """

    place: int
    line: int
    custom_id: str | None = None
    url: str | None = None
    request: Request | None = None
    error: RequestError | None = None


@dataclass(kw_only=True)
class Survey:
    """What a file holds.

    Attributes:
        digest: SHA-256 of its bytes. items, good: lines that are not blank, those of them that are requests.
        models: the names that bodies give, each with its first line. nameless: the first good line without one.
        repeated: places whose `custom_id` an earlier line has.
        urls: good lines by url.
    """

    digest: str = ""
    items: int = 0
    good: int = 0
    models: dict[str, int] = field(default_factory=dict)
    nameless: int | None = None
    repeated: set[int] = field(default_factory=set)
    urls: Counter[str] = field(default_factory=Counter)

    def model(self, source: Path, named: str | None) -> str:
        """The model that answers: the one that is asked for, else the one that every good line names.

        Raises:
            SnelloError: they name several, or none.
        """
        if named is not None:
            return named
        if len(self.models) > 1:
            (first, at), (second, other) = list(self.models.items())[:2]
            message = f"{source} names two models: {first} (line {at}) and {second} (line {other})"
            raise SnelloError(message, "split the file, or give --model: it answers every line", exit_code=2)
        if self.nameless is not None or not self.models:
            message = f"no model was given, and line {self.nameless} of {source} names none"
            raise SnelloError(message, "give --model MODEL", exit_code=2)
        return next(iter(self.models))


def survey(source: Path) -> Survey:
    """Reads the whole file once.

    Raises:
        SnelloError: it cannot be read, is no text, is empty, or has no good line.
    """
    found, seen, first_error = Survey(), set[bytes](), None
    digest = hashlib.sha256()
    for item in _items(source, digest):
        found.items += 1
        if item.custom_id is not None:
            mark = _mark(item.custom_id)
            if mark in seen:
                found.repeated.add(item.place)
                continue
            seen.add(mark)
        if item.request is None:
            first_error = first_error or item
            continue
        _count(found, item, item.request)
    found.digest = digest.hexdigest()
    if not found.items:
        raise SnelloError(f"{source} is empty", f"write a request a line: {FORM}")
    if first_error is not None and first_error.error is not None and not found.good:
        message = f"{source} has no good line; line {first_error.line}: {first_error.error.message}"
        raise SnelloError(message, f"write a request a line: {FORM}")
    return found


def _count(found: Survey, item: Item, request: Request) -> None:
    found.good += 1
    found.urls[str(item.url)] += 1
    if request.model is not None:
        found.models.setdefault(request.model, item.line)
    elif found.nameless is None:
        found.nameless = item.line


def items(source: Path, found: Survey) -> Iterator[Item]:
    """The items in order, a repeated `custom_id` as an error.

    Raises:
        SnelloError: at the end: the file is not what `survey` has read.
    """
    digest = hashlib.sha256()
    for item in _items(source, digest):
        if item.place in found.repeated:
            message = f"custom_id {item.custom_id!r} stands on an earlier line too"
            error = RequestError(message, param="custom_id", code="duplicate_custom_id")
            item = Item(place=item.place, line=item.line, custom_id=item.custom_id, error=error)
        yield item
    if digest.hexdigest() != found.digest:
        raise SnelloError(f"{source} was changed while it was answered", "--fresh answers it from the beginning")


def _items(source: Path, digest: Any) -> Iterator[Item]:
    try:
        with open(source, "rb") as file:
            if b"\0" in file.peek(LOOK_BYTES)[:LOOK_BYTES]:
                raise SnelloError(f"{source} is not text", f"write a request a line: {FORM}")
            place = 0
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                if raw.strip():
                    yield read_line(raw, place=place, line=number)
                    place += 1
    except OSError as error:
        raise SnelloError(f"cannot read {source}: {error.strerror}", "give a file of requests, one a line") from None


def _mark(custom_id: str) -> bytes:
    """Sixteen bytes that stand for a name of any length."""
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:16]


# ---- one line -------------------------------------------------------------------------------------------------------


def read_line(raw: bytes, *, place: int, line: int) -> Item:
    """A request, or the error that this line is answered with."""
    custom_id: str | None = None
    try:
        table = _table(raw)
        given = table.get("custom_id")
        custom_id = given if isinstance(given, str) and given else None
        url, body = _parts(table)
        request = read_request(url, body)
        if not isinstance(request, EmbeddingRequest) and request.stream:
            raise RequestError("a file is not streamed", param="stream", code="unsupported_parameter")
        return Item(place=place, line=line, custom_id=custom_id, url=url, request=request)
    except RequestError as error:
        return Item(place=place, line=line, custom_id=custom_id, error=error)


def _table(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_float=finite, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise RequestError("the line is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the line is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the line is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the line is not a JSON table", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parts(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The url and the body of a line."""
    for name in table:
        if name not in LINE_FIELDS:
            raise unknown_field(name, LINE_FIELDS)
    custom_id, method, url, body = (table.get(name) for name in LINE_FIELDS)
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id must be a string that is not empty", param="custom_id", code="invalid_custom_id")
    if method != "POST":
        raise RequestError('method must be "POST"', param="method", code="invalid_method")
    if not isinstance(url, str):
        raise RequestError("url must be a string", param="url", code="invalid_type")
    if not isinstance(body, dict):
        raise RequestError("body must be a table", param="body", code="invalid_type")
    return url, body
