"""Where exits would go and what they'd give, on made-up tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eellm.evaluate.advice import LayerChoices, PartCosts, advise, best_exits, speedup, surest
from tests.step_costs import curve


def part_costs(num_layers=12, *, layer_s=1.0, head_s=1.0, gate_s=0.05):
    return PartCosts(
        num_layers=num_layers,
        layer_s=curve(layer_s),
        head_s=curve(head_s),
        exit_s=curve(head_s),
        gate_s=curve(gate_s),
        overhead_s=0.0,
    )


def choices(agrees, scores=None, *, num_layers=None):
    agrees_LN = np.array(agrees, bool)
    num_layers = num_layers or len(agrees_LN) + 1
    scores_LN = agrees_LN.astype(float) if scores is None else np.array(scores, float)
    return LayerChoices(
        layers=tuple(range(1, len(agrees_LN) + 1)), num_layers=num_layers, agrees_LN=agrees_LN, scores_LN=scores_LN
    )


def settled_at(depths, num_layers):
    """Tokens whose choice is the final one from a layer on, and surely so."""
    return choices([[layer >= depth for depth in depths] for layer in range(1, num_layers)])


def test_ideal_depths_are_the_first_right_layer_and_the_first_that_stays_right():
    table = choices([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    assert table.ideal_depths(stays=False).tolist() == [1, 2, 4, 2]
    assert table.ideal_depths(stays=True).tolist() == [3, 2, 4, 4]
    assert table.agreement() == {1: 0.25, 2: 0.5, 3: 0.5}


def test_tokens_leave_at_the_first_exit_in_use_that_is_right():
    table = choices([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    assert table.known_shares((1, 3)) == {1: 0.25, 3: 0.25, 4: 0.5}
    assert table.known_shares(()) == {4: 1.0}


def test_the_threshold_takes_as_many_as_keep_the_precision_and_equal_scores_together():
    right, scores = np.array([1, 1, 0, 1, 0], bool), np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert surest(right, scores, 1.0).tolist() == [True, True, False, False, False]
    assert surest(right, scores, 0.75).tolist() == [True, True, True, True, False]
    assert surest(right, np.array([0.9, 0.7, 0.7, 0.7, 0.5]), 1.0).tolist() == [True, False, False, False, False]
    assert not surest(~right, scores, 1.0).any()
    assert surest(right[:0], scores[:0], 1.0).tolist() == []


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30), st.floats(0.1, 1.0))
def test_no_threshold_takes_more_at_that_precision(rows, precision):
    right, scores = np.array([r for r, _ in rows]), np.array([s / 5 for _, s in rows])
    taken = surest(right, scores, precision)
    assert not taken.any() or right[taken].mean() >= precision
    for tau in scores:
        other = scores >= tau
        assert right[other].mean() < precision or other.sum() <= taken.sum()


def test_a_speed_up_is_worked_out_from_layers_heads_and_rows_taken_along():
    # after layer 4 of 12: 4 layers and a head; every 17th token all layers, two heads
    costs = part_costs(gate_s=5.0)
    shares = {4: 1.0, 12: 0.0}
    assert speedup(costs, (4,), shares) == pytest.approx(13 / (4 + 1 + 8 / 17), rel=1e-6)


def test_where_most_tokens_are_settled_at_a_layer_one_exit_goes_there():
    table = settled_at([4] * 95 + [12] * 5, 12)
    advice = advise(table, part_costs())
    assert (advice.verdict, advice.exits) == ("put", (4,))
    assert "Put one exit after layer 4: expect" in advice.text
    assert "These are untuned" in advice.text
    assert 1.5 < advice.expected.speedup <= advice.bound.speedup + 1e-9 < advice.by_layers
    assert "untuned" not in advise(table, part_costs(), is_tuned=True).text


def test_tokens_of_two_kinds_get_two_exits():
    table = settled_at([2] * 50 + [8] * 48 + [24] * 2, 24)
    advice = advise(table, part_costs(24, head_s=0.5))
    assert advice.exits == (2, 8)
    assert "2 exits after layers 2 and 8" in advice.text


def test_where_heads_cost_what_layers_save_it_says_do_not():
    advice = advise(settled_at([4] * 30 + [12] * 70, 12), part_costs(head_s=8.0, gate_s=8.0))
    assert (advice.verdict, advice.exits) == ("do not", ())
    assert advice.text.startswith("Do not give this model exits")


def test_right_layers_that_do_not_know_it_get_no_exits_and_tuning_is_named():
    generator = np.random.default_rng(0)
    table = settled_at([4] * 60 + [12] * 40, 12)
    unsure = choices(table.agrees_LN, generator.random(table.agrees_LN.shape))
    advice = advise(unsure, part_costs())
    assert (advice.verdict, advice.exits, advice.bound.exits) == ("do not", (), (4,))
    assert "Do not, as it is" in advice.text
    assert "--tune-steps" in advice.text
    tuned = advise(unsure, part_costs(), is_tuned=True)
    assert tuned.verdict == "do not"
    assert "unless exits can be tuned for far longer" in tuned.text


def test_no_layers_no_exits():
    assert best_exits(part_costs(), (), lambda exits: {12: 1.0}).exits == ()
