"""Faults of a request as clients of the OpenAI API read them."""

from typing import Any

RETRY_SECONDS = 1
"""What a client is told to wait where the same request may be served later."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class RequestFault(Exception):
    """A request that is not served, and why.

    Args:
        status: Status code of HTTP.
        message: Sentence for people: key, rule and value.
        param: Field of the request that is to blame, if one is.
        code: Name of the fault for programs.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document that tells the client."""
        kind = TYPES.get(self.status, "server_error")
        code = self.code if self.status != 503 else 503  # llama.cpp's clients compare it with the number
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def wrong(param: str, rule: str, value: object) -> RequestFault:
    """A field with a value that its rule does not allow."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
    return RequestFault(400, f"{param} {rule}, got {shown}", param=param)
