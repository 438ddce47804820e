"""A server's life: socket, models, threads, requests, SIGTERM, drain, end.

The socket is bound first, so that a port in use is known before anything is loaded. On SIGTERM (or Ctrl-C) new requests
are refused, /ready says so, running ones have `drain_s` to end; a second signal ends them at once.
"""

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path

import uvicorn

from eellm.config.serve import ServeConfig
from eellm.errors import ConfigError
from eellm.log import log
from eellm.serve.access import Keys, read_keys
from eellm.serve.app import Server, make_app
from eellm.serve.models import serve_models
from eellm.serve.protocol import bounded

CLOSE_S = 5.0
"""After the drain, for connections whose clients don't read."""


def serve(config: ServeConfig, *, cache_dir: Path | None, announce: Callable[[str], None]) -> bool:
    """Serves until a signal; returns whether it was Ctrl-C. announce: is told the URL once requests are answered.

    Raises ConfigError, CheckpointError before that.
    """
    config.served()
    config.check_open()
    keys = None if config.api_keys is None else Keys(read_keys(config.api_keys))
    with bound(config.host, config.port) as listening:
        server = Server(config, serve_models(config, cache_dir=cache_dir))
        running = Running(server, keys, listening)
        with asyncio.Runner(loop_factory=running.loop_factory) as runner:
            runner.run(running.run(announce))
    return running.interrupted


@contextlib.contextmanager
def bound(host: str, port: int) -> Generator[socket.socket]:
    """A socket at this address. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter of what no host can be called
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"host = {host!r}: {reason}") from None
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(
                    f"host = {host!r}: this is no address of this machine; 0.0.0.0 is all of them"
                ) from None
            raise ConfigError(f"port = {port}: {error.strerror} at {host}; name another, or 0 for any") from None
        yield listening


class Running:
    """One server on one socket. `drain` may be called from any thread by way of `loop`."""

    def __init__(self, server: Server, keys: Keys | None, listening: socket.socket) -> None:
        self.server, self.listening = server, listening
        self.interrupted = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._is_hurried = False
        settings = uvicorn.Config(
            make_app(server, keys),
            http=bounded(server.config.body_s),
            ws="none",
            lifespan="on",
            log_level="error",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(CLOSE_S),
        )
        self.loop_factory = settings.get_loop_factory()
        """uvloop's, where it is installed."""
        self._uvicorn = _Uvicorn(settings)

    @property
    def url(self) -> str:
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run(self, announce: Callable[[str], None], *, signals: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        if signals:
            self.loop.add_signal_handler(signal.SIGTERM, self.drain)
            self.loop.add_signal_handler(signal.SIGINT, self._interrupt)
        serving = asyncio.ensure_future(self._uvicorn.serve([self.listening]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            announce(self.url)
        await serving

    def drain(self) -> None:
        """The first call lets running requests end, the second ends them."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._is_hurried = True

    def _interrupt(self) -> None:
        self.interrupted = True
        self.drain()

    async def _drain(self) -> None:
        server = self.server
        server.is_draining = True
        log.info("shutting down: %d requests have %g s to end", server.num_open, server.config.drain_s)
        until = time.monotonic() + server.config.drain_s
        while server.num_open and time.monotonic() < until and not self._is_hurried:
            await asyncio.sleep(0.05)
        for served in server.served.values():
            served.worker.stop()  # jobs that are open hear of it, and answer their clients
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: its own would close the socket at once, and end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield
