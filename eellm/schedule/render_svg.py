"""A timeline as one SVG file that refers to nothing outside of itself.

Ranks are rows, time goes to the right. A span carries the most of stage, letter and microbatch that fits into it, and
all of it in a tooltip. Microbatches that fill bubbles are hatched. The picture brings its own background, so it reads
the same in light and dark viewers.
"""

import math
from html import escape
from statistics import median

from eellm.schedule.render_marks import MARKS, has_extras, marks_of, summary, time_text, unit_of
from eellm.schedule.timeline import Letter, Span, Timeline

INK, FAINT, LINE, IDLE = "#24292f", "#57606a", "#d0d7de", "#f3f5f7"
ROW, BAR = 34, 26
"""Height of a rank's row, and of what is drawn in it, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 64, 78
"""Margins around the rows."""
WIDTHS = (1080, 6000)
"""Bounds of the rows' width."""
ENOUGH = 26
"""Width at which a span's label fits; half of the spans get it where the bounds allow."""
CHARACTER = 7.0
"""Width of a label's character."""


def as_svg(timeline: Timeline, *, title: str = "") -> str:
    """The picture. title: plain text above it."""
    width = _width(timeline)
    scale = width / timeline.end_s if timeline.end_s else 0.0
    height = TOP + ROW * timeline.num_ranks + BOTTOM
    whole = f"{title}: {summary(timeline)}" if title else summary(timeline)
    total = LEFT + width + RIGHT
    heading = f'<text x="{LEFT}" y="28" font-size="16" font-weight="600" fill="{INK}">{escape(title)}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" viewBox="0 0 {total} {height}" '
        f'role="img" aria-label="{escape(whole)}" '
        'font-family="ui-sans-serif, system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="12">',
        _style(timeline),
        f'<rect width="{total}" height="{height}" rx="8" fill="#ffffff"/>',
        heading if title else "",
        f'<text x="{LEFT}" y="{48 if title else 36}" fill="{FAINT}">{summary(timeline)}</text>',
        *(_row(rank, width) for rank in range(timeline.num_ranks)),
        _axis(timeline, scale),
        *_spans(timeline, scale),
        _legend(timeline, height - 22),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _width(timeline: Timeline) -> int:
    """Of the rows."""
    lengths = [span.end_s - span.start_s for span in timeline.spans if span.end_s > span.start_s]
    wanted = ENOUGH * timeline.end_s / median(lengths) if lengths else 0.0
    return round(min(max(wanted, WIDTHS[0]), WIDTHS[1]))


def _style(timeline: Timeline) -> str:
    """Colours of what occurs, and hatched ones for what fills bubbles."""
    rules, patterns = [".span{stroke:#ffffff;stroke-width:.75}", ".span+text{text-anchor:middle;font-size:11px}"], []
    extra = {span.letter for span in timeline.spans if span.is_extra}
    for letter, mark in marks_of(timeline).items():
        rules += [f".{letter}{{fill:{mark.fill}}}", f".{letter}+text{{fill:{mark.ink}}}"]
        if letter in extra:
            rules += [f".{letter}.extra{{fill:url(#extra-{letter});stroke:{mark.fill};stroke-width:1.5}}"]
            rules += [f".{letter}.extra+text{{fill:#000000}}"]
            patterns.append(
                f'<pattern id="extra-{letter}" width="7" height="7" patternUnits="userSpaceOnUse" '
                f'patternTransform="rotate(45)"><rect width="7" height="7" fill="#ffffff"/>'
                f'<rect width="2.5" height="7" fill="{mark.fill}" opacity=".55"/></pattern>'
            )
    return f"<style>{''.join(rules)}</style>" + (f"<defs>{''.join(patterns)}</defs>" if patterns else "")


def _row(rank: int, width: int) -> str:
    y = TOP + ROW * rank
    return (
        f'<text x="{LEFT - 12}" y="{y + BAR / 2 + 4:g}" text-anchor="end" fill="{INK}">rank {rank}</text>'
        f'<rect x="{LEFT}" y="{y}" width="{width}" height="{BAR}" fill="{IDLE}"/>'
    )


def _axis(timeline: Timeline, scale: float) -> str:
    """Lines at round times, named below the rows."""
    if not timeline.end_s:
        return ""
    unit, name = unit_of(timeline.end_s)
    step = _round_step(110 / scale / unit)
    bottom = TOP + ROW * timeline.num_ranks
    parts = []
    for i in range(int(timeline.end_s / unit / step + 1e-9) + 1):
        x = LEFT + i * step * unit * scale
        label = f"{i * step:g}" + (f" {name}" if i == 0 else "")
        parts.append(
            f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="{LINE}"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="{FAINT}">{label}</text>'
        )
    return "".join(parts)


def _round_step(at_least: float) -> float:
    """The next of 1, 2, 5, 10, 20 … and of their decimal parts."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= at_least * (1 - 1e-9))


def _spans(timeline: Timeline, scale: float) -> list[str]:
    has_stages = _has_stages(timeline)
    return [_span(span, scale, has_stages) for span in timeline.spans]


def _has_stages(timeline: Timeline) -> bool:
    """Whether some rank has several stages, so that labels name them."""
    ranks_of_stages = {(span.rank, span.stage) for span in timeline.spans}
    return len(ranks_of_stages) > len({rank for rank, _ in ranks_of_stages})


def _span(span: Span, scale: float, has_stages: bool) -> str:
    x, width, y = LEFT + span.start_s * scale, (span.end_s - span.start_s) * scale, TOP + ROW * span.rank
    kind = f"span {span.letter} extra" if span.is_extra else f"span {span.letter}"
    label = next((label for label in _labels(span, has_stages) if len(label) * CHARACTER <= width - 2), "")
    text = f'<text x="{x + width / 2:.2f}" y="{y + BAR / 2 + 4:g}">{label}</text>' if label else ""
    return (
        f"<g><title>{_tooltip(span)}</title>"
        f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}"/>{text}</g>'
    )


def _labels(span: Span, has_stages: bool) -> list[str]:
    """The most telling first."""
    short = f"{span.letter}{span.microbatch}"
    return [*([f"{span.stage}{short}"] if has_stages else []), short, span.letter]


def _tooltip(span: Span) -> str:
    what = MARKS[span.letter].name + (", fills a bubble" if span.is_extra else "")
    when = f"{time_text(span.end_s - span.start_s)} from {time_text(span.start_s)}"
    return f"{span.letter} {span.microbatch} ({what}), stage {span.stage}: {when}"


def _legend(timeline: Timeline, y: int) -> str:
    letters: list[tuple[Letter, str, str]] = [
        (letter, "", f"{letter} {mark.name}") for letter, mark in marks_of(timeline).items()
    ]
    if has_extras(timeline):
        letters.append((next(s.letter for s in timeline.spans if s.is_extra), " extra", "hatched: fills a bubble"))
    x, parts = float(LEFT), []
    for letter, extra, text in letters:
        parts.append(
            f'<rect class="{letter}{extra}" x="{x:.1f}" y="{y - 11}" width="14" height="14" rx="2"/>'
            f'<text x="{x + 20:.1f}" y="{y}" style="fill:{INK}">{text}</text>'
        )
        x += 20 + 6.2 * len(text) + 18
    key = "2F3: stage 2, forward of microbatch 3" if _has_stages(timeline) else "F3: forward of microbatch 3"
    return "".join([*parts, f'<text x="{x:.1f}" y="{y}" fill="{FAINT}">{key}</text>'])
