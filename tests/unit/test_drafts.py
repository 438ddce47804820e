"""What speculation is worth: formulas against rounds that are played, and a guard that never recommends a loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.infer.drafts import Acceptance, best_draft, best_lookup, expected_tokens, plain
from tests.step_costs import step_costs

SURE = (1.0, 0.7)


def played_rounds(generator, costs, layer, num_drafts, bonus, *, alpha, sure, gated, num_rounds=4000):
    """Tokens and seconds of rounds, played row by row: seconds per token."""
    tokens = seconds = 0.0
    last = costs.num_layers
    for _ in range(num_rounds):
        drafted, rows = 0, 0
        while True:
            rows += 1
            seconds += costs.pass_s(0, layer, 1)
            if drafted == num_drafts:
                break  # the bonus row
            is_sure = generator.random() < sure
            seconds += costs.test_s(layer, 1, is_sure, gated=gated)
            drafted += is_sure
            if not is_sure or (drafted == num_drafts and not bonus):
                break
        seconds += costs.pass_s(layer, last, rows) + costs.head_s[last].at(rows)
        right = 0
        while right < drafted and generator.random() < alpha:
            right += 1
        tokens += right + (
            right < rows
        )  # the final exit's own token, where it has read a row behind the last right one
    return seconds / tokens


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("num_drafts", [1, 2, 5])
@pytest.mark.parametrize("bonus", [False, True])
def test_expected_tokens_are_those_of_rounds_that_are_played(alpha, num_drafts, bonus):
    right = np.random.default_rng(0).random((20_000, num_drafts)) < alpha
    num_right = right.cumprod(1).sum(1)
    tokens = num_right + (bonus | (num_right < num_drafts))
    assert expected_tokens(alpha, num_drafts, bonus) == pytest.approx(tokens.mean(), rel=0.02)


@given(alpha=st.floats(0, 1), more=st.floats(0, 1), num_drafts=st.integers(1, 20), bonus=st.booleans())
@settings(max_examples=50, deadline=None)
def test_tokens_grow_with_acceptance_and_length(alpha, more, num_drafts, bonus):
    tokens = expected_tokens(alpha, num_drafts, bonus)
    assert 1 <= tokens <= expected_tokens(max(alpha, more), num_drafts, bonus) <= num_drafts + bonus
    assert tokens <= expected_tokens(alpha, num_drafts + 1, bonus)
    assert expected_tokens(alpha, num_drafts, True) == pytest.approx(
        expected_tokens(alpha, num_drafts, False) + alpha**num_drafts
    )


@pytest.mark.parametrize("sure", SURE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("layer", "layer_row_s", "alpha"), [(2, 0.0, 0.8), (4, 0.05, 0.9), (2, 0.3, 0.6)])
def test_the_best_plan_is_the_fastest_of_all_rounds_that_are_played(sure, gated, layer, layer_row_s, alpha):
    costs = step_costs((2, 4, 12), layer_row_s=layer_row_s, head_s=1.5, head_row_s=0.1, gate_s=0.2, overhead_s=0.1)
    generator = np.random.default_rng(1)
    played = {
        (num, bonus): played_rounds(generator, costs, layer, num, bonus, alpha=alpha, sure=sure, gated=gated)
        for num in range(1, 6)
        for bonus in (False, True)
    }
    plan = best_draft(alpha, costs, layer, 5, sure=sure, gated=gated, margin=-1)
    assert plan.seconds_per_token == pytest.approx(played[plan.num_drafts, plan.bonus], rel=0.02)
    assert plan.seconds_per_token <= min(played.values()) * 1.02
    assert plan.layer == layer


def test_the_bonus_row_goes_along_where_its_token_is_likely_enough():
    """C1's rule, costs being layers: α^d > E / (layers per token)."""
    costs = step_costs((4, 12), head_s=1e-9)
    for alpha, num_drafts in ((0.95, 3), (0.5, 3), (0.9, 1), (0.2, 1)):
        without = (4 * num_drafts + 8) / expected_tokens(alpha, num_drafts, False)
        expected = alpha**num_drafts > 4 / without
        plans = [best_draft(alpha, costs, 4, most, margin=-1) for most in range(1, num_drafts + 1)]
        if plans[-1].num_drafts == num_drafts:
            assert plans[-1].bonus == expected
    assert best_draft(0.95, costs, 4, 1, margin=-1).bonus
    assert not best_draft(0.2, costs, 4, 1, margin=-1).bonus


def test_looked_up_drafts_cost_only_their_rows():
    costs = step_costs((4, 12), layer_s=1.0, layer_row_s=0.1, head_s=2.0, head_row_s=0.5, overhead_s=0.5)
    seconds = {
        num: (12 * (1 + 0.1 * num) + 2 + 0.5 * num + 0.5) / sum(0.7**i for i in range(num + 1)) for num in range(9)
    }
    plan = best_lookup(0.7, costs, 8)
    assert plan.num_drafts == min(seconds, key=seconds.get) > 0
    assert plan.seconds_per_token == pytest.approx(min(seconds.values()))
    assert plan.bonus
    assert plan.layer == 12


def test_what_a_batch_shares_is_what_its_rows_share():
    by_row = step_costs((2, 12), layer_s=1.0, layer_row_s=1.0, head_s=2.0, head_row_s=2.0)
    shared = step_costs((2, 12), layer_s=1.0, head_s=2.0)
    for plan in (
        lambda costs, size: best_draft(0.8, costs, 2, 3, sure=0.9, batch_size=size, margin=-1),
        lambda costs, size: best_lookup(0.8, costs, 3, batch_size=size, margin=-1),
    ):
        assert plan(by_row, 4).num_drafts > 0
        assert plan(by_row, 4).seconds_per_token == pytest.approx(plan(by_row, 1).seconds_per_token)
        assert plan(shared, 4).seconds_per_token == pytest.approx(plan(shared, 1).seconds_per_token / 4)


def test_a_busy_machine_drafts_less():
    """Rows that cost as much as the first: what is rejected is lost time, the more the larger the batch."""
    costs = step_costs((2, 12), layer_row_s=0.15, head_s=0.5, head_row_s=0.1)
    lengths = [best_draft(0.8, costs, 2, 8, batch_size=size).num_drafts for size in (1, 4, 32)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2
    assert best_lookup(0.4, costs, 8).num_drafts > 0
    assert best_lookup(0.4, costs, 8, batch_size=32).num_drafts == 0


COSTS = st.builds(
    step_costs,
    st.just((2, 5, 12)),
    layer_s=st.floats(0.1, 2.0),
    layer_row_s=st.floats(0.0, 1.0),
    head_s=st.floats(0.01, 8.0),
    head_row_s=st.floats(0.0, 1.0),
    overhead_s=st.floats(0.0, 1.0),
)
PROBABILITY = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, alpha=PROBABILITY, sure=PROBABILITY, batch_size=st.integers(1, 8), margin=st.floats(0, 0.2))
def test_the_guard_never_recommends_drafts_that_gain_less_than_the_margin(costs, alpha, sure, batch_size, margin):
    full = plain(costs, batch_size)
    assert full.seconds_per_token == pytest.approx(costs.full_s(batch_size) / batch_size)
    plans = [best_draft(alpha, costs, layer, 6, sure=sure, batch_size=batch_size, margin=margin) for layer in (2, 5)]
    for plan in (*plans, best_lookup(alpha, costs, 6, batch_size=batch_size, margin=margin)):
        if plan.num_drafts == 0:
            assert plan == full
        else:
            assert plan.seconds_per_token * (1 + margin) <= full.seconds_per_token


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, alpha=PROBABILITY, more=PROBABILITY, sure=PROBABILITY, most=st.integers(1, 6))
def test_better_drafts_and_more_room_never_slow_the_best_plan_down(costs, alpha, more, sure, most):
    seconds = best_draft(alpha, costs, 5, most, sure=sure).seconds_per_token
    assert best_draft(max(alpha, more), costs, 5, most, sure=sure).seconds_per_token <= seconds * (1 + 1e-9)
    assert best_draft(alpha, costs, 5, most + 1, sure=sure).seconds_per_token <= seconds * (1 + 1e-9)
    seconds = best_lookup(alpha, costs, most).seconds_per_token
    assert best_lookup(max(alpha, more), costs, most).seconds_per_token <= seconds * (1 + 1e-9)


def test_an_exit_that_is_never_sure_or_never_right_drafts_nothing():
    costs = step_costs((2, 12), head_s=0.1)
    assert best_draft(0.9, costs, 2, 8).num_drafts > 0
    assert best_draft(0.0, costs, 2, 8) == plain(costs)
    assert best_draft(0.9, costs, 2, 8, sure=0.0) == plain(costs)
    assert best_draft(0.9, costs, 2, 0) == best_lookup(0.9, costs, 0) == plain(costs)


def test_acceptance_starts_at_its_prior_and_finds_the_true_probability():
    generator = np.random.default_rng(2)
    acceptance = Acceptance(0.9)
    assert acceptance.probability == 0.9
    estimates = []
    for _ in range(2000):
        num_right = 0
        while num_right < 4 and generator.random() < 0.5:
            num_right += 1
        acceptance.update(4, num_right)
        estimates.append(acceptance.probability)
    assert np.mean(estimates[200:]) == pytest.approx(0.5, abs=0.02)
    assert np.std(estimates[200:]) < 0.1


def test_acceptance_follows_a_text_that_changes():
    acceptance = Acceptance()
    for _ in range(500):
        acceptance.update(2, 2)
    assert acceptance.probability > 0.95
    for _ in range(200):
        acceptance.update(2, 0)
    assert acceptance.probability < 0.1


def test_drafts_behind_a_wrong_one_say_nothing():
    long, short = Acceptance(), Acceptance()
    long.update(8, 1)
    short.update(2, 1)
    assert long.probability == short.probability
    nothing = Acceptance()
    nothing.update(0, 0)
    assert nothing.probability == Acceptance().probability


@settings(max_examples=50, deadline=None)
@given(rounds=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted), max_size=20), prior=PROBABILITY)
def test_acceptance_is_a_probability_that_grows_with_what_is_accepted(rounds, prior):
    acceptance, better = Acceptance(prior), Acceptance(prior)
    for num_accepted, num_drafted in rounds:
        acceptance.update(num_drafted, num_accepted)
        better.update(num_accepted, num_accepted)  # the same without the wrong ones
    assert 0 <= acceptance.probability <= better.probability + 1e-12 <= 1 + 1e-9
