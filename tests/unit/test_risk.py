"""The statistics of certificates: p-values that are true, a path from safe to risky, and what is certified holds."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eellm.config.calibrate import CalibrateConfig
from eellm.evaluate.calibrate import choose_thresholds
from eellm.evaluate.losses import ReadLosses
from eellm.evaluate.path import OFF, risk_by_score, threshold_path
from eellm.evaluate.risk import binomial_cdf, hoeffding_bentkus, last_safe_step, units_needed
from eellm.evaluate.rouge import rouge_l
from eellm.exits.metrics import ExitRows, ExitTable

RISKS = st.sampled_from([0.01, 0.02, 0.1, 0.3, 0.7])


# --- p-values ---


@given(num=st.integers(1, 60), most=st.integers(0, 70), percent=st.integers(1, 99))
def test_the_binomial_distribution_is_the_exact_one(num, most, percent):
    p = Fraction(percent, 100)
    exact = sum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(min(most, num) + 1))
    assert binomial_cdf(most, num, percent / 100) == pytest.approx(float(exact), rel=1e-9)


@given(num=st.integers(1, 400), risk=RISKS, doubt=st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_where_the_risk_is_the_bound_losses_of_0_and_1_pass_no_more_often_than_the_doubt_allows(num, risk, doubt):
    passing = 0.0
    for wrong in range(num + 1):
        if hoeffding_bentkus([1.0] * wrong + [0.0] * (num - wrong), risk) > doubt:
            break
        passing = binomial_cdf(wrong, num, risk)
    assert passing <= doubt


@given(losses=st.lists(st.floats(0, 1), min_size=1, max_size=80), risk=RISKS, more=st.floats(0, 1))
def test_p_values_lie_between_0_and_1_and_rise_with_the_losses(losses, risk, more):
    p_value = hoeffding_bentkus(losses, risk)
    assert 0 <= p_value <= 1
    larger = [max(loss, more) for loss in losses]
    assert hoeffding_bentkus(larger, risk) >= p_value * (1 - 1e-9)
    if sum(losses) / len(losses) > risk:
        assert p_value > 0.3


def test_the_units_needed_are_the_fewest_that_pass_without_any_loss():
    assert units_needed(0.02, 0.95) == 149
    assert units_needed(0.05, 0.9) == 45
    for risk, confidence in [(0.02, 0.95), (0.3, 0.99), (0.9, 0.5), (0.001, 0.9)]:
        num = units_needed(risk, confidence)
        assert hoeffding_bentkus([0.0] * num, risk) <= 1 - confidence
        assert num == 1 or hoeffding_bentkus([0.0] * (num - 1), risk) > 1 - confidence


def test_the_first_step_that_fails_ends_the_test_and_later_ones_are_not_looked_at():
    asked = []

    def steps():
        for index, loss in enumerate([0.0, 0.001, 0.5, 0.0]):
            asked.append(index)
            yield [loss] * 300

    step = last_safe_step(steps(), 0.02, 0.95)
    assert (step.index, step.mean_loss) == (1, pytest.approx(0.001))
    assert step.p_value == hoeffding_bentkus([0.001] * 300, 0.02)
    assert asked == [0, 1, 2]
    assert last_safe_step(iter([[0.5] * 300]), 0.02, 0.95) is None


# --- the path ---

tokens = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60)


@given(tokens=tokens)
def test_the_risk_at_a_score_is_the_isotonic_regression(tokens):
    """Against its definition: the largest, over beginnings that end at or before, of the least mean up to or past."""
    ordered = sorted(tokens, key=lambda token: -token[0])
    scores = sorted({score for score, _ in tokens}, reverse=True)
    groups = [[wrong for score, wrong in ordered if score == value] for value in scores]

    def mean(first, last):
        some = [wrong for group in groups[first : last + 1] for wrong in group]
        return sum(some) / len(some)

    blocks = risk_by_score(np.array([s for s, _ in tokens]) / 20, np.array([w for _, w in tokens]))
    for at, score in enumerate(scores):
        expected = max(min(mean(i, j) for j in range(at, len(scores))) for i in range(at + 1))
        found = next(block.risk for block in blocks if block.lowest <= score / 20)
        assert found == pytest.approx(expected)


@given(first=tokens, second=tokens, num_levels=st.integers(1, 30))
def test_a_path_goes_from_safe_to_risky_and_ends_where_every_token_leaves(first, second, num_levels):
    exits = {3: first, 6: second}
    scores = {layer: np.array([s for s, _ in each]) / 20 for layer, each in exits.items()}
    is_wrong = {layer: np.array([w for _, w in each]) for layer, each in exits.items()}
    path = threshold_path(scores, is_wrong, num_levels)
    assert all(step != after for step, after in pairwise(path))
    for layer in exits:
        thresholds = [step[layer] for step in path]
        assert thresholds == sorted(thresholds, reverse=True)
        sure = scores[layer] >= thresholds[0]
        assert thresholds[0] == OFF or not is_wrong[layer][sure].any(), "the first step takes no token that was wrong"
        if num_levels > 1:
            assert (scores[layer] >= thresholds[-1]).sum() >= (scores[layer] < 1).sum()


def test_the_better_exit_gets_the_lower_threshold():
    generator = np.random.default_rng(0)
    scores = generator.random((2, 20_000))
    is_wrong = generator.random((2, 20_000)) > scores ** np.array([[1.0], [0.2]])
    path = threshold_path({3: scores[0], 6: scores[1]}, {3: is_wrong[0], 6: is_wrong[1]}, 20)
    middle = path[len(path) // 2]
    assert middle[6] < middle[3] - 0.2


# --- what is certified holds ---


def population(num_units, generator, *, num_tokens=8):
    """Units of texts that differ in how hard they are; exits that are wrong the more often the less sure they are."""
    hard_U = generator.beta(2, 6, num_units)
    unit_N = np.repeat(np.arange(num_units), num_tokens)
    exits = {}
    for layer, skill in ((3, 1.0), (6, 0.5)):
        score_N = 1 - generator.random(len(unit_N)) * np.sqrt(hard_U[unit_N])
        is_wrong_N = generator.random(len(unit_N)) < skill * (1 - score_N) ** 1.5
        scores = {"max_prob": torch.tensor(score_N, dtype=torch.float32)}
        exits[layer] = ExitRows(torch.zeros(len(unit_N)), torch.tensor(is_wrong_N).long(), scores)
    zeros = torch.zeros(len(unit_N), dtype=torch.int64)
    exits[12] = ExitRows(torch.zeros(len(unit_N)), zeros, {"max_prob": torch.ones(len(unit_N))})
    return ExitTable(zeros, exits), unit_N


def exceeded(risk, confidence, *, num_runs=200, num_units=300):
    """Of so many calibrations, how many have a risk above the bound, and the mean layer after which tokens leave."""
    generator = np.random.default_rng(1)
    config = CalibrateConfig(risk=risk, confidence=confidence, num_levels=30)
    whole = ReadLosses(*population(5_000, generator), config)
    num_exceeded, layers = 0, []
    for _ in range(num_runs):
        chosen = choose_thresholds(ReadLosses(*population(num_units, generator), config), config)
        losses, layer = whole.of(chosen.thresholds, np.arange(whole.num_units))
        num_exceeded += float(np.mean(losses)) > risk
        layers.append(layer)
    return num_exceeded, float(np.mean(layers))


def most_by_chance(num_runs, doubt):
    """A number of failures that is exceeded once in ten thousand times, should each be as likely as the doubt."""
    return next(k for k in range(num_runs + 1) if binomial_cdf(k, num_runs, doubt) > 1 - 1e-4)


@pytest.mark.parametrize(("risk", "confidence"), [(0.05, 0.95), (0.1, 0.8)])
def test_over_200_calibrations_the_certified_risk_is_exceeded_at_most_as_often_as_the_confidence_says(risk, confidence):
    num_exceeded, mean_layer = exceeded(risk, confidence)
    assert num_exceeded <= most_by_chance(200, 1 - confidence)
    assert mean_layer < 10, "a certificate under which no token leaves early would be worth nothing"


def test_a_rule_that_believes_the_mean_loss_exceeds_the_risk_far_more_often(monkeypatch):
    """So the test above can fail."""
    monkeypatch.setattr("eellm.evaluate.risk.hoeffding_bentkus", lambda losses, risk: float(np.mean(losses) > risk))
    num_exceeded, _ = exceeded(0.05, 0.95, num_runs=60)
    assert num_exceeded > most_by_chance(60, 0.05)


# --- ROUGE-L ---


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("the cat was found under the bed", "the cat was under the bed", 2 * 6 / 13),
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("A, b; C!", "a b c", 1.0),
        ("", "", 1.0),
        ("...", "words", 0.0),
        ("été", "Été", 1.0),
        ("a b c d", "d c b a", 1 / 4),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_of_words(text, reference, value):
    assert rouge_l(text, reference) == pytest.approx(value)
    assert rouge_l(reference, text) == pytest.approx(value)
