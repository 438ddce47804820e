"""What a step will cost: exits, bounds, filling, estimates from shorter steps."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eellm import ExitConfig
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TextConfig, TrainConfig, TrainLoopConfig
from eellm.errors import ConfigError
from eellm.plan.forecast import estimate, exit_forecasts, forecast, overhead_of_exits, prepare
from eellm.plan.hardware import find_hardware
from tests.models import tiny_config

HARDWARE = find_hardware("a100-80")
SCHEDULES = ("gpipe", "1f1b", "filled_1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv")


def recipe(layers=(), *, num_layers=16, rows=64, **parallel):
    """Layers that cost far more than a head."""
    exits = tuple(ExitConfig(layer=n, kind="embed", head="own") for n in layers)
    model = tiny_config(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_heads=8, num_layers=num_layers, exits=exits
    )
    model = replace(model, max_seq_len=1024, tie_embeddings=False)
    return TrainConfig(
        model=model,
        data=TextConfig(train=("text",), seq_len=1024),
        train=TrainLoopConfig(out_dir="run", global_batch_size=rows, dtype="bfloat16"),
        parallel=ParallelConfig(**parallel),
    )


def test_each_exit_is_charged_the_difference_that_it_makes():
    config = recipe((4, 8), pp=4, num_microbatches=16, layers_per_stage=(4, 4, 4, 4))
    exits = exit_forecasts(config, HARDWARE)
    assert [(each.layer, each.stage) for each in exits] == [(4, 0), (8, 1)]
    whole = forecast(config, HARDWARE).iteration_s
    assert overhead_of_exits(config, HARDWARE) == pytest.approx(sum(e.cost_s for e in exits) / whole, rel=0.05)
    moved = exit_forecasts(replace(config, parallel=replace(config.parallel, exit_placement="next_stage")), HARDWARE)
    assert [(each.layer, each.stage) for each in moved] == [(4, 1), (8, 2)]


def test_one_process_pays_for_an_exit_with_every_microbatch():
    config = recipe((4,), num_microbatches=16)
    (exit,) = exit_forecasts(config, HARDWARE)
    parts, (cost,) = prepare(config, HARDWARE), prepare(config, HARDWARE).costs
    end_s = prepare(replace(config, model=replace(config.model, exits=())), HARDWARE).end_s
    assert exit.cost_s == pytest.approx(16 * (cost.exit_forward_s + cost.exit_backward_s) + parts.end_s - end_s)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    pp=st.integers(2, 4),
    times=st.integers(2, 24),
    layers=st.sets(st.integers(1, 15), max_size=3),
    placement=st.sampled_from(["stay", "next_stage", "auto"]),
)
@example(schedule="zbv", pp=4, times=12, layers={1, 6, 14}, placement="next_stage")
@example(schedule="zbv", pp=4, times=10, layers={1, 10, 14}, placement="next_stage")
@example(schedule="zbv", pp=2, times=24, layers={1, 2}, placement="stay")
def test_bounds_hold_and_short_steps_tell_of_long_ones(schedule, pp, times, layers, placement):
    config = recipe(
        tuple(sorted(layers)),
        rows=pp * times,
        pp=pp,
        num_microbatches=pp * times,
        schedule=schedule,
        exit_placement=placement,
    )
    parts = prepare(config, HARDWARE)
    whole = forecast(config, HARDWARE)
    assert whole.iteration_s >= parts.least_s * (1 - 1e-9)
    seconds, num_bytes = estimate(parts, HARDWARE)
    assert seconds == pytest.approx(whole.iteration_s, rel=2e-3)
    assert num_bytes == pytest.approx(max(whole.memory_bytes), rel=1e-6)
    assert 0 <= whole.bubble < 1


def test_filling_makes_use_of_idle_time_and_takes_no_longer():
    layout = {"pp": 4, "num_microbatches": 16, "layers_per_stage": (4, 4, 4, 4)}
    plain = forecast(recipe((4, 8), **layout), HARDWARE)
    filled = forecast(recipe((4, 8), schedule="filled_1f1b", **layout), HARDWARE)
    assert len(filled.schedule.extras) >= 3
    assert filled.iteration_s <= plain.iteration_s * (1 + 1e-9)
    assert filled.bubble < plain.bubble


def test_a_layout_that_cannot_be_is_refused_with_the_nearest_that_can():
    with pytest.raises(ConfigError, match="use at most 16 stages"):
        forecast(recipe(pp=32, rows=64, num_microbatches=64), HARDWARE)
    with pytest.raises(ConfigError, match="the nearest that work: 4 and 8"):
        forecast(recipe(pp=4, rows=64, num_microbatches=2), HARDWARE)
