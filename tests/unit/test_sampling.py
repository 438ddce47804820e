"""Drawing tokens: each filter against its formula in numpy, draws against the probabilities, seeds, greedy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm.infer.sampling import Sampler, filtered, lowered, penalised
from tests.models import drawn_oracle, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LOGITS = [2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.4, -0.5, 2.1, 0.3]


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def naive(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=()):
    """The probabilities that a token is drawn with, one filter after the other, in float64."""
    logits = np.array(logits, dtype=np.float64)
    for token in set(seen):
        logits[token] = logits[token] / repetition_penalty if logits[token] > 0 else logits[token] * repetition_penalty
    logits = logits / temperature
    order = np.argsort(-logits, kind="stable")
    if top_k:
        logits[order[top_k:]] = -np.inf
    probabilities, held = softmax(logits), 0.0
    for rank, token in enumerate(order):
        if rank > 0 and held >= top_p:
            logits[token] = -np.inf
        held += probabilities[token]
    probabilities = softmax(logits)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def shares(logits, *, seen=(), temperature=1.0, repetition_penalty=1.0, **options):
    """Ours, made from the two functions that a draw uses."""
    logits = torch.tensor(logits)
    if repetition_penalty != 1:
        logits = penalised(logits, torch.tensor(seen, dtype=torch.int64), repetition_penalty)
    probabilities = filtered(logits / temperature, eellm.Sampling(temperature=temperature, **options))
    return (probabilities / probabilities.sum()).numpy()


def frequencies(sampling, num_draws, *, logits=LOGITS, prompt=()):
    """How often each token is drawn, at as many places. Nothing is accepted: the penalty would see it."""
    logits = torch.tensor(logits)
    sampler = Sampler(sampling, prompt, logits.device)
    draws = [sampler.choice(sampler.probabilities(logits), place) for place in range(num_draws)]
    return np.bincount(draws, minlength=len(logits)) / num_draws


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 10},
        {"top_k": 99},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.75},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"min_p": 0.6},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7, "seen": [0, 4, 4, 9]},
        {"repetition_penalty": 0.5, "seen": [0, 4]},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.12, "repetition_penalty": 1.3, "seen": [8, 3]},
    ],
)
def test_each_filter_is_its_formula(options):
    expected = naive(LOGITS, **options)
    assert shares(LOGITS, **options) == pytest.approx(expected, abs=1e-6)
    assert (shares(LOGITS, **options) == 0).tolist() == (expected == 0).tolist()


@settings(deadline=None)  # machines are busy at times
@given(
    logits=st.lists(st.integers(-80, 80), min_size=2, max_size=12, unique=True).map(lambda x: [i / 10 for i in x]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.0, 0.2, 0.55, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.33, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.37, 0.73]),  # no two tokens become equally likely
)
def test_all_filters_together_are_their_formula(logits, **options):
    options["seen"] = [0, 1, 1]
    expected = naive(logits, **options)
    found = shares(logits, **options)
    if (np.sort(found) > 0).sum() == (expected > 0).sum():  # a sum within rounding of top_p may fall on either side
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert abs(int((found > 0).sum()) - int((expected > 0).sum())) == 1


def test_the_likeliest_token_stays_under_every_filter_at_its_strictest():
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert shares(LOGITS, **options).tolist() == [0.0] * 8 + [1.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.8},
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    num_draws, prompt = 4000, [0, 8, 4]
    seen = prompt if "repetition_penalty" in options else ()
    expected = naive(LOGITS, **options, seen=seen)
    found = frequencies(eellm.Sampling(**options, seed=1), num_draws, prompt=prompt)
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = num_draws * ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < 30, "beyond this with probability 0.0005 for 9 degrees of freedom; the seed is fixed"
    assert 0.5 * np.abs(found - expected).sum() < 0.03
    plain = naive(LOGITS)
    if options != {"temperature": 1.0}:
        assert 0.5 * np.abs(found - plain).sum() > 0.06, "the option must make a difference that this test would see"


def test_a_temperature_near_0_is_greedy_and_never_overflows():
    for temperature in (1e-3, 1e-20, 1e-37):
        sampler = Sampler(eellm.Sampling(temperature=temperature, seed=0), (), torch.device("cpu"))
        assert {sampler.draw(torch.tensor(LOGITS) * 50) for _ in range(20)} == {8}


def test_the_penalty_sees_the_prompt_and_each_token_drawn():
    sampler = Sampler(eellm.Sampling(repetition_penalty=1e6), [0, 8], torch.device("cpu"))
    logits = torch.tensor(LOGITS)
    ranked = [token for token in np.argsort(-np.array(LOGITS)) if LOGITS[token] > 0 and token not in (0, 8)]
    assert [sampler.draw(logits) for _ in ranked] == ranked
    assert torch.equal(logits, torch.tensor(LOGITS)), "the logits are the caller's"


# --- in generation ---


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "seed": 5},
        {"temperature": 0.8, "top_k": 5, "seed": 6},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 7},
        {"repetition_penalty": 1.3},
    ],
)
def test_generation_draws_from_the_logits_of_the_whole_context_and_reports_raw_log_probabilities(options):
    model, sampling = tiny_model(seed=2), eellm.Sampling(**options)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=24, method="full", sampling=sampling)
    expected = drawn_oracle(model, PROMPT, 24, sampling)
    assert out.tokens == [token for token, _ in expected]
    assert out.logprobs == pytest.approx([logprob for _, logprob in expected], abs=1e-5)
    greedy = eellm.generate(model, [PROMPT], max_new_tokens=24, method="full")[0]
    assert out.tokens != greedy.tokens


def test_the_default_is_greedy():
    model = tiny_model(seed=2)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=12, method="full")
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + out.tokens]))[6][0, len(PROMPT) - 1 : -1]
    assert out.tokens == logits.argmax(-1).tolist()


def test_a_seed_repeats_the_draws_and_another_seed_or_none_does_not():
    model = tiny_model(seed=2)

    def tokens(seed):
        sampling = eellm.Sampling(temperature=3.0, seed=seed)
        return eellm.generate(model, [PROMPT], max_new_tokens=24, threshold=0.5, sampling=sampling)[0].tokens

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 2**64 - 1, None, None)}) == 5


def test_torch_s_own_generator_is_neither_read_nor_moved():
    model = tiny_model(seed=2)
    sampling = eellm.Sampling(temperature=3.0, seed=3)
    outs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(eellm.generate(model, [PROMPT], max_new_tokens=5, sampling=sampling)[0].tokens)
        assert torch.equal(torch.get_rng_state(), before)
    assert outs[0] == outs[1]


def test_penalties_on_what_was_said_are_openais():
    sampling = eellm.Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sampler, logits = Sampler(sampling, PROMPT, torch.device("cpu")), torch.tensor(LOGITS)
    assert not sampler.takes_likeliest
    expected = np.array(LOGITS)
    for _ in range(20):
        token = sampler.draw(logits)
        assert token == int(np.argmax(expected)), "the prompt's tokens aren't penalised"
        expected[token] -= 0.25 + (0.5 if expected[token] == np.float64(LOGITS[token]) else 0)
    drawn = Sampler(eellm.Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25), [], logits.device)
    drawn.accept(3)
    lowered = np.array(LOGITS) - np.array([0, 0, 0, 0.5 + 2 * 0.25, 0.75, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(drawn.probabilities(logits, [3, 4]).numpy(), softmax(lowered), rtol=1e-5)


def test_penalties_below_0_make_what_was_said_likelier():
    model = tiny_model()
    options = {"max_new_tokens": 20, "ignore_eos": True, "method": "full"}
    (plain,) = eellm.generate(model, [PROMPT], **options)
    (same,) = eellm.generate(model, [PROMPT], sampling=eellm.Sampling(presence_penalty=-100.0), **options)
    assert len(set(same.tokens)) == 1 < len(set(plain.tokens))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e300])
def test_extreme_penalties_and_temperatures_leave_probabilities_that_can_be_drawn_from(temperature, penalty):
    sampling = eellm.Sampling(temperature=temperature, repetition_penalty=penalty, top_p=0.0, seed=1)
    sampler = Sampler(sampling, [0, 1, 2], "cpu")
    logits = torch.tensor([3.0, -2.0, 0.0, 1.0])
    found = sampler.probabilities(logits)
    assert found.isfinite().all()
    assert float(found.sum()) == pytest.approx(1)
    assert sampler.draw(logits) == (0 if penalty < 1 else 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("presence", [0.0, 1e308, -1e308, 7e4])
@pytest.mark.parametrize("frequency", [0.0, 1e308, -1e308])
@pytest.mark.parametrize("repetition", [1.0, 1e-308, 1e308])
def test_no_penalty_is_so_large_that_probabilities_are_no_numbers(dtype, presence, frequency, repetition):
    said = [0, 0, 1, 2, 2, 2]
    for logits in ([2.0, -1.0, 0.0], [2.0, -1.0, 0.0, 5.0], [-torch.inf, 1.0, 3.0]):
        logits_V = torch.tensor(logits, dtype=dtype)
        logits_V = penalised(logits_V, torch.tensor(said), repetition)
        logits_V = lowered(logits_V, said, presence, frequency)
        assert not logits_V.isnan().any()
        assert not (logits_V == torch.inf).any()
        probabilities_V = filtered(logits_V - logits_V.max(), eellm.Sampling(temperature=1.0))
        assert probabilities_V.isfinite().all()
        assert float(probabilities_V.sum()) == pytest.approx(1, abs=0.01)
