"""Looking up: the latest earlier occurrence of the longest ending, against a search through whole texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm.errors import ConfigError
from eellm.infer.decode.drafting import Drafters, Drafting
from eellm.infer.lookup import LENGTHS, Lookup, Recall
from eellm.infer.prepare import network_of
from tests.models import agreeing_model, drawn_oracle, tiny_model
from tests.step_costs import step_costs

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def searched(tokens, num_tokens, lengths):
    """The same by looking at every place."""
    for size in lengths:
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for i in range(num_tokens):
                    text.append(text[start + size + i])
                return text[len(tokens) :], size
    return [], 0


def recalled(texts, tokens, num_tokens, lengths, longer_than):
    """The same as a memory of these texts, the newest last."""
    for size in lengths:
        if not longer_than < size <= len(tokens):
            continue
        for text in reversed(texts):
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == tokens[len(tokens) - size :]:
                    return text[start + size : start + size + num_tokens], size
    return [], 0


def kept(texts, capacity):
    """What a memory holds: the newest texts that fit, each with its end."""
    held = []
    for text in texts:
        text = text[max(len(text) - capacity + 1, 0) :]
        if len(text) < 3:
            continue
        held.append(text)
        while sum(len(known) + 1 for known in held) > capacity:
            held.pop(0)
    return held


TEXT = st.lists(st.integers(0, 2), max_size=14)
SIZES = st.sampled_from([(2,), (3, 2), (4, 2), (5, 3, 2)])


@settings(max_examples=200, deadline=None)
@given(prompt=TEXT, more=TEXT, num_tokens=st.integers(0, 9), lengths=SIZES)
def test_drafts_are_those_of_a_search_through_the_text(prompt, more, num_tokens, lengths):
    lookup = Lookup(prompt, lengths=lengths)
    for i, token in enumerate(more):
        assert lookup.draft(num_tokens) == searched([*prompt, *more[:i]], num_tokens, lengths)
        lookup.append(token)
    assert lookup.draft(num_tokens) == searched([*prompt, *more], num_tokens, lengths)


def test_the_longest_match_wins_and_of_those_the_latest():
    assert Lookup([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).draft(2) == ([7, 2], 3)
    assert Lookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).draft(2) == ([8, 1], 3)


def test_new_words_draft_nothing():
    for tokens in ([], [5], [5, 5], [1, 2, 3, 4]):
        assert Lookup(tokens).draft(4) == ([], 0)


def test_a_loop_goes_round_beyond_the_end_of_the_text():
    assert Lookup([1, 2, 3, 1, 2, 3]).draft(8) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)
    assert Lookup([4, 4, 4]).draft(5) == ([4] * 5, 2)


# --- finished texts ---


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(TEXT, max_size=8),
    ending=st.lists(st.integers(0, 2), max_size=6),
    num_tokens=st.integers(1, 9),
    lengths=SIZES,
    capacity=st.integers(0, 40),
    longer_than=st.integers(0, 4),
)
def test_what_is_recalled_is_what_a_search_through_the_newest_texts_finds(
    texts, ending, num_tokens, lengths, capacity, longer_than
):
    recall = Recall(capacity, lengths=lengths)
    for text in texts:
        recall.add(text)
        assert recall.num_tokens <= capacity
        assert recall.num_ngrams <= len(lengths) * capacity
    held = [text for text in kept(texts, capacity) if len(text) > min(lengths)]
    assert recall.num_tokens == sum(len(text) + 1 for text in held)
    found = recall.draft(ending, num_tokens, longer_than=longer_than)
    assert found == recalled(held, ending, num_tokens, lengths, longer_than)


def test_a_memory_that_is_full_for_long_does_not_grow():
    recall = Recall(500)
    for number in range(3000):
        recall.add([(number * 7 + i * i) % 1000 for i in range(number % 60)])
    assert recall.num_tokens <= 500
    assert recall.num_ngrams <= len(LENGTHS) * 500
    assert len(recall._ring) == 500
    recall.clear()
    assert (recall.num_tokens, recall.num_ngrams) == (0, 0)


def test_no_draft_goes_beyond_the_end_of_a_text():
    recall = Recall(100)
    for text in ([1, 2, 3], [4, 5, 6, 7]):
        recall.add(text)
    assert recall.draft([1, 2], 8) == ([3], 2)
    assert recall.draft([3, 4], 8) == ([], 0), "of two texts, nothing follows the one in the other"
    assert recall.draft([4, 5], 8) == ([6, 7], 2)


def drafting(recall, prompt, **right):
    """One sequence's, where rows cost a little."""
    drafters = Drafters(step_costs((2, 12), layer_row_s=0.2, head_s=0.1), recall)
    for length, estimate in right.items():
        for known in [drafters.matched[int(length[1:])]]:
            for _ in range(400):
                known.update(4, round(4 * estimate))
    return Drafting(drafters, prompt, max_draft=8, lookup=True, is_guarded=False)


def test_a_longer_match_is_looked_up_elsewhere_and_one_as_long_in_the_text_itself():
    recall = Recall(100)
    recall.add([1, 2, 3, 4, 5, 6, 7])
    for prompt, expected, length in (
        ([2, 3, 9, 1, 2, 3], [4, 5, 6, 7], 3),
        ([1, 2, 3, 9, 9, 1, 2, 3], [9, 9, 1, 2], 3),
        ([8, 8, 2, 3], [4, 5, 6, 7], 2),
    ):
        one = drafting(recall, prompt)
        assert one.begin(prompt, 4, {})[:4] == expected
        assert one.length == length


def test_the_number_of_drafts_follows_the_length_of_the_match():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    recall = Recall(100)
    recall.add(text)
    long, short = (
        len(drafting(recall, prompt, _8=1.0, _2=0.25).begin(prompt, 8, {})) for prompt in (text[:8], [0, *text[6:8]])
    )
    assert long == 8
    assert 1 <= short <= 3


def test_matches_are_told_apart_by_their_length():
    recall = Recall(100)
    recall.add(list(range(20)))
    one = drafting(recall, [0, 5, 6])
    before = {length: known.probability for length, known in one.matched.items()}
    drafts = one.begin([0, 5, 6], 8, {})
    one.judged(len(drafts), 0)
    assert {length for length, known in one.matched.items() if known.probability != before[length]} == {2}
    for length, known in one.drafters.matched.items():
        assert (known.probability < 0.8) == (length == 2)


# --- in the engine ---


def priced(model):
    network_of(model).costs = step_costs((*model.config.exit_layers, model.config.num_layers), head_s=0.1)
    return model


def test_what_is_recalled_saves_deep_passes_and_changes_no_token():
    model = priced(agreeing_model())
    prompts = [[*PROMPT, number] for number in range(3)]
    wishes = {"method": "speculative", "always_draft": True, "exits": [], "max_new_tokens": 24}
    draws = [eellm.Sampling(), eellm.Sampling(temperature=0.9, top_k=40, repetition_penalty=1.2, seed=5)]
    passes = {}
    for capacity in (0, 1000):
        with eellm.Engine(model, recall=capacity) as engine:
            for sampling in draws:
                for again in range(2):
                    outs = engine.generate(prompts, sampling=sampling, **wishes)
                    for prompt, out in zip(prompts, outs, strict=True):
                        assert out.tokens == [row[0] for row in drawn_oracle(model, prompt, 24, sampling)]
                    passes[capacity, sampling.seed, again] = sum(out.stats.deep_passes for out in outs)
            assert engine.recall.num_tokens <= capacity
    for seed in (None, 5):
        assert passes[0, seed, 1] == passes[0, seed, 0]
        assert passes[1000, seed, 1] < 0.6 * passes[0, seed, 1]


def test_requests_that_look_nothing_up_recall_nothing():
    model = priced(tiny_model(seed=4))
    with eellm.Engine(model) as engine:
        wishes = {"method": "speculative", "always_draft": True, "exits": [], "max_new_tokens": 20}
        engine.generate([PROMPT], **wishes)
        (out,) = engine.generate([PROMPT], lookup=False, **wishes)
        assert out.stats.drafted == 0
        (out,) = engine.generate([PROMPT], **wishes)
        assert out.stats.accepted > 10


def test_texts_of_any_method_and_cancelled_ones_are_remembered_up_to_a_bound():
    model = tiny_model(seed=4)
    with eellm.Engine(model, recall=60) as engine:
        (out,) = engine.generate([PROMPT], method="early", threshold=0.3, max_new_tokens=10)
        assert engine.recall.draft([*PROMPT, *out.tokens[:2]], 4) == (out.tokens[2:6], 8)
        running = engine.submit([7, 7, 8], method="full", max_new_tokens=30)
        first = next(running).id
        running.cancel()
        assert engine.recall.draft([7, 8], 4) == ([first], 2)
        for number in range(20):
            engine.generate([[number, *PROMPT]], method="full", max_new_tokens=1 + number)
            assert engine.recall.num_tokens <= 60


def test_a_pass_that_is_broken_off_leaves_nothing_to_recall(monkeypatch):
    with eellm.Engine(tiny_model(seed=4)) as engine:
        engine.generate([PROMPT], method="full", max_new_tokens=5)
        assert engine.recall.num_tokens > 0
        engine.submit(PROMPT, method="full")
        monkeypatch.setattr(engine.loop, "step", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert engine.recall.num_tokens == 0


def _interrupted(*_):
    raise KeyboardInterrupt


def test_a_memory_below_0_is_refused_in_words():
    for recall in (-1, 2.5, True):
        with pytest.raises(ConfigError, match=r"recall = .*: must be a whole number of tokens, at least 0"):
            eellm.Engine(tiny_model(), recall=recall)
