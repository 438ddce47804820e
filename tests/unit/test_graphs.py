"""What is recorded: when, for which memory, how much of it; and what happens where it can't be."""

import pytest
import torch

from eellm.infer.attention import Span
from eellm.infer.fixed import FixedNetwork
from eellm.infer.graphs import Graphs
from eellm.infer.packed import PackedNetwork
from tests.fixed import MODEL, STOPS, played, random
from tests.models import tiny_model
from tests.played import Played, Watch


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


class Refuses:
    """A recorder on a device that records nothing."""

    def __init__(self):
        self.num_asked = 0

    def record(self, work):
        self.num_asked += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    def settle(self):
        raise AssertionError("nothing was recorded")


def test_a_device_that_can_t_record_does_the_work_and_is_asked_once(caplog):
    recorder, done = Refuses(), []
    graphs = Graphs(recorder)
    for number in range(4):
        graphs.run("key", lambda number=number: done.append(number))
    assert done == [0, 1, 2, 3]
    assert recorder.num_asked == 1
    assert "operation by operation: operation not permitted" in caplog.text


def test_work_that_was_broken_off_has_not_been_done_once():
    graphs, done = Graphs(Played()), []

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphs.run("key", interrupted)
    graphs.run("key", lambda: done.append(0))
    assert (done, graphs.recorder.num_recorded) == ([0], 0), "the first whole time is the one that isn't recorded"
