"""TOML or JSON → strict, frozen dataclasses, and back.

Every key must be a field and every value of its field's type: a wrong one is named with its path (`optim.lr`) and the
nearest right one. `true` is not a number and `"false"` is not a boolean.
"""

import dataclasses
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eellm.errors import ConfigError, did_you_mean

T = TypeVar("T")


def from_toml(cls: type[T], path: Path, missing: dict[str, Any] | None = None) -> T:
    """Reads a recipe; `missing` has what stands for tables that it leaves out. Errors: ConfigError that begins with the
    file's name."""
    data = read_toml(path)
    try:
        return from_dict(cls, {**(missing or {}), **data})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """What a recipe says, unchecked. Errors: ConfigError, with the file's name in front."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Makes the dataclass `cls` from nested plain data. `path` names where in the file we are, for errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{path or cls.__name__} = {data!r}: must be a table")
    hints = get_type_hints(cls)
    prefix = f"{path}." if path else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{prefix}{key}'{did_you_mean(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"'{prefix}{name}' is missing")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data, without the fields that hold their default. `from_dict` reads it back."""
    data = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            data[field.name] = _plain(value)
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`; int is taken where float is meant, nothing else is bent."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [arg for arg in args if arg is not type(None)]
        return None if value is None else _convert(kinds[0], value, path)
    if origin is Literal:
        return value  # the dataclass checks its words itself
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} = {value!r}: must be a list")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ConfigError(f"{path} = {value!r}: must have {len(kinds)} items")
        return tuple(_convert(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)  # pyrefly: ignore[bad-argument-type]
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} = {value!r}: must be {_NAMES.get(hint, hint.__name__)}")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
