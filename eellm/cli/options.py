"""Command-line options from dataclasses (tyro), with errors on one line and the list types that verbs share."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from eellm.errors import ConfigError, did_you_mean

T = TypeVar("T")
CACHE_DIR = Path.home() / ".cache" / "eellm"
"""Where what was measured or rounded on this machine is kept."""


def parse(cls: type[T], args: list[str], *, verb: str, default: T | None = None) -> T:
    """`args` as an instance of the dataclass `cls`; what they leave out comes from `default`.

    Raises ConfigError with one line for an unknown option (with the nearest right one) or a bad value.
    """
    _refuse_unknown({"--help", *_flags(cls, "--")}, args, verb)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls,
                args=args,
                prog=f"eellm {verb}",
                description=cls.__doc__,
                default=default,
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise ConfigError(_one_line(errors.getvalue(), verb)) from None


def split_options(first: type, second: type, args: list[str], *, verb: str) -> tuple[list[str], list[str]]:
    """The options of the dataclass `first`, with their values, and those of `second`.

    Raises ConfigError for an option of neither, with the nearest right one.
    """
    known = {"--help", "-h", *_flags(first, "--")}
    _refuse_unknown({*known, *_flags(second, "--")}, args, verb)
    parts: tuple[list[str], list[str]] = ([], [])
    part = parts[1]
    for word in args:
        if word.startswith("--") or word == "-h":
            part = parts[0] if word.split("=")[0].replace("_", "-") in known else parts[1]
        part.append(word)
    return parts


def _refuse_unknown(known: set[str], args: list[str], verb: str) -> None:
    for word in args:
        flag = word.split("=")[0]
        if flag.startswith("--") and " " not in flag and flag.replace("_", "-") not in known:
            raise ConfigError(
                f"unknown option '{flag}'{did_you_mean(flag, known)}; see 'eellm {verb.split()[0]} --help'"
            )


def _flags(cls: type, prefix: str) -> Iterator[str]:
    """Every flag of a dataclass, its nested ones with dots."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _flags(hints[field.name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if hints[field.name] is bool:
                yield f"{prefix}no-{name}"


def _one_line(box: str, verb: str) -> str:
    """The message inside the box that tyro prints, of lines or, where a terminal has none, of dashes."""
    lines = [re.sub(r"^([│╭╰─\s]|-{8,})+|([│╮╯─\s]|-{8,})+$", "", line) for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    message = re.split(r" For full helptext| Argument helptext", text)[0].strip()
    for theirs, ours in _WORDS.items():
        message = re.sub(theirs, ours, message)
    return f"{message}; see 'eellm {verb.split()[0]} --help'"


_WORDS = {  # Python's and tyro's words for a bad number
    r"no type matching \{None\}\|INT could be instantiated from \['(.*?)'\].*": r"'\1' is not a whole number",
    r"no type matching \{None\}\|FLOAT could be instantiated from \['(.*?)'\].*": r"'\1' is not a number",
    r"invalid literal for int\(\) with base 10: (.+)": r"\1 is not a whole number",
    r"could not convert string to float: (.+)": r"\1 is not a number",
}


def _layers(words: list[str]) -> tuple[int, ...] | None:
    return None if words[0] == "all" else tuple(int(word) for word in words[0].split(","))


def _threshold(words: list[str]) -> float | dict[int, float] | None:
    if words[0] == "default":
        return None
    if "=" not in words[0]:
        return float(words[0])
    pairs = (word.split("=") for word in words[0].split(","))
    return {int(layer): float(value) for layer, value in pairs}


def _numbers(words: list[str]) -> tuple[float, ...]:
    return tuple(float(word) for word in words[0].split(","))


def _names(words: list[str]) -> tuple[str, ...]:
    return tuple(word for word in words[0].split(",") if word)


Numbers = Annotated[
    tuple[float, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="0.9,0.8",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value)) or "none"],
    ),
]
"""Numbers, separated by commas; none by default."""

Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="ONE,TWO",
        instance_from_str=_names,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]
"""Names, separated by commas."""

Layers = Annotated[
    tuple[int, ...] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="10,20",
        instance_from_str=_layers,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["all" if value is None else ",".join(map(str, value))],
    ),
]
"""Layer numbers, separated by commas."""

Thresholds = Annotated[
    float | dict[int, float] | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="0.8|10=0.7,20=0.9",
        instance_from_str=_threshold,
        is_instance=lambda value: value is None or isinstance(value, float | dict),
        str_from_instance=lambda value: ["default" if value is None else str(value)],
    ),
]
"""One threshold, or one per exit layer."""
