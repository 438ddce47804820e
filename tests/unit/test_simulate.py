"""Timelines of schedules: by hand for small ones, and what the paper says of exits in a pipeline."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.plan.simulate import StageCost, simulate
from eellm.schedule.generate import make_schedule
from eellm.schedule.partition import takes

LAYERS = StageCost(forward_s=1.0, input_s=1.0, weight_s=1.0)
NAMES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")


def stages(num_stages, exits=(), *, mode="deferred", head=(0.2, 0.4)):
    """Alike but for heads: early ones on the stages `exits`, the final one on the last."""
    forward, backward = head
    return [
        replace(
            LAYERS,
            exit_mode=mode,
            exit_forward_s=forward * exits.count(stage),
            exit_backward_s=backward * exits.count(stage),
            final_forward_s=forward * (stage == num_stages - 1),
            final_backward_s=backward * (stage == num_stages - 1),
        )
        for stage in range(num_stages)
    ]


def test_two_stages_by_hand():
    timeline = simulate(make_schedule("1f1b", 2, 2), stages(2, (0,), head=(0.5, 1.0)), 0.25)
    ends = {(span.rank, span.microbatch, span.letter): span.end_s for span in timeline.spans}
    assert ends[1, 0, "B"] == 1.25 + 1 + 1.5 + 2  # forward there, head, backward
    assert ends[0, 0, "D"] == ends[1, 0, "B"] + 0.25 + 1.5
    assert timeline.end_s == ends[0, 1, "B"] == ends[1, 1, "B"] + 0.25 + 1.5 + 2
    assert timeline.bubble == pytest.approx(1 - 4 * (3 + 1.5) / (2 * timeline.end_s))


@pytest.mark.parametrize("mode", ["deferred", "eager"])
@pytest.mark.parametrize("num_exits", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [4, 8, 16])
def test_minimal_exits_cost_their_own_time_once_a_step_whatever_the_number_of_microbatches(num_ranks, num_exits, mode):
    for num_microbatches in (num_ranks, 2 * num_ranks, 8 * num_ranks):
        schedule = make_schedule("1f1b", num_ranks, num_microbatches)
        plain = simulate(schedule, stages(num_ranks, mode=mode)).end_s
        exits = simulate(schedule, stages(num_ranks, tuple(range(num_exits)), mode=mode)).end_s
        assert exits - plain == pytest.approx(num_exits * 0.6)


def test_a_second_exit_on_one_stage_costs_with_every_microbatch():
    schedule = make_schedule("1f1b", 4, 32)
    plain, crowded = (simulate(schedule, stages(4, exits)).end_s for exits in ((), (1, 1)))
    assert crowded - plain > 0.6 * 28


MODES = ("deferred", "checkpoint")


def test_a_checkpointed_exit_costs_another_forward():
    schedule = make_schedule("1f1b", 4, 4)
    once, twice = (sum(map(simulate(schedule, stages(4, (1,), mode=mode)).busy_s, range(4))) for mode in MODES)
    assert twice - once == pytest.approx(4 * 2 * 0.2)  # the exit's and the final head's, of four microbatches


seconds = st.floats(0.1, 3.0)
costs = st.builds(StageCost, forward_s=seconds, input_s=seconds, weight_s=seconds, exit_forward_s=seconds)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(NAMES), st.integers(2, 5), st.integers(1, 12), st.floats(0.0, 1.0))
def test_no_schedule_is_faster_than_it_can_be(data, name, num_ranks, num_microbatches, send_s):
    if not takes(name, num_ranks, num_microbatches):
        return
    schedule = make_schedule(name, num_ranks, num_microbatches)
    parts = [data.draw(costs) for _ in range(schedule.num_stages)]
    timeline = simulate(schedule, parts, send_s)
    for rank in range(num_ranks):
        busy = sum(part.total_s for part, at in zip(parts, schedule.ranks, strict=True) if at == rank)
        assert timeline.busy_s(rank) == pytest.approx(busy * num_microbatches)
        assert timeline.end_s >= busy * num_microbatches * (1 - 1e-9)
    way = sum(part.forward_s + part.input_s + part.exit_forward_s for part in parts)
    assert timeline.end_s >= way * (1 - 1e-9)
    ends = dict.fromkeys(range(num_ranks), 0.0)
    for span in timeline.spans:  # a rank does one thing at a time
        assert span.start_s >= ends[span.rank] * (1 - 1e-9)
        ends[span.rank] = span.end_s


def test_sixty_four_stages_with_a_thousand_microbatches():
    timeline = simulate(make_schedule("1f1b", 64, 1024), stages(64, (15, 31)), 0.01)
    assert len(timeline.spans) == 64 * 1024 * 2 + 3 * 1024
