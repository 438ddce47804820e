"""The report: one page that parses, escapes what it is given and asks the network for nothing; and the picture."""

import re
import sys
from html.parser import HTMLParser

import pytest

from eellm.errors import ConfigError
from eellm.evaluate.plot import inline_svg, save_plot
from eellm.evaluate.report import Chapter, write_report
from eellm.evaluate.tables import CURVE_LEGEND
from eellm.exits.palette import PALETTE, colour
from eellm.infer.result import Generation, Stats

HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script>"\' onfocus="alert(2)" & {{ 7 * 7 }}'
VOID = {"meta", "br", "link", "img", "input", "hr"}

EVALUATION = {
    "num_tokens": 90,
    "num_bytes": 400,
    "exits": [
        {"layer": n, "kind": kind, "nll": 3.0, "perplexity": p, "bits_per_byte": 1.0, "agreement": a, "accuracy": 0.2}
        for n, kind, p, a in ((2, "mlp, tied", None, 0.5), (6, "final", 20.0, 1.0))
    ],
}


def curve(perplexities=(20.0, 21.0, 90.0)):
    points = []
    for i, perplexity in enumerate(perplexities):
        speedup = 1 + i / 4
        measured = {
            "tokens_per_s": 30.0 * speedup,
            "speedup": speedup,
            "speedup_range": [speedup - 0.1, speedup + 0.1],
            "layers_run": 60,
            "layers_full": 72,
            "mean_exit_layer": 5.0,
            "same_prefix": 0.5,
        }
        point = {"threshold": 1 - i / 4, "taken": {"2": i / 4, "6": 1 - i / 4}, "agreement": 1 - i / 5}
        points.append(point | {"perplexity": perplexity, "measured": measured})
    return {"policy": "max_prob", "num_layers": 6, "points": points}


def generation(pieces=("Hel", "lo", "", "!"), exits=(2, 2, 4, 6), text="Hello!"):
    num = len(exits)
    stats = Stats(
        prompt_tokens=3,
        new_tokens=num,
        prefill_s=0.1,
        decode_s=0.2,
        tokens_per_s=15.0,
        mean_exit_layer=3.5,
        layers_run=14,
        layers_full=24,
        deep_passes=1,
        heads_run={2: 4, 6: 1},
    )
    return Generation(
        text=text,
        tokens=list(range(10, 10 + num)),
        exits=list(exits),
        confidences=[0.5] * num,
        logprobs=[-0.7] * num,
        pieces=list(pieces),
        finish_reason="length",
        stats=stats,
    )


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that are not closed in their order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def tokens(self):
        return [attributes for tag, attributes in self.tags if tag == "span" and "tabindex" in attributes]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def page(tmp_path, **changes):
    options = {
        "title": "A report",
        "notes": ["First note.", "Second note."],
        "generations": [("full depth", "Say hello", generation())],
        "table": EVALUATION,
        "curve": curve(),
        "num_layers": 6,
    }
    write_report(tmp_path / "report.html", Chapter(**(options | changes)))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return html, Page(html)


def test_every_token_tells_its_exit_in_words_and_in_colour_and_can_be_reached_by_keyboard(tmp_path):
    _, parsed = page(tmp_path)
    titles = [token["title"] for token in parsed.tokens]
    assert titles[0] == "exit at layer 2 of 6 · confidence 0.50 · probability 0.50 · token 10"
    assert titles[3].startswith("final exit, layer 6")
    assert all(token["tabindex"] == "0" for token in parsed.tokens)
    assert [
        colour(n, 6) is not None and colour(n, 6) in token.get("style", "")
        for n, token in zip((2, 2, 4, 6), parsed.tokens, strict=True)
    ] == [True, True, True, False]
    assert ["early" in token["class"] for token in parsed.tokens] == [True, True, True, False]


def test_the_page_tells_what_it_was_given(tmp_path):
    _, parsed = page(tmp_path)
    for words in (
        "First note.",
        "Second note.",
        "Say hello",
        "full depth",
        "exit at layer 2 of 6",
        "2 tokens (50%)",
        "1 token (25%)",
        "14 of 24 layer passes run (42% saved)",
        "15.0 tokens/s",
        "mlp, tied",
        "20.00",
    ):
        assert words in parsed.text
    assert sum(tag == "table" for tag, _ in parsed.tags) == 2
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 1
    assert sum(tag == "sup" for tag, _ in parsed.tags) == 2, "once for each run of tokens of one early exit"


def test_the_page_refers_to_nothing_outside_of_itself(tmp_path):
    html, parsed = page(tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<script|<img|<iframe", html)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_hostile_text_stays_text(tmp_path):
    out = generation(pieces=(HOSTILE, "</span>", "", "<b>"), text=HOSTILE)
    _, parsed = page(tmp_path, title=HOSTILE, notes=[HOSTILE], generations=[(HOSTILE, HOSTILE, out)], curve=None)
    assert not {"script", "b"} & {tag for tag, _ in parsed.tags}
    assert not any("onfocus" in attributes for _, attributes in parsed.tags)
    assert parsed.text.count(HOSTILE) == 6, "twice the title; note, label, prompt, token"


def test_a_page_of_two_models_has_a_heading_for_each_and_no_name_twice(tmp_path):
    shared = {"notes": [], "generations": [], "table": EVALUATION, "num_layers": 6}
    chapters = [Chapter(title=title, curve=curve(), **shared) for title in ("One model", "Another model")]
    write_report(tmp_path / "report.html", *chapters)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(html)
    assert re.findall(r"<h1>([^<]*)</h1>", html) == ["One model", "Another model"]
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 2
    names = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)
    assert used
    assert {a or b for a, b in used} <= set(names)


def test_the_text_of_every_token_is_there_in_order_and_the_legend_of_the_curve_too(tmp_path):
    html, parsed = page(tmp_path)
    spans = re.findall(r'<span class="t[ "][^>]*>(?:<sup>\d+</sup>)?([^<]*)</span>', html)
    assert spans == ["Hel", "lo", "·", "!"]
    assert " ".join(CURVE_LEGEND.split()) in parsed.text


def test_text_keeps_its_whitespace_and_tokens_without_text_have_a_mark(tmp_path):
    html, parsed = page(tmp_path, generations=[("l", "a\n  b", generation(pieces=("\n  x", " ", "", "z")))])
    assert "a\n  b</div>" in html
    assert "\n  x</span>" in html
    assert ["blank" in token["class"] for token in parsed.tokens] == [False, False, True, False]


def test_without_a_tokenizer_the_ids_are_shown(tmp_path):
    html, _ = page(tmp_path, generations=[("l", "p", generation(pieces=("",) * 4, text=None))])
    assert re.findall(r">(\d+) </span>", re.sub(r"<sup>\d+</sup>", "", html)) == ["10", "11", "12", "13"]


def test_a_report_can_do_without_generations_and_without_a_curve(tmp_path):
    _, parsed = page(tmp_path, generations=[], curve=None)
    assert parsed.tokens == []
    assert sum(tag == "table" for tag, _ in parsed.tags) == 1


def test_a_report_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    page(tmp_path)
    before = (tmp_path / "report.html").read_text()
    with pytest.raises(KeyError):
        page(tmp_path, table={})
    assert (tmp_path / "report.html").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_the_report_has_no_picture_and_a_plot_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, parsed = page(tmp_path)
    assert not any(tag == "svg" for tag, _ in parsed.tags)
    assert sum(tag == "table" for tag, _ in parsed.tags) == 2
    assert "eellm[plot]" in caplog.text
    with pytest.raises(ConfigError, match=r"pip install 'eellm\[plot\]'"):
        save_plot(curve(), tmp_path / "curve.png")


def test_pictures_are_written_in_the_format_of_their_suffix_and_repeat_bit_for_bit(tmp_path):
    for name, magic in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        save_plot(curve(), tmp_path / name)
        first = (tmp_path / name).read_bytes()
        assert first.startswith(magic)
        save_plot(curve(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == first


def test_a_picture_names_its_thresholds_and_neighbours_share_a_label():
    apart = inline_svg(curve())
    assert all(f"τ {threshold:g}" in apart for threshold in (1, 0.75, 0.5))
    close = curve()
    close["points"][1]["measured"]["speedup"] = 1.01
    close["points"][1]["agreement"] = 0.99
    close["points"][1]["perplexity"] = 20.1
    assert "τ 1 … 0.75" in inline_svg(close)


def test_perplexities_that_are_far_apart_or_not_finite_can_be_drawn():
    assert inline_svg(curve((20.0, 3000.0, 5e8))) != inline_svg(curve((20.0, 21.0, 5e8)))
    for perplexities in ((20.0, None, 30.0), (None, None, None), (20.0, 20.0, 20.0)):
        assert inline_svg(curve(perplexities)).startswith("<svg")


def test_colours_go_from_early_to_late_and_the_final_exit_has_none():
    assert colour(1, 30) == PALETTE[0]
    assert colour(29, 30) == PALETTE[-1]
    assert colour(30, 30) is None
    assert [colour(n, 2) for n in (1, 2)] == [PALETTE[0], None]
