"""How a run ends from outside: after the present step when asked to, at once with the process that started it."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 1.0
"""A launcher hands on the signal that its processes got as well: within this time it's one request."""
PR_SET_PDEATHSIG = 1


class Stop:
    """Within this context SIGTERM and SIGINT set `requested`, which the loop reads between steps.

    Another signal, at least a second later, does what it would have done without us. The ranks of a run get theirs at
    different steps: they must agree on the flag before one of them acts on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested: str | None = None
        """Name of the signal that asked to stop."""
        self._clock = clock
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """In the main thread only, as Python has it."""
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # NOTE no logging here: it may have been interrupted in the midst of a write
        if self.requested is None:
            self.requested, self._requested_at = signal.Signals(number).name, self._clock()
        elif self._clock() - self._requested_at >= SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def end_with_parent() -> None:
    """From now on the kernel kills this process when its parent ends, however that happens (Linux; elsewhere nothing).

    For processes that a launcher started. One that was started from a shell must be able to outlive it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
