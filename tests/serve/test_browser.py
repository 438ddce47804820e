"""The playground in a real browser: what is done with keys and pointer, and what is then there to be seen and read."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

from tests.serve.servers import eventually, held, served_model, serving

if os.environ.get("CI_BROWSER") == "1":  # there it must not be missed
    from selenium import webdriver
else:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromium-driver aren't installed", allow_module_level=True)

pytestmark = pytest.mark.slow
KEYS = {"alice": "secret"}


class Page:
    """A tab with the playground, as its user sees it."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self, width=1100):
        from examples.playground_screenshots import prefer, resize

        resize(self.driver, width, 900)
        prefer(self.driver, color_scheme="light")
        self.driver.get(self.server.url)
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get(self.server.url)
        return self

    def get(self, id):
        return self.driver.find_element("id", id)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def set(self, id, value):
        """As typing, dragging or choosing would."""
        script = """arguments[0].value = arguments[1];
            for (const name of ["input", "change"]) arguments[0].dispatchEvent(new Event(name, {bubbles: true}))"""
        self.js(script, self.get(id), str(value))

    def status(self):
        return self.get("status").text

    def is_ready(self):
        return self.get("generate").is_enabled()

    def type(self, text):
        self.get("prompt").clear()
        self.get("prompt").send_keys(text)

    def generate(self):
        eventually(self.is_ready)
        self.get("generate").click()
        eventually(lambda: self.status().startswith("Done"))
        eventually(self.is_ready)

    def tokens(self, answer=1):
        return self.all(f"article:nth-child({answer}) .token")

    def exits(self, answer=1):
        return [int(token.get_attribute("data-exit")) for token in self.tokens(answer)]

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def opened(server, downloads):
    from examples.playground_screenshots import browser

    with browser(downloads) as driver:
        yield Page(driver, server)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def server():
    models = {"tiny": served_model(), "plain": served_model(seed=1, tokenizer=False)}
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def tab(server, downloads):
    with opened(server, downloads) as page:
        yield page


@pytest.fixture
def page(tab, server):
    """Afterwards the console must be silent, and no other host may have been asked."""
    tab.open()
    eventually(tab.is_ready)
    tab.set("max-tokens", 20)
    yield tab
    assert tab.errors() == []
    asked = tab.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked
    assert all(name.startswith((server.url, "data:", "blob:")) for name in asked)
    eventually(server.is_idle)


def test_a_prompt_is_typed_and_its_tokens_come_coloured_by_exit(page):
    page.type("for x in")
    page.set("threshold", 0.3)
    page.generate()
    assert len(page.tokens()) == 20
    assert len(set(page.exits())) > 1
    colours = {
        token.get_attribute("data-exit"): token.value_of_css_property("background-color") for token in page.tokens()
    }
    assert len(set(colours.values())) == len(colours), "each exit has a colour of its own"
    label = page.tokens()[0].get_attribute("aria-label")
    assert f"exit {page.exits()[0]} of 6, confidence " in label
    counts = [int(row.text.split()[0]) for row in page.all("#exits-list .value")]
    assert sum(counts) == 20
    assert page.get("mean-exit").text == f"{sum(page.exits()) / 20:.1f}"
    assert page.get("saved").text.endswith("%")
    assert float(page.get("speed").text) > 0


def test_the_text_shown_is_the_text_answered(page):
    page.type("for x in")
    page.set("method", "full")
    page.generate()
    said = page.server.post(
        model="tiny", prompt="for x in", temperature=0, max_tokens=20, early_exit={"method": "full"}
    )
    shown = page.js("return document.querySelector('.tokens').textContent").replace("◌", "")
    assert shown == said.json()["choices"][0]["text"]
    assert set(page.exits()) == {6}


def test_arrow_keys_move_between_tokens_and_the_panel_tells_of_each(page):
    page.set("threshold", 0.3)
    page.generate()
    assert not page.get("token-words").is_displayed()
    page.js("arguments[0].focus()", page.tokens()[0])
    keys = {"\ue014": 1, "\ue012": 0, "\ue010": 19, "\ue011": 0}  # right, left, end, home
    for key, place in keys.items():
        page.driver.switch_to.active_element.send_keys(key)
        assert page.driver.switch_to.active_element == page.tokens()[place]
        assert page.tokens()[place].get_attribute("aria-selected") == "true"
        layer = page.exits()[place]
        wanted = "Went through all 6 layers." if layer == 6 else f"Left after layer {layer} of 6."
        assert page.get("token-words").text == wanted
        taken = page.all("#token-exits li")[-1].text
        assert f"Layer {layer}" in taken
        assert "taken" in taken
        assert 5 <= len(page.all("#token-top li")) <= 6
    assert [token.get_attribute("tabindex") for token in page.tokens()].count("0") == 1, "one place to tab to"


def test_pointing_at_a_token_shows_its_panel(page):
    page.set("threshold", 0.3)
    page.generate()
    webdriver.ActionChains(page.driver).move_to_element(page.tokens()[3]).perform()
    assert str(page.exits()[3]) in page.get("token-words").text
    assert page.get("token-name").text.startswith("“")


def test_the_threshold_moves_where_tokens_leave(page):
    means = []
    for threshold in (0, 0.3, 1):
        page.set("threshold", threshold)
        assert page.get("threshold-value").text == f"{threshold:.2f}"
        page.generate()
        means.append(sum(page.exits()) / 20)
    assert means[0] == 1
    assert means[0] < means[1] < means[2] == 6
    page.set("method", "full")
    assert not page.get("threshold").is_enabled()


def test_full_depth_stands_beside_and_differences_are_marked_and_told(page):
    page.set("threshold", 0)
    page.get("compare").click()
    page.generate()
    assert set(page.exits(1)) == {1}
    assert set(page.exits(2)) == {6}
    assert "aren't in full depth's answer" in page.get("comparison").text
    marked = page.all("article:nth-child(1) .differs")
    assert marked
    assert "not in the other answer" in marked[0].get_attribute("aria-label")
    assert all("a second" in facts.text for facts in page.all(".facts"))
    page.set("threshold", 1)
    page.generate()
    assert page.get("comparison").text.startswith("All 20 tokens are those of full depth.")
    assert not page.all(".differs")


def test_what_is_shown_can_be_downloaded(page, downloads):
    page.set("threshold", 0.3)
    page.get("compare").click()
    page.generate()
    page.get("download").click()
    path = downloads / "eellm-answer.json"
    eventually(path.exists)
    (answer, full) = json.loads(path.read_text())["answers"]
    assert [token["exit"] for token in answer["tokens"]] == page.exits()
    assert answer["request"]["early_exit"] == {
        "method": "early",
        "report": True,
        "policy": "max_prob",
        "threshold": 0.3,
    }
    assert full["request"]["early_exit"]["method"] == "full"
    assert answer["usage"]["completion_tokens"] == 20
    assert all(0 <= token["confidence"] <= 1 and token["passed"] is not None for token in answer["tokens"])


def test_stop_ends_the_request_on_the_server(page):
    page.set("max-tokens", 200)
    with held(page.server.engine) as go:
        page.get("generate").click()
        eventually(lambda: page.server.worker.num_open == 1)
        go(60)
        eventually(lambda: len(page.tokens()) > 0)
        assert not page.is_ready()
        page.get("stop").click()
        eventually(lambda: page.status().startswith("Stopped after"))
        assert page.is_ready()
    eventually(page.server.is_idle)
    assert len(page.tokens()) < 200


def test_a_chat_keeps_its_turns(page):
    page.all('input[value="chat"]')[0].click()
    for text in ("hi", "and more"):
        page.type(text)
        page.generate()
        assert page.get("prompt").get_attribute("value") == ""
    turns = [turn.text.split("\n")[0] for turn in page.all("#turns li")]
    assert turns == ["You", "Answer", "You"]
    assert len(page.tokens()) > 0
    page.get("new-chat").click()
    assert not page.all("#turns li")


def test_another_model_is_chosen_and_what_it_cannot_is_off(page):
    page.set("model", "plain")
    assert not page.all('input[value="chat"]')[0].is_enabled()
    assert page.get("chat-hint").text == "This model has no chat template."


def test_a_refusal_is_told_in_words(page):
    page.set("model", "plain")
    page.get("generate").click()
    eventually(lambda: page.get("status").get_attribute("data-kind") == "error")
    assert "tokenizer" in page.status()
    assert page.is_ready()
    (entry,) = page.errors()  # the browser's own word on the 400
    assert "400" in entry["message"]


def test_dark_and_narrow(page):
    from examples.playground_screenshots import prefer, resize

    light = page.all("body")[0].value_of_css_property("background-color")
    prefer(page.driver, color_scheme="dark")
    assert page.all("body")[0].value_of_css_property("background-color") != light
    page.get("compare").click()
    page.generate()
    page.js("arguments[0].focus()", page.tokens()[0])
    for width in (360, 320):
        resize(page.driver, width, 740)
        assert page.js("return document.documentElement.scrollWidth") <= width


def test_a_page_can_be_used_without_a_pointer(page):
    seen = set()
    page.js("document.body.focus()")
    for _ in range(20):
        page.all("body")[0].send_keys("\ue004") if not seen else page.driver.switch_to.active_element.send_keys(
            "\ue004"
        )
        seen.add(page.driver.switch_to.active_element.get_attribute("id"))
    assert {
        "prompt",
        "generate",
        "compare",
        "method",
        "policy",
        "threshold",
        "max-tokens",
        "temperature",
        "seed",
    } <= seen
    page.get("prompt").send_keys("x", "\ue009\ue007")  # control and enter
    eventually(lambda: page.status().startswith("Done"))


def test_a_key_is_asked_for_and_kept_for_the_session_only(downloads):
    with serving({"tiny": served_model()}, keys=KEYS) as server, opened(server, downloads) as page:
        page.open()
        eventually(lambda: "wants an API key" in page.status())
        page.get("key").send_keys("wrong\n")
        eventually(lambda: "isn't known" in page.status())
        page.get("key").clear()
        page.get("key").send_keys("secret\n")
        eventually(page.is_ready)
        page.set("max-tokens", 5)
        page.generate()
        assert len(page.tokens()) == 5
        assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
        assert page.js("return sessionStorage.getItem('eellm.key')") == "secret"
