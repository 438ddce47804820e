"""Tensor parallelism inside a stage: what one process gives, whatever the method; each process has its part alone; and
a process that is lost is named."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

import eellm
from eellm.errors import ConfigError, WorkerError
from eellm.infer.attention import Span
from eellm.infer.packed import PackedNetwork
from eellm.infer.pipelined.team import meet
from eellm.infer.pipelined.tensor import Follower, Lead, TensorParallelNetwork, part_config, part_weights
from eellm.infer.pipelined.worker import stage_model
from eellm.infer.score import score
from tests.engines import REQUESTS, ROOT, assert_same, check_mix, is_running, run_python, wait_until_ended
from tests.models import tiny_config, tiny_model
from tests.traffic import LONG, events

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [1, 2, 3], LONG, [5]]
LAYOUTS = [(2, 2), (4, 2)]
"""Workers, and how many of them share a stage."""

pytestmark = pytest.mark.timeout(120)


@torch.no_grad()
def biased_model():
    """Everything can be halved, and every bias counts."""
    model = tiny_model(seed=0, vocab_size=30, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).view_as(parameter))
    return model


MODEL = biased_model()


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def engine(request):
    workers, tp = request.param
    with eellm.Engine(MODEL, max_batch=4, workers=workers, tp=tp, timeout_s=20.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone():
    return eellm.Engine(MODEL, max_batch=4)


@pytest.mark.parametrize(("policy", "threshold"), [("max_prob", 0.2), ("margin", 0.3), ("entropy", 0.5), ("gate", 0.6)])
def test_early_and_pipelined_give_one_process_s_tokens_exits_and_log_probabilities(engine, alone, policy, threshold):
    options = {"threshold": threshold, "policy": policy, "max_new_tokens": 16}
    reference = alone.generate(PROMPTS, method="early", **options)
    assert len({layer for out in reference for layer in out.exits}) > 2, "tokens leave at several exits"
    for method in ("early", "pipelined"):
        for out, expected in zip(engine.generate(PROMPTS, method=method, **options), reference, strict=True):
            assert_same(out, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full", "top_logprobs": 3},
        {"method": "full", "sampling": eellm.Sampling(temperature=0.9, top_p=0.9, seed=1)},
        {"method": "speculative", "always_draft": True},
        {"method": "auto"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_method_gives_one_process_s_tokens(engine, alone, fields):
    reference = alone.generate(PROMPTS, max_new_tokens=12, **fields)
    for out, expected in zip(engine.generate(PROMPTS, max_new_tokens=12, **fields), reference, strict=True):
        assert_same(out, expected, exits=fields["method"] == "full")  # drafts depend on what passes take


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events(REQUESTS))
def test_any_mix_of_requests_that_come_go_and_are_cancelled_gets_what_each_gets_alone(engine, alone, events):
    check_mix(engine, alone, events)


def test_rows_are_reused_and_copied_on_every_process(engine, alone):
    before = engine.stats().reused_tokens
    first = engine.submit(LONG[:48], method="full", max_new_tokens=20)
    next(first)
    others = [engine.submit([*LONG[:40], token], method="full", max_new_tokens=6) for token in (1, 2)]
    for handle, token in zip(others, (1, 2), strict=True):
        assert_same(handle.result(), alone.generate([[*LONG[:40], token]], method="full", max_new_tokens=6)[0])
    assert engine.stats().reused_tokens - before >= 64
    first.cancel()


def test_scores_are_one_process_s(engine, alone):
    for fields in ({}, {"exit": 3}, {"policy": "gate", "threshold": 0.5}):
        (ours,), (expected,) = engine.score([LONG[:30]], **fields), alone.score([LONG[:30]], **fields)
        assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-6)
        assert ours.exits == expected.exits


def test_each_process_holds_its_own_heads_and_its_part_of_the_matrices_until_the_engine_closes():
    """Memory is all processes' together, and what an engine of one process has."""
    with eellm.Engine(MODEL, max_batch=1) as alone, eellm.Engine(MODEL, max_batch=1, workers=4, tp=2) as engine:
        for each in (alone, engine):
            each.generate([[1, 2, 3]], max_new_tokens=4)
        assert engine.loop.memory.layers[1].shape[1] == 2 * MODEL.config.kv_heads // 2
        assert engine.stats().memory_bytes == alone.stats().memory_bytes
        assert engine.stats().weight_bytes == alone.stats().weight_bytes  # no matrix is read by both stages here
        assert engine.network.num_bytes < alone.network.num_bytes / 2
        pids = engine.crew.pids
    assert len(pids) == 3
    assert not any(map(is_running, pids))


# --- without an engine ---


class Pair:
    """Two processes' parts of a model, in two threads of this one."""

    def __init__(self, model, quantize=None):
        store, config = dist.HashStore(), model.config
        layers, met = range(1, config.num_layers + 1), {}
        threads = [threading.Thread(target=lambda r=r: met.update({r: meet(store, r, 2, 2)})) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cpu, weights = torch.device("cpu"), model.state_dict()
        weights = {name: tensor for name, tensor in weights.items() if "embed" not in name}
        parts = [stage_model(part_config(config, 2), part_weights(weights, place, 2), cpu) for place in range(2)]
        self.lead = Lead(met[0][1])
        self.network = TensorParallelNetwork(
            parts[0],
            layers,
            config,
            self.lead,
            embedding_VD=model.decoder.embed.weight.detach(),
            quantize=quantize,
        )
        self.follower = Follower(PackedNetwork(parts[1], quantize, team=met[1][1]), met[1][1])
        self.thread = threading.Thread(target=self.follower.run, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lead.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@torch.inference_mode()
def test_hidden_states_and_logits_are_the_whole_network_s_to_fp64():
    whole = PackedNetwork(MODEL)
    with Pair(MODEL) as pair:
        networks = (whole, pair.network)
        memories = [network.new_memory() for network in networks]
        for memory in memories:
            memory.reserve(3, 40)
        for spans in ([Span(0, 0, 9), Span(2, 0, 3)], [Span(0, 9, 1), Span(2, 3, 2)]):
            tokens = LONG[: sum(span.count for span in spans)]
            states = [network.embed(tokens) for network in networks]
            done = 0
            for stop in (*MODEL.config.exit_layers, MODEL.config.num_layers):
                seen = []
                for i, (network, memory) in enumerate(zip(networks, memories, strict=True)):
                    rows = network.rows(spans)
                    states[i] = network.run(states[i], done + 1, stop, rows, memory)
                    z_ND = network.normed(stop, network.attended(stop, states[i], rows, memory))
                    seen.append((states[i], z_ND, network.logits(stop, z_ND)))
                done = stop
                for (ours, theirs), within in zip(zip(*seen, strict=True), (1e-9, 1e-9, 1e-5), strict=True):
                    assert ours.shape == theirs.shape
                    assert (ours - theirs).abs().max() < within


def scored(network):
    return score(network, LONG, 1, dict.fromkeys(network.config.exit_layers, 0.4), "max_prob")


def test_windows_norms_of_heads_and_tied_matrices_in_float32():
    changes = {"sliding_window": 5, "sliding_layers": (2, 5, 6), "qk_norm": True, "tie_embeddings": True}
    model = tiny_model(seed=3, vocab_size=30, dtype="float32", **changes)
    expected = scored(PackedNetwork(model))
    assert len(set(expected.exits)) > 2
    with Pair(model) as pair:
        out = scored(pair.network)
    assert out.exits == expected.exits
    assert out.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", "int8")])
def test_coarser_numbers_lose_little_more_than_in_one_process(dtype, quantize):
    """Each process rounds its part by itself."""
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
    model, exact = (tiny_model(seed=2, dtype=name, **sizes) for name in (dtype, "float64"))
    whole = PackedNetwork(model, quantize)
    with Pair(model, quantize) as pair:
        logprobs = [
            score(network, LONG, 1, {}, "max_prob").logprobs for network in (PackedNetwork(exact), whole, pair.network)
        ]
        assert 2 * pair.network.num_bytes == pytest.approx(whole.num_bytes, rel=0.1)  # scales are of parts of rows
    errors = [sum(abs(a - b) for a, b in zip(logprobs[0], each, strict=True)) for each in logprobs[1:]]
    assert 0 < errors[1] < 2 * errors[0]


def test_memories_that_are_gone_here_are_gone_on_the_other_processes():
    with Pair(MODEL) as pair:
        kept, passing = pair.network.new_memory(), pair.network.new_memory()
        for memory in (kept, passing):
            memory.reserve(1, 8)
        gone = weakref.ref(passing)
        del passing, memory
        assert gone() is None
        kept.reserve(2, 8)
        with torch.inference_mode():  # its sums come after all that was told before
            pair.network.logits(MODEL.config.num_layers, pair.network.embed([1]))
        assert [*pair.follower.memories] == [0]
        assert pair.follower.memories[0].num_slots == 2


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
    handle.cancel()
    other = engine.submit([4, 5], method="full")
    with pytest.raises(WorkerError, match="a pass was broken off"):
        next(other)
    with pytest.raises(WorkerError, match="a pass was broken off"):
        engine.submit([1], method="full")
    engine.close()
    wait_until_ended(pids)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 3, "tp": 2}, "tp = 2: .* workers must be a multiple of it, and it is 3; make it 2 or 4"),
        ({"workers": 1, "tp": 2}, "tp = 2: .* it is 1; make it 2"),
        ({"workers": 2, "tp": 0}, "tp = 0: must be at least 1"),
        ({"workers": 2, "tp": 2, "compile": True}, "compile = True: the kernels run a stage in one process"),
        ({"workers": 14, "tp": 2}, "workers = 14: the model has 6 layers, and each 2 workers need one"),
        ({"workers": 4, "tp": 4}, r"tp = 4: num_kv_heads = 2 is not a multiple of it; .* tp in \[1, 2\]"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        eellm.Engine(MODEL, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 29}, r"vocab_size = 29 is not a multiple of it; this model takes tp in \[1\]"),
        ({"vocab_size": 30, "intermediate_size": 45}, "intermediate_size = 45 is not"),
    ],
)
def test_sizes_that_cannot_be_shared_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        eellm.Engine(eellm.build(tiny_config(**changes)), workers=2, tp=2)


# --- faults ---


def started(workers, **options):
    engine = eellm.Engine(MODEL, max_batch=2, workers=workers, tp=2, **options)
    handle = engine.submit(PROMPTS[0], method="full", max_new_tokens=60)
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
