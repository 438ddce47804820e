"""Weights of the exits' losses over a run: schedules, curricula, and what is refused."""

import pytest

from eellm.config.train import LossConfig
from eellm.errors import ConfigError
from eellm.train.weights import check_weights, exit_weights

LAYERS = (2, 4, 7)
FINALS = (0.1, 0.2, 0.4)


def weights_at(step, num_steps=100, layers=LAYERS, **options):
    return exit_weights(LossConfig(**options), layers, step, num_steps)


def layers_at(step, num_steps=100, layers=LAYERS, **options):
    return {layer for layer, weight in weights_at(step, num_steps, layers, **options).items() if weight}


def test_unset_weights_are_three_tenths_each_at_every_step():
    assert weights_at(1) == weights_at(100) == {2: 0.3, 4: 0.3, 7: 0.3}


def test_constant_weights_ignore_warm_up_and_initial_weights():
    options = {"exit_weights": FINALS, "initial_weights": (9.0, 9.0, 9.0), "weight_warmup_steps": 50}
    assert weights_at(1, **options) == dict(zip(LAYERS, FINALS, strict=True))


def test_a_linear_schedule_starts_from_zero_and_is_there_at_the_end_of_the_warm_up():
    options = {"exit_weights": FINALS, "weight_schedule": "linear", "weight_warmup_steps": 10}
    assert weights_at(1, **options) == pytest.approx({2: 0.01, 4: 0.02, 7: 0.04})
    assert weights_at(5, **options) == pytest.approx({2: 0.05, 4: 0.1, 7: 0.2})
    assert weights_at(10, **options) == weights_at(99, **options) == pytest.approx({2: 0.1, 4: 0.2, 7: 0.4})


def test_a_cosine_schedule_is_slow_at_both_ends():
    options = {"exit_weights": (1.0, 1.0, 1.0), "weight_schedule": "cosine", "weight_warmup_steps": 4}
    found = [weights_at(step, **options)[4] for step in range(6)]
    assert found == pytest.approx([0, 0.1464466, 0.5, 0.8535534, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_larger_initial_weights_make_a_cool_down(schedule):
    options = {"exit_weights": FINALS, "initial_weights": (1.1, 1.2, 1.4), "weight_warmup_steps": 10}
    found = weights_at(5, weight_schedule=schedule, **options)
    assert found == pytest.approx({2: 0.6, 4: 0.7, 7: 0.9})
    assert weights_at(10, weight_schedule=schedule, **options) == pytest.approx({2: 0.1, 4: 0.2, 7: 0.4})


def test_without_a_warm_up_the_weights_are_there_at_once():
    assert weights_at(1, exit_weights=FINALS, weight_schedule="linear")[7] == 0.4


def test_the_rotational_curriculum_takes_every_exit_once_a_period_and_keeps_its_weight():
    options = {"curriculum": "rotational", "curriculum_period": 3, "exit_weights": FINALS}
    # (layer - 1 - step) mod 3 = 0: layer 2 in steps 1, 4, 7, ...; layers 4 and 7 in steps 3, 6, 9, ...
    assert [layers_at(step, **options) for step in range(1, 7)] == [{2}, set(), {4, 7}, {2}, set(), {4, 7}]
    assert weights_at(3, **options) == {2: 0.0, 4: 0.2, 7: 0.4}


def test_the_gradual_curriculum_adds_exits_from_the_top_and_has_all_at_half_of_the_run():
    found = [layers_at(step, num_steps=60, curriculum="gradual") for step in range(1, 61)]
    assert found == [set()] * 9 + [{7}] * 10 + [{4, 7}] * 10 + [{2, 4, 7}] * 31


def test_a_model_without_early_exits_has_no_weights():
    for curriculum in ("none", "rotational", "gradual"):
        assert weights_at(1, layers=(), curriculum=curriculum) == {}


@pytest.mark.parametrize("name", ["exit_weights", "initial_weights"])
def test_too_few_or_too_many_weights_are_refused_with_the_number_of_exits(name):
    for weights in ((0.1, 0.2), (0.1,) * 4):
        with pytest.raises(ConfigError, match=rf"objective\.{name}.*has 3 early exits, after layers 2, 4, 7"):
            check_weights(LossConfig(**{name: weights}), LAYERS)
    with pytest.raises(ConfigError, match="has 0 early exits;"):
        check_weights(LossConfig(**{name: (0.1,)}), ())
    check_weights(LossConfig(**{name: FINALS}), LAYERS)
    check_weights(LossConfig(), LAYERS)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_negative_and_infinite_weights_are_refused(bad):
    with pytest.raises(ConfigError, match=r"objective\.exit_weights.*at least 0"):
        check_weights(LossConfig(exit_weights=(0.1, bad, 0.1)), LAYERS)
