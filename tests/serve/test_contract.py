"""What OpenAI's own client gets from the server is what the engine says."""

import asyncio
import itertools
import json

import pytest

import eellm
from eellm.config.serve import ServeConfig
from eellm.infer.sampling import Sampler
from eellm.serve.ask import make_ask
from eellm.serve.schema import CompletionRequest
from tests.serve.servers import events, eventually, served_model, serving
from tests.worlds import tiny_tokenizer

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def server(model):
    with serving({"tiny": model, "other": served_model(seed=1), "ids": served_model(tokenizer=False)}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


def wanted(model, prompt, **options):
    (out,) = eellm.generate(model, [prompt], **({"max_new_tokens": 12, "method": "full"} | options))
    return out


FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def test_models_are_listed_with_their_exits(client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "other", "ids"]
    assert client.models.retrieve("tiny").exit_layers == [1, 2, 3, 5]
    assert cards["tiny"].num_layers == 6


def test_a_completion_is_the_engine_s(client, model):
    made = client.completions.create(prompt="for x in", **GREEDY)
    out = wanted(model, "for x in")
    assert made.choices[0].text == out.text
    assert made.choices[0].finish_reason == FINISH[out.finish_reason]
    assert made.choices[0].logprobs is None
    usage = made.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (out.stats.prompt_tokens, out.stats.new_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert made.object == "text_completion"
    assert made.id.startswith("cmpl-")


@pytest.mark.parametrize(
    "early_exit",
    [
        {"method": "full"},
        {"method": "early", "threshold": 0.3},
        {"threshold": 1},
        {"threshold": {"2": 0.2, "5": 0.4}},
        {"threshold": 0.2, "exits": [3], "policy": "margin", "max_deferred": 2},
        {"policy": "gate", "threshold": 0.5},
        {"method": "speculative", "threshold": 0.2},
        {"method": "auto"},
    ],
)
def test_early_exits_are_asked_for_by_one_field(client, model, early_exit):
    made = client.completions.create(prompt="while x", **GREEDY, extra_body={"early_exit": early_exit})
    options = {"method": "early"} | early_exit
    if isinstance(options.get("threshold"), dict):
        options["threshold"] = {int(layer): value for layer, value in options["threshold"].items()}
    assert made.choices[0].text == wanted(model, "while x", **options).text


def test_without_the_field_the_answer_is_full_depth_s(client, model):
    for early_exit in ({}, {"early_exit": {}}):
        made = client.completions.create(prompt="def f", **GREEDY, extra_body=early_exit)
        assert made.choices[0].text == wanted(model, "def f").text


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, "auto"),
        ({"temperature": 0, "seed": 1}, "auto"),
        ({"seed": 1}, "auto"),  # what is drafted changes no draw
        ({"early_exit": {"report": True}}, "auto"),
        ({"early_exit": {"threshold": 0.5}}, "early"),
        ({"early_exit": {"exits": [2]}}, "early"),
        ({"early_exit": {"policy": "margin", "method": "speculative"}}, "speculative"),
    ],
)
def test_who_names_no_method_gets_a_lossless_one_unless_exits_are_asked_for(model, fields, method):
    body = CompletionRequest(model="tiny", prompt="x", **fields)
    ask = make_ask(model, body, ServeConfig(model="-"), max_tokens=99, capacity=9)
    ((_, options),) = ask.runs
    assert options.method == method


def test_a_chat_goes_through_the_template(client, model):
    made = client.chat.completions.create(messages=CHAT, **GREEDY)
    out = wanted(model, CHAT)
    assert made.choices[0].message.content == out.text
    assert made.choices[0].message.role == "assistant"
    assert made.usage.prompt_tokens == out.stats.prompt_tokens
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    again = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **GREEDY)
    assert again.choices[0].message.content == out.text
    system, developer = (
        client.chat.completions.create(messages=[{"role": role, "content": "be brief"}, *CHAT], **GREEDY)
        for role in ("system", "developer")
    )
    assert system.choices[0].message.content == developer.choices[0].message.content


def test_a_chat_s_answer_can_be_sent_back(client):
    first = client.chat.completions.create(messages=CHAT, **GREEDY).choices[0].message
    messages = [*CHAT, {"role": first.role, "content": first.content}, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content


def test_a_chat_without_a_limit_fills_the_room(client):
    made = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, extra_body={"ignore_eos": True, "early_exit": {"threshold": 0}}
    )
    assert made.usage.total_tokens == 256
    assert made.choices[0].finish_reason == "length"


def test_a_completion_streams_what_it_would_have_said(client):
    whole = client.completions.create(prompt="for x in", **GREEDY)
    token_by_token = {"early_exit": {"method": "full"}}  # an answer that was given before may come at once
    chunks = list(client.completions.create(prompt="for x in", stream=True, **GREEDY, extra_body=token_by_token))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 3


def test_a_chat_streams_what_it_would_have_said_and_usage_comes_last(client):
    whole = client.chat.completions.create(messages=CHAT, n=2, seed=3, **{**GREEDY, "temperature": 1})
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=CHAT, n=2, seed=3, **{**GREEDY, "temperature": 1}, **asked))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {choice.delta.role for choice in chunks[0].choices} == {"assistant"}
    for i in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == i]
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[i].message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [whole.choices[i].finish_reason]


def test_the_stream_s_lines_are_server_sent_events(server):
    answer = server.post(prompt="for x in", stream=True, stream_options={"include_usage": True}, **GREEDY)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    found = events(answer.text)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] <= 12
    assert all(event["usage"] is None for event in found[:-1])
    plain = events(server.post(prompt="for x in", stream=True, **GREEDY).text)
    assert not any("usage" in event for event in plain)


def test_n_answers_take_the_seeds_that_follow_and_count_the_prompt_once(client, model):
    asked = {**GREEDY, "temperature": 1.5, "top_p": 0.9}
    made = client.completions.create(prompt="for x in", n=3, seed=5, **asked)
    outs = [
        wanted(model, "for x in", sampling=eellm.Sampling(temperature=1.5, top_p=0.9, seed=seed)) for seed in (5, 6, 7)
    ]
    assert [choice.text for choice in made.choices] == [out.text for out in outs]
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert made.usage.prompt_tokens == outs[0].stats.prompt_tokens
    assert made.usage.completion_tokens == sum(out.stats.new_tokens for out in outs)


def test_a_seed_repeats_and_without_one_answers_differ(client):
    asked = {**GREEDY, "temperature": 1.5, "prompt": "for x in"}
    seeded = {client.completions.create(seed=9, **asked).choices[0].text for _ in range(3)}
    free = {client.completions.create(**asked).choices[0].text for _ in range(4)}
    assert len(seeded) == 1
    assert len(free) > 1


def test_the_largest_seed_goes_round(client):
    made = client.completions.create(prompt="x", n=2, **GREEDY, extra_body={"seed": 2**64 - 1})
    assert len(made.choices) == 2


def test_several_prompts_are_answered_in_order(client, model):
    prompts = ["for x in", "while", "def f"]
    made = client.completions.create(prompt=prompts, n=2, **GREEDY)
    texts = [wanted(model, prompt).text for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in made.choices] == texts
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    made = client.completions.create(prompt=ids, **GREEDY)
    assert [choice.text for choice in made.choices] == texts[::2]
    made = client.completions.create(prompt=ids[0], **GREEDY)
    assert made.choices[0].text == texts[0]


def test_a_stop_string_ends_the_text_and_is_cut_off(client):
    whole = client.completions.create(prompt="for x in", **GREEDY).choices[0].text
    stop = whole[4:6]
    for given in (stop, ["zzzz", stop]):
        made = client.completions.create(prompt="for x in", stop=given, **GREEDY)
        assert made.choices[0].text == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
        chunks = client.completions.create(prompt="for x in", stop=given, stream=True, **GREEDY)
        assert "".join(chunk.choices[0].text for chunk in chunks) == made.choices[0].text


def test_logprobs_of_a_completion_are_the_engine_s(client, model):
    made = client.completions.create(prompt="for x in", logprobs=0, **GREEDY).choices[0]
    out = wanted(model, "for x in")
    assert made.logprobs.token_logprobs == pytest.approx(out.logprobs)
    assert len(made.logprobs.tokens) == len(out.tokens)
    starts = itertools.accumulate([0, *map(len, out.pieces[:-1])])
    assert made.logprobs.text_offset == list(starts)
    chunks = list(client.completions.create(prompt="for x in", logprobs=0, stream=True, **GREEDY))
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks]
        assert [*itertools.chain(*parts)] == getattr(made.logprobs, name)


def test_logprobs_of_a_chat_hold_each_token_s_bytes(client, model):
    made = client.chat.completions.create(messages=CHAT, logprobs=True, **GREEDY).choices[0]
    out = wanted(model, CHAT)
    entries = made.logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx(out.logprobs)
    spelt = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelt.decode(errors="replace").removesuffix("<|end|>") == made.message.content


def test_top_logprobs_hold_the_likeliest_tokens(client):
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    for entry in chat.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert [top.logprob for top in entry.top_logprobs] == sorted(t.logprob for t in entry.top_logprobs)[::-1]
    text = client.completions.create(prompt="for x in", logprobs=2, **GREEDY).choices[0].logprobs
    for token, logprob, top in zip(text.tokens, text.token_logprobs, text.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == max(top.values()) == logprob


def test_a_report_says_where_each_token_left_and_how_sure_the_exits_before_were(client, model):
    asked = {"early_exit": {"threshold": 0.3, "report": True}}
    out = wanted(model, CHAT, method="early", threshold=0.3)
    made = client.chat.completions.create(messages=CHAT, **GREEDY, extra_body=asked)
    entries = [entry.model_dump() for entry in made.choices[0].logprobs.content]
    assert [entry["exit_layer"] for entry in entries] == out.exits
    assert [entry["confidence"] for entry in entries] == pytest.approx(out.confidences)
    for entry in entries:
        before = [layer for layer in (1, 2, 3, 5) if layer < entry["exit_layer"]]
        assert [passed["exit_layer"] for passed in entry["passed"]] == before
        assert all(passed["confidence"] < 0.3 for passed in entry["passed"])
    cost = made.usage.model_dump()["early_exit"]
    assert (cost["layers_run"], cost["layers_full"]) == (out.stats.layers_run, out.stats.layers_full)
    assert cost["mean_exit_layer"] == pytest.approx(out.stats.mean_exit_layer)
    text = client.completions.create(prompt="for x in", **GREEDY, extra_body=asked).choices[0].logprobs.model_dump()
    assert len(text["exit_layer"]) == len(text["confidence"]) == len(text["passed"]) == len(text["tokens"])


def test_echo_says_the_prompt_again(client, model):
    made = client.completions.create(prompt="for x in", echo=True, **GREEDY).choices[0]
    assert made.text == "for x in" + wanted(model, "for x in").text
    ids = model.tokenizer.encode("for x in")
    assert client.completions.create(prompt=ids, echo=True, **GREEDY).choices[0].text == made.text
    chunks = client.completions.create(prompt="for x in", echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == made.text


@pytest.mark.parametrize("early_exit", [{}, {"threshold": 0.3}, {"threshold": 0.0, "exits": [2]}])
def test_echo_with_logprobs_scores_the_prompt_where_its_tokens_would_have_left(client, model, early_exit):
    fields = {**GREEDY, "max_tokens": 0, "extra_body": {"early_exit": early_exit}}
    made = client.completions.create(prompt=["for x in", "x"], echo=True, logprobs=0, **fields)
    options = {"policy": "max_prob"} | early_exit if early_exit else {}
    with eellm.Engine(model) as engine:
        (score,) = engine.score(["for x in"], **options)
    found = made.choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(score.logprobs)
    assert found.text_offset == [0, 1, 3, 4, 5]
    assert made.choices[0].text == "for x in"
    assert made.choices[1].logprobs.token_logprobs == [None]
    assert made.usage.completion_tokens == 0
    chunks = list(client.completions.create(prompt="for x in", echo=True, logprobs=0, stream=True, **fields))
    assert chunks[0].choices[0].logprobs == found


def test_echo_with_top_logprobs_says_what_the_model_would_have_said(client):
    made = client.completions.create(prompt="for x in", echo=True, logprobs=1, **{**GREEDY, "max_tokens": 0})
    found = made.choices[0].logprobs
    for token, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[token] == logprob <= max(top.values())


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_reach_the_engine(client, model, penalty):
    made = client.completions.create(prompt="for x in", **{penalty: 2.0}, **GREEDY)
    assert made.choices[0].text == wanted(model, "for x in", sampling=eellm.Sampling(**{penalty: 2.0})).text


def test_the_engine_s_own_sampling_options_reach_it(client, model):
    for options in (
        {"repetition_penalty": 1.5},
        {"temperature": 2, "top_k": 3, "seed": 1},
        {"temperature": 1, "min_p": 0.3, "seed": 2},
    ):
        made = client.completions.create(
            model="tiny", prompt="for x", max_tokens=12, extra_body={"temperature": 0} | options
        )
        out = wanted(model, "for x", sampling=eellm.Sampling(**options))
        assert made.choices[0].text == out.text


def test_a_model_without_tokenizer_takes_ids(client, server):
    made = client.completions.create(prompt=[3, 1, 4], logprobs=0, **{**GREEDY, "model": "ids"}).choices[0]
    ids = [int(name[1:-1]) for name in made.logprobs.tokens]
    assert ids == wanted(server.server.served["ids"].model, [3, 1, 4]).tokens


@pytest.mark.parametrize("stream", [False, True])
def test_characters_that_are_split_over_tokens_arrive_whole(client, monkeypatch, stream):
    text = "é 日本 😀 naïve"
    ids = iter(tiny_tokenizer().encode(text))
    monkeypatch.setattr(Sampler, "takes_likeliest", False)
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(ids, 0))
    fields = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stream": stream}
    made = client.completions.create(**fields, extra_body={"early_exit": {"method": "full"}})
    pieces = [chunk.choices[0].text for chunk in made] if stream else [made.choices[0].text]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_an_emoji_over_four_tokens_comes_at_once_and_cut_off_as_a_replacement(client, monkeypatch, num_tokens):
    ids = tiny_tokenizer().encode("😀!")
    assert len(ids) == 5
    monkeypatch.setattr(Sampler, "takes_likeliest", False)
    texts = []
    for stream in (False, True):
        given = iter(ids)
        monkeypatch.setattr(Sampler, "draw", lambda self, logits, given=given: next(given))
        fields = {"model": "tiny", "prompt": "x", "max_tokens": num_tokens, "stream": stream}
        made = client.completions.create(**fields, extra_body={"early_exit": {"method": "full"}})
        texts.append([chunk.choices[0].text for chunk in made] if stream else [made.choices[0].text])
    whole, pieces = texts
    assert "".join(pieces) == whole[0] == "😀!"[: num_tokens - 3] if num_tokens > 3 else "\ufffd"
    assert [piece for piece in pieces if piece] == list("😀!"[: num_tokens - 3] if num_tokens > 3 else "\ufffd")


def test_many_at_once_get_what_each_would_get_alone(server):
    prompts = [f"for {letter} in" for letter in "abcdefghijkl"]
    models = {name: server.server.served[name].model for name in ("tiny", "other")}
    kinds = [{"method": "full"}, {"method": "early", "threshold": 0.3}, {"method": "speculative"}]

    async def ask(client, i, prompt):
        early_exit = kinds[i % 3]
        fields = {**GREEDY, "model": ("tiny", "other")[i % 2], "prompt": prompt}
        made = await client.completions.create(stream=True, **fields, extra_body={"early_exit": early_exit})
        return "".join([chunk.choices[0].text async for chunk in made])

    async def all_of_them():
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, i, prompt) for i, prompt in enumerate(prompts)))

    texts = asyncio.run(all_of_them())
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert text == wanted(models[("tiny", "other")[i % 2]], prompt, **kinds[i % 3]).text


def test_metrics_count_what_was_done(server, client):
    def value(name):
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    names = {
        "eellm_requests_total{key": 1,
        "eellm_generation_tokens_total": 12,
        'eellm_exit_tokens_total{layer="6",model="tiny"}': 12,
        'eellm_time_to_first_token_seconds_count{model="tiny"}': 1,
        'eellm_inter_token_latency_seconds_count{model="tiny"}': 11,
        'eellm_layers_full_total{model="tiny"}': 72,
    }
    del names["eellm_requests_total{key"]
    names['eellm_requests_total{key="",route="/v1/completions",status="200"}'] = 1
    before = {name: value(name) for name in names}
    client.completions.create(
        prompt="for x in", **GREEDY, extra_body={"ignore_eos": True, "early_exit": {"method": "full"}}
    )
    assert {name: value(name) - before[name] for name in names} == names
    assert value('eellm_num_requests_running{model="tiny"}') == 0
    assert value('eellm_num_requests_waiting{model="tiny"}') == 0


def test_the_access_log_is_json_and_holds_no_prompt(server, client, caplog):
    with caplog.at_level("INFO", logger="eellm"):
        client.completions.create(prompt="a secret", **GREEDY)
        eventually(lambda: "/v1/completions" in caplog.text)
    lines = [json.loads(record.message) for record in caplog.records]
    (line,) = [line for line in lines if line["path"] == "/v1/completions"]
    assert (line["path"], line["status"], line["model"], line["key"]) == ("/v1/completions", 200, "tiny", "")
    assert line["new_tokens"] > 0
    assert "secret" not in caplog.text
