"""A continuation after a context is one text with it, encoded once and cut as lm-eval cuts it."""

import pytest

import eellm
from eellm.errors import RequestError
from tests.models import tiny_model
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer

PAIRS = [
    ("abc de", "fgh a"),
    ("ab ", "cd"),
    ("a", "b"),
    ("abc\n ", "ab"),
    ("ab. ", "ab ab"),
    ("", "ab ab"),
    (" ", "ab"),
]


def model_of(tokenizer, **changes):
    model = tiny_model(dtype="float32", vocab_size=tokenizer.vocab_size, **changes)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def model():
    """Its tokenizer puts bos in front of every text."""
    return model_of(sentencepiece_tokenizer())


@pytest.mark.parametrize("pair", PAIRS)
def test_bos_stands_in_front_alone_and_the_parts_are_those_of_the_whole(model, pair):
    bos, encode = model.tokenizer.bos_id, model.tokenizer.encode
    (score,) = eellm.Engine(model).score([pair])
    assert bos not in score.tokens
    context, continuation = pair
    whole = encode(context + continuation) if context.strip() else [bos, *encode(context + continuation)[1:]]
    if pair == ("a", "b"):  # one token holds both
        assert score.tokens == encode("b", add_special_tokens=False)
        return
    assert score.tokens == whole[-len(score.tokens) :]
    (same,) = eellm.Engine(model).score([(whole[: -len(score.tokens)], score.tokens)])
    assert score.logprobs == same.logprobs


@pytest.mark.parametrize("pair", PAIRS)
def test_an_engine_and_lm_eval_score_the_same(model, pair):
    pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")
    from lm_eval.api.instance import Instance

    from eellm.evaluate.harness import EellmLM

    ((logprob, _),) = EellmLM(model).loglikelihood(
        [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)]
    )
    (score,) = eellm.Engine(model).score([pair])
    assert logprob == pytest.approx(score.logprob, abs=1e-5)


def test_ids_and_chats_in_front_of_a_text_bring_no_second_beginning(model):
    bos, ids = model.tokenizer.bos_id, model.tokenizer.encode("ab ab")
    (score,) = eellm.Engine(model).score([(ids, "ab")])
    assert score.tokens == model.tokenizer.encode("ab", add_special_tokens=False)
    (first,), (second,) = (eellm.Engine(model).score([(context, [7, 8])]) for context in ([], [bos]))
    assert first.logprobs == second.logprobs, "without a context, the text begins"


def test_without_bos_an_empty_context_is_the_end_of_the_text_before():
    model = model_of(tiny_tokenizer())
    end = model.tokenizer.eos_id
    found, expected = eellm.Engine(model).score([("", "import"), ([end], model.tokenizer.encode("import"))])
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
    with pytest.raises(RequestError, match="the context is empty, and the model names no token"):
        eellm.Engine(tiny_model()).score([([], [1, 2])])
    with pytest.raises(RequestError, match="the prompt is empty"):
        eellm.Engine(model).score([("for", "")])
