"""Filling bubbles: what fits, what the factors are, that gradients stay unbiased and get less noisy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm import ExitConfig
from eellm.config.parallel import ParallelConfig
from eellm.plan.layout import plan_stages
from eellm.plan.simulate import StageCost, fill_bubbles, simulate
from eellm.schedule.action import Work
from eellm.schedule.check import check, peak_in_flight
from eellm.schedule.fill import fill_scales, is_part_1, max_extras
from eellm.schedule.generate import make_schedule
from tests.distributed.filled_step import partial_losses, stage_of
from tests.distributed.one_step import SIZES, batch, whole_model
from tests.models import tiny_config


def alike(num_stages, ratio=2.0):
    return [StageCost(forward_s=1.0, input_s=ratio / 2, weight_s=ratio / 2)] * num_stages


def depths(filled):
    """Of Part 1 the number of stages that each extra runs through, of Part 2 that each learns from."""
    part_1 = [work.forward_end for work in filled.extras if is_part_1(work)]
    return part_1, [work.backward_end - work.backward_start for work in filled.extras if not is_part_1(work)]


@pytest.mark.parametrize("num_ranks", range(2, 17))
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0])
def test_stages_that_are_alike_have_room_for_as_many_as_the_paper_says(num_ranks, ratio):
    filled = fill_bubbles(make_schedule("1f1b", num_ranks, 3 * num_ranks), alike(num_ranks, ratio))
    room = int((num_ranks - 1) * ratio / (1 + ratio) + 1e-9)
    part_1, part_2 = depths(filled)
    assert part_1 == [room + 1 - i for i in range(1, room + 1)]
    expected = [int(num_ranks - i * (1 / ratio + 1) + 1e-9) for i in range(1, room + 1)]
    assert part_2 == [depth for depth in expected if depth > 0]
    assert max_extras(num_ranks, ratio) == room


def test_two_stages_have_no_room():
    assert max_extras(2, 2.0) == 0
    assert fill_bubbles(make_schedule("1f1b", 2, 8), alike(2)).extras == ()


costs = st.builds(
    StageCost,
    forward_s=st.floats(0.5, 2.0),
    input_s=st.floats(0.5, 2.0),
    weight_s=st.floats(0.5, 2.0),
    exit_forward_s=st.floats(0.0, 1.0),
    exit_backward_s=st.floats(0.0, 1.0),
    final_forward_s=st.floats(0.0, 1.0),
    exit_mode=st.sampled_from(["deferred", "eager", "checkpoint"]),
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 12), st.floats(0.0, 0.7))
def test_a_filled_schedule_is_valid_and_takes_no_longer(data, num_ranks, more, send_s):
    stages = [data.draw(costs) for _ in range(num_ranks)]
    plain = make_schedule("1f1b", num_ranks, num_ranks + more)
    filled = fill_bubbles(plain, stages, send_s)
    check(filled)
    before, after = simulate(plain, stages, send_s), simulate(filled, stages, send_s)
    assert after.end_s <= before.end_s * (1 + 1e-9)
    regular = range(plain.num_microbatches)
    assert [[a for a in order if a.microbatch in regular] for order in filled.orders] == list(map(list, plain.orders))
    busy = sum(stage.total_s for stage in stages) * plain.num_microbatches
    extra = sum(span.end_s - span.start_s for span in after.spans if span.is_extra)
    assert sum(map(after.busy_s, range(num_ranks))) == pytest.approx(busy + extra)
    assert (extra > 0) == bool(filled.extras)
    # torch looks a loss up by its place in the order in which microbatches reach the last stage
    arrivals = [action.microbatch for action in filled.orders[-1] if action.kind == "F"]
    assert arrivals == list(range(len(arrivals)))
    assert max(peak_in_flight(filled)) <= num_ranks + max_extras(num_ranks, 100.0) + 1


def test_factors_of_a_stage_count_the_extras_that_reach_it():
    filled = fill_bubbles(make_schedule("1f1b", 4, 8), alike(4))
    assert filled.extras == (Work(8, 4, 2, 4), Work(9, 4, 3, 4), Work(10, 2, 0, 2), Work(11, 1, 0, 1))
    scales = fill_scales(filled)
    assert [scale.loss for scale in scales] == [8 / 10, 8 / 9, 1.0, 1.0]
    assert [scale.gradient for scale in scales] == [1.0, 1.0, 8 / 9, 8 / 10]


@pytest.fixture(scope="module")
def gradients():
    """By stage of the loss, stage of the parameters and microbatch: the gradient, flat."""
    exits = tuple(ExitConfig(layer=n, kind="norm", head="own", norm="own") for n in (2, 4))
    config = tiny_config(**SIZES | {"exits": exits, "tie_embeddings": False})
    stages = plan_stages(config, ParallelConfig(pp=4, layers_per_stage=(2, 2, 2, 2)))
    model, (rows, _) = whole_model(config), batch(24)
    found = {}
    for n in range(24):
        row = rows.part(slice(n, n + 1))
        losses = partial_losses(model, stages, row, Work(n, 4, 0, 4))
        for stage, loss in losses.values():
            model.zero_grad()
            loss.backward(retain_graph=True)
            for j in range(4):
                flat = [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for name, p in model.named_parameters()
                    if stage_of(name, stages, config) == j
                ]
                found[stage, j, n] = torch.cat(flat).numpy().copy()
    return found


@pytest.mark.parametrize("stage", range(4))
def test_the_mean_gradient_is_the_plain_one_and_its_variance_lower(gradients, stage):
    regular, num_pool, num_draws = 8, 24, 4000
    filled = fill_bubbles(make_schedule("1f1b", 4, regular), alike(4))
    scales, losses = fill_scales(filled), sorted({s for s, j, _ in gradients if j == stage and s >= stage})
    pool = {s: np.stack([gradients[s, stage, n] for n in range(num_pool)]) for s in losses}
    expected = regular * sum(each.mean(0) for each in pool.values())
    picks = np.random.default_rng(0).integers(num_pool, size=(num_draws, len(filled.works)))

    def counted(s, work):
        """By what the loss at stage `s` of a microbatch counts in the gradient of `stage`."""
        if is_part_1(work):
            return scales[s].loss if s < work.forward_end else 0.0
        return 1.0 if work.backward_start <= stage else 0.0

    plain = sum(pool[s][picks[:, :regular]].sum(1) for s in losses)
    weights = {s: np.array([counted(s, work) for work in filled.works]) for s in losses}
    drawn = scales[stage].gradient * sum(np.einsum("tnd,n->td", pool[s][picks], weights[s]) for s in losses)
    deviation = np.abs(drawn.mean(0) - expected) / (drawn.std(0) / num_draws**0.5 + 1e-12)
    assert np.sqrt((deviation**2).mean()) < 1.3  # 1 where only chance is left
    assert drawn.var(0).sum() < 0.98 * plain.var(0).sum()
    biased = drawn / scales[stage].gradient if scales[stage].gradient < 1 else None
    if biased is not None:
        off = np.abs(biased.mean(0) - expected) / (biased.std(0) / num_draws**0.5 + 1e-12)
        assert np.sqrt((off**2).mean()) > 5  # so a missing factor would be seen
