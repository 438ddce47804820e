"""Microbatches that fill bubbles: gradients equal a single process's that computes the same partial losses."""

import pytest

from eellm import ExitConfig
from eellm.config.parallel import ParallelConfig
from tests.distributed.filled_step import FilledStep, found_differences, run_filled_steps
from tests.distributed.one_step import SIZES
from tests.models import tiny_config
from tests.ranks import run_on_ranks


def filled_step(layers, *, mistake=None, **parallel):
    exits = tuple(ExitConfig(layer=n, kind="mlp" if n % 2 else "norm", head="own", norm="own") for n in layers)
    model = tiny_config(**SIZES | {"exits": exits, "tie_embeddings": False})
    return FilledStep(model, ParallelConfig(schedule="filled_1f1b", **parallel), mistake)


def differences_of(num_processes, steps):
    ranks = run_on_ranks(num_processes, run_filled_steps, steps, timeout_s=280)
    return [found_differences(step, list(outcomes)) for step, *outcomes in zip(steps, *ranks, strict=True)]


def test_four_stages_with_exits_anywhere_equal_one_process():
    steps = [filled_step(layers, pp=4, num_microbatches=n) for layers in ([1, 2, 5], [4], [7], []) for n in (4, 6)]
    steps += [filled_step([2, 4], pp=4, num_microbatches=4, exit_placement="next_stage")]
    steps += [filled_step([2, 4], pp=4, num_microbatches=4, exit_mode="eager", recompute="full")]
    assert [len(step.filled.extras) for step in steps] == [4] * len(steps)
    assert differences_of(4, steps) == [[]] * len(steps)


@pytest.mark.parametrize("other", [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}], ids=str)
def test_beside_other_axes(other):
    step = filled_step([2, 4], pp=3, num_microbatches=3, **other)
    assert len(step.filled.extras) == 2
    assert differences_of(6, [step]) == [[]]


def test_two_stages_have_no_room_and_run_1f1b():
    step = filled_step([2, 4], pp=2, num_microbatches=4)
    assert step.filled.extras == ()
    assert differences_of(2, [step]) == [[]]


def test_a_missing_factor_is_noticed():
    (found,) = differences_of(4, [filled_step([2], pp=4, num_microbatches=4, mistake="gradients aren't scaled")])
    assert any("gradient of decoder.layers.8" in entry for entry in found)
