"""What OpenAI's clients, their servers' users and browsers send besides the plain request."""

import json

import httpx
import pytest

import eellm
from tests.serve.servers import events, served_model, serving

BASE = {"model": "tiny", "prompt": "for x in", "max_tokens": 6, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
PATHS = {"/v1/completions": BASE, "/v1/chat/completions": CHAT}
ORIGIN = {"origin": "https://a.example"}
COMMON = "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed n stop ignore_eos"
COMMON += " stream stream_options user early_exit logprobs max_tokens logit_bias"
FIELDS = [("/v1/completions", name) for name in f"{COMMON} echo best_of suffix".split()]
FIELDS += [
    ("/v1/chat/completions", name)
    for name in f"{COMMON} max_completion_tokens top_logprobs tools tool_choice response_format metadata store".split()
]


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def server(model):
    with serving({"tiny": model}, cors_origins=("https://a.example",), keys={"alice": "sk-one"}) as running:
        yield running


@pytest.fixture
def post(server):
    def call(path="/v1/completions", **body):
        return server.post(path, headers={"authorization": "Bearer sk-one"}, **body)

    return call


def said(answer):
    assert answer.status_code == 200, answer.text
    return [{**choice, "index": 0} for choice in answer.json()["choices"]]


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_null_means_that_a_field_is_not_given(post, path, name):
    plain = {key: value for key, value in PATHS[path].items() if key not in (name, "temperature")}
    fixed = {"seed": 3} if name != "seed" else {"temperature": 0}
    assert said(post(path, **plain | fixed | {name: None})) == said(post(path, **plain | fixed))


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("stream_options", {"include_usage": None}),
        ("early_exit", {"method": None, "threshold": None, "report": None, "risk_metric": None}),
    ],
)
def test_null_means_the_same_within_a_table(post, table, value):
    asked = BASE | {"stream": True}
    given, plain = (events(post(**asked | fields).text) for fields in ({table: value}, {}))
    assert [event["choices"] for event in given] == [event["choices"] for event in plain]


def test_null_stays_wrong_where_something_must_be_given_and_in_names_that_nobody_knows(post):
    for body, param in (
        (BASE | {"model": None}, "model"),
        (BASE | {"prompt": None}, "prompt"),
        (BASE | {"tempreature": None}, "tempreature"),
        (BASE | {"stop": [None]}, "stop"),
    ):
        answer = post(**body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_message_as_other_programs_keep_it_can_be_sent_back(post):
    nulls = dict.fromkeys(["refusal", "tool_calls", "function_call", "audio", "annotations", "name"])
    ask = {"role": "user", "content": "hi"}
    full = [ask, {"role": "assistant", "content": "x", **nulls}, ask]
    plain = [ask, {"role": "assistant", "content": "x"}, ask]
    path = "/v1/chat/completions"
    assert said(post(path, **CHAT | {"messages": full})) == said(post(path, **CHAT | {"messages": plain}))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**63])
def test_every_seed_of_64_bits_fixes_the_answer(post, model, seed):
    asked = BASE | {"temperature": 1.5, "seed": seed}
    sampling = eellm.Sampling(temperature=1.5, seed=seed % 2**64)
    (out,) = eellm.generate(model, ["for x in"], method="full", max_new_tokens=6, sampling=sampling)
    assert said(post(**asked))[0]["text"] == said(post(**asked))[0]["text"] == out.text
    assert len(said(post(**asked, n=2))) == 2


@pytest.mark.parametrize("name", ["best_of", "logit_bias", "suffix", "tools", "response_format"])
def test_a_field_of_openai_s_that_is_not_served_is_called_that(post, name):
    error = post(**BASE | {name: {"5": 1}}).json()["error"]
    assert f"unknown field '{name}': OpenAI has it, this server doesn't; leave it out" in error["message"]
    assert (error["param"], error["code"]) == (name, "unknown_field")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "max_tokens": 0}, {"echo": True, "logprobs": 1}])
def test_a_stream_ends_with_the_usage_of_the_whole(post, fields, number):
    asked = BASE | {"n": number, "ignore_eos": True} | fields
    whole = post(**asked)
    streamed = events(post(**asked, stream=True, stream_options={"include_usage": True}).text)
    usage = whole.json()["usage"]
    assert streamed[-1]["usage"] == usage
    assert usage["completion_tokens"] == number * asked["max_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for i in range(number):
        mine = [choice for event in streamed for choice in event["choices"] if choice["index"] == i]
        assert "".join(choice["text"] for choice in mine) == whole.json()["choices"][i]["text"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (json.dumps(BASE).encode(), "text/plain", "Content-Type: application/json"),
        (json.dumps(BASE).encode(), "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"[]", "application/json", "the body must be a JSON object"),
        (b"null", "application/json", "the body must be a JSON object"),
        (b'"x"', "application/json", "the body must be a JSON object"),
        (b"{", "application/json", "the body is not JSON"),
    ],
)
def test_a_body_that_is_none_is_refused_in_words(server, content, kind, words):
    headers = {"authorization": "Bearer sk-one", "content-type": kind}
    for path in PATHS:
        answer = server.post(path, headers=headers, content=content)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_a_browser_s_preflight_of_openai_s_client_needs_no_key(server):
    sent = "authorization,content-type,openai-organization,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"
    asked = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": sent}
    answer = httpx.options(server.url + "/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    allowed = {name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert allowed >= set(sent.split(","))
    refused = httpx.options(server.url + "/v1/chat/completions", headers=asked | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_streams_and_refusals_may_be_read_by_the_pages_that_may_ask(server, monkeypatch):
    allowed = ORIGIN | {"authorization": "Bearer sk-one"}

    def broken(*_):
        raise AssertionError("a bug")

    found = {
        200: server.post(headers=allowed, **BASE, stream=True),
        400: server.post(headers=allowed, **BASE, tools=[]),
        401: server.post(headers=ORIGIN, **BASE),
        404: server.get("/nope", headers=allowed),
        405: server.get("/v1/completions", headers=allowed),
        413: server.post(headers=allowed, content=b"x" * 1_000_001),
    }
    monkeypatch.setattr("eellm.serve.app.make_ask", broken)
    found[500] = server.post(headers=allowed, **BASE)
    for status, answer in found.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://a.example", status
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics", "/playground/app.js"])
def test_head_says_what_get_would_without_the_body(server, path):
    headers = {"authorization": "Bearer sk-one"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        assert client.get(path).status_code == 200  # on the same connection


def test_head_of_what_is_only_posted_or_not_there_is_refused(server):
    headers = {"authorization": "Bearer sk-one"}
    assert httpx.head(server.url + "/v1/completions", headers=headers).status_code == 405
    assert httpx.head(server.url + "/nope", headers=headers).status_code == 404
    assert httpx.head(server.url + "/v1/models").status_code == 401


def test_a_connection_goes_on_after_a_refusal(server):
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer sk-one"}) as client:
        for body, status in ((BASE | {"tools": []}, 400), (BASE | {"model": "x"}, 404), (BASE, 200)):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == status
            assert answer.headers.get("connection") != "close"
