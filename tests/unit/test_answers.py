"""SQuAD's measures of an answer, against values worked out by hand."""

import pytest

from eellm.evaluate.answers import squad, token_f1, words


def test_case_punctuation_and_articles_do_not_count():
    assert words("The  Denver, Broncos!") == ["denver", "broncos"]
    assert token_f1("A theatre.", "theatre") == 1
    assert words("another") == ["another"], "articles are whole words"


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("Denver Broncos", "Denver Broncos", 1),
        ("the Denver team", "Denver Broncos", 0.5),
        ("Broncos of Denver", "Denver Broncos", 0.8),
        ("Paris", "Denver Broncos", 0),
        ("", "Denver", 0),
        ("the", "a", 1),
        ("no no no", "no", 0.5),
        ("no no maybe", "no no", 0.8),
    ],
)
def test_f1_counts_each_word_as_often_as_it_stands_there(answer, right, f1):
    assert token_f1(answer, right) == pytest.approx(f1)


def test_of_several_right_answers_the_nearest_counts():
    doc = {"answers": ["gold", "the colour gold"]}
    assert squad(doc, ["colour gold"]) == {"f1": 1, "exact_match": 1}
    assert squad(doc, ["golden colour gold"]) == {"f1": pytest.approx(0.8), "exact_match": 0}
