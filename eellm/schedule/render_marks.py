"""How a timeline's letters are drawn, alike in every picture: a name, and a colour that tells them apart for the
common colour blindnesses (from Okabe and Ito's palette). The letter itself says the same without colour."""

from typing import NamedTuple

from eellm.schedule.timeline import Letter, Timeline


class Mark(NamedTuple):
    """How one kind of work is drawn."""

    name: str
    fill: str
    ink: str
    """Of letters on `fill`."""
    trace: str
    """The nearest of the colours that Chrome's trace viewer has names for."""


MARKS: dict[Letter, Mark] = {
    "F": Mark("forward", "#56b4e9", "#000000", "thread_state_runnable"),
    "B": Mark("backward", "#0072b2", "#ffffff", "rail_load"),
    "I": Mark("backward for inputs", "#009e73", "#ffffff", "thread_state_running"),
    "W": Mark("backward for weights", "#f0e442", "#000000", "yellow"),
    "E": Mark("exit forward", "#e69f00", "#000000", "thread_state_iowait"),
    "e": Mark("exit backward", "#8a5a00", "#ffffff", "bad"),
    "D": Mark("deferred exit", "#d55e00", "#ffffff", "terrible"),
    "H": Mark("final head", "#cc79a7", "#000000", "rail_animation"),
    "h": Mark("final head backward", "#7b3f61", "#ffffff", "detailed_memory_dump"),
}
"""In the order of legends."""


def marks_of(timeline: Timeline) -> dict[Letter, Mark]:
    """Those that occur."""
    letters = {span.letter for span in timeline.spans}
    return {letter: mark for letter, mark in MARKS.items() if letter in letters}


def has_extras(timeline: Timeline) -> bool:
    """Whether some microbatch fills a bubble."""
    return any(span.is_extra for span in timeline.spans)


def unit_of(seconds: float) -> tuple[float, str]:
    """The unit in which a time is at least 1, as (seconds, name)."""
    return next((unit for unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= unit[0]), (1e-6, "µs"))


def time_text(seconds: float) -> str:
    """To three digits or more, with its unit."""
    unit, name = unit_of(seconds)
    value = seconds / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def summary(timeline: Timeline) -> str:
    """Total time and bubble, the share of all ranks' time in which they compute nothing."""
    return f"{time_text(timeline.end_s)}, bubble {timeline.bubble:.1%}"
