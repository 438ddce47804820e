"""Walks and engines on networks of fixed shapes: what those of any shape give; on a GPU, with graphs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.infer.attention import Span
from eellm.infer.fixed import Asked, FixedNetwork
from eellm.infer.measure import measure
from eellm.infer.network import Leg
from eellm.infer.packed import PackedNetwork
from eellm.infer.prepare import make_network
from tests.fixed import MODEL, STOPS, WINDOWED, a_walk, ahead, engine_on, parts, played, random
from tests.models import oracle, tiny_model
from tests.step_costs import step_costs
from tests.traffic import LOCAL_REQUESTS, LONG, events, play

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# --- walks ---


@pytest.mark.parametrize("leaves_at", [0, 2, 3, 4])
@torch.inference_mode()
def test_walks_give_what_passes_to_every_stop_do_also_where_a_leg_starts_in_vain(leaves_at):
    thresholds = [0.0 if i >= leaves_at else math.inf for i in range(5)]
    expected_h, expected, theirs = a_walk(PackedNetwork(MODEL), thresholds=thresholds)
    for network in (FixedNetwork(MODEL), ahead(MODEL)):
        for _ in range(3):  # done, recorded, played
            h_ND, gone, ours = a_walk(network, thresholds=thresholds)
            torch.testing.assert_close(h_ND, expected_h, rtol=0, atol=1e-10)
            assert len(gone) == len(expected) == leaves_at + 1
            for one, other in zip(gone, expected, strict=True):
                assert (one.heard is None) == (other.heard is None)
                if one.heard is not None:
                    torch.testing.assert_close(one.heard.logits_NV, other.heard.logits_NV)
                    assert [row[0] for row in one.heard.answers] == [row[0] for row in other.heard.answers]
        last = STOPS[leaves_at]
        is_ahead = network.costs is not None
        for (part, kv), (_, other) in zip(parts(ours), parts(theirs), strict=True):
            if not is_ahead or not 0 < part > last:
                torch.testing.assert_close(kv, other, rtol=0, atol=1e-10)
            else:  # in vain: rows that have not passed, of this slot alone
                torch.testing.assert_close(kv[:, :10], other[:, :10], rtol=0, atol=1e-10)
                assert torch.equal(kv[[0, 2]], other[[0, 2]])
                assert torch.equal(kv[1, 16:], other[1, 16:])
        if leaves_at < 4:
            in_vain = any(
                not torch.equal(kv[1, 10:16], torch.zeros_like(kv[1, 10:16])) for part, kv in parts(ours) if part > last
            )
            assert in_vain == is_ahead


@torch.inference_mode()
def test_a_leg_in_vain_has_written_what_a_later_pass_writes_to_the_last_bit():
    network = ahead(MODEL)
    h_ND, gone, memory = a_walk(network, thresholds=(0.0,) * 5)
    assert len(gone) == 1
    before = memory.layers[2].clone()
    rows = network.rows([Span(1, 12, 4)])
    network.run(h_ND[2:], 2, 2, rows, memory)
    assert before[1, :, 12:16].abs().min() > 0
    assert torch.equal(memory.layers[2], before)


@torch.inference_mode()
def test_the_host_looks_once_for_each_head_and_where_it_pays_the_next_leg_has_started_by_then(monkeypatch):
    def order(network, **fields):
        done = []
        start, look = FixedNetwork._start, Asked.answers
        with monkeypatch.context() as patch:
            patch.setattr(FixedNetwork, "_start", lambda *args: done.append(args[3].last) or start(*args))
            patch.setattr(Asked, "answers", lambda asked: done.append("look") or look(asked))
            a_walk(network, **fields)
        return done

    assert order(ahead(MODEL)) == [1, 2, "look", 3, 5, "look", 6, "look", "look"]
    assert order(ahead(MODEL), likely=1.0) == [1, "look", 2, 3, "look", 5, "look", 6, "look"]
    assert order(played(MODEL)) == [1, "look", 2, 3, "look", 5, "look", 6, "look"], "costs aren't known"
    assert order(ahead(MODEL), thresholds=(0.0,) * 5) == [1, 2, "look"]
    # a layer takes a second: in vain with probability p it costs p, and saves the look otherwise
    assert order(ahead(MODEL, look_s=1.1))[:3] == [1, 2, "look"]
    assert order(ahead(MODEL, look_s=0.9))[:3] == [1, "look", 2]
    assert order(ahead(MODEL, look_s=0.9), likely=0.4)[:3] == [1, 2, "look"]


# --- engines ---


@settings(max_examples=25)
@given(
    events=events(LOCAL_REQUESTS),
    max_batch=st.integers(1, 5),
    chunk=st.sampled_from([3, 7, 256]),
    windowed=st.booleans(),
    starts_ahead=st.booleans(),
)
def test_requests_of_any_mix_get_the_tokens_and_exits_of_ragged_passes(
    events, max_batch, chunk, windowed, starts_ahead
):
    model = WINDOWED if windowed else MODEL
    network = ahead(model) if starts_ahead else played(model)
    packed = PackedNetwork(model)
    packed.costs = network.costs = step_costs(STOPS)
    with engine_on(network, model, max_batch=max_batch) as engine, engine_on(packed, model) as other:
        engine.scheduler.max_prompt_rows = chunk
        for handle, prompt, options in play(engine, events):
            out = handle.result()
            (expected,) = other.generate([prompt], **options)
            num = len(out.tokens)
            if out.finish_reason == "length":
                assert num == options["max_new_tokens"]
            assert out.tokens == expected.tokens[:num]
            assert out.logprobs == pytest.approx(expected.logprobs[:num], abs=1e-5)
            if options["method"] != "speculative":
                assert out.exits == expected.exits[:num]


@pytest.mark.parametrize("look_s", [0.0, math.inf])
def test_early_exit_keeps_to_the_decoder_without_a_cache(look_s):
    network, taken = ahead(MODEL, look_s), set()
    with engine_on(network, MODEL) as engine:
        for threshold in (0.2, 0.5):
            for exits in ((1, 3, 5), None):
                thresholds = dict.fromkeys(exits or MODEL.config.exit_layers, threshold)
                expected = oracle(MODEL, LONG[:8], num_tokens=24, thresholds=thresholds)
                options = {"threshold": threshold, "exits": exits, "max_new_tokens": 24, "max_deferred": 3}
                (out,) = engine.generate([LONG[:8]], method="early", **options)
                assert list(zip(out.tokens, out.exits, strict=True)) == [row[:2] for row in expected]
                assert out.logprobs == pytest.approx([row[2] for row in expected], abs=1e-5)
                taken |= set(out.exits)
    assert taken == {1, 2, 3, 5, 6}
    assert network.graphs.recorder.num_played > 100


def test_texts_are_scored_as_by_ragged_passes():
    scores = []
    for network in (played(MODEL), PackedNetwork(MODEL)):
        with engine_on(network, MODEL) as engine:
            scores.append(engine.score([LONG, LONG[:9], LONG[5:20]], threshold=0.3))
    for one, other in zip(*scores, strict=True):
        assert one.exits == other.exits
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_its_parts_can_be_measured():
    costs = measure(played(MODEL))
    assert costs.stops == STOPS
    assert costs.full_s(4) > costs.pass_s(0, 1, 4) > 0


def test_a_cpu_has_no_use_for_it():
    assert type(make_network(MODEL, compile=False)) is PackedNetwork
    assert type(make_network(MODEL)) is PackedNetwork


# --- on a GPU: never run yet ---


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_a_gpu_give_what_plain_launches_do(dtype):
    model = tiny_model(seed=0, dtype=dtype).to("cuda")
    fixed, packed = make_network(model), make_network(model, compile=False)
    assert (type(fixed), type(packed)) == (FixedNetwork, PackedNetwork)
    bound = 1e-3 if dtype == "float32" else 0.3
    for network in (fixed, ahead_on_gpu(model)):
        with torch.inference_mode():
            for _ in range(3):
                found, expected = (a_walk_on(one, dtype) for one in (network, packed))
                torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    if dtype == "float32":
        outs = []
        for network in (fixed, packed):
            with engine_on(network, model) as engine:
                prompts = [LONG[: 3 + 5 * i] for i in range(6)]
                outs.append(engine.generate(prompts, method="early", threshold=0.4, max_new_tokens=30))
        assert [out.tokens for out in outs[0]] == [out.tokens for out in outs[1]]
    assert any(replay is not None for replay in fixed.graphs._known.values())


def ahead_on_gpu(model):
    network = FixedNetwork(model, look_s=math.inf)
    network.costs = step_costs(STOPS)
    return network


def a_walk_on(network, dtype):
    """The logits that the heads of a walk give, on the CPU."""
    memory = network.new_memory()
    memory.reserve(2, 30)
    prompt, rows = (random(n, 32, seed=n).to("cuda", getattr(torch, dtype)) for n in (10, 3))
    network.run(prompt, 1, 6, network.rows([Span(1, 0, 10)]), memory)
    legs = [Leg(last=stop, start=0, num_asked=int(stop != 2), threshold=math.inf, likely=0.5) for stop in STOPS]
    _, gone = network.walk(rows, 0, legs, Span(1, 10, 3), memory, "max_prob")
    return torch.cat([leg.heard.logits_NV for leg in gone if leg.heard is not None]).cpu()
