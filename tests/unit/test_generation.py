"""Generation around the decoder: prompts, texts, where they end, streaming, and what it all cost."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eellm
from eellm.errors import ConfigError, RequestError
from eellm.infer.loop import Loop
from eellm.infer.packed import PackedNetwork
from eellm.infer.sampling import Sampler
from eellm.text.tokenizer import Tokenizer
from tests.models import oracle, tiny_model
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
END = 0  # tiny_tokenizer's <|end|>
TEXT = "The for statement is used to iterate over the elements of a sequence — déjà vu 🙂."


def model_with_tokenizer(tokenizer=None, **changes):
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(dtype="float32", vocab_size=tokenizer.vocab_size, **changes)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def model():
    return model_with_tokenizer(eos_token_ids=(END,))


@pytest.fixture
def say(monkeypatch):
    """Makes the model say these tokens, whatever its logits are."""

    def script(ids):
        rest = iter(ids)
        monkeypatch.setattr(Sampler, "takes_likeliest", False)
        monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(rest))

    return script


def said(model, ids, say, **options):
    say(ids)
    (out,) = eellm.generate(model, [PROMPT], **{"max_new_tokens": len(ids)} | options)
    return out


# --- prompts ---


def test_a_string_and_its_ids_are_the_same_prompt(model):
    ids = model.tokenizer.encode("for x in")
    outs = eellm.generate(model, ["for x in", ids, tuple(ids)], max_new_tokens=6)
    assert outs[0].tokens == outs[1].tokens == outs[2].tokens
    assert [out.stats.prompt_tokens for out in outs] == [len(ids)] * 3
    assert outs[0].text == model.tokenizer.decode(outs[0].tokens)


def test_the_tokens_that_a_pipeline_adds_are_part_of_a_string_prompt():
    model = model_with_tokenizer(sentencepiece_tokenizer())
    (out,) = eellm.generate(model, ["ab"], max_new_tokens=1)
    assert out.stats.prompt_tokens == len(model.tokenizer.encode("ab", add_special_tokens=False)) + 1


def test_chat_messages_go_through_the_template_up_to_the_answer(model):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "x"},
    ]
    text = "<|start|>user\nhi<|end|>\n<|start|>assistant\nyes<|end|>\n<|start|>user\nx<|end|>\n<|start|>assistant\n"
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert END in ids
    by_chat, by_ids = eellm.generate(model, [chat, ids], max_new_tokens=6)
    assert by_chat.tokens == by_ids.tokens
    assert by_chat.stats.prompt_tokens == len(ids)


def test_what_the_pipeline_adds_to_a_text_is_not_added_to_a_chat_whose_template_writes_it():
    files = sentencepiece_tokenizer().files() | {"chat_template.jinja": b"<s>{{ messages[0]['content'] }}"}
    model = model_with_tokenizer(Tokenizer.from_files(files))
    (out,) = eellm.generate(model, [[{"role": "user", "content": "ab"}]], max_new_tokens=1)
    assert out.stats.prompt_tokens == 1 + len(model.tokenizer.encode("ab", add_special_tokens=False))


def test_models_without_a_tokenizer_take_ids_and_give_no_text():
    (out,) = eellm.generate(tiny_model(), [PROMPT], max_new_tokens=4)
    assert out.text is None
    assert out.pieces == [""] * 4
    assert len(out.tokens) == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([3, 512], "prompt token 512: ids are whole numbers from 0 to 511"),
        ([-1], "prompt token -1: ids"),
        ([3, True], "prompt token True: ids"),
        ([3, 2.0], r"prompt token 2\.0: ids"),
        ([3, "a"], "prompt token 'a': ids"),
        ([1] * 128, "the prompt has 128 tokens; the model's context is 128 and needs room for one"),
        ([{"role": "user", "content": "x " * 200}], "the model's context is 128"),
        ("half a \ud800 pair", "surrogate"),
    ],
)
def test_a_prompt_that_can_not_be_served_is_refused_before_any_is(model, prompt, message, monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("generation began"))
    with pytest.raises(RequestError, match=message):
        eellm.generate(model, [PROMPT, prompt])
    with pytest.raises(RequestError, match=message):
        eellm.stream(model, prompt)


@pytest.mark.parametrize("prompts", ["hello", [3, 1, 4], [{"role": "user", "content": "hello"}]])
def test_a_single_prompt_that_is_no_list_of_prompts_is_refused(model, prompts):
    with pytest.raises(RequestError, match="put the single one in a list"):
        eellm.generate(model, prompts)


def test_no_prompts_give_no_generations(model):
    assert eellm.generate(model, []) == []


def test_what_needs_a_tokenizer_a_template_or_a_gate_says_so():
    bare = tiny_model(exits=(eellm.ExitConfig(layer=2), eellm.ExitConfig(layer=3, gate_size=4)))
    for prompt in ("hello", [{"role": "user", "content": "hello"}]):
        with pytest.raises(RequestError, match="no tokenizer; give the prompt as a list of token ids"):
            eellm.generate(bare, [prompt])
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        eellm.generate(bare, [PROMPT], stop=("x",))
    with pytest.raises(ConfigError, match=r"policy = 'gate': the exit at layer 2 has no gate"):
        eellm.generate(bare, [PROMPT], policy="gate")
    for fine in ({"exits": (3,)}, {"threshold": {2: 1.0, 3: 0.5}}, {"method": "full"}):
        eellm.generate(bare, [PROMPT], policy="gate", max_new_tokens=2, **fine)
    templateless = model_with_tokenizer(sentencepiece_tokenizer())
    with pytest.raises(RequestError, match="no chat template"):
        eellm.generate(templateless, [[{"role": "user", "content": "a"}]])


def test_exits_that_the_model_lacks_are_refused(model):
    for options in ({"exits": (4,)}, {"exits": (6,)}, {"threshold": {4: 0.5}}):
        with pytest.raises(ConfigError, match="the model has no exit at layer"):
            eellm.generate(model, [PROMPT], **options)


# --- where a text ends ---


def test_max_new_tokens_of_one_gives_one_token(model):
    for options in ({"method": "full"}, {"threshold": 0.0}, {"threshold": 0.5}):
        (out,) = eellm.generate(model, [PROMPT], max_new_tokens=1, ignore_eos=True, **options)
        assert [len(x) for x in (out.tokens, out.exits, out.confidences, out.logprobs, out.pieces)] == [1] * 5
        assert out.finish_reason == "length"
        assert out.stats.decode_s == 0
        assert out.stats.tokens_per_s == 1 / out.stats.prefill_s


@pytest.mark.parametrize("prompt_size", [1, 10, 14, 15])
@pytest.mark.parametrize("options", [{"method": "full"}, {"threshold": 0.0, "max_deferred": 64}, {"threshold": 0.4}])
def test_the_context_s_limit_ends_a_text_with_its_last_position_used(prompt_size, options):
    model = tiny_model(max_seq_len=16)
    (out,) = eellm.generate(model, [list(range(prompt_size))], max_new_tokens=64, **options)
    assert len(out.tokens) == 16 - prompt_size
    assert out.finish_reason == "length"


def test_an_end_of_text_token_is_among_the_tokens_and_not_in_the_text(model, say):
    hello, world = model.tokenizer.encode("hello"), model.tokenizer.encode(" world")
    out = said(model, [*hello, END, *world], say)
    assert (out.text, out.tokens, out.finish_reason) == ("hello", [*hello, END], "eos")
    assert out.stats.new_tokens == len(out.exits) == len(hello) + 1
    out = said(model, [*hello, END, *world], say, ignore_eos=True)
    assert (out.text, out.tokens, out.finish_reason) == ("hello world", [*hello, END, *world], "length")


def test_an_end_of_text_token_in_the_last_place_ends_the_text_as_such(model, say):
    out = said(model, [9, END], say)
    assert out.finish_reason == "eos"


def test_a_model_that_eellm_builds_has_no_end_of_text():
    assert tiny_model().config.eos_token_ids == ()


def test_a_stop_string_across_tokens_is_cut_off_and_no_token_follows(model, say):
    ids = model.tokenizer.encode("for item in range(10): print(item)")
    pieces = [model.tokenizer.decode([i]) for i in ids]
    ends = [len("".join(pieces[: n + 1])) for n in range(len(pieces))]
    stop = "m in ran"
    place = "".join(pieces).index(stop)
    inside = [end for end in ends if place < end < place + len(stop)]
    assert inside, "the stop string must span tokens"
    out = said(model, ids, say, stop=(stop,))
    assert out.text == "for ite"
    assert out.finish_reason == "stop"
    assert out.tokens == ids[: next(n for n, end in enumerate(ends) if end >= place + len(stop)) + 1]
    assert len(out.tokens) == out.stats.new_tokens


def test_the_stop_string_that_begins_first_cuts_and_the_prompt_s_own_do_not_count(model, say):
    ids = model.tokenizer.encode("one two three")
    assert said(model, ids, say, stop=("three", "two", "wo")).text == "one "
    say(ids)
    (out,) = eellm.generate(model, ["two"], max_new_tokens=len(ids), stop=("tw",))
    assert out.text == "one "


def test_a_single_stop_string_is_one_stop_string_and_not_its_letters(model, say):
    assert said(model, model.tokenizer.encode("one two three"), say, stop="two").text == "one "


def test_the_beginning_of_a_stop_string_is_shown_once_the_text_has_ended_without_the_rest(model, say):
    ids = model.tokenizer.encode("hello wor")
    for more, finish_reason in (((), "length"), ((END,), "eos")):
        room = len(ids) if finish_reason == "length" else 99
        out = said(model, [*ids, *more], say, stop=("world",), max_new_tokens=room)
        assert (out.text, out.finish_reason) == ("hello wor", finish_reason)
        assert out.tokens == [*ids, *more]


def test_half_a_character_at_the_end_is_shown_as_such(model, say):
    ids = model.tokenizer.encode("né🙂")[:-1]
    out = said(model, ids, say)
    assert out.text == "né�" == model.tokenizer.decode(ids)


WORDS = st.lists(st.sampled_from([*"aeté 🙂.\n", "the", "sequence", " of"]), max_size=12).map("".join)


@settings(max_examples=40, deadline=None)
@given(text=WORDS, stops=st.lists(WORDS.filter(bool), max_size=3), end=st.booleans())
@example(text="eaa", stops=["a", "eaa"], end=False)  # after "ea" the longer one, which begins earlier, may yet come
@example(text="eat", stops=["a", "eaa"], end=False)
@example(text="ea", stops=["a", "eaa"], end=True)
def test_pieces_join_to_the_text_which_is_what_comes_before_the_first_stop_string(text, stops, end):
    model = ONE_LAYER
    ids = model.tokenizer.encode(text) + [END] * end
    if not ids:
        return
    rest = iter(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "takes_likeliest", False)
        patch.setattr(Sampler, "draw", lambda self, logits: next(rest))
        (out,) = eellm.generate(model, [[5]], max_new_tokens=len(ids), stop=tuple(stops))
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert out.text == text[:cut]
    assert "".join(out.pieces) == out.text
    assert len(out.pieces) == len(out.tokens)
    if cut < len(text):
        assert out.finish_reason == "stop"
        whole = model.tokenizer.decode(out.tokens)
        assert any(stop in whole for stop in stops), "stopped too early"
        before = model.tokenizer.decode(out.tokens[:-1]).rstrip("\ufffd")
        is_cut = any(before[cut:].startswith(stop) for stop in stops)
        may_be_cut_earlier = any(stop.startswith(before[i:]) for stop in stops for i in range(min(cut, len(before))))
        assert not is_cut or may_be_cut_earlier, "stopped too late"
    else:
        assert out.tokens == ids
        assert out.finish_reason == ("eos" if end else "length")


ONE_LAYER = model_with_tokenizer(num_layers=1, exits=(), eos_token_ids=(END,))


# --- streaming ---


@pytest.mark.parametrize("options", [{"threshold": 0.3}, {"method": "full"}, {"threshold": 0.2, "stop": ("e", " ")}])
def test_a_stream_gives_what_generate_gives(model, options):
    sampling = eellm.Sampling(temperature=1.0, seed=3)
    options = {"max_new_tokens": 16, "sampling": sampling} | options
    (out,) = eellm.generate(model, ["for x in"], **options)
    run = eellm.stream(model, "for x in", eellm.GenerateConfig(**options))
    tokens = list(run)
    assert [token.id for token in tokens] == out.tokens
    assert [token.text for token in tokens] == out.pieces
    assert [token.exit for token in tokens] == out.exits == run.exits
    assert [token.confidence for token in tokens] == out.confidences
    assert [token.logprob for token in tokens] == out.logprobs
    assert run.finish_reason == out.finish_reason
    clocks = ("prefill_s", "decode_s", "tokens_per_s")
    assert {k: v for k, v in vars(run.stats()).items() if k not in clocks} == {
        k: v for k, v in vars(out.stats).items() if k not in clocks
    }


def test_a_stream_computes_a_token_when_it_is_asked_for_and_goes_on_where_it_was(model):
    options = eellm.GenerateConfig(max_new_tokens=8, method="full", ignore_eos=True)
    whole = [token.id for token in eellm.stream(model, PROMPT, options)]
    run = eellm.stream(model, PROMPT, options)
    assert run.exits == []
    first = next(iter(run))
    assert run.stats().new_tokens == 1
    assert run.stats().layers_run == 6
    second = next(run)
    rest = [token.id for token in run]
    assert [first.id, second.id, *rest] == whole
    assert list(run) == []


def test_runs_of_one_model_can_be_interleaved(model):
    options = eellm.GenerateConfig(max_new_tokens=8, threshold=0.3, ignore_eos=True)
    alone = [[t.id for t in eellm.stream(model, prompt, options)] for prompt in ("for x", "if the")]
    runs = [eellm.stream(model, prompt, options) for prompt in ("for x", "if the")]
    together = [(a.id, b.id) for a, b in zip(*runs, strict=True)]
    assert [list(ids) for ids in zip(*together, strict=True)] == alone


# --- costs ---


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs: passes through each layer, and each exit's output matrix."""
    layers, heads = dict.fromkeys(range(1, 7), 0), {}
    run, logits = PackedNetwork.run, PackedNetwork.logits

    def counting_run(self, h_ND, first, last, *rest):
        for n in range(first, last + 1):
            layers[n] += 1
        return run(self, h_ND, first, last, *rest)

    def counting_logits(self, layer, z_ND):
        heads[layer] = heads.get(layer, 0) + 1
        return logits(self, layer, z_ND)

    monkeypatch.setattr(PackedNetwork, "run", counting_run)
    monkeypatch.setattr(PackedNetwork, "logits", counting_logits)
    return layers, heads


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"threshold": 0.3},
        {"threshold": 0.5, "max_deferred": 2},
        {"threshold": 0.0, "max_deferred": 3},
        {"threshold": 0.5, "policy": "gate"},
        {"threshold": 1},
    ],
)
def test_the_work_reported_is_the_work_done(options, calls):
    model = tiny_model()
    layers, matrices = calls
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=20, **options)
    stats = out.stats
    assert stats.layers_run == sum(layers.values())
    assert stats.deep_passes == layers[6]
    assert stats.layers_full == 6 * 20
    heads = stats.heads_run
    assert list(heads) == sorted(heads)
    assert heads == matrices
    assert stats.mean_exit_layer == sum(out.exits) / 20
    if options.get("method") == "full" or options.get("threshold") == 1:
        assert (stats.layers_run, stats.deep_passes, stats.mean_exit_layer) == (120, 20, 6)
        assert heads == {6: 20}
    else:
        assert stats.layers_run < 120


def test_times_and_speed_are_arithmetic_on_the_clock(model, monkeypatch):
    times = iter([10.0, 12.5, 13.0, 13.5, 15.0])
    monkeypatch.setattr("eellm.infer.sequence.time", SimpleNamespace(perf_counter=lambda: next(times)))
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=4, ignore_eos=True)
    stats = out.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (8, 4)
    assert stats.prefill_s == 2.5
    assert stats.decode_s == 2.5
    assert stats.tokens_per_s == 3 / 2.5


def test_lists_have_one_value_per_token_and_scores_are_scores(model):
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=20, threshold=0.4, ignore_eos=True)
    assert {len(x) for x in (out.tokens, out.exits, out.confidences, out.logprobs, out.pieces)} == {20}
    assert set(out.exits) <= {1, 2, 3, 5, 6}
    for layer, confidence, logprob in zip(out.exits, out.confidences, out.logprobs, strict=True):
        assert 0 <= confidence <= 1
        assert layer == 6 or confidence >= 0.4
        assert torch.tensor(logprob).exp() == pytest.approx(confidence, abs=1e-4), "greedy: the likeliest token"


@pytest.mark.parametrize("method", ["full", "early", "speculative"])
def test_the_likeliest_tokens_come_with_each(method):
    model, prompt = tiny_model(seed=2), [3, 1, 4]
    engine = eellm.Engine(model)
    tokens = [*engine.submit(prompt, method=method, threshold=0.3, top_logprobs=4, max_new_tokens=12)]
    text = prompt[:]
    for token in tokens:
        assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=1e-6))
        layer = model.config.num_layers if method == "speculative" else token.exit
        expected = model(torch.tensor([text]))[layer][0, -1].float().log_softmax(-1).topk(4)
        assert [id for id, _ in token.top] == expected.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(expected.values.tolist(), abs=1e-5)
        text.append(token.id)
    assert all(token.top == () for token in engine.submit(prompt, max_new_tokens=3))


@pytest.mark.parametrize("policy", ["max_prob", "gate"])
def test_exits_that_were_not_sure_come_with_each_token(policy):
    model = tiny_model(seed=2)
    thresholds = dict.fromkeys(model.config.exit_layers, 0.5)
    tokens = [*eellm.Engine(model).submit([3, 1, 4], method="early", threshold=0.5, policy=policy, max_new_tokens=24)]
    text = [3, 1, 4]
    for token in tokens:
        assert [layer for layer, _ in token.passed] == [layer for layer in thresholds if layer < token.exit]
        for layer, score in token.passed:
            ((_, _, _, expected),) = oracle(model, text, num_tokens=1, thresholds={layer: 0.0}, policy=policy)
            assert score == pytest.approx(expected, abs=1e-6)
            assert score < 0.5
        text.append(token.id)
    assert len({token.exit for token in tokens}) > 2
