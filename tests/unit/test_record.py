"""What a recorder takes down, on a clock that goes on by one whenever it is read."""

from itertools import count

import pytest
import torch

from eellm.parallel.mesh import World
from eellm.pipeline.record import Recorder, recording
from eellm.pipeline.stage import StepLosses


@pytest.fixture
def recorder():
    ticks = count()
    recorder = Recorder(World(), num_microbatches=2, clock=lambda: float(next(ticks)))
    recorder.start()
    return recorder


def pieces(recorder):
    return [(s.letter, s.stage, s.microbatch, s.start_s, s.end_s) for s in recorder.timeline().spans]


def test_a_deferred_head_cuts_the_backward_that_it_runs_in(recorder):
    x = torch.ones(1, requires_grad=True)
    with recording(recorder, "F", 1, 0):
        y = recorder.head(lambda h: h * 2, x * 3, is_final=False, is_deferred=True)
    with recording(recorder, "B", 1, 0):
        y.backward()
    assert x.grad == 6
    assert pieces(recorder) == [("F", 1, 0, 0, 1), ("B", 1, 0, 2, 3), ("D", 1, 0, 3, 4), ("B", 1, 0, 4, 5)]


def test_an_eager_head_cuts_both(recorder):
    x = torch.ones(1, requires_grad=True)
    with recording(recorder, "F", 0, 1):
        y = recorder.head(lambda h: h + h * h, x * 3, is_final=True, is_deferred=False)
    with recording(recorder, "B", 0, 1):
        y.backward()
    assert x.grad == 21
    assert [letter for letter, *_ in pieces(recorder)] == ["F", "H", "F", "B", "h", "B"]


def test_two_heads_are_two_pieces(recorder):
    with recording(recorder, "F", 0, 0):
        h = torch.ones(1, requires_grad=True) * 3
        for is_final in (False, True):
            h = recorder.head(lambda h: h * 2, h * 1, is_final=is_final, is_deferred=True)
    with recording(recorder, "B", 0, 0):
        h.backward()
    assert [letter for letter, *_ in pieces(recorder)] == ["F", "B", "H", "B", "D", "B"]


def test_a_gradient_that_passes_again_without_its_head_leaves_the_work_as_it_is(recorder):
    with recording(recorder, "F", 0, 0):
        x = torch.ones(1, requires_grad=True) * 3
        recorder.head(lambda h: h * 2, x, is_final=False, is_deferred=True)
    with recording(recorder, "W", 0, 0):
        x.backward()
        recorder._clock()
    assert pieces(recorder) == [("F", 0, 0, 0, 1), ("W", 0, 0, 2, 4)]


def test_microbatches_beyond_the_regular_ones_fill_bubbles(recorder):
    for microbatch in range(3):
        with recording(recorder, "F", 0, microbatch):
            pass
    assert [span.is_extra for span in recorder.timeline().spans] == [False, False, True]


def test_time_begins_with_the_first_span(recorder):
    recorder._clock()
    with recording(recorder, "F", 0, 0):
        pass
    assert pieces(recorder) == [("F", 0, 0, 0, 1)]


class Pair(World):
    """This process, and one whose clock is 100 ahead of ours and which looked late at two of the barriers."""

    def axis_size(self, axis):
        return 2

    def gather(self, value):
        met_s, spans = value
        late = [t + 100 + 7 * (i in (0, 5)) for i, t in enumerate(met_s)]
        return [
            value,
            (late, [span._replace(rank=1, start_s=span.end_s + 100, end_s=span.end_s + 101) for span in spans]),
        ]


def test_ranks_are_put_on_one_clock_also_where_one_looked_late():
    ticks = count()
    recorder = Recorder(Pair(), num_microbatches=1, clock=lambda: float(next(ticks)))
    recorder.start()
    with recording(recorder, "F", 0, 0):
        pass
    assert [(s.rank, s.start_s, s.end_s) for s in recorder.timeline().spans] == [(0, 0, 1), (1, 1, 2)]


def test_without_a_recorder_nothing_is_taken_down():
    with recording(None, "F", 0, 0):
        assert StepLosses({}).recorder is None
