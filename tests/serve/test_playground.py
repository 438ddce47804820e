"""The playground's files, as a browser gets them. What the page does is in test_browser.py."""

import re
from importlib.resources import files

import httpx
import pytest

from eellm.serve.page import FILES
from tests.serve.servers import raw, read_all, served_model, serving

KEYS = {"alice": "secret"}


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": served_model(), "ids": served_model(tokenizer=False)}, keys=KEYS) as running:
        yield running


def folder():
    return files("eellm.serve") / "playground"


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_served_as_what_it_is_and_needs_no_key(server, path):
    name, kind = FILES[path]
    answer = server.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kind
    assert answer.content == (folder() / name).read_bytes()


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_kept_but_asked_about(server, path):
    first = server.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = server.get(path, headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert server.get(path, headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", FILES)
def test_nothing_but_the_server_s_own_files_may_run(server, path):
    answer = server.get(path)
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_file_of_the_folder_is_in_the_table():
    assert sorted(entry.name for entry in folder().iterdir()) == sorted(name for name, _ in FILES.values())


@pytest.mark.parametrize("name", sorted({name for name, _ in FILES.values()}))
def test_a_file_names_no_other_host_and_parses_no_data_as_markup(name):
    text = (folder() / name).read_text(encoding="utf-8")
    assert "//" not in re.sub(r"(^|\s)// .*|^//$", "", text, flags=re.MULTILINE), "an address of another host"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage", text)
    assert not re.search(r"\son\w+=|style=\"|<script>|<style", text), "inline script or style, which the policy forbids"


def test_what_the_page_loads_is_there(server):
    page = server.get("/").text
    loaded = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', page))
    scripts = {path for path in FILES if path.endswith(".js")}
    imported = {name for path in scripts for name in re.findall(r'from "\./([^"]+)"', server.get(path).text)}
    assert {f"/{name}" for name in loaded} | {f"/playground/{name}" for name in imported} == set(FILES) - {"/"}


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/other.js",
        "/playground/../page.py",
        "/playground/%2e%2e/page.py",
        "/playground/..%2fpage.py",
        "/playground/app.js%00",
        "//etc/passwd",
        "/playground//etc/passwd",
    ],
)
def test_no_other_name_is_opened(server, path):
    """Sent as it stands: clients would tidy it up."""
    for header, status in (("", 401), (f"authorization: Bearer {KEYS['alice']}\r\n", 404)):
        with raw(server) as connection:
            request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{header}connection: close\r\n\r\n"
            connection.sendall(request.encode())
            assert read_all(connection).split(b" ", 2)[1] == str(status).encode()


def test_only_the_page_and_health_are_open(server):
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/ready", "/openapi.json"):
        assert server.get(path).status_code == 401
    assert server.post(model="tiny", prompt="x").status_code == 401
    assert server.get("/health").status_code == 200
    assert httpx.post(f"{server.url}/").status_code == 405


def test_models_say_what_the_page_needs(server):
    cards = server.get("/v1/models", headers={"authorization": "Bearer secret"}).json()["data"]
    exits = {card["id"]: card["early_exit"] for card in cards}
    assert exits["tiny"]["methods"] == ["full", "early", "speculative", "auto"]
    assert exits["tiny"]["default_method"] == "auto"
    assert exits["ids"]["has_chat_template"] is False
    assert exits["tiny"]["has_chat_template"] is True
    assert server.get("/").status_code == 200
