"""Prompt lookup: the latest earlier occurrence of the longest ending, against a search through the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.infer.lookup import PromptLookup


def searched(tokens, num_tokens, max_ngram, min_ngram):
    """The same by looking at every place."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for i in range(num_tokens):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2), max_size=12),
    more=st.lists(st.integers(0, 2), max_size=12),
    num_tokens=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
)
def test_drafts_are_those_of_a_search_through_the_text(prompt, more, num_tokens, sizes):
    lookup = PromptLookup(prompt, max_ngram=sizes[1], min_ngram=sizes[0])
    for i, token in enumerate(more):
        assert lookup.draft(num_tokens) == searched([*prompt, *more[:i]], num_tokens, sizes[1], sizes[0])
        lookup.append(token)
    assert lookup.draft(num_tokens) == searched([*prompt, *more], num_tokens, sizes[1], sizes[0])


def test_the_longest_match_wins_and_of_those_the_latest():
    assert PromptLookup([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).draft(2) == [7, 2]
    assert PromptLookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).draft(2) == [8, 1]


def test_new_words_draft_nothing():
    for tokens in ([], [5], [5, 5], [1, 2, 3, 4]):
        assert PromptLookup(tokens).draft(4) == []


def test_a_loop_goes_round_beyond_the_end_of_the_text():
    assert PromptLookup([1, 2, 3, 1, 2, 3]).draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert PromptLookup([4, 4, 4]).draft(5) == [4] * 5
