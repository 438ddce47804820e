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


def test_a_gradient_that_passes_again_without_its_head_is_part_of_the_work(recorder):
    with recording(recorder, "F", 0, 0):
        x = torch.ones(1, requires_grad=True) * 3
        recorder.head(lambda h: h * 2, x, is_final=False, is_deferred=True)
    with recording(recorder, "W", 0, 0):
        x.backward()
    assert [letter for letter, *_ in pieces(recorder)] == ["F", "W"]


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


def test_without_a_recorder_nothing_is_taken_down():
    with recording(None, "F", 0, 0):
        assert StepLosses({}).recorder is None
