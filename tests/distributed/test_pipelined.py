"""Decoding over several processes: what one process gives, whatever the mix; and no process is left, whatever happens.

Exits, tokens and log-probabilities of `early` on one process are held against the oracle elsewhere: here it is the
reference.
"""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eellm
from eellm.data.documents import Document
from eellm.data.packing import pack
from eellm.errors import ConfigError, WorkerError
from eellm.evaluate.curve import CurveConfig, measure_curve
from eellm.evaluate.perplexity import evaluate
from eellm.infer.pipelined.start import stages_of
from tests.engines import DRAWN, REQUESTS, ROOT, assert_same, check_mix, is_running, run_python, wait_until_ended
from tests.models import EXITS, needs_compiler, tiny_config, tiny_model
from tests.traffic import LONG, events
from tests.unit.test_certificates import certificate_for

MODEL = tiny_model(seed=0)
WINDOWED = tiny_model(seed=3, sliding_window=5, sliding_layers=(2, 5, 6), qk_norm=True, tie_embeddings=True)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [1, 2, 3], LONG, [5], LONG[:40]]
TIMEOUT_S = 20.0

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.slow)])
def engine(request):
    """One for all tests: what a request gets doesn't depend on those before it."""
    with eellm.Engine(MODEL, max_batch=4, workers=request.param, timeout_s=TIMEOUT_S) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone():
    return eellm.Engine(MODEL, max_batch=4)


@pytest.mark.parametrize(
    ("policy", "threshold"), [("max_prob", 0.2), ("max_prob", 0.5), ("margin", 0.3), ("entropy", 0.5), ("gate", 0.6)]
)
def test_pipelined_gives_the_tokens_exits_and_log_probabilities_of_early(engine, alone, policy, threshold):
    options = {"threshold": threshold, "policy": policy, "max_new_tokens": 24}
    reference = alone.generate(PROMPTS, method="early", **options)
    taken = {layer for out in reference for layer in out.exits}
    assert len(taken) > 2, "the test means nothing unless tokens leave at several exits"
    for out, expected in zip(engine.generate(PROMPTS, method="pipelined", **options), reference, strict=True):
        assert_same(out, expected)


def test_sampled_tokens_are_full_depth_s_over_stages_whatever_is_drafted(engine, alone):
    for number, prompt in enumerate(PROMPTS):
        options = {"max_new_tokens": 20, "sampling": replace(DRAWN, seed=number)}
        (full,) = alone.generate([prompt], method="full", **options)
        for fields in (
            {"method": "full"},
            {"method": "pipelined", "threshold": 1},
            {"method": "speculative", "always_draft": True, "threshold": 0.0},
            {"method": "speculative", "always_draft": True, "lookup": False, "exits": [3], "threshold": 0.2},
        ):
            (out,) = engine.generate([prompt], **fields, **options)
            assert_same(out, full, exits=False)


def test_a_curve_of_the_pipeline_stops_where_one_of_early_does():
    tokens = np.random.default_rng(0).integers(29, size=150).astype(np.int32)
    rows = pack([Document(tokens=tokens, is_target=np.ones(150, bool))], 32)
    table = evaluate(MODEL, rows).table
    sizes = {"thresholds": (1.0, 0.5, 0.2), "num_prompts": 2, "prompt_tokens": 8, "new_tokens": 6}
    early = measure_curve(MODEL, rows, table, CurveConfig(**sizes))
    pipelined = measure_curve(MODEL, rows, table, CurveConfig(method="pipelined", workers=2, **sizes))
    assert (early.as_json()["method"], pipelined.as_json()["method"]) == ("early", "pipelined")
    for (quality, one), (same_quality, other) in zip(early.points, pipelined.points, strict=True):
        assert quality == same_quality
        assert (other.mean_exit_layer, other.same_prefix) == (one.mean_exit_layer, one.same_prefix)
    assert early.points[-1][1].mean_exit_layer < early.points[0][1].mean_exit_layer


@pytest.mark.parametrize("policy", ["max_prob", "gate"])
def test_tokens_tell_which_exits_were_asked_in_vain_on_every_stage(engine, alone, policy):
    options = {"threshold": 0.3, "policy": policy, "max_new_tokens": 24}
    expected, asked = {}, set()
    for number, prompt in enumerate(PROMPTS):
        expected[number] = [token.passed for token in alone.submit(prompt, method="early", **options)]
        asked |= {layer for passed in expected[number] for layer, _ in passed}
    assert asked == {1, 2, 3, 5}
    handles = [engine.submit(prompt, method="pipelined", **options) for prompt in PROMPTS]
    for number, handle in enumerate(handles):
        for token, passed in zip(handle, expected[number], strict=True):
            assert [layer for layer, _ in token.passed] == [layer for layer, _ in passed]
            assert [score for _, score in token.passed] == pytest.approx([score for _, score in passed], abs=1e-6)


def test_a_certificate_s_thresholds_and_policy_hold_on_every_stage():
    model = tiny_model(seed=0)
    thresholds = ((1, 0.9), (2, 0.4), (3, 1.0), (5, 0.2))
    model.certificates = (certificate_for(model, policy="margin", risk=0.1, thresholds=thresholds),)
    rule = {"threshold": dict(thresholds), "policy": "margin"}
    with eellm.Engine(model) as alone, eellm.Engine(model, workers=2, timeout_s=TIMEOUT_S) as engine:
        reference = alone.generate(PROMPTS, method="early", max_new_tokens=24, **rule)
        found = engine.generate(PROMPTS, method="pipelined", max_new_tokens=24, risk=0.1)
    assert {layer for out in reference for layer in out.exits} >= {2, 5, 6}
    for out, expected in zip(found, reference, strict=True):
        assert_same(out, expected)


@needs_compiler
@pytest.mark.parametrize("workers", [2, 3])
def test_with_kernels_of_our_own_workers_give_the_very_bits_of_one_process(workers):
    model = tiny_model(seed=5, dtype="float32", head_dim=16)
    options = {"threshold": 0.4, "max_new_tokens": 20}
    with eellm.Engine(model, compile=True) as alone, eellm.Engine(model, compile=True, workers=workers) as engine:
        for fields in ({"method": "early"}, {"method": "speculative", "always_draft": True}):
            reference = alone.generate(PROMPTS, **fields, **options)
            for out, expected in zip(engine.generate(PROMPTS, **fields, **options), reference, strict=True):
                assert (out.tokens, out.logprobs) == (expected.tokens, expected.logprobs)
        reference = alone.generate(PROMPTS, method="early", **options)
        for out, expected in zip(engine.generate(PROMPTS, method="pipelined", **options), reference, strict=True):
            assert (out.tokens, out.exits, out.logprobs) == (expected.tokens, expected.exits, expected.logprobs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events(REQUESTS), chunk=st.sampled_from([3, 7, 256]))
def test_any_mix_of_requests_that_come_go_and_are_cancelled_gets_what_each_gets_alone(engine, alone, events, chunk):
    engine.scheduler.max_prompt_rows = chunk
    check_mix(engine, alone, events)


def test_rows_are_reused_and_copied_on_every_stage(engine, alone):
    before = engine.stats().reused_tokens
    first = engine.submit(LONG[:48], method="full", max_new_tokens=30)
    next(first)
    others = [engine.submit([*LONG[:40], token], method="full", max_new_tokens=8) for token in (1, 2)]
    for handle, token in zip(others, (1, 2), strict=True):
        assert_same(handle.result(), alone.generate([[*LONG[:40], token]], method="full", max_new_tokens=8)[0])
    assert engine.stats().reused_tokens - before >= 64
    first.cancel()


def test_windows_and_tied_matrices_work_over_stages():
    reference = eellm.Engine(WINDOWED, max_batch=4).generate(PROMPTS, method="early", threshold=0.3, max_new_tokens=16)
    outs = eellm.generate(WINDOWED, PROMPTS, method="pipelined", threshold=0.3, max_new_tokens=16, workers=3)
    for out, expected in zip(outs, reference, strict=True):
        assert_same(out, expected)


def test_as_many_passes_of_a_request_are_on_their_way_as_there_are_stages_and_no_more(engine):
    num_stages = len(engine.crew.stages)
    handle = engine.submit(LONG[:4], method="early", threshold=0.0, max_deferred=1, max_new_tokens=40)
    os.kill(engine.crew.pids[0], signal.SIGSTOP)  # what is sent stays on its way
    try:
        flights = []
        while len(flights) < 12 or (flights[-1] < num_stages and len(flights) < 100):
            engine.step()
            flights.append(len(engine.loop.flights))
    finally:
        os.kill(engine.crew.pids[0], signal.SIGCONT)
    assert max(flights) == flights[-1] == num_stages
    assert len(handle.result().tokens) == 40


def test_the_weights_of_all_stages_are_counted_once(engine, alone):
    """Output matrices that several stages read are on each."""
    ours, whole = engine.stats(), alone.stats()
    assert whole.weight_bytes <= ours.weight_bytes < 2 * whole.weight_bytes
    assert ours.memory_bytes % (6 + 1) == 0


def test_stages_share_layers_by_what_exits_cost():
    stages = stages_of(tiny_config(vocab_size=20_000, exits=EXITS[:3]), 2)
    assert [(stage.first, stage.last) for stage in stages] == [(1, 2), (3, 6)]
    with pytest.raises(ConfigError, match="workers = 7: the model has 6 layers"):
        eellm.Engine(MODEL, workers=7)


# --- faults ---


def started(num_workers, **options):
    engine = eellm.Engine(MODEL, max_batch=2, workers=num_workers, **options)
    handles = [engine.submit(prompt, method="full", max_new_tokens=60) for prompt in PROMPTS[:2]]
    waiting = engine.submit(PROMPTS[3], method="early", max_new_tokens=5)
    for handle in handles:
        next(handle)
    return engine, handles, waiting


@pytest.mark.parametrize("rank", [1, 2])
def test_a_worker_that_is_killed_is_named_and_all_requests_fail(rank):
    engine, handles, waiting = started(3)
    pids = engine.crew.pids
    os.kill(pids[rank - 1], signal.SIGKILL)
    start = time.monotonic()
    stage = engine.crew.stages[rank]
    words = f"worker {rank} of 2 .layers {stage.first} to {stage.last}, process {pids[rank - 1]} .* signal 9"
    for handle in (*handles, waiting):
        with pytest.raises(WorkerError, match=words):
            for _ in handle:
                pass
    with pytest.raises(WorkerError, match=words):
        engine.submit([1, 2], method="full")
    assert time.monotonic() - start < 5
    wait_until_ended(pids)
    engine.close()
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("rank", [1, 2])
def test_a_worker_that_hangs_is_named_after_the_time_out(rank):
    engine, handles, _ = started(3, timeout_s=2.0)
    pids = engine.crew.pids
    os.kill(pids[rank - 1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"worker {rank} of 2 .*, process {pids[rank - 1]} .* nothing for 2 s"):
        handles[0].result()
    assert 1.5 < time.monotonic() - start < 6
    wait_until_ended(pids)
    engine.close()


def test_a_pass_that_is_interrupted_ends_the_engine_and_its_workers(monkeypatch):
    engine = eellm.Engine(MODEL, workers=2)
    pids, handle = engine.crew.pids, engine.submit([1, 2, 3], method="full", max_new_tokens=20)
    next(handle)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.network, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(handle)
    with pytest.raises(WorkerError, match=r"a pass was broken off.*make a new engine"):
        next(handle)
    with pytest.raises(WorkerError, match=r"a pass was broken off.*make a new engine"):
        engine.submit([4, 5], method="full")
    wait_until_ended(pids)
    engine.close()


def test_a_worker_that_fails_to_start_is_an_error(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(WorkerError, match="worker 1 ended with exit code 1 while it started"):
        eellm.Engine(MODEL, workers=2)
    capfd.readouterr()


def test_close_ends_the_workers_and_gives_threads_back():
    engine, *_ = started(2)
    pids = engine.crew.pids
    engine.close()
    assert not any(is_running(pid) for pid in pids)
    engine.close()


def test_an_engine_that_is_forgotten_leaves_no_processes():
    engine = eellm.Engine(MODEL, workers=2)
    pids = engine.crew.pids
    del engine
    gc.collect()
    wait_until_ended(pids)


@pytest.mark.parametrize("end", ["raise RuntimeError('stop')", "os.kill(os.getpid(), 9)"])
def test_no_processes_are_left_when_the_engine_s_process_ends(end):
    out = run_python(f"""
        import os, eellm
        from tests.models import tiny_model
        engine = eellm.Engine(tiny_model(), workers=3)
        handle = engine.submit([1, 2, 3], max_new_tokens=50)
        next(handle)
        print(*engine.crew.pids, flush=True)
        {end}
    """)
    assert out.returncode != 0
    pids = [int(word) for word in out.stdout.split()]
    assert len(pids) == 2, out.stderr
    wait_until_ended(pids)


def test_torchrun_s_processes_are_the_workers(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import torch, eellm
        from tests.models import tiny_model
        with eellm.Engine(tiny_model(), workers=2) as engine:
            (out,) = engine.generate([[3, 1, 4]], method="pipelined", threshold=0.4, max_new_tokens=12)
        print("tokens", *out.tokens, flush=True)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=90, env=environment)
    assert out.returncode == 0, out.stderr
    lines = [line for line in out.stdout.splitlines() if line.startswith("tokens")]
    expected = eellm.generate(MODEL, [[3, 1, 4]], method="early", threshold=0.4, max_new_tokens=12)[0].tokens
    assert lines == ["tokens " + " ".join(map(str, expected))], "rank 0 alone goes on behind the constructor"
