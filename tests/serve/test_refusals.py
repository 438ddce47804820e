"""Every refusal has OpenAI's body, the right status, and says what is wrong with which field."""

import json

import openai
import pytest

from tests.serve.servers import eventually, raw, read_all, served_model, serving
from tests.worlds import tiny_tokenizer, tokenizer_of

PLAIN = {"model": "tiny", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    plain = served_model(exits=())
    plain.tokenizer = tokenizer_of(tiny_tokenizer()._backend, eos_token="<|end|>")
    models = {"tiny": served_model(), "plain": plain, "ids": served_model(tokenizer=False)}
    with serving(models, max_body_bytes=50_000, max_tokens=100) as running:
        yield running


@pytest.fixture
def refused(server):
    """Posts what must be refused; checks body and status, and that the message holds each of `words`."""

    def call(body, *words, status=400, param=None, path="/v1/completions"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = server.post(path, content=content)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json().keys() == {"error"}
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert answer.status_code == status, error
        assert not [word for word in words if word not in error["message"]], error
        assert error["param"] == param
        eventually(server.is_idle)
        return error

    return call


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"tempreature": 1}, ["unknown field 'tempreature' (did you mean 'temperature'?)"], "tempreature"),
        ({"tools": []}, ["unknown field 'tools'"], "tools"),
        ({"best_of": 2}, ["unknown field 'best_of'"], "best_of"),
        ({"early_exit": {"treshold": 1}}, ["did you mean 'threshold'"], "early_exit.treshold"),
        ({"early_exit": {"str": 1}}, ["unknown field 'early_exit.str'"], "early_exit.str"),
        ({"stream": True, "stream_options": {"usage": True}}, ["include_usage"], "stream_options.usage"),
        ({"x" * 20_000: 1}, ["unknown field 'xxx"], "x" * 100),
        ({"temperature": True}, ["temperature: Input should be a valid number"], "temperature"),
        ({"temperature": "1"}, ["valid number"], "temperature"),
        ({"temperature": -1}, ["greater than or equal to 0"], "temperature"),
        ({"stream": 1}, ["valid boolean"], "stream"),
        ({"stream": "true"}, ["valid boolean"], "stream"),
        ({"echo": 0}, ["valid boolean"], "echo"),
        ({"max_tokens": 2.5}, ["valid integer"], "max_tokens"),
        ({"max_tokens": True}, ["valid integer"], "max_tokens"),
        ({"max_tokens": -1}, ["greater than or equal to 0"], "max_tokens"),
        ({"n": 0}, ["greater than or equal to 1"], "n"),
        ({"seed": -(2**63) - 1}, ["greater than or equal to -9223372036854775808"], "seed"),
        ({"seed": 2**64}, ["less than"], "seed"),
        ({"seed": 1.0}, ["valid integer"], "seed"),
        ({"top_p": 1.1}, ["less than or equal to 1"], "top_p"),
        ({"logprobs": 21}, ["less than or equal to 20"], "logprobs"),
        ({"logprobs": True}, ["valid integer"], "logprobs"),
        ({"presence_penalty": 3}, ["less than or equal to 2"], "presence_penalty"),
        ({"repetition_penalty": 0}, ["greater than 0"], "repetition_penalty"),
        ({"prompt": 7}, ["prompt"], "prompt"),
        ({"prompt": None}, ["prompt"], "prompt"),
        ({"prompt": [1.5]}, ["prompt"], "prompt"),
        ({"prompt": [-1]}, ["prompt"], "prompt"),
        ({"model": 1}, ["valid string"], "model"),
        ({"early_exit": True}, ["early_exit"], "early_exit"),
        ({"early_exit": {"threshold": True}}, ["valid number"], "early_exit.threshold"),
        ({"early_exit": {"threshold": -1}}, ["greater than or equal to 0"], "early_exit.threshold"),
        ({"early_exit": {"threshold": {"ten": 0.5}}}, ["'ten' is no layer"], "early_exit.threshold"),
        ({"early_exit": {"method": "fast"}}, ["'full'", "'auto'"], "early_exit.method"),
        ({"early_exit": {"policy": "luck"}}, ["'max_prob'"], "early_exit.policy"),
        ({"early_exit": {"report": 1}}, ["valid boolean"], "early_exit.report"),
        ({"early_exit": {"max_deferred": 0}}, ["greater than or equal to 1"], "early_exit.max_deferred"),
        ({"stop": ["x"] * 17}, ["17 strings; at most 16"], "stop"),
        ({"stop": "x" * 1001}, ["1001 characters; at most 1000"], "stop"),
        ({"stop": [1]}, ["a list of strings"], "stop"),
        ({"prompt": []}, ["the list is empty"], "prompt"),
    ],
)
def test_a_field_that_can_t_be_is_named(refused, fields, words, param):
    refused(PLAIN | fields, *words, param=param)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, ["the prompt is empty"]),
        ({"prompt": ["x", ""]}, ["the prompt is empty"]),
        ({"prompt": [512]}, ["prompt token 512", "0 to 511"]),
        ({"prompt": [True]}, ["prompt"]),
        ({"prompt": "x" * 99}, ["needs room for 101 tokens (99 of the prompt)"]),
        ({"max_tokens": 100}, ["needs room for 101 tokens"]),
        ({"stop": ""}, ["an empty stop string"]),
        ({"stop": ["x" * 1000] * 16, "prompt": "y" * 40_000}, ["larger than 50000 bytes"]),
        ({"prompt": ["x"] * 21}, ["21 answers in one request: at most 20"]),
        ({"n": 128}, ["128 answers in one request: at most 20"]),
        ({"max_tokens": 0}, ["it is for echo = true"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options are for stream = true"]),
        ({"early_exit": {"exits": [4]}}, ["the model has no exit at layer 4; it has 1, 2, 3, 5"]),
        ({"early_exit": {"threshold": {"4": 0.5}}}, ["no exit at layer 4"]),
        ({"early_exit": {"method": "pipelined"}}, ["needs worker processes"]),
        ({"model": "plain", "early_exit": {"exits": [2]}}, ["no exit at layer 2; it has none"]),
        ({"model": "ids"}, ["the model has no tokenizer"]),
        ({"model": "ids", "prompt": [3], "stop": "x"}, ["stop strings need a tokenizer"]),
    ],
)
def test_what_the_engine_can_t_serve_is_refused_in_its_words(refused, fields, words):
    answer = PLAIN | fields
    large = len(json.dumps(answer)) > 50_000
    param = "prompt" if fields.get("prompt") == [True] else None
    refused(answer, *words, status=413 if large else 400, param=param)


def test_what_is_missing_is_named(refused):
    refused({"prompt": "x"}, "'model' is missing", param="model")
    refused({"model": "tiny"}, "'prompt' is missing", param="prompt")
    refused({"model": "tiny"}, "'messages' is missing", param="messages", path="/v1/chat/completions")


@pytest.mark.parametrize(
    ("messages", "words", "param"),
    [
        ([], ["at least 1"], "messages"),
        ([{"role": "user"}], ["'messages.0.content' is missing"], "messages.0.content"),
        ([{"role": "user", "content": 1}], ["valid string"], "messages.0.content"),
        ([{"role": "robot", "content": "x"}], ["'user'"], "messages.0.role"),
        ([{"role": "user", "content": "x", "contnt": "y"}], ["did you mean 'content'"], "messages.0.contnt"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], ...),
        ("hi", ["valid list"], "messages"),
    ],
)
def test_messages_that_can_t_be_are_refused(server, refused, messages, words, param):
    if param is ...:
        answer = server.post("/v1/chat/completions", **CHAT | {"messages": messages})
        assert answer.status_code == 400
        return
    refused(CHAT | {"messages": messages}, *words, param=param, path="/v1/chat/completions")


def test_a_chat_s_own_rules(refused):
    path = "/v1/chat/completions"
    refused(CHAT | {"top_logprobs": 2}, "top_logprobs are for logprobs = true", path=path)
    refused(CHAT | {"max_completion_tokens": 2}, "two names of one number", path=path)
    refused(CHAT | {"logprobs": 2}, "valid boolean", param="logprobs", path=path)
    refused(CHAT | {"max_tokens": 0}, "greater than or equal to 1", param="max_tokens", path=path)
    refused(CHAT | {"model": "plain"}, "the model has no chat template", path=path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{'model': 1}",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "x"} x',
        b"[" * 40_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = server.post(path, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000])
def test_numbers_that_are_none_are_refused(server, number):
    for name in (b"temperature", b"top_p", b"max_tokens", b"seed", b"presence_penalty"):
        answer = server.post(content=b'{"model": "tiny", "prompt": "x", "%b": %b}' % (name, number))
        assert answer.status_code == 400, answer.text
    body = b'{"model": "tiny", "prompt": "x", "early_exit": {"threshold": NaN}}'
    assert server.post(content=body).status_code == 400


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(server):
    half = "\\ud83d"
    for body in (
        f'{{"model": "tiny", "prompt": "{half}"}}',
        f'{{"model": "{half}", "prompt": "x"}}',
        f'{{"model": "tiny", "prompt": "x", "stop": "{half}"}}',
        f'{{"model": "tiny", "prompt": "x", "user": "{half}"}}',
        f'{{"model": "tiny", "prompt": "x", "{half}": 1}}',
        f'{{"model": "tiny", "prompt": "x", "early_exit": {{"threshold": {{"{half}": 1}}}}}}',
    ):
        answer = server.post(content=body.encode())
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["message"]
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{half}"}}]}}'
    assert server.post("/v1/chat/completions", content=body.encode()).status_code == 400


def test_a_body_of_another_type_is_refused(server):
    answer = server.post(headers={"content-type": "text/plain"}, content=json.dumps(PLAIN).encode())
    assert answer.status_code == 400


def test_an_unknown_model_is_404_with_the_nearest_name(refused, server):
    error = refused(PLAIN | {"model": "tinny"}, "did you mean 'tiny'", status=404, param="model")
    assert error["code"] == "model_not_found"
    assert server.get("/v1/models/nope").json()["error"]["code"] == "model_not_found"
    assert server.get("/v1/models/../../etc/passwd").status_code == 404


def test_a_path_in_place_of_a_model_s_name_opens_nothing(refused, tmp_path):
    for name in (str(tmp_path), "../tiny", "file:///etc/passwd", "/etc/passwd"):
        refused(PLAIN | {"model": name}, "is not served here", status=404, param="model")


def test_unknown_paths_and_methods_have_the_same_body(server):
    assert server.get("/nope").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    for path in ("/nope", "/v1/completions"):
        assert server.get(path).json()["error"].keys() == {"message", "type", "param", "code"}
    assert server.get("/docs").status_code == server.get("/redoc").status_code == 404


def test_the_client_library_raises_its_own_errors(server):
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="unknown field 'tools'"):
            client.chat.completions.create(**CHAT, tools=[])
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.completions.create(**PLAIN | {"model": "nope"})
        with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
            client.completions.create(**PLAIN | {"prompt": ""}, stream=True)


def test_a_body_that_says_it_is_too_large_is_refused_unread(server):
    with raw(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99999999999\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 50000 bytes" in answer


def test_a_body_that_turns_out_too_large_is_refused_on_the_way(server):
    with raw(server) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head + b"c350\r\n" + b"x" * 50_000 + b"\r\n1\r\nx\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_just_within_the_limit_is_read(server):
    body = json.dumps(PLAIN).encode()
    assert server.post(content=body + b" " * (50_000 - len(body))).status_code == 200
    assert server.post(content=body + b" " * (50_001 - len(body))).status_code == 413


def test_a_large_body_is_no_large_head():
    with serving({"tiny": served_model()}) as server:
        body = json.dumps(PLAIN).encode()
        for size in (70_000, 300_000, 900_000):
            for _ in range(3):  # how much of it is read at once differs
                assert server.post(content=body + b" " * size).status_code == 200
