"""Layer dropout: its rates by depth and time, and a mask that no layout can change."""

import math

import numpy as np
import pytest

from eellm.config.train import LossConfig
from eellm.train.dropout import keep_mask, layer_dropout_rates


def rates(num_layers=5, step=1, num_steps=11, **options):
    return layer_dropout_rates(LossConfig(layer_dropout=0.4, **options), num_layers, step, num_steps)


def test_rates_grow_exponentially_from_zero_to_that_of_the_recipe():
    expected = [0.4 * (math.exp((layer - 1) * math.log(2) / 4) - 1) for layer in range(1, 6)]
    assert rates() == pytest.approx(expected)
    assert rates()[0] == 0
    assert rates()[-1] == pytest.approx(0.4)


def test_a_constant_schedule_has_the_same_rates_throughout():
    assert list(rates(step=1)) == list(rates(step=11))


def test_an_exponential_schedule_starts_from_zero_and_ends_at_the_full_rates():
    found = [rates(step=step, dropout_schedule="exponential")[-1] for step in range(1, 12)]
    assert found == pytest.approx([0.4 * (math.exp(t * math.log(2) / 10) - 1) for t in range(11)])
    assert found[0] == 0
    assert found[-1] == pytest.approx(0.4)


def test_the_only_layer_of_a_model_is_never_skipped():
    assert list(rates(num_layers=1)) == [0]


def test_a_run_of_one_step_has_rates():
    assert np.isfinite(rates(num_steps=1, dropout_schedule="exponential")).all()


def test_rows_are_kept_as_often_as_the_rates_say():
    found = 1 - keep_mask(rates(), num_rows=20_000, seed=1, step=3).mean(0)
    assert found == pytest.approx(rates(), abs=0.015)
    assert found[0] == 0


def test_rates_of_zero_skip_nothing_and_of_one_everything():
    mask = keep_mask(np.array([0.0, 1.0]), num_rows=1000, seed=0, step=1)
    assert mask.dtype == bool
    assert mask[:, 0].all()
    assert not mask[:, 1].any()


def test_the_mask_is_a_function_of_seed_and_step():
    def mask(**changes):
        return keep_mask(np.full(8, 0.5), **({"num_rows": 16, "seed": 1, "step": 2} | changes))

    assert (mask() == mask()).all()
    assert (mask() != mask(seed=2)).any()
    assert (mask() != mask(step=3)).any()


def test_a_row_s_mask_does_not_depend_on_the_rows_behind_it():
    few, many = (keep_mask(np.full(8, 0.5), num_rows=n, seed=1, step=2) for n in (6, 16))
    assert (few == many[:6]).all()


def test_rows_and_layers_are_drawn_apart():
    mask = keep_mask(np.full(8, 0.5), num_rows=16, seed=1, step=2)
    assert len(np.unique(mask, axis=0)) > 8
    assert len(np.unique(mask, axis=1).T) == 8
