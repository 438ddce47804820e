"""Passes of few fixed shapes give what passes of any shape do; played again, too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.infer import cells
from eellm.infer.attention import Span
from eellm.infer.fixed import FixedNetwork
from eellm.infer.grid import MOST_CELLS
from eellm.infer.packed import PackedNetwork
from tests.fixed import MODEL, WINDOWED, parts, played, random, reorder
from tests.models import tiny_model


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
