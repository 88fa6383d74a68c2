"""What a request got wrong, as OpenAI's clients expect it: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from snello.errors import SnelloError
from snello.native.core import NotFinite

TYPES = {400: "invalid_request_error", 500: "server_error"}  # by status


class RequestError(SnelloError):
    """A request that is refused, or that failed.

    Args:
        param: the field that is wrong, where there is one.
        code: a word for programs, where OpenAI has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        kind = TYPES[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def request_error(error: SnelloError) -> RequestError:
    """Any error of one request in the protocol's form; its words do not depend on what else ran beside it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotFinite):  # its own words name a row of the batch
        message = f"the activations of the model are not finite: {error.hint}"
        return RequestError(message, code="not_finite", status=500)
    return RequestError(f"{error.message}: {error.hint}" if error.hint else error.message)
