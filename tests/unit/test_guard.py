"""Which exits pay and when to split a batch: against all choices, costed by formulas of their own."""

import itertools
from functools import cache
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.infer.guard import SplitRule, early_pays, splits
from eellm.plan.decode import ExitDistribution, full_step_s, recomputation_step_s
from eellm.plan.decode_cost import DecodeCosts, PartCost
from eellm.schedule.partition import partition
from tests.step_costs import step_costs

STOPS = (2, 4, 7, 12)
ROW_S = 0.02


def planner_costs(exit_s, final_s):
    """The same as `costs_of` for the planner."""

    def part(first_s):
        return PartCost(read_s=first_s - ROW_S, message_s=ROW_S)

    return DecodeCosts(
        stages=partition(12, 1, STOPS[:-1]),
        layers=(part(1.0),) * 12,
        final_head=part(final_s),
        exits={layer: part(seconds) for layer, seconds in exit_s.items()},
        hop=PartCost(),
        step_s=0.0,
    )


def costs_of(exit_s, final_s):
    return step_costs(STOPS, layer_s=1.0, layer_row_s=ROW_S, head_s=final_s, head_row_s=ROW_S, exit_s=exit_s)


def falling_to_the_next(shares, used):
    """Where tokens leave when only some exits are used."""
    moved = dict.fromkeys((*used, 12), 0.0)
    for layer, share in shares.items():
        moved[min(at for at in moved if at >= layer)] += share
    return ExitDistribution(shares=moved)


WEIGHTS = st.lists(st.integers(0, 10), min_size=4, max_size=4).filter(any)
HEADS = st.lists(st.floats(0.1, 4.0), min_size=4, max_size=4)


def planned(weights, heads, batch_size, max_deferred, **options):
    """The planner's costs, where tokens leave, and what `early_pays` makes of both."""
    shares = {layer: weight / sum(weights) for layer, weight in zip(STOPS, weights, strict=True)}
    exit_s, final_s = dict(zip(STOPS[:-1], heads[:-1], strict=True)), heads[-1]
    plan = early_pays(
        ExitDistribution(shares=shares),
        costs_of(exit_s, final_s),
        batch_size=batch_size,
        max_deferred=max_deferred,
        margin=0.0,
        **options,
    )
    return planner_costs(exit_s, final_s), shares, plan


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, heads=HEADS, batch_size=st.integers(1, 3), max_deferred=st.integers(1, 6))
def test_the_exits_in_use_are_the_fastest_of_all_subsets(weights, heads, batch_size, max_deferred):
    planner, shares, plan = planned(weights, heads, batch_size, max_deferred)
    subsets = [used for num in range(1, 4) for used in itertools.combinations(STOPS[:-1], num)]
    step_s = {
        used: recomputation_step_s(planner, falling_to_the_next(shares, used), batch_size, max_deferred)
        for used in subsets
    } | {(): full_step_s(planner, batch_size)}
    assert plan.seconds_per_token * batch_size == pytest.approx(min(step_s.values()), rel=1e-6)
    assert step_s[plan.exits] == pytest.approx(min(step_s.values()), rel=1e-6)


def test_exits_that_gain_less_than_the_margin_are_not_used():
    costs = step_costs((6, 12), head_s=1.0)
    distribution = ExitDistribution(shares={6: 0.3, 12: 0.7})
    plan = early_pays(distribution, costs, margin=0.0)
    gain = costs.full_s(1) / plan.seconds_per_token - 1
    assert plan.exits == (6,)
    assert early_pays(distribution, costs, margin=gain * 0.99) == plan
    full = early_pays(distribution, costs, margin=gain * 1.01)
    assert full.exits == ()
    assert full.seconds_per_token == costs.full_s(1)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, heads=HEADS, batch_size=st.integers(1, 3), max_deferred=st.integers(1, 6))
def test_exits_that_have_one_certificate_are_all_in_use_or_none(weights, heads, batch_size, max_deferred):
    planner, shares, plan = planned(weights, heads, batch_size, max_deferred, whole=True)
    all_s = recomputation_step_s(planner, ExitDistribution(shares=shares), batch_size, max_deferred)
    full_s = full_step_s(planner, batch_size)
    assert plan.seconds_per_token * batch_size == pytest.approx(min(all_s, full_s), rel=1e-6)
    assert plan.exits in ((), STOPS[:-1])


def test_a_certificate_for_some_of_the_exits_leaves_the_others_out():
    costs = step_costs((4, 8, 12), layer_s=1.0, head_s=0.1)
    assert early_pays(ExitDistribution(shares={8: 0.9, 12: 0.1}), costs, whole=True).exits == (8,)


def test_a_head_that_costs_more_than_the_layers_behind_it_is_not_tested():
    distribution = ExitDistribution(shares={6: 0.9, 12: 0.1})
    assert early_pays(distribution, step_costs((6, 12), exit_s={6: 7.0})).exits == ()
    assert early_pays(distribution, step_costs((6, 12), exit_s={6: 2.0})).exits == (6,)


def test_a_gate_makes_a_dear_head_pay_that_is_seldom_sure():
    costs = step_costs((6, 12), layer_s=1.0, head_s=2.0, gate_s=0.1)
    seldom = ExitDistribution(shares={6: 0.2, 12: 0.8})
    assert early_pays(seldom, costs).exits == ()
    plan = early_pays(seldom, costs, gated=True)
    assert plan.exits == (6,)
    # every row: 6 layers and the gate; of 5 tokens one has the head there, the others the rest
    assert plan.seconds_per_token == pytest.approx(6 + 0.1 + 0.2 * 2 + 0.8 * (6 + 2), rel=1e-3)


def test_with_gates_every_exit_costs_the_heads_of_what_it_answers():
    costs = step_costs((4, 8, 12), layer_s=1.0, head_s=1.0, gate_s=0.1)
    leaving = ExitDistribution(shares={4: 0.5, 8: 0.3, 12: 0.2})
    plan = early_pays(leaving, costs, gated=True, margin=0.0, max_deferred=200)
    assert plan.exits == (4, 8)
    layers_s = 4 + 0.5 * 4 + 0.2 * 4
    assert plan.seconds_per_token == pytest.approx(layers_s + 0.1 + 0.5 * 0.1 + 1.0, rel=1e-3)


def test_exits_that_were_not_measured_are_not_proposed():
    costs = step_costs((2, 4, 12), head_s=0.1)
    assert early_pays(ExitDistribution(shares={4: 0.8, 12: 0.2}), costs).exits == (4,)
    assert early_pays(ExitDistribution(shares={12: 1.0}), costs).exits == ()


# --- shallow or deep ---


def stopped_optimally(costs, layer, probability, batch_size, rule=None):
    """Tokens per second in the long run, of a rule (ready, waiting) → shallow?, or of the best rule there is.

    Every deep pass makes all ready again, so a rule earns what a cycle of it does: the rate at which a cycle's tokens
    are worth its seconds, found by bisection over the exact chain.
    """

    def surplus(rate):
        @cache
        def value(ready):
            waiting = batch_size - ready
            deep = waiting - rate * (costs.pass_s(layer, costs.num_layers, waiting) + costs.head_s[12].at(waiting))
            if ready == 0:
                return deep
            shallow = ready * probability - rate * (costs.pass_s(0, layer, ready) + costs.head_s[layer].at(ready))
            chances = [comb(ready, k) * probability**k * (1 - probability) ** (ready - k) for k in range(ready)]
            shallow += sum(chance * value(k) for k, chance in enumerate(chances))
            shallow /= 1 - probability**ready  # until one is left behind
            if waiting == 0:
                return shallow
            return max(shallow, deep) if rule is None else shallow if rule(ready, waiting) else deep

        return value(batch_size)

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize("batch_size", [2, 4, 8])
@pytest.mark.parametrize("probability", [0.1, 0.4, 0.7, 0.9])
@pytest.mark.parametrize(("layer", "row_s", "head_s"), [(3, 0.0, 0.5), (6, 0.02, 1.0), (6, 0.5, 1.0), (9, 0.1, 3.0)])
def test_splitting_is_as_fast_as_the_best_rule_there_is(batch_size, probability, layer, row_s, head_s):
    costs = step_costs((layer, 12), layer_row_s=row_s, head_s=head_s, overhead_s=0.1)

    rule = splits(costs, layer, probability, batch_size)
    ours = stopped_optimally(costs, layer, probability, batch_size, lambda ready, waiting: rule[ready])
    best = stopped_optimally(costs, layer, probability, batch_size)
    assert ours == pytest.approx(best, rel=1e-6)


def choice(costs, exit_probability=0.5, **state):
    return SplitRule(costs, costs.stops[0]).split_pays(exit_probability, **state)


def test_what_can_run_runs():
    costs = step_costs((6, 12))
    for probability in (0.0, 0.5, 1.0):
        assert choice(costs, probability, num_ready=1, num_waiting=0)
        assert not choice(costs, probability, num_ready=0, num_waiting=1)


def test_nobody_waits_longer_than_the_bound():
    rule = SplitRule(step_costs((2, 12)), 2, max_wait=5)
    assert rule.split_pays(0.95, num_ready=20, num_waiting=1, ticks_waited=4)
    assert not rule.split_pays(0.95, num_ready=20, num_waiting=1, ticks_waited=5)
    assert rule.split_pays(0.95, num_ready=20, num_waiting=0, ticks_waited=99), "there is no one to wait"


def test_few_do_not_go_on_alone_where_a_pass_costs_the_same_for_all():
    costs = step_costs((6, 12))
    assert not choice(costs, num_ready=1, num_waiting=7)
    assert choice(costs, num_ready=7, num_waiting=1)


def test_an_exit_that_never_answers_keeps_no_one_waiting_for_a_sequence_alone():
    assert not choice(step_costs((6, 12)), 0.0, num_ready=1, num_waiting=7)


def test_a_rule_remembers_only_what_follows_from_its_costs():
    rule = SplitRule(step_costs((3, 12), layer_row_s=0.1), 3)
    states = [(p / 8, ready, 6 - ready) for p in range(8) for ready in range(1, 6)]
    fresh = [splits(rule.costs, 3, p, 6)[ready] for p, ready, _ in states]
    for _ in range(2):
        assert [rule.split_pays(p, num_ready=ready, num_waiting=waiting) for p, ready, waiting in states] == fresh
    by_probability = [fresh[i : i + 5] for i in range(0, len(fresh), 5)]
    assert by_probability[0] != by_probability[-1]
