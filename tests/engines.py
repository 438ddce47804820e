"""What tests of engines with worker processes have in common."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

import eellm
from tests.traffic import play

ROOT = Path(__file__).parents[1]


DRAWN = eellm.Sampling(temperature=1.4, top_k=12, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, seed=8)
REQUESTS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["full", "early", "pipelined", "speculative"]),
        "threshold": st.sampled_from([0.0, 0.2, 0.4, 0.7]),
        "always_draft": st.booleans(),
        "max_new_tokens": st.integers(1, 14),
        "max_deferred": st.sampled_from([1, 2, 16]),
        "policy": st.sampled_from(["max_prob", "gate", "margin"]),
        "exits": st.sampled_from([None, (1, 5), (2,), (3, 5)]),
        "sampling": st.sampled_from([eellm.Sampling(), eellm.Sampling(temperature=0.8, seed=3), DRAWN]),
    }
)
"""Options of any request."""


def assert_same(out, reference, *, exits=True, within=1e-6):
    assert out.tokens == reference.tokens
    assert out.logprobs == pytest.approx(reference.logprobs, abs=within)  # logits are float32
    assert out.finish_reason == reference.finish_reason
    if exits:
        assert out.exits == reference.exits
        assert out.confidences == pytest.approx(reference.confidences, abs=within)
        assert out.stats.heads_run == reference.stats.heads_run


def check_mix(engine, alone, events):
    """Runs what `traffic.events` drew; each request must get what it gets `alone`, as far as it came."""
    for handle, prompt, options in play(engine, events):
        out = handle.result()
        method = "early" if options["method"] == "pipelined" else options["method"]
        (expected,) = alone.generate([prompt], **options | {"method": method})
        num = len(out.tokens)
        if out.finish_reason == "cancelled":
            assert num < options["max_new_tokens"] or num == 0
        else:
            assert num == len(expected.tokens)
        assert out.tokens == expected.tokens[:num]
        assert out.logprobs == pytest.approx(expected.logprobs[:num], abs=1e-6)
        if options["method"] != "speculative":
            assert out.exits == expected.exits[:num]
    assert engine.stats().num_running == 0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_ended(pids, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"processes {[pid for pid in pids if is_running(pid)]} are left"
        time.sleep(0.02)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
