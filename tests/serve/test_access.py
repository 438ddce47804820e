"""Who may ask: keys, their owners' names, hosts, web pages of others."""

import http.client
import json

import openai
import pytest

from eellm.errors import ConfigError
from eellm.serve.access import Keys, read_keys
from tests.serve.servers import eventually, served_model, serving

KEYS = {"alice": "sk-one", "bob": "sk-two"}
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def server(model):
    with serving({"tiny": model}, keys=KEYS) as running:
        yield running


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_nothing_but_health_and_the_page_answers_without_a_key(server):
    paths = server.get("/openapi.json", bearer("sk-one")).json()["paths"]
    assert len(paths) >= 7
    for path in [*paths, "/openapi.json", "/nope", "/playground"]:
        for method in ("get", "post"):
            answer = server.get(path) if method == "get" else server.post(path, **BODY)
            if path == "/health":
                assert answer.status_code in (200, 405)
                continue
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONE"])
def test_no_way_of_writing_a_path_or_a_method_gets_around_the_key(server, method):
    host, port = server.url.removeprefix("http://").split(":")
    ways = "/v1/models //v1/models /health/../v1/models /v1/models?/health /v1/models/ /METRICS /metrics#/health"
    for path in f"{ways} /%76%31/models /playground/../metrics /playground/ http://x/metrics".split():
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status in (400, 401), path
        assert b"tiny" not in answer.read()
        connection.close()


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer sk-on", "Bearer sk-one1", "Bearer sk-ONE", "sk-one", "Basic sk-one", "Bearer \xff"],
)
def test_a_wrong_key_is_refused(server, header):
    headers = {"authorization": header.encode("latin-1")}
    assert server.get("/v1/models", headers).status_code == 401


def test_each_key_opens_and_its_owner_is_logged_and_counted(server, caplog):
    for name, key in KEYS.items():
        with caplog.at_level("INFO", logger="eellm"), server.client(key) as client:
            client.completions.create(**BODY)
            eventually(lambda: caplog.records)
        line = json.loads(caplog.records[-1].message)
        assert line["key"] == name
        caplog.clear()
    text = server.get("/metrics", bearer("sk-one")).text
    for name in KEYS:
        assert f'eellm_requests_total{{key="{name}",route="/v1/completions",status="200"}} 1.0' in text
        assert f'eellm_generation_tokens_total{{key="{name}",model="tiny"}}' in text
    assert not [key for key in KEYS.values() if key in text]
    with server.client("nope") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_paths_that_nobody_serves_have_one_name_in_metrics(server):
    for i in range(5):
        server.get(f"/nope/{i}")
    text = server.get("/metrics", bearer("sk-one")).text
    assert "/nope" not in text
    assert 'route="other",status="401"' in text


def test_every_key_is_compared_whoever_asks(monkeypatch):
    seen = []
    keys = Keys(KEYS)
    monkeypatch.setattr("eellm.serve.access.hmac.compare_digest", lambda a, b: seen.append((len(a), len(b))) or a == b)
    assert keys.owner(b"Bearer sk-one") == "alice"
    assert keys.owner(b"Bearer nope") is None
    assert seen == [(32, 32)] * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no keys"),
        ("alice = 1", "the key of 'alice' must be a string"),
        ('alice = ""', "the key of 'alice'"),
        ('alice = "a b"', "visible ASCII"),
        ('alice = "é"', "visible ASCII"),
        ('a = "x"\nb = "x"', "two names have the same key"),
        ('[alice]\nkey = "x"', "the key of 'alice'"),
        ("alice", "not a TOML file"),
    ],
)
def test_a_bad_file_of_keys_is_refused(tmp_path, text, words):
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_keys(tmp_path / "keys.toml")


def test_a_file_of_keys_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"keys\.toml: can't be read"):
        read_keys(tmp_path / "keys.toml")


def test_a_page_whose_name_was_made_to_point_here_gets_nothing(model):
    with serving({"tiny": model}) as server:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", ""):
            answer = server.get("/v1/models", {"host": host})
            assert answer.status_code in (400, 403), host
        for host in ("localhost", "LOCALHOST:123", "127.0.0.1", "[::1]", "[::1]:80"):
            assert server.get("/v1/models", {"host": host}).status_code == 200, host
    with serving({"tiny": model}, allowed_hosts=("llm.example",)) as server:
        assert server.get("/v1/models", {"host": "llm.example:443"}).status_code == 200
        assert server.get("/v1/models").status_code == 403


def test_other_pages_may_not_ask_unless_told_so(model, server):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}

    def allowed(running, headers):
        import httpx

        answer = httpx.options(running.url + "/v1/completions", headers=headers)
        return answer.headers.get("access-control-allow-origin")

    assert allowed(server, ask) is None
    assert "access-control-allow-origin" not in server.get("/health", ask).headers
    with serving({"tiny": model}, cors_origins=("https://a.example",)) as open_server:
        assert allowed(open_server, ask) == "https://a.example"
        assert allowed(open_server, ask | {"origin": "https://b.example"}) is None
        assert open_server.get("/v1/models", ask).headers["access-control-allow-origin"] == "https://a.example"


def test_prompts_are_logged_only_when_asked_for(model, caplog):
    with serving({"tiny": model}, log_prompts=True) as server, caplog.at_level("INFO", logger="eellm"):
        server.post(**BODY | {"prompt": "a secret"})
        server.post("/v1/chat/completions", model="tiny", messages=[{"role": "user", "content": "a 2nd"}], max_tokens=1)
        eventually(lambda: len(caplog.records) == 2)
    lines = [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]
    assert [line["prompt"] for line in lines] == ["a secret", [{"role": "user", "content": "a 2nd"}]]
