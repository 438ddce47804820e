"""Processes that share a stage's matrices: one that is lost is named, and none is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import eellm
from eellm.errors import WorkerError
from tests.engines import ROOT, run_python, wait_until_ended
from tests.models import biased_model, tiny_model

MODEL = biased_model()

pytestmark = pytest.mark.timeout(120)


def started(workers, **options):
    engine = eellm.Engine(MODEL, max_batch=2, workers=workers, tp=2, **options)
    handle = engine.submit([3, 1, 4, 1, 5], method="full", max_new_tokens=60)
    next(handle)
    return engine, handle


@pytest.mark.parametrize(("workers", "rank"), [(2, 1), (4, 1), (4, 3)])
def test_a_process_of_a_stage_that_is_killed_is_named_and_the_requests_fail(workers, rank):
    engine, handle = started(workers)
    pids, stage = engine.crew.pids, engine.crew.stages[rank // 2]
    os.kill(pids[rank - 1], signal.SIGKILL)
    start = time.monotonic()
    words = (
        f"worker {rank} of {workers - 1} .layers {stage.first} to {stage.last}, part {rank % 2 + 1} of 2, "
        f"process {pids[rank - 1]} .* signal 9"
    )
    with pytest.raises(WorkerError, match=words):
        handle.result()
    with pytest.raises(WorkerError, match=words):
        engine.submit([1, 2], method="full")
    assert time.monotonic() - start < 5
    wait_until_ended(pids)
    engine.close()


@pytest.mark.parametrize(("workers", "rank"), [(2, 1), (4, 3)])
def test_a_process_of_a_stage_that_hangs_is_named_after_the_time_out(workers, rank):
    engine, handle = started(workers, timeout_s=4.0)
    pids = engine.crew.pids
    os.kill(pids[rank - 1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"worker {rank} of {workers - 1} .* {pids[rank - 1]} .* nothing for 4 s"):
        handle.result()
    assert 3.5 < time.monotonic() - start < 10
    wait_until_ended(pids)
    engine.close()


def test_a_process_that_answers_but_never_comes_to_the_sum_is_named(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import sys, threading
        if sys.orig_argv[-3:] == ["3", "4", "2"]:
            from eellm.infer.pipelined import team
            def stuck(self, x_NO, sums=[]):
                sums.append(1)
                if len(sums) > 30:
                    threading.Event().wait()
                return summed(self, x_NO)
            summed, team.StageTeam.sum = team.StageTeam.sum, stuck
        """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    engine, handle = started(4, timeout_s=4.0)
    pids = engine.crew.pids
    with pytest.raises(WorkerError, match=f"worker 3 of 3 .* {pids[2]} .* nothing for 4 s"):
        handle.result()
    wait_until_ended(pids)


def test_no_processes_are_left_when_the_engine_s_is_killed():
    out = run_python("""
        import os, eellm
        from tests.models import tiny_model
        engine = eellm.Engine(tiny_model(vocab_size=30), workers=4, tp=2)
        next(engine.submit([1, 2, 3], max_new_tokens=50))
        print(*engine.crew.pids, flush=True)
        os.kill(os.getpid(), 9)
    """)
    pids = [int(word) for word in out.stdout.split()]
    assert len(pids) == 3, out.stderr
    wait_until_ended(pids)


def test_torchrun_s_processes_are_the_workers(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import eellm
        from tests.models import tiny_model
        with eellm.Engine(tiny_model(vocab_size=30), workers=4, tp=2) as engine:
            (out,) = engine.generate([[3, 1, 4]], method="pipelined", threshold=0.4, max_new_tokens=12)
        print("tokens", *out.tokens, flush=True)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=90, env=environment)
    assert out.returncode == 0, out.stderr
    lines = [line for line in out.stdout.splitlines() if line.startswith("tokens")]
    model = tiny_model(vocab_size=30)
    (expected,) = eellm.generate(model, [[3, 1, 4]], method="early", threshold=0.4, max_new_tokens=12)
    assert lines == ["tokens " + " ".join(map(str, expected.tokens))], "rank 0 alone goes on behind the constructor"


def test_after_a_call_that_was_broken_off_nothing_is_computed_out_of_step(monkeypatch):
    engine = eellm.Engine(MODEL, max_batch=1, workers=2, tp=2)
    pids = engine.crew.pids
    handle = engine.submit([1, 2, 3], method="full", max_new_tokens=20)
    next(handle)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.network.part, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(handle)
    with pytest.raises(WorkerError, match="a pass was broken off"):
        engine.score([[1, 2, 3]])
    with pytest.raises(WorkerError, match="a pass was broken off"):
        next(handle)
    with pytest.raises(WorkerError, match="a pass was broken off"):
        engine.submit([1], method="full")
    handle.cancel()
    engine.close()
    wait_until_ended(pids)
