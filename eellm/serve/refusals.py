"""What a client is told when it gets no answer: OpenAI's error body, and the status that its libraries expect."""

import json
from collections.abc import Mapping
from typing import Any, Self

from eellm.errors import EellmError, ModelError, WorkerError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refusal(Exception):  # noqa: N818 - it is an answer
    """Ends a request with a status and an error body. Not an EellmError: it is the answer, not a failure of ours."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def again(self) -> Self:
        """The same, to be raised: one that is raised for many would collect all their frames."""
        return type(self)(self.status, self.message, param=self.param, code=self.code, headers=self.headers)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refusal:
    """What a client hears of an error: all of it where it can mend it, nothing of what only we can."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, WorkerError):
        return Refusal(
            503, "a worker process of the model is lost; the server must be started anew", code="worker_lost"
        )
    if isinstance(error, ModelError):
        return Refusal(500, str(error), code="model_failed")
    if isinstance(error, EellmError):
        return Refusal(400, str(error))
    return Refusal(500, "the server failed; its log says why")


def dump(data: Any) -> bytes:
    """JSON on one line. ASCII, so that no text can break it."""
    return json.dumps(data, separators=(",", ":")).encode("ascii")
