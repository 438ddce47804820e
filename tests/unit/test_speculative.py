"""Self-speculation is lossless: tokens are full depth's, greedy and sampled, and so have its distribution."""

import numpy as np
import pytest
import torch

import eellm
from eellm.infer.prepare import network_of
from eellm.infer.sampling import filtered
from tests.models import agreeing_model, drawn_oracle, oracle, tiny_model
from tests.step_costs import step_costs

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def priced(model):
    """The model, with made-up costs in place of measured ones: how much is drafted is the same on every machine."""
    stops = (*model.config.exit_layers, model.config.num_layers)
    network_of(model).costs = step_costs(stops, layer_s=1.0, head_s=0.1)
    return model


def greedy(model, prompt=PROMPT, num_tokens=40, **options):
    fields = {"always_draft": True} | options
    (out,) = eellm.generate(model, [prompt], max_new_tokens=num_tokens, method="speculative", **fields)
    return out


@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize(
    "max_draft", [1, pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)]
)
def test_greedy_tokens_and_log_probabilities_are_those_of_full_depth(max_draft, lookup):
    for seed in (0, 4, 5):
        model = tiny_model(seed=seed)
        expected = oracle(model, PROMPT, num_tokens=40, thresholds={})
        for threshold in (0.0, 0.3, 0.6, 1):
            for max_deferred in (1, 3, 16):
                out = greedy(model, max_draft=max_draft, lookup=lookup, threshold=threshold, max_deferred=max_deferred)
                assert out.tokens == [row[0] for row in expected]
                assert out.logprobs == pytest.approx([row[2] for row in expected], abs=1e-5)


def test_exits_are_the_layers_that_drafted_and_the_final_one_for_corrections():
    model = priced(tiny_model(seed=4))
    for layer in (3, 5):
        out = greedy(model, lookup=False, exits=[layer], threshold=0.3)
        assert set(out.exits) == {layer, 6}
        assert sum(exit < 6 for exit in out.exits) == out.stats.accepted > 0
        assert out.stats.drafted > out.stats.accepted
        assert out.exits[0] == 6, "the prompt's rows draft nothing"


def test_a_model_that_repeats_itself_is_drafted_by_looking_up_with_fewer_deep_passes():
    model = tiny_model(seed=0)
    with torch.no_grad():  # the next token follows from the last one alone: the text becomes a cycle
        for layer in model.decoder.layers.values():
            layer.attn.out.weight.zero_()
    expected = oracle(model, PROMPT, num_tokens=60, thresholds={})
    out = greedy(model, num_tokens=60, exits=[], lookup=True)
    assert out.tokens == [row[0] for row in expected]
    assert out.stats.deep_passes < 30
    assert greedy(model, num_tokens=60, exits=[], lookup=False).stats.deep_passes == 60


def test_a_stop_token_among_the_drafts_ends_the_request_there():
    model = tiny_model(seed=0)
    full = oracle(model, PROMPT, num_tokens=30, thresholds={})
    for position in range(0, 30, 3):
        token = full[position][0]
        if token in [row[0] for row in full[:position]]:
            continue
        ending = tiny_model(seed=0, eos_token_ids=(token,))
        out = greedy(ending, num_tokens=30, threshold=0.0)
        assert out.tokens == [row[0] for row in full[: position + 1]]
        assert out.finish_reason == "eos"


def test_no_token_beyond_the_limit_is_emitted():
    model = tiny_model(seed=4)
    for num_tokens in range(1, 12):
        out = greedy(model, num_tokens=num_tokens, threshold=0.0)
        assert (len(out.tokens), out.finish_reason) == (num_tokens, "length")


def test_typical_acceptance_takes_drafts_that_full_depth_would_not_choose():
    model = priced(tiny_model(seed=4))
    strict, loose = (greedy(model, lookup=False, threshold=0.3, typical=typical) for typical in (1.0, 0.05))
    assert strict.tokens == greedy(model, lookup=False, threshold=0.3).tokens
    assert loose.stats.accepted > strict.stats.accepted
    with torch.inference_mode():
        p = model(torch.tensor([PROMPT + loose.tokens]))[6][0, len(PROMPT) - 1 : -1].softmax(-1)
    for row, token, layer in zip(p, loose.tokens, loose.exits, strict=True):
        assert row[token] >= 0.05 * row.max() if layer < 6 else token == row.argmax()


# --- sampling ---

DRAWS = [
    {"temperature": 1.5},
    {"temperature": 1.2, "top_k": 4, "min_p": 0.02},
    {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.4},
    {"temperature": 2.0, "top_k": 9, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.2},
]
DRAFTERS = [
    {"lookup": False, "threshold": 0.0, "max_draft": 1},
    {"lookup": False, "threshold": 0.0, "max_draft": 6, "max_deferred": 4},
    {"lookup": False, "threshold": 0.2, "exits": [3, 5]},
    {"lookup": True, "exits": []},
    {"lookup": True, "threshold": 0.1},
]


@pytest.mark.parametrize("draws", DRAWS)
def test_sampled_tokens_are_those_of_full_depth_whatever_is_drafted(draws):
    accepted = 0
    for seed in (0, 3, 2**64 - 1):
        model, sampling = priced(tiny_model(seed=4)), eellm.Sampling(**draws, seed=seed)
        expected = drawn_oracle(model, PROMPT, 40, sampling)
        (full,) = eellm.generate(model, [PROMPT], max_new_tokens=40, method="full", sampling=sampling)
        assert full.tokens == [token for token, _ in expected]
        (early,) = eellm.generate(model, [PROMPT], max_new_tokens=40, threshold=1, sampling=sampling)
        assert early.tokens == full.tokens
        for drafter in DRAFTERS:
            out = greedy(model, sampling=sampling, **drafter)
            assert out.tokens == full.tokens
            assert out.logprobs == pytest.approx([logprob for _, logprob in expected], abs=1e-5)
            accepted += out.stats.accepted
    assert accepted > 20, "drafts must be accepted now and then, or nothing is tested"


def test_sampled_tokens_of_a_mixed_batch_are_those_of_full_depth_alone():
    model = priced(tiny_model(seed=4))
    wishes = [
        (PROMPT[: 2 + number % 6], eellm.Sampling(**draws, seed=number), drafter | {"always_draft": number % 3 > 0})
        for number, (draws, drafter) in enumerate((draws, drafter) for draws in DRAWS for drafter in DRAFTERS)
    ]
    with eellm.Engine(model, max_batch=7) as engine:
        handles = [
            engine.submit(prompt, method="speculative", max_new_tokens=12 + 3 * (number % 5), sampling=draws, **drafter)
            for number, (prompt, draws, drafter) in enumerate(wishes)
        ]
        for handle, (prompt, sampling, _) in zip(handles, wishes, strict=True):
            out = handle.result()
            assert out.tokens == [token for token, _ in drawn_oracle(model, prompt, len(out.tokens), sampling)]
    assert sum(handle.stats().accepted for handle in handles) > 20


def test_an_exit_that_agrees_with_the_end_drafts_what_the_end_draws():
    """Were the luck another for the draft, two draws from one distribution would mostly differ."""
    model = priced(agreeing_model(change=0.0))
    sampling = eellm.Sampling(temperature=1.0, seed=1)
    out = greedy(model, sampling=sampling, lookup=False, threshold=0.0, exits=[2])
    assert out.stats.accepted == out.stats.drafted > 20
    assert len(set(out.tokens)) > 10


def third_token(model, prompt, sampling):
    """The distribution of the third new token at full depth, exactly: over all first and second ones."""

    def following(contexts):
        with torch.inference_mode():
            logits = model(torch.tensor(contexts))[model.config.num_layers][:, -1].float()
        p = torch.stack([filtered(row / sampling.temperature, sampling) for row in logits])
        return (p / p.sum(-1, keepdim=True)).double()

    size = model.config.vocab_size
    first = following([prompt])[0]
    second = following([[*prompt, a] for a in range(size)])
    third = following([[*prompt, a, b] for a in range(size) for b in range(size)]).view(size, size, size)
    return torch.einsum("a,ab,abc->c", first, second, third).numpy()


@pytest.mark.parametrize("sampling", [{"temperature": 1.5}, {"temperature": 1.2, "top_k": 4, "min_p": 0.02}])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lookup": False, "threshold": 0.0, "max_draft": 1}, marks=pytest.mark.slow),
        {"lookup": False, "threshold": 0.0, "max_draft": 4},
        {"lookup": False, "threshold": 0.2, "exits": [3, 5]},
        {"lookup": True, "exits": []},
    ],
)
def test_sampled_tokens_have_full_depth_s_distribution(options, sampling):
    if options["lookup"]:  # of few tokens, all pairs in the prompt: there is always something to look up
        model, prompt = (
            priced(tiny_model(seed=4, vocab_size=4)),
            [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 3, 0, 0, 1, 1, 2, 2],
        )
    else:
        model, prompt = priced(tiny_model(seed=4)), PROMPT
    expected = third_token(model, prompt, eellm.Sampling(**sampling))
    num_draws, counts, accepted = 1600, np.zeros(len(expected)), 0
    with eellm.Engine(model, max_batch=16) as engine:
        for start in range(0, num_draws, 16):
            draws = [eellm.Sampling(**sampling, seed=seed) for seed in range(start, start + 16)]
            fields = options | {"method": "speculative", "always_draft": True, "max_new_tokens": 4}
            for handle in [engine.submit(prompt, sampling=draw, **fields) for draw in draws]:
                out = handle.result()
                counts[out.tokens[2]] += 1
                accepted += out.stats.accepted
    assert accepted > 50, "drafts must be accepted now and then, or nothing is tested"
    assert counts[expected == 0].sum() == 0
    kept = expected * num_draws >= 4
    found = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], 1 - expected[kept].sum()) * num_draws
    chi_square = ((found - wanted) ** 2 / np.maximum(wanted, 1)).sum()
    degrees = len(found) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees), "beyond this with a probability of about 0.0005"
