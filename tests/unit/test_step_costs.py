"""The table of measured costs: what it says between, beyond and at what was measured; there and back as JSON."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.errors import ConfigError
from eellm.infer.costs import Curve, StepCosts
from tests.step_costs import step_costs


def test_seconds_are_interpolated_between_what_was_measured_and_go_on_as_steeply_beyond():
    curve = Curve((1, 4, 8), (3.0, 6.0, 10.0))
    assert [curve.at(rows) for rows in (0.5, 1, 2, 4, 6, 8, 16)] == [3, 3, 4, 6, 8, 10, 18]
    assert Curve((1,), (2.0,)).at(50) == 2


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True).map(sorted),
    data=st.data(),
    asked=st.lists(st.integers(0, 300) | st.just(5_000_000), min_size=1),
)
def test_many_numbers_of_rows_at_once_are_the_same(rows, data, asked):
    seconds = data.draw(st.lists(st.floats(0.1, 9.0), min_size=len(rows), max_size=len(rows)))
    curve = Curve(tuple(rows), tuple(seconds))
    assert curve.at_each(np.array(asked)) == pytest.approx([curve.at(one) for one in asked])
    assert [curve.at(row) for row in rows] == pytest.approx(seconds)


def test_noise_never_makes_many_rows_cheaper_than_those_measured():
    assert Curve((1, 32, 64), (1.0, 4.0, 3.0)).at(6400) == 3


def test_a_pass_has_one_overhead_and_the_layers_between_its_stops():
    costs = step_costs((2, 3, 7), layer_s=1.0, layer_row_s=0.5, head_s=5.0, head_row_s=1.0, overhead_s=0.25)
    assert costs.pass_s(0, 2, 1) == pytest.approx(2.25)
    assert costs.pass_s(2, 7, 3) == pytest.approx(5 * (1 + 2 * 0.5) + 0.25)
    assert costs.full_s(2, 3) == pytest.approx(7 * (1 + 5 * 0.5) + 0.25 + 5 + 5)


def test_with_a_gate_only_the_answered_rows_cost_the_head():
    costs = step_costs((2, 7), head_s=5.0, head_row_s=1.0, gate_s=0.5)
    assert costs.test_s(2, 3, 1) == 7
    assert costs.test_s(2, 3, 1, gated=True) == 5.5
    assert costs.test_s(2, 3, 0, gated=True) == 0.5
    assert costs.test_s(2, 0, 0) == costs.test_s(2, 0, 0, gated=True) == 0


@settings(max_examples=30, deadline=None)
@given(
    stops=st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True).map(sorted),
    seconds=st.floats(1e-7, 1.0),
    overhead_s=st.floats(0, 1e-3),
)
def test_json_there_and_back_is_the_same(stops, seconds, overhead_s):
    costs = step_costs(tuple(stops), layer_s=seconds, head_s=seconds / 3, overhead_s=overhead_s)
    assert StepCosts.from_json(costs.to_json()) == costs


@pytest.mark.parametrize("damage", ["", "[]", "{}", "not json", '{"stops": 3}'])
def test_a_damaged_file_is_refused_with_what_to_do(damage):
    with pytest.raises(ConfigError, match="delete the file"):
        StepCosts.from_json(damage)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("stops", [2, 3], "stops"),
        ("overhead_s", -1.0, "overhead_s"),
        ("overhead_s", float("nan"), "overhead_s"),
        ("segment_s", [{"rows": [1, 2], "seconds": [1, 1]}, {"rows": [1, 4], "seconds": [1, 1]}], "different"),
        ("segment_s", [{"rows": [1, 1], "seconds": [1, 1]}] * 2, "ascend"),
        ("segment_s", [{"rows": [1, 2], "seconds": [1, 0]}] * 2, "above 0"),
        ("segment_s", [{"rows": [1, 2], "seconds": [1]}] * 2, "1 times"),
    ],
)
def test_costs_that_cannot_be_are_refused(key, value, match):
    fields = json.loads(step_costs((2, 7)).to_json())
    if key == "stops":
        value = [*value, 9]
    with pytest.raises(ConfigError, match=match):
        StepCosts.from_json(json.dumps(fields | {key: value}))
