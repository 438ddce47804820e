"""uvicorn's HTTP, with a bound on what comes before a body: so many bytes, so much time.

uvicorn bounds neither with httptools, and everything else (keys, sizes, deadlines) is only looked at once the head of a
request is there. Bodies are bounded in `eellm.serve.access`.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536


def bounded(head_s: float) -> type[HttpToolsProtocol]:
    """A protocol that closes connections whose next request doesn't begin to be one within `head_s`."""

    class Bounded(HttpToolsProtocol):
        _head_bytes: int | None = 0
        """Of the request whose head isn't there yet; None: it is."""
        _has_ended = False
        """Whether a request has, with what was received last."""
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head_bytes is not None and self._timer is None:
                self._wait_for_head()
            self._has_ended = False
            super().data_received(data)
            if self._head_bytes is not None and not self._has_ended:  # else most of it was a request's end
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                    self.send_400_response(f"the head of a request has at most {MAX_HEAD_BYTES} bytes here")

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._head_bytes, self._has_ended = 0, True
            super().on_message_complete()

        def _wait_for_head(self) -> None:
            self._head_bytes = 0
            self._timer = self.loop.call_later(head_s, self.transport.close)

        def _head_is_there(self) -> None:
            self._head_bytes = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded
