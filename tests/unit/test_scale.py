"""The loss scale and the count of bad steps, as plain numbers."""

from pathlib import Path

import pytest

from eellm.errors import RunError
from eellm.train.bad_steps import BadSteps
from eellm.train.scale import LossScale


def updated(scale, pattern):
    """After good (+) and overflowing (-) steps."""
    for mark in pattern:
        scale.update(mark == "+")
    return scale.scale


def test_an_overflow_halves_the_scale_and_it_never_falls_below_one():
    scale = LossScale(scale=8.0)
    assert [updated(scale, "-") for _ in range(5)] == [4.0, 2.0, 1.0, 1.0, 1.0]
    assert not scale.can_shrink


@pytest.mark.parametrize(
    ("pattern", "expected"), [("++", 8), ("+++", 16), ("+++++", 16), ("++++++", 32), ("++-++", 4), ("++-+++", 8)]
)
def test_the_scale_doubles_after_the_interval_of_good_steps_in_a_row(pattern, expected):
    assert updated(LossScale(scale=8.0, growth_interval=3), pattern) == expected


def test_a_restored_scale_goes_on_as_the_one_that_was_saved():
    one = LossScale(scale=8.0, growth_interval=3)
    updated(one, "++")
    other = LossScale(growth_interval=3)
    other.restore(one.state())
    assert updated(one, "+") == updated(other, "+") == 16


def test_a_fixed_scale_is_one_whatever_happens():
    scale = LossScale.fixed()
    scale.restore(LossScale().state())
    assert updated(scale, "+" * 5000 + "---") == 1.0
    assert not scale.can_shrink


def bad_steps(limit=3):
    return BadSteps(limit=limit, batch=Path("out/bad-batch"))


def test_too_many_bad_steps_in_a_row_end_the_run_with_what_to_do():
    steps = bad_steps()
    for step, finite in enumerate([False, False, True, False, False], start=1):
        steps.record(step, finite=finite)
    assert steps.skipped == 4
    with pytest.raises(RunError, match=r"step 6: .* 3 in a row; lower optim\.lr .* batch in out/bad-batch"):
        steps.record(6, finite=False)


def test_overflows_that_a_smaller_scale_mends_are_skipped_but_end_nothing():
    steps = bad_steps()
    for step in range(1, 11):
        steps.record(step, finite=False, overflow=True)
    assert (steps.skipped, steps.in_a_row) == (10, 0)


def test_a_restored_count_goes_on_as_the_one_that_was_saved():
    steps, restored = bad_steps(), bad_steps()
    steps.record(1, finite=False)
    steps.record(2, finite=False)
    restored.restore(steps.state())
    assert restored.skipped == 2
    with pytest.raises(RunError):
        restored.record(3, finite=False)
