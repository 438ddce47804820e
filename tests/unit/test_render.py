"""Timelines as text, SVG and trace: what each shows of a timeline made by hand."""

import json
import re
from xml.etree import ElementTree

import pytest
from rich.text import Text

from eellm.errors import ConfigError
from eellm.schedule.render import as_svg, as_text, as_trace, write_timeline
from eellm.schedule.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"
TINY = Timeline(
    num_ranks=2,
    spans=(
        Span(0, 0, 0, "F", 0.0, 0.010),
        Span(0, 0, 1, "F", 0.010, 0.014, is_extra=True),
        Span(0, 0, 0, "D", 0.030, 0.034),
        Span(0, 0, 0, "B", 0.034, 0.050),
        Span(1, 1, 0, "F", 0.010, 0.020),
        Span(1, 1, 0, "h", 0.020, 0.030),
    ),
)


def test_the_text_is_exact():
    assert as_text(TINY, width=8 + 25) == (
        "rank 0  F0---Ⓕ1........D0B0------\n"
        "rank 1  .....F0---h0---..........\n"
        "F forward, B backward, D deferred exit, h final head backward, Ⓕ+ fills a bubble, . idle\n"
        "50.0 ms, bubble 46.0%\n"
    )


def test_a_cell_has_room_for_a_letter_only():
    assert as_text(TINY, width=8 + 10).splitlines()[0] == "rank 0  F0Ⓕ...DB0-"


def test_a_long_number_that_does_not_fit_is_not_cut():
    spans = (Span(0, 0, 123, "F", 0.0, 1.0), Span(0, 0, 9, "e", 1.0, 2.0, is_extra=True))
    timeline = Timeline(num_ranks=1, spans=spans)
    assert as_text(timeline, width=8 + 6).splitlines()[0] == "rank 0  F--ⓔ9+"
    assert as_text(timeline, width=8 + 8).splitlines()[0] == "rank 0  F123ⓔ9++"


def test_coloured_text_says_the_same():
    coloured = Text.from_markup(as_text(TINY, width=40, color=True))
    assert coloured.plain == as_text(TINY, width=40)
    styles = {coloured.plain[span.start : span.end]: str(span.style) for span in coloured.spans}
    assert len({styles["F"], styles["B"], styles["D"], styles["h"]}) == 4


def test_ranks_without_anything_are_idle():
    assert as_text(Timeline(num_ranks=1, spans=()), width=12) == "rank 0  ....\n. idle\n0.00 µs, bubble 0.0%\n"
    assert rects(as_svg(Timeline(num_ranks=1, spans=()))) == []


def rects(svg):
    return [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if "span" in rect.get("class", "")]


def test_the_svg_has_one_rectangle_for_each_span_where_it_belongs():
    found = rects(as_svg(TINY))
    assert [rect.get("class") for rect in found] == [
        f"span {span.letter}" + (" extra" if span.is_extra else "") for span in TINY.spans
    ]
    left, scale = float(found[0].get("x")), float(found[0].get("width")) / 0.010
    for rect, span in zip(found, TINY.spans, strict=True):
        assert float(rect.get("x")) == pytest.approx(left + scale * span.start_s, abs=0.01)
        assert float(rect.get("width")) == pytest.approx(scale * (span.end_s - span.start_s), abs=0.01)
    rows = [float(rect.get("y")) for rect in found]
    assert rows[0] == rows[3] < rows[4] == rows[5]


def test_the_svg_says_what_each_span_is():
    groups = [g for g in ElementTree.fromstring(as_svg(TINY)).iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    assert groups[1].findtext(f"{SVG}title") == "F 1 (forward, fills a bubble), stage 0: 4.00 ms from 10.0 ms"
    assert [group.findtext(f"{SVG}text") for group in groups] == ["F0", "F1", "D0", "B0", "F0", "h0"]


def test_a_rank_with_several_stages_has_them_in_its_labels():
    spans = (Span(0, 0, 0, "F", 0.0, 1.0), Span(0, 3, 0, "F", 1.0, 2.0))
    svg = ElementTree.fromstring(as_svg(Timeline(num_ranks=1, spans=spans)))
    assert [group.findtext(f"{SVG}text") for group in svg.iter(f"{SVG}g")] == ["0F0", "3F0"]


def test_the_svg_escapes_its_title_and_refers_to_nothing_outside():
    svg = as_svg(TINY, title='<b> & "exits"')
    assert '<b> & "exits"' in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]


def test_the_svg_hatches_what_fills_bubbles_and_nothing_else():
    svg = as_svg(TINY)
    assert re.findall(r'<pattern id="([^"]+)"', svg) == ["extra-F"]
    assert ".F.extra{fill:url(#extra-F)" in svg
    assert "fills a bubble" not in as_svg(Timeline(num_ranks=1, spans=TINY.spans[:1]))


@pytest.mark.parametrize(
    ("end_s", "labels"), [(0.05, ["0 ms", "10", "20"]), (7.0, ["0 s", "1", "2"]), (3e-5, ["0 µs"])]
)
def test_the_axis_has_round_times(end_s, labels):
    svg = as_svg(Timeline(num_ranks=1, spans=(Span(0, 0, 0, "F", 0.0, end_s),)))
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert texts[texts.index(labels[0]) :][: len(labels)] == labels


def test_the_trace_has_a_thread_for_each_rank_and_microseconds():
    events = json.loads(json.dumps(as_trace(TINY)))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(TINY.spans)
    first, extra, exit, *_ = spans
    assert (first["name"], first["cat"], first["tid"], first["pid"]) == ("F 0", "forward", 0, 0)
    assert (exit["name"], exit["cat"]) == ("D 0 (deferred exit)", "deferred exit")
    assert (exit["ts"], exit["dur"]) == (pytest.approx(30_000), pytest.approx(4_000))
    assert (extra["name"], extra["cat"]) == ("F 1 (extra)", "forward,extra")
    assert extra["args"] == {"stage": 0, "microbatch": 1, "fills_bubble": True}


def test_the_suffix_chooses_the_form(tmp_path):
    for name in ("a.svg", "new/b.json", "c.txt"):
        write_timeline(TINY, tmp_path / name, title="one step")
    assert (tmp_path / "a.svg").read_text() == as_svg(TINY, title="one step")
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == as_trace(TINY)
    assert (tmp_path / "c.txt").read_text() == "one step\n\n" + as_text(TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "c.txt", "new"]


def test_another_suffix_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(ConfigError, match=r"out\.png.*\.svg.*\.json.*\.txt"):
        write_timeline(TINY, tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_timeline(TINY, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"
