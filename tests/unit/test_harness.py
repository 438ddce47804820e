"""lm-eval's model type `eellm`, against whole logits of the model without any cache."""

import pytest
import torch

import eellm
from eellm.errors import ConfigError, RequestError
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from eellm.evaluate.harness import EellmLM

EXITS = (
    eellm.ExitConfig(layer=2, kind="mlp", gate_size=8),
    eellm.ExitConfig(layer=3, kind="layer", head="own"),
    eellm.ExitConfig(layer=5, kind="norm"),
)
CONTEXT_LENGTH = 48
PAIRS = (
    ("for x in", " range"),
    ("", "import"),
    ("a", " b c d e f g"),
    ("The lambda expression yields a function object. " * 9, " and so on"),
    ("if x:", "\n    return x\nelse:\n    pass"),
    ("trailing space ", "word"),
)


@pytest.fixture(scope="module")
def model():
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        seed=2, dtype="float32", vocab_size=tokenizer.vocab_size, exits=EXITS, max_seq_len=CONTEXT_LENGTH, num_layers=6
    )
    model.tokenizer = tokenizer
    return model


RULES = (
    ({}, {}),
    ({"exit": 2}, {2: 0.0}),
    ({"exit": 3}, {3: 0.0}),
    ({"exit": 6}, {}),
    ({"threshold": 0.5}, {2: 0.5, 3: 0.5, 5: 0.5}),
    ({"threshold": 0.3, "exits": "2+5"}, {2: 0.3, 5: 0.3}),
)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@torch.inference_mode()
def expected(model, tokens, num_scored, thresholds):
    """(sum of log-probabilities, whether each is the likeliest) of the last tokens, from whole logits."""
    logits = {layer: value[0].float() for layer, value in model(torch.tensor([tokens[:-1]])).items()}
    total, is_greedy = 0.0, True
    for place in range(len(tokens) - num_scored, len(tokens)):
        for layer in sorted(logits):
            row_V = logits[layer][place - 1]
            if layer == 6 or float(row_V.softmax(-1).max()) >= thresholds.get(layer, 2):
                break
        total += float(row_V.log_softmax(-1)[tokens[place]])
        is_greedy &= int(row_V.argmax()) == tokens[place]
    return total, is_greedy


def ids(model, context, continuation):
    """As lm-eval splits them: a context's last spaces belong to the continuation; nothing is the end of a text."""
    encode = model.tokenizer.encode
    if not context:
        return [model.tokenizer.eos_id], encode(continuation)
    whole, before = encode(context + continuation), encode(context.rstrip(" "))
    return before, whole[len(before) :]


@pytest.mark.parametrize(("fields", "thresholds"), RULES)
def test_a_continuation_s_likelihood_is_that_of_the_whole_logits(model, fields, thresholds):
    lm = EellmLM(model, **fields)
    found = lm.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        before, after = ids(model, context, continuation)
        tokens = [*before, *after][-CONTEXT_LENGTH - 1 :]
        right, right_greedy = expected(model, tokens, len(after), thresholds)
        assert logprob == pytest.approx(right, abs=1e-3)
        assert is_greedy == right_greedy
    assert lm.counts.truncated == 1
    assert sum(lm.counts.exits.values()) == sum(len(ids(model, *pair)[1]) for pair in PAIRS)


def test_what_greedy_decoding_says_is_called_greedy(model):
    (out,) = eellm.generate(model, [model.tokenizer.encode("for x in")], method="full", max_new_tokens=5)
    lm = EellmLM(model)
    ((_, is_greedy),) = lm._loglikelihood_tokens([(("", ""), model.tokenizer.encode("for x in"), out.tokens)])
    assert is_greedy


@pytest.mark.parametrize(("fields", "thresholds"), RULES)
def test_a_long_text_s_likelihood_is_the_sum_over_windows_that_hold_each_token_once(model, fields, thresholds):
    texts = ["import sys", "The lambda expression yields a function object. " * 9]
    lm = EellmLM(model, **fields)
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    for text, logprob in zip(texts, found, strict=True):
        tokens = [model.tokenizer.eos_id, *model.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(tokens):
            end = min(done + CONTEXT_LENGTH, len(tokens))
            window = tokens[max(0, end - CONTEXT_LENGTH - 1) : end]
            total += expected(model, window, end - done, thresholds)[0]
            done = end
        assert logprob == pytest.approx(total, abs=2e-3)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"method": "full"}),
        ({"exit": 3}, {"exits": [3], "threshold": 0.0}),
        ({"threshold": 0.4}, {"threshold": 0.4}),
    ],
)
def test_generating_is_what_eellm_generates(model, fields, options):
    prompts = ["for x in", "The lambda", "while"]
    requests = [(prompt, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for prompt in prompts]
    lm = EellmLM(model, batch_size=2, **fields)
    found = lm.generate_until(instances("generate_until", requests))
    outs = eellm.generate(model, prompts, stop=["\n"], max_new_tokens=12, **options)
    assert found == [out.text for out in outs]
    assert lm.counts.layers_full == 6 * sum(len(out.tokens) for out in outs)
    assert set(lm.counts.exits) == {exit for out in outs for exit in out.exits}


def test_a_stop_string_ends_the_text_and_is_not_in_it(model):
    lm = EellmLM(model)
    (whole,) = lm.generate_until(instances("generate_until", [("for x in", {"max_gen_toks": 20})]))
    assert len(whole) > 6
    stop = whole[4:6]
    (cut,) = lm.generate_until(instances("generate_until", [("for x in", {"max_gen_toks": 20, "until": stop})]))
    assert cut == whole[: whole.index(stop)]


def test_of_a_prompt_that_is_too_long_the_end_is_kept(model):
    prompt = "The lambda expression yields a function object. " * 9
    lm = EellmLM(model)
    (found,) = lm.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": 8, "until": []})]))
    kept = model.tokenizer.encode(prompt)[-(CONTEXT_LENGTH - 8) :]
    assert found == eellm.generate(model, [kept], method="full", max_new_tokens=8)[0].text
    assert lm.counts.truncated == 1


def test_an_empty_prompt_begins_a_text(model):
    lm = EellmLM(model)
    (found,) = lm.generate_until(instances("generate_until", [("", {"max_gen_toks": 8})]))
    assert found == eellm.generate(model, [[model.tokenizer.eos_id]], method="full", max_new_tokens=8)[0].text


def test_chats_go_through_the_model_s_template(model):
    lm = EellmLM(model)
    history = [{"role": "user", "content": "Hi"}]
    prompt = model.tokenizer.apply_chat(history)
    assert lm.apply_chat_template(history) == prompt
    begun = [*history, {"role": "assistant", "content": "Well,"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == f"{prompt}Well,"
    assert lm.chat_template(True) == model.tokenizer.chat_template
    assert lm.chat_template(False) is None


def test_lm_eval_makes_it_from_a_line_of_arguments(model, tmp_path):
    eellm.save(model, tmp_path / "model")
    line = f"pretrained={tmp_path / 'model'},threshold=0.5,policy=max_prob,exits=2+5"
    lm = get_model("eellm").create_from_arg_string(line, {"batch_size": 4, "max_batch_size": None, "device": "cuda:0"})
    there = EellmLM(model, threshold=0.5, exits=(2, 5))
    requests = instances("loglikelihood", PAIRS)
    assert [x for x, _ in lm.loglikelihood(requests)] == pytest.approx(
        [x for x, _ in there.loglikelihood(requests)], abs=1e-4
    )
    assert len(lm.engine.slots) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 48}, "max_gen_toks = 48: the model's context is 48"),
        ({"num_beams": 4}, "'num_beams' isn't known here"),
    ],
)
def test_what_can_not_be_generated_is_refused(model, options, message):
    with pytest.raises(RequestError, match=message):
        EellmLM(model).generate_until(instances("generate_until", [("x", options)]))


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(RequestError, match="a continuation has"):
        EellmLM(model).loglikelihood(instances("loglikelihood", [("x", " y" * 60)]))


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="no tokenizer"):
        EellmLM(tiny_model(dtype="float32"))
