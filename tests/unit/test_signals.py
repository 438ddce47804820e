"""How a run ends from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eellm.train.signals import Stop

ROOT = Path(__file__).parents[2]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def received():
    """Signals that reach the handlers that were there before."""
    numbers = []
    before = {n: signal.signal(n, lambda n, _: numbers.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks_and_a_second_one_does_what_it_always_does(received, number):
    clock = Clock()
    with Stop(clock) as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == number.name
        clock.now += 5
        assert received == []
        signal.raise_signal(number)
        assert received == [number]


def test_a_launcher_that_hands_on_the_signal_that_all_its_processes_got_asks_once(received):
    clock = Clock()
    with Stop(clock) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            clock.now += 0.1
        assert stop.requested == "SIGINT"
        assert received == []


def test_outside_the_context_signals_do_what_they_did_before(received):
    with Stop():
        pass
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_process_asked_twice_ends_by_the_signal():
    script = (
        "import signal; from eellm.train.signals import Stop\n"
        "times = iter([0.0, 9.0])\n"
        "with Stop(lambda: next(times)) as stop:\n"
        "    signal.raise_signal(signal.SIGTERM); print(stop.requested, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
@pytest.mark.parametrize("bound", [True, False])
def test_a_worker_ends_when_its_launcher_is_killed(bound):
    """And without it, it would not: that is the control."""
    bind = "from eellm.train.signals import end_with_parent; end_with_parent()" if bound else "pass"
    worker = f"import os, time\n{bind}\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        try:
            assert is_running(pid)
            process.kill()
            process.wait()
            deadline = time.monotonic() + (10 if bound else 0.5)
            while is_running(pid) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert is_running(pid) is not bound
        finally:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
