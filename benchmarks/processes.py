"""Processes that benchmarks start, each in a session of its own: they end with who started them."""

import contextlib
import os
import signal
import subprocess
import sys


def end_session(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """First asks it to end, for it may have started sessions of its own; after so many seconds, or once it has ended,
    kills what is left of its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def leave_on_sigterm() -> None:
    """From now on SIGTERM leaves every `with` and `finally` as an error would, instead of ending the program there."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to end what was started takes a moment
        sys.exit("stopped")

    signal.signal(signal.SIGTERM, leave)
