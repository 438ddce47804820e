"""A timeline for the terminal, one line per rank.

    rank 0  F0-F1-F2-F3-.....D0B0--D1B1--Ⓕ4+D2B2--…

A cell shows what runs in its middle. A span begins with its letter, then comes its microbatch where it fits, then `-`.
Microbatches that fill bubbles have a letter in a circle, and `+` behind it. Stages of one rank aren't told apart.
"""

from eellm.schedule.render_marks import MARKS, has_extras, marks_of, summary
from eellm.schedule.timeline import Span, Timeline

_DIM = "dim"


def as_text(timeline: Timeline, *, width: int = 100, color: bool = False) -> str:
    """The lines of all ranks, a legend of what occurs, total time and bubble.

    width: of the ranks' lines, in characters. color: with markup for `rich`, which prints it in colour.
    """
    names = [f"rank {rank}" for rank in range(timeline.num_ranks)]
    margin = max(map(len, names), default=0) + 2
    spans: list[list[Span]] = [[] for _ in names]
    for span in timeline.spans:
        spans[span.rank].append(span)
    num_cells = max(width - margin, 1)
    scale = num_cells / timeline.end_s if timeline.end_s else 0.0
    lines = [name.ljust(margin) + _line(mine, scale, num_cells, color) for name, mine in zip(names, spans, strict=True)]
    return "\n".join([*lines, _legend(timeline, color), summary(timeline)]) + "\n"


def _line(spans: list[Span], scale: float, num_cells: int, color: bool) -> str:
    parts, at = [], 0
    for span in spans:
        start, end = (min(int(time * scale + 0.5), num_cells) for time in (span.start_s, span.end_s))
        if end > start:
            parts += [_styled("." * (start - at), _DIM, color), _cells(span, end - start, color)]
            at = end
    return "".join([*parts, _styled("." * (num_cells - at), _DIM, color)])


def _cells(span: Span, num_cells: int, color: bool) -> str:
    letter, number = _letter(span.letter, span.is_extra), str(span.microbatch)
    text = letter + number if len(letter + number) <= num_cells else letter
    return _styled(text.ljust(num_cells, "+" if span.is_extra else "-"), _style(span.letter), color)


def _letter(letter: str, is_extra: bool) -> str:
    if not is_extra:
        return letter
    return chr(ord("Ⓐ") + ord(letter) - ord("A")) if letter.isupper() else chr(ord("ⓐ") + ord(letter) - ord("a"))


def _legend(timeline: Timeline, color: bool) -> str:
    entries = [f"{_styled(letter, _style(letter), color)} {mark.name}" for letter, mark in marks_of(timeline).items()]
    if has_extras(timeline):
        first = next(span.letter for span in timeline.spans if span.is_extra)
        entries.append(f"{_styled(_letter(first, True) + '+', _style(first), color)} fills a bubble")
    return ", ".join([*entries, ". idle"])


def _style(letter: str) -> str:
    mark = MARKS[letter]  # pyrefly: ignore[bad-index]
    return f"{mark.ink} on {mark.fill}"


def _styled(text: str, style: str, color: bool) -> str:
    return f"[{style}]{text}[/]" if color and text else text
