"""The luck of a place: what is chosen by it has the distribution it is chosen from, and nothing else in common."""

import numpy as np
import pytest
import torch

from eellm.infer.luck import BITS, STEP, arrivals, chosen, key_of, mixed

SEEDS = (0, 1, 2**63 - 1, 2**63, 2**64 - 1)


def spread(num_tokens, *, seed=0, scale=2.0):
    """Made-up probabilities."""
    logits = torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed)) * scale
    return logits.softmax(-1)


def chi_square_of(counts, probabilities):
    """Of as many degrees of freedom as there are kinds that are expected often enough, and how many these are."""
    wanted = probabilities * counts.sum()
    kept = wanted >= 5
    found, wanted = np.append(counts[kept], counts[~kept].sum()), np.append(wanted[kept], wanted[~kept].sum())
    return float(((found - wanted) ** 2 / np.maximum(wanted, 1)).sum()), len(found) - 1


def assert_drawn_from(draws, probabilities):
    counts = np.bincount(draws, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    chi_square, degrees = chi_square_of(counts, probabilities)
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees), "beyond this with a probability of about 0.0005"


def test_splitmix_gives_the_numbers_that_its_authors_give():
    """The first of seed 1234567, as in Rosetta Code's test of it."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mixed(1234567 + STEP * (i + 1)) for i in range(5)] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_tensors_are_mixed_as_whole_numbers_are(seed):
    tokens = [0, 1, 2, 1000, 149_999, 2**31]
    for place in (0, 1, 5000):
        bits = [mixed(key_of(seed, place) + STEP * token) >> (64 - BITS) for token in tokens]
        expected = [-np.log((number + 0.5) * 2.0**-BITS) for number in bits]
        found = arrivals(torch.tensor(tokens), seed, place)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_token_s_luck_is_the_same_whichever_others_can_be_chosen():
    every = arrivals(torch.arange(5000), 7, 3)
    some = torch.tensor([4999, 17, 0, 256])
    assert torch.equal(arrivals(some, 7, 3), every[some])
    weights = spread(5000)
    winner = chosen(weights, 7, 3)
    for other in (0, 256, 4999):
        kept = torch.zeros_like(weights).index_copy(0, torch.tensor([winner, other]), weights[[winner, other]])
        assert chosen(kept, 7, 3) == winner


@pytest.mark.parametrize("num_tokens", [2, 10, 300])
@pytest.mark.parametrize("over", ["places", "seeds", "diagonal"])
def test_choices_have_the_distribution_they_are_made_from(over, num_tokens):
    weights = spread(num_tokens)
    pairs = {
        "places": [(5, i) for i in range(2000)],
        "seeds": [(i, 5) for i in range(2000)],
        "diagonal": [(i, 2000 - i) for i in range(2000)],
    }
    assert_drawn_from([chosen(weights, *pair) for pair in pairs[over]], weights.double().numpy())


def test_a_few_tokens_far_apart_in_a_large_vocabulary_are_chosen_as_often_as_they_should():
    weights = torch.zeros(150_000)
    weights[[0, 1, 2**16, 2**17, 149_999]] = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    assert_drawn_from([chosen(weights, 11, place) for place in range(1000)], weights.double().numpy())


def test_neighbouring_places_and_seeds_have_nothing_in_common():
    weights = torch.full((5,), 0.2)
    for step in ((1, 0), (0, 1), (1, 1), (2, -1)):
        pairs = [
            5 * chosen(weights, seed, place) + chosen(weights, seed + step[0], place + step[1])
            for seed in range(20)
            for place in range(1, 61)
        ]
        assert_drawn_from(pairs, np.full(25, 1 / 25))


def test_arrivals_of_a_large_vocabulary_are_exponential_and_differ():
    found = arrivals(torch.arange(150_000), 3, 9)
    assert len(found.unique()) == 150_000
    assert float(found.min()) > 0
    shares = np.histogram(1 - np.exp(-found.numpy()), bins=100, range=(0, 1))[0]
    chi_square, degrees = chi_square_of(shares, np.full(100, 0.01))
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("change", [0.3, 1.0])
def test_two_distributions_mostly_choose_alike(change):
    """At least with (1 - d) / (1 + d), d the total variation; a point mass with its token's probability."""
    one, num_places = spread(50), 1000
    other = (one.log() + change * spread(50, seed=1, scale=1.0).log().neg()).softmax(-1)
    distance = 0.5 * float((one - other).abs().sum())
    alike = sum(chosen(one, 2, place) == chosen(other, 2, place) for place in range(num_places)) / num_places
    least = (1 - distance) / (1 + distance)
    assert alike > least - 3 * np.sqrt(least * (1 - least) / num_places)
    assert distance > 0.02, "they differ"
    unlike = sum(chosen(one, 2, place) == chosen(other, 3, place) for place in range(num_places)) / num_places
    assert unlike < alike - 0.1, "with another luck they don't"


def test_what_has_no_probability_is_never_chosen_and_what_has_all_always_is():
    for place in range(200):
        assert chosen(torch.tensor([0.0, 0.5, 0.0, 0.5]), 1, place) in (1, 3)
        assert chosen(torch.tensor([0.0, 0.0, 1.0]), 1, place) == 2
        assert chosen(torch.tensor([1e-45, 0.0, 1.0]), 1, place) == 2


def test_weights_need_not_sum_to_1_and_may_be_of_any_size():
    weights = spread(20)
    for factor in (1e-30, 3.0, 1e30):
        assert [chosen(weights * factor, 4, i) for i in range(50)] == [chosen(weights, 4, i) for i in range(50)]
