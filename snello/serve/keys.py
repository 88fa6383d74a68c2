"""Who may call: keys, of which the server knows only hashes, and names of hosts that a browser may be led to.

A file holds a line a key: its SHA-256 in hex, then a name for logs and for what is kept apart (computed prompts are
shared only within one key). Every hash is compared, each in constant time, so that a wrong key says nothing about the
right ones. Without keys only this machine may call, and only under its own name: a page in a browser could otherwise
point its own name at this machine (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snello.errors import SnelloError
from snello.serve.errors import RequestError
from snello.serve.options import LOOPBACK

MAKE = "make one: openssl rand -hex 32 | tee key.txt | tr -d '\\n' | sha256sum | cut -d' ' -f1 >> keys.txt"
OPEN_PATHS = ("/health/live", "/health/ready")  # one word each, for whoever restarts or balances


@dataclass(frozen=True)
class Caller:
    """Who asks. `salt`: what is computed for one salt is never used for another."""

    name: str = "local"
    salt: str = ""


class Keys:
    """The keys of a server. `names`: by hash."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._names = dict(names)

    def __len__(self) -> int:
        return len(self._names)

    def caller(self, authorization: str | None) -> Caller:
        """The caller behind an `Authorization` header.

        Raises:
            RequestError: 401: there is no key, or it is not one of ours.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "a key is needed: send the header Authorization: Bearer KEY"
            raise RequestError(message, code="missing_api_key", status=401)
        hashed, found = hashlib.sha256(key.strip().encode()).digest(), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, hashed):
                found = Caller(name, known.hex())
        if found is None:
            raise RequestError("this key is not known here", code="invalid_api_key", status=401)
        return found


def read_keys(path: Path) -> Keys:
    """The hashes in a file; empty lines and those that begin with # are left out.

    Raises:
        SnelloError: it cannot be read, holds something else, or no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SnelloError(f"cannot read the keys in {path}: {error}", MAKE, exit_code=2) from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        word, _, name = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        if not re.fullmatch("[0-9a-fA-F]{64}", word):
            raise SnelloError(
                f"line {number} of {path} is no SHA-256 in hex", f"never the key itself; {MAKE}", exit_code=2
            )
        names[bytes.fromhex(word)] = name.strip() or f"key-{number}"
    if not names:
        raise SnelloError(f"{path} holds no key", MAKE, exit_code=2)
    return Keys(names)


def check_host(host: str | None, allowed: Sequence[str] = LOOPBACK) -> None:
    """The `Host` that a request was sent to.

    Raises:
        RequestError: 403: it is another name than this machine's own.
    """
    name = re.sub(r":\d+$", "", host or "").strip("[]").lower()
    if name not in allowed and not re.fullmatch(r"127\.\d+\.\d+\.\d+", name):
        message = f"this server answers to {' and '.join(allowed)} alone, not to {host!r}"
        raise RequestError(message, code="unknown_host", status=403)


def check_origin(origin: str | None) -> None:
    """The page that a browser sends from: without keys, one of this machine. Programs send none.

    Raises:
        RequestError: 403: it is another.
    """
    if origin is not None:
        scheme, _, host = origin.partition("://")
        if scheme not in ("http", "https"):
            raise RequestError("a page of no host may not call this server", code="unknown_origin", status=403)
        check_host(host)
