"""Microbatches that fill bubbles: gradients equal a single process's that computes the same partial losses."""

from dataclasses import replace
from pathlib import Path

import pytest

from eellm import ExitConfig
from eellm.config.load import from_toml
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TrainConfig
from eellm.train.check import resolve
from tests.distributed.filled_step import FilledStep, found_differences, run_filled_steps, run_recipe
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


def recipe(*, head="own", **parallel):
    config = from_toml(TrainConfig, Path(__file__).parents[2] / "recipes" / "debug.toml")
    exits = tuple(replace(exit, head=head, norm="own") for exit in config.model.exits)
    return resolve(
        replace(
            config,
            model=replace(config.model, exits=exits, tie_embeddings=False),
            data=replace(config.data, seq_len=16, validation_rows=5),
            train=replace(config.train, global_batch_size=8, steps=3),
            parallel=ParallelConfig(pp=4, num_microbatches=8, **parallel),
        )
    )


def test_a_run_takes_more_rows_and_reports_the_regular_ones():
    filled, *_ = run_on_ranks(4, run_recipe, recipe(schedule="filled_1f1b"), timeout_s=280)
    plain, *_ = run_on_ranks(4, run_recipe, recipe(schedule="1f1b"), timeout_s=280)
    assert plain.measured is None
    assert all(forward > 0 and backward > 0 for forward, backward in filled.measured)
    assert (filled.num_extra, plain.num_extra) == (4, 0)
    assert (filled.num_rows_taken, plain.num_rows_taken) == (3 * (8 + 4), 3 * 8)
    assert filled.before == pytest.approx(plain.before, rel=1e-6)
    first, expected = filled.rows[0], plain.rows[0]  # of the same weights and rows
    assert {key: x for key, x in first.items() if key != "grad_norm"} == pytest.approx(
        {key: x for key, x in expected.items() if key != "grad_norm"}, rel=1e-6
    )
    assert first["grad_norm"] != pytest.approx(expected["grad_norm"], rel=1e-6)
    extras = {(span.microbatch, span.rank) for span in filled.timeline.spans if span.is_extra}
    assert {microbatch for microbatch, _ in extras} == {8, 9, 10, 11}
    assert {rank for _, rank in extras} == {0, 1, 2, 3}


def test_matrices_that_stages_share_are_refused():
    with pytest.raises(
        AssertionError, match=r"ConfigError: parallel.schedule = 'filled_1f1b': stages .* share .* or 1f1b"
    ):
        run_on_ranks(4, run_recipe, recipe(head="tied", schedule="filled_1f1b"), timeout_s=280)
