"""What a request got wrong, as OpenAI's clients expect it: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from snello.errors import SnelloError
from snello.native.core import NotFinite

RATE_LIMITED = 429


class RequestError(SnelloError):
    """A request that is refused, or that failed.

    Args:
        param: the field that is wrong, where there is one.
        code: a word for programs, where OpenAI has one.
        retry_after: seconds after which the same request may well succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.retry_after = param, code, status, retry_after

    @property
    def kind(self) -> str:
        if self.status == RATE_LIMITED:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def request_error(error: SnelloError) -> RequestError:
    """Any error of one request in the protocol's form; its words do not depend on what else ran beside it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotFinite):  # its own words name a row of the batch
        message = f"the activations of the model are not finite: {error.hint}"
        return RequestError(message, code="not_finite", status=500)
    return RequestError(f"{error.message}: {error.hint}" if error.hint else error.message)
