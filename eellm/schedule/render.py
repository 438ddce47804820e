"""Timelines as pictures: text for the terminal, SVG, and the trace-event JSON of Chrome's viewer and of Perfetto.

    Timeline, simulated or measured → .txt | .svg | .json

What runs is told apart by letter and by colour; microbatches that fill bubbles are marked in every form.
"""

import json
import os
from pathlib import Path
from typing import Any

from eellm.errors import ConfigError
from eellm.schedule.render_marks import MARKS
from eellm.schedule.render_svg import as_svg
from eellm.schedule.render_text import as_text
from eellm.schedule.timeline import Span, Timeline

SUFFIXES = (".svg", ".json", ".txt")


def as_trace(timeline: Timeline) -> dict[str, Any]:
    """Trace events, a thread for each rank; https://ui.perfetto.dev opens the JSON. Times in microseconds."""
    events: list[dict[str, Any]] = [_metadata("process_name", 0, name="pipeline")]
    for rank in range(timeline.num_ranks):
        events.append(_metadata("thread_name", rank, name=f"rank {rank}"))
        events.append(_metadata("thread_sort_index", rank, sort_index=rank))
    return {"displayTimeUnit": "ms", "traceEvents": [*events, *map(_event, timeline.spans)]}


def _metadata(what: str, rank: int, **args: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": rank, "args": args}


def _event(span: Span) -> dict[str, Any]:
    mark = MARKS[span.letter]
    notes = [mark.name] * (span.letter not in "FB") + ["extra"] * span.is_extra
    return {
        "name": f"{span.letter} {span.microbatch}" + (f" ({', '.join(notes)})" if notes else ""),
        "cat": mark.name + (",extra" if span.is_extra else ""),
        "ph": "X",
        "ts": span.start_s * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "pid": 0,
        "tid": span.rank,
        "cname": mark.trace,
        "args": {"stage": span.stage, "microbatch": span.microbatch, "fills_bubble": span.is_extra},
    }


def check_suffix(path: Path) -> None:
    """Raises ConfigError for a picture that `write_timeline` can't write."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"timeline {path}: unknown kind of picture; use .svg (any browser), .json (a trace for Perfetto) or .txt"
        )


def write_timeline(timeline: Timeline, path: Path, *, title: str = "") -> None:
    """Writes the picture that the suffix names, whole or not at all. Raises ConfigError for another suffix."""
    check_suffix(path)
    if path.suffix == ".svg":
        text = as_svg(timeline, title=title)
    elif path.suffix == ".json":
        text = json.dumps(as_trace(timeline)) + "\n"
    else:
        text = (f"{title}\n\n" if title else "") + as_text(timeline)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
