"""Checks that config dataclasses share. Each names the field, its value and what would be right."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from eellm.errors import ConfigError, did_you_mean


def check_literals(config: Any) -> None:
    """Every field annotated `Literal[...]` holds one of its words."""
    for name, hint in get_type_hints(type(config)).items():
        words = get_args(hint)
        if words and all(isinstance(word, str) for word in words):
            check_choice(name, getattr(config, name), words)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(choices)}{hint}")


def check_numbers(config: Any, *names: str) -> None:
    """Each named field is a number, a whole one unless its annotation says float. True is none; None where allowed."""
    hints = get_type_hints(type(config))
    for name in names:
        value, kinds = getattr(config, name), get_args(hints[name]) or (hints[name],)
        kind, words = (Real, "a number") if float in kinds else (Integral, "a whole number")
        is_unset = value is None and type(None) in kinds
        if not is_unset and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ConfigError(f"{name} = {value!r}: must be {words}")


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Each named field is a number of at least `minimum` (or None where its annotation says that it may be unset)."""
    check_numbers(config, *names)
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # NaN fails the comparison
            raise ConfigError(f"{name} = {value!r}: must be at least {minimum}")


def check_whole(name: str, value: object, minimum: int) -> None:
    """A setting that is a whole number of at least `minimum`; True is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} = {value!r}: must be a whole number")
    if value < minimum:
        raise ConfigError(f"{name} = {value!r}: must be at least {minimum}")


def check_switch(name: str, value: object, *, may_be_unset: bool = False) -> None:
    """A setting that is True or False, or None where that may be."""
    if not (isinstance(value, bool) or (value is None and may_be_unset)):
        raise ConfigError(f"{name} = {value!r}: must be True or False{', or None' if may_be_unset else ''}")


def check_fraction(config: Any, *names: str) -> None:
    """Each named field lies in [0, 1]."""
    check_numbers(config, *names)
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} = {value!r}: must lie between 0 and 1")
