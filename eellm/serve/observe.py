"""The outermost layer: every request is counted, timed and logged as one line of JSON; what fails unseen is a 500.

Prompts are in no line unless asked for. What a handler knows of its request it adds with `note`.
"""

import json
import time
import traceback
import uuid
from collections.abc import Collection, MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eellm.log import log
from eellm.serve.metrics import Meters
from eellm.serve.refusals import dump, refusal_of

_NOTES = "eellm.notes"
LEFT = 499
"""The status in logs and metrics where a client left before its answer began."""


def note(scope: MutableMapping[str, Any], **facts: Any) -> None:
    """For the request's line in the log."""
    scope.setdefault(_NOTES, {}).update(facts)


def noted(scope: MutableMapping[str, Any], name: str) -> Any:
    return scope.setdefault(_NOTES, {}).get(name)


class Observed:
    def __init__(self, app: ASGIApp, meters: Meters, routes: Collection[str]) -> None:
        """routes: the paths that metrics name; there is one name for all others."""
        self.app, self.meters, self.routes = app, meters, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin_s, status, request_id = time.perf_counter(), LEFT, uuid.uuid4().hex
        note(scope, key="")

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # the last place where anybody hears of it
            log.error("a request failed:\n%s", traceback.format_exc())
            if status == LEFT:
                await send_json(watched, 500, refusal_of(error).body)
        finally:
            path, seconds = scope["path"], time.perf_counter() - begin_s
            self.meters.request(path if path in self.routes else "other", status, noted(scope, "key"))
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(seconds, 4),
            }
            log.info("%s", json.dumps(line | scope[_NOTES]))


async def send_json(send: Send, status: int, data: Any, headers: MutableMapping[str, str] | None = None) -> None:
    body = dump(data)
    named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
