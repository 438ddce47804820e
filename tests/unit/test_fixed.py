"""Passes of few fixed shapes give what passes of any shape do; played again, too."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm.infer import cells
from eellm.infer.attention import Span
from eellm.infer.fixed import Asked, FixedNetwork
from eellm.infer.graphs import Graphs
from eellm.infer.grid import MOST_CELLS
from eellm.infer.measure import measure
from eellm.infer.network import Leg
from eellm.infer.packed import PackedNetwork
from eellm.infer.prepare import make_network
from tests.models import oracle, tiny_model
from tests.played import Played, Watch
from tests.step_costs import step_costs
from tests.traffic import LONG, events

MODEL = tiny_model(seed=0)
WINDOWED = tiny_model(seed=3, sliding_window=5, sliding_layers=(2, 5, 6), qk_norm=True)
STOPS = (1, 2, 3, 5, 6)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def played(model, **fields) -> FixedNetwork:
    """A network whose passes are recorded and played."""
    network = FixedNetwork(model, **fields)
    network.graphs = Graphs(Played())
    return network


@contextmanager
def engine_on(network, model, **fields):
    """An engine that computes with the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eellm.infer.backend.network_of", lambda *_: network)
        engine = eellm.Engine(model, **fields)
    with engine:
        yield engine


def parts(memory):
    """What is kept by layer, and by minus the layer of the exits; the spare rows left out: (S, C, 2K, E)."""
    every = memory.layers | {-layer: kv for layer, kv in memory.exits.items()}
    return [(part, kv[:, :, : memory.capacity].transpose(1, 2)) for part, kv in every.items()]


def reorder(name, layers, h_ND):
    """The first arguments of a network's `run` or `attended`."""
    return (h_ND, *layers) if name == "run" else (*layers, h_ND)


# --- passes ---


@st.composite
def histories(draw):
    """Passes of a memory that grows now and then: (slots, capacity, spans, the layers of each part of the way)."""
    num_slots, capacity, lengths, history = 1, 6, {}, []
    for _ in range(draw(st.integers(1, 7))):
        num_slots, capacity = num_slots + draw(st.sampled_from([0, 0, 2])), capacity + draw(st.sampled_from([0, 0, 30]))
        spans = []
        for slot in draw(st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=num_slots, unique=True)):
            before = lengths.get(slot, 0)
            if before == capacity or draw(st.integers(0, 9)) == 0:
                before = 0  # another sequence has the slot now
            spans.append(Span(slot, before, draw(st.integers(1, min(12, capacity - before)))))
            lengths[slot] = spans[-1].end
        history.append((num_slots, capacity, spans, draw(st.sampled_from([(6,), (2, 6), (1, 3, 5, 6)]))))
    return history


@settings(max_examples=50)
@given(history=histories(), windowed=st.booleans(), is_played=st.booleans())
@torch.inference_mode()
def test_any_passes_over_any_slots_of_a_growing_memory_give_what_ragged_ones_do(history, windowed, is_played):
    model = WINDOWED if windowed else MODEL
    fixed, packed = played(model) if is_played else FixedNetwork(model), PackedNetwork(model)
    ours, theirs = fixed.new_memory(), packed.new_memory()
    for number, (num_slots, capacity, spans, ends) in enumerate(history):
        ours.reserve(num_slots, capacity)
        theirs.reserve(num_slots, capacity)
        before = {part: kv.clone() for part, kv in parts(ours)}
        our_h = their_h = random(sum(span.count for span in spans), 32, seed=number)
        our_rows, their_rows, done = fixed.rows(spans), packed.rows(spans), 0
        for end in ends:
            our_h = fixed.run(our_h, done + 1, end, our_rows, ours)
            their_h = packed.run(their_h, done + 1, end, their_rows, theirs)
            torch.testing.assert_close(our_h, their_h, rtol=0, atol=1e-10)
            done = end
            if end == 2:
                found = fixed.attended(end, our_h, our_rows, ours)
                torch.testing.assert_close(found, packed.attended(end, their_h, their_rows, theirs), rtol=0, atol=1e-10)
        untouched = torch.ones(num_slots, capacity, dtype=torch.bool)
        for span in spans:
            untouched[span.slot, span.before : span.end] = False
        for (part, kv), (_, expected) in zip(parts(ours), parts(theirs), strict=True):
            torch.testing.assert_close(kv, expected, rtol=0, atol=1e-10)
            assert torch.equal(kv[untouched], before[part][untouched]), f"{part}: rows of others have changed"


@pytest.mark.parametrize("is_played", [False, True])
@torch.inference_mode()
def test_what_is_in_idle_cells_and_spare_rows_changes_nothing(is_played):
    network = played(MODEL) if is_played else FixedNetwork(MODEL)
    spans = [Span(0, 0, 3), Span(2, 0, 1), Span(3, 0, 2)]
    found = []
    for garbage in (0.0, math.nan):
        memory = network.new_memory()
        memory.reserve(4, 10)
        for part in (memory.layers, memory.exits):
            for kv in part.values():
                kv[:, :, memory.capacity :] = garbage
        outs = []
        for step in range(4):
            network._rows_CD.fill_(garbage)
            network._asked_CD.fill_(garbage)
            now = [Span(slot, before + count * step, count) for slot, before, count in spans]
            if now[0].end > memory.capacity:
                memory.reserve(5, 40)  # what was spare is a row now
            h_ND = network.run(random(6, 32, seed=step), 1, 6, network.rows(now), memory)
            outs += [h_ND, network.answers(5, h_ND[:3], ["margin"])[0]]
        found.append(outs)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_memory_that_grows_leaves_its_spare_rows_behind():
    memory = FixedNetwork(MODEL).new_memory()
    memory.reserve(2, 6)
    generation = memory.generation
    for kv in memory.layers.values():
        kv[:, :, :6], kv[:, :, 6:] = 1.0, math.nan
    memory.reserve(1, 5)
    assert memory.generation is generation
    memory.reserve(3, 9)
    assert memory.generation is not generation
    for kv in memory.layers.values():
        assert kv.shape[2] == 10
        assert (kv[:2, :, :6] == 1).all()
        assert (kv[:2, :, 6:] == 0).all()


@torch.inference_mode()
def test_passes_without_a_grid_go_the_ragged_way(monkeypatch):
    network, packed = played(MODEL), PackedNetwork(MODEL)
    memory, other = network.new_memory(), packed.new_memory()
    memory.reserve(4, 100)
    other.reserve(4, 100)
    for spans in ([Span(1, 0, MOST_CELLS + 1)], [Span(0, 0, 2), Span(3, 0, 1)]):
        if len(spans) > 1:
            assert network.rows(spans).placed(memory) is not None
            monkeypatch.setattr(cells, "MOST_IDLE_BYTES", 1000)
        rows = network.rows(spans)
        assert rows.placed(memory) is None
        h_ND = random(sum(span.count for span in spans), 32)
        for name, layers in (("run", (1, 2)), ("attended", (2,))):
            found = getattr(network, name)(*reorder(name, layers, h_ND), rows, memory)
            expected = getattr(packed, name)(*reorder(name, layers, h_ND), packed.rows(spans), other)
            assert torch.equal(found, expected)
    many_ND = random(MOST_CELLS + 1, 32)
    assert network.answers(3, many_ND, ["entropy"])[1] == packed.answers(3, many_ND, ["entropy"])[1]
    assert network.graphs.recorder.num_recorded == 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@torch.inference_mode()
def test_rounded_weights_and_parts_of_a_model_go_through_it_too(quantize):
    model = tiny_model(dtype="float32", hidden_size=64, head_dim=16)
    layers = range(3, 7)
    fixed, packed = played(model, quantize=quantize, layers=layers), PackedNetwork(model, quantize, layers)
    ours, theirs = fixed.new_memory(), packed.new_memory()
    assert set(ours.layers) == set(layers)
    for memory in (ours, theirs):
        memory.reserve(2, 30)
    for step in range(4):
        spans = [Span(slot, 2 * step, 2) for slot in range(2)]
        h_ND = random(4, 64, seed=step, dtype=torch.float32)
        found = fixed.run(h_ND, 3, 6, fixed.rows(spans), ours)
        expected = packed.run(h_ND, 3, 6, packed.rows(spans), theirs)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert fixed.num_bytes == packed.num_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@torch.inference_mode()
def test_in_lower_precisions_it_is_as_near_to_the_truth_as_ragged_passes(dtype):
    exact = tiny_model(seed=7)
    model = tiny_model(seed=7, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the same, rounded
    spans = [[Span(0, 0, 9), Span(1, 0, 4)], [Span(0, 9, 1), Span(1, 4, 2)], [Span(1, 6, 3)]]
    found = []
    for network in (PackedNetwork(exact), PackedNetwork(model), FixedNetwork(model)):
        memory, outs = network.new_memory(), []
        memory.reserve(2, 20)
        for step, now in enumerate(spans):
            h_ND = random(sum(span.count for span in now), 32, seed=step).to(network.dtype)
            h_ND = network.run(h_ND, 1, 6, network.rows(now), memory)
            outs.append(network.answers(6, h_ND, [])[0].double())
        found.append(torch.cat(outs))
    error, packed_error = ((x - found[0]).abs().max() for x in (found[2], found[1]))
    assert 0 < error < 2.5 * packed_error


# --- what is recorded ---


@torch.inference_mode()
def test_what_is_recorded_asks_for_no_value_and_takes_nothing_from_the_host():
    model = tiny_model(seed=3, sliding_window=5, sliding_layers=(2, 5, 6), qk_norm=True).to("meta")  # has no values
    network, works = FixedNetwork(model), []
    network.graphs.run = lambda key, work: works.append((key, work))
    memory = network.new_memory()
    memory.reserve(4, 50)
    rows = network.rows([Span(0, 0, 3), Span(2, 40, 1)])
    h_ND = torch.zeros(4, 32, dtype=torch.float64, device="meta")
    network.run(h_ND, 1, 6, rows, memory)
    network.attended(2, h_ND, rows, memory)
    for layer in STOPS:
        with pytest.raises(NotImplementedError, match="meta"):  # here, and not before, values are asked for
            network.answers(layer, h_ND, ["max_prob", "margin", "entropy"])
    assert len(works) == 2 + len(STOPS)
    for _, work in works:
        watch = Watch("meta")
        with watch:
            work()
        assert len(watch.operations) > 5


@torch.inference_mode()
def test_a_shape_is_recorded_when_it_comes_again_and_played_from_then_on():
    network = played(MODEL)
    memory = network.new_memory()
    memory.reserve(2, 100)
    counts = []
    for position in range(70):
        network.run(random(1, 32), 1, 6, network.rows([Span(1, position, 1)]), memory)
        counts.append((network.graphs.recorder.num_recorded, network.graphs.recorder.num_played))
    assert counts[0] == (0, 0)
    assert counts[1:64] == [(1, n) for n in range(1, 64)]
    assert counts[64:] == [(1, 63), *((2, n) for n in range(64, 69))], "more keys, once"


@torch.inference_mode()
def test_recordings_belong_to_one_memory_as_it_was_then():
    network, packed = played(MODEL), PackedNetwork(MODEL)
    memories = [[one.new_memory() for one in (network, packed)] for _ in range(2)]
    for position in range(12):
        for number, pair in enumerate(memories):
            outs = []
            for one, memory in zip((network, packed), pair, strict=True):
                if position % 4 == 0:
                    memory.reserve(1, 200 if number else 64 + position)  # the one grows, the other doesn't
                h_ND = random(1, 32, seed=2 * position + number)
                outs.append(one.run(h_ND, 1, 6, one.rows([Span(0, position, 1)]), memory))
            torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    assert network.graphs.recorder.num_recorded == 3 + 1
    assert network.graphs.recorder.num_played == 24 - 5, "the table of angles has grown too, after the first pass"


def test_of_more_recordings_than_are_kept_those_used_last_stay():
    graphs, done = Graphs(Played(), most=2), []
    for key in (1, 1, 2, 2, 1, 3, 3, 1):
        graphs.run(key, lambda key=key: done.append(key))
    assert graphs.recorder.num_recorded == 3
    assert graphs.recorder.num_settled == 1
    graphs.run(1, lambda: done.append("anew"))
    assert graphs.recorder.num_recorded == 3
    graphs.run(2, lambda: done.append("anew"))
    assert (done[-1], graphs.recorder.num_settled) == ("anew", 2)


def test_where_nothing_can_be_recorded_work_is_simply_done():
    graphs, done = Graphs(None), []
    for number in range(3):
        graphs.run("key", lambda number=number: done.append(number))
    assert done == [0, 1, 2]


# --- walks ---


def a_walk(network, *, thresholds=(math.inf,) * 5, asked=(1, 0, 1, 1, 2), start=(3, 2, 2, 0, 0), likely=0.5):
    """Of rows 10 .. 15 behind a prompt in slot 1: what comes of it, and the memory."""
    memory = network.new_memory()
    memory.reserve(3, 30)
    network.run(random(10, 32, seed=1), 1, 6, network.rows([Span(1, 0, 10)]), memory)
    legs = [
        Leg(last=stop, start=first, num_asked=num, threshold=threshold, likely=likely)
        for stop, first, num, threshold in zip(STOPS, start, asked, thresholds, strict=True)
    ]
    h_ND, gone = network.walk(random(6, 32, seed=2), 0, legs, Span(1, 10, 6), memory, "max_prob")
    return h_ND, gone, memory


def ahead(model, look_s=math.inf) -> FixedNetwork:
    """A network that starts each next leg before it looks."""
    network = played(model, look_s=look_s)
    network.costs = step_costs(STOPS)
    return network


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

requests = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["full", "early", "speculative"]),
        "threshold": st.sampled_from([0.0, 0.2, 0.4, 0.7]),
        "max_new_tokens": st.integers(1, 14),
        "max_deferred": st.sampled_from([1, 2, 5, 16]),
        "policy": st.sampled_from(["max_prob", "gate", "margin"]),
        "exits": st.sampled_from([None, (1, 3, 5), (3,)]),
        "max_draft": st.sampled_from([1, 3, 8]),
        "always_draft": st.booleans(),
    }
)


@settings(max_examples=25)
@given(
    events=events(requests),
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
    handles = []
    with engine_on(network, model, max_batch=max_batch) as engine, engine_on(packed, model) as other:
        engine.scheduler.max_prompt_rows = chunk
        for kind, *rest in events:
            if kind == "submit":
                handles.append((engine.submit(rest[0], **rest[1]), rest))
            elif kind == "step":
                for _ in range(rest[0]):
                    engine.step()
            elif handles:
                handles[rest[0] % len(handles)][0].cancel()
        for handle, (prompt, options) in handles:
            out = handle.result()
            (expected,) = other.generate([prompt], **options)
            num = len(out.tokens)
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
