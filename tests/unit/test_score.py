"""Scoring text: the log-probability of each token at the exit that it would be drawn from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eellm
from eellm.errors import ConfigError, RequestError
from eellm.exits.policy import SCORES
from eellm.infer import score as scoring
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

MODEL = tiny_model(seed=1)
TEXT = [(5 * i + i * i) % 29 for i in range(50)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 7)


@torch.inference_mode()
def expected(tokens, thresholds, policy="max_prob"):
    """(exit, log-probability, confidence, whether likeliest) of each token but the first, from whole logits."""
    logits = {layer: value[0].float() for layer, value in MODEL(torch.tensor([tokens])).items()}
    rows = MODEL.decoder.rows(len(tokens))
    hiddens = dict(MODEL.hiddens(torch.tensor([tokens]), rows))
    out = []
    for i, token in enumerate(tokens[1:]):
        for layer in sorted(logits):
            if policy != "gate":
                confidence = float(SCORES[policy](logits[layer][i]))
            elif layer == 6:
                confidence = 1.0
            else:
                z = MODEL.normed(layer, hiddens[layer], rows)[0, i]
                confidence = float(MODEL.exit(layer).gate(z).float().sigmoid())
            if layer == 6 or confidence >= thresholds.get(layer, 2):
                break
        row = logits[layer][i]
        out.append((layer, float(row.log_softmax(-1)[token]), confidence, int(row.argmax()) == token))
    return out


def assert_is(score, rows):
    assert score.exits == [row[0] for row in rows]
    assert score.logprobs == pytest.approx([row[1] for row in rows], abs=1e-5)
    assert score.confidences == pytest.approx([row[2] for row in rows], abs=1e-5)
    assert score.is_likeliest == [row[3] for row in rows]
    assert score.logprob == pytest.approx(sum(row[1] for row in rows), abs=1e-4)


def test_at_full_depth_and_at_one_exit():
    with eellm.Engine(MODEL) as engine:
        for exit, thresholds in ((None, {}), (6, {}), (1, {1: 0.0}), (2, {2: 0.0}), (3, {3: 0.0}), (5, {5: 0.0})):
            (score,) = engine.score([TEXT], exit=exit)
            assert score.tokens == TEXT[1:]
            assert_is(score, expected(TEXT, thresholds))
            assert set(score.exits) == {exit or 6}


@pytest.mark.parametrize("policy", ["max_prob", "margin", "entropy", "gate"])
def test_under_the_exit_policy_each_token_is_scored_by_the_exit_that_it_would_take(policy):
    with eellm.Engine(MODEL) as engine:
        for threshold in (0.5, 0.8):
            (score,) = engine.score([TEXT], policy=policy, threshold=threshold)
            assert_is(score, expected(TEXT, dict.fromkeys((1, 2, 3, 5), threshold), policy))
            assert len(set(score.exits)) > 1
        (some,) = engine.score([TEXT], policy=policy, threshold={2: 0.3, 5: 0.4})
        assert_is(some, expected(TEXT, {2: 0.3, 5: 0.4}, policy))


def test_what_early_exit_generates_is_scored_as_it_was_drawn():
    with eellm.Engine(MODEL) as engine:
        (out,) = engine.generate([TEXT[:9]], method="early", threshold=0.3, max_new_tokens=40)
        (score,) = engine.score([(TEXT[:9], out.tokens)], threshold=0.3)
    assert score.exits == out.exits
    assert score.logprobs == pytest.approx(out.logprobs, abs=1e-5)
    assert all(score.is_likeliest)


def test_of_a_pair_the_continuation_is_scored_given_the_context():
    model = tiny_model(seed=1, dtype="float32", vocab_size=tiny_tokenizer().vocab_size)
    model.tokenizer = tiny_tokenizer()
    with eellm.Engine(model) as engine:
        whole, pair = engine.score(["for x in range", ("for x", " in range")])
        ids = [model.tokenizer.encode(text) for text in ("for x", " in range")]
        assert pair.tokens == ids[1]
        if whole.tokens == [*ids[0], *ids[1]][1:]:
            assert pair.logprobs == pytest.approx(whole.logprobs[-len(ids[1]) :], abs=1e-4)
        tokens = engine.score([(ids[0], ids[1])])[0]
        assert tokens.logprobs == pytest.approx(pair.logprobs, abs=1e-4)


@pytest.mark.parametrize("thresholds", [{}, {2: 0.0}, {1: 0.5, 2: 0.5, 3: 0.5, 5: 0.5}])
@pytest.mark.parametrize("room", [1, 100, 4096])
def test_texts_of_any_lengths_at_once_are_scored_as_each_alone(thresholds, room, monkeypatch):
    monkeypatch.setattr(scoring, "ROOM", room)
    texts = [TEXT[i : i + length] for i, length in enumerate((2, 30, 5, 8, 2, 2, 2, 49, 9, 3, 3, 3, 12))]
    fields = {"threshold": thresholds} if thresholds else {}
    with eellm.Engine(MODEL) as engine:
        scores = engine.score(texts, **fields)
        pairs = engine.score([(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts], **fields)
        assert engine.score([]) == []
    for text, score, pair in zip(texts, scores, pairs, strict=True):
        rows = expected(text, thresholds)
        assert_is(score, rows)
        assert_is(pair, rows[len(text) // 2 - 1 :])


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 5))
def test_chunks_hold_every_row_once_in_order_and_no_slot_twice(lengths, num_slots):
    chunks = list(scoring._chunks(lengths, num_slots))
    parts = [part for chunk in chunks for part in chunk]
    rows = [(part.text, row) for part in parts for row in range(part.start, part.end)]
    assert rows == [(text, row) for text, length in enumerate(lengths) for row in range(length)]
    for chunk in chunks:
        assert sum(part.end - part.start for part in chunk) <= scoring.CHUNK
        slots = [part.text % num_slots for part in chunk]
        assert len(set(slots)) == len(slots)


@pytest.mark.parametrize(
    ("text", "fields", "error", "message"),
    [
        ([3], {}, RequestError, "a text of one token has nothing to score"),
        ([], {}, RequestError, "the prompt is empty"),
        ([1] * 130, {}, RequestError, "130 tokens; the model's context is 128"),
        (TEXT, {"exit": 4}, ConfigError, "no exit at layer 4"),
        (TEXT, {"exit": 3, "threshold": 0.5}, RequestError, "leave out threshold"),
    ],
)
def test_what_can_not_be_scored_is_refused(text, fields, error, message):
    with eellm.Engine(MODEL) as engine, pytest.raises(error, match=message):
        engine.score([text], **fields)


def test_the_likeliest_tokens_of_each_place_are_told_where_they_are_asked_for():
    engine = eellm.Engine(MODEL)
    (plain,) = engine.score([TEXT], threshold=0.4)
    (score,) = engine.score([TEXT], threshold=0.4, top_logprobs=3)
    assert score.logprobs == plain.logprobs
    assert plain.top == [()] * len(plain.tokens)
    logits = {layer: value[0].float() for layer, value in MODEL(torch.tensor([TEXT])).items()}
    for i, (exit, top) in enumerate(zip(score.exits, score.top, strict=True)):
        expected = logits[exit][i].log_softmax(-1).topk(3)
        assert [id for id, _ in top] == expected.indices.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    (end,) = engine.score([(TEXT[:20], TEXT[20:])], threshold=0.4, top_logprobs=3)
    assert end.top == score.top[19:]
