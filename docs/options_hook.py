"""A hook of mkdocs: the page of options, made from the dataclasses of the command line, so that it can't go stale.

VERBS → the dataclasses of each → one table, a row for each option: its name, type and default, its docstring
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from eellm.cli.main import VERBS
from eellm.config.plan import PlanConfig
from eellm.config.serve import ServeConfig
from eellm.config.train import TrainConfig
from eellm.config.tune import TuneConfig

MARK = "<!-- options -->"
RECIPES = {"train": TrainConfig, "tune": TuneConfig, "serve": ServeConfig, "plan": PlanConfig}
"""Verbs that take a recipe: its dataclass. `plan` takes a training recipe's options besides its own."""


class Option(NamedTuple):
    name: str
    default: str
    text: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return markdown.replace(MARK, "\n".join(_section(verb) for verb in VERBS)) if MARK in markdown else markdown


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a verb's dataclass, nested ones with dots."""
    hints, docs = get_type_hints(cls), _docstrings(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{name}.")
        else:
            yield Option(name, _default(field), _with_choices(docs[field.name], hint))


def _section(verb: str) -> str:
    module, what = VERBS[verb]
    cls = RECIPES.get(verb) or import_module(module).Options
    rows = [f"| `{o.name}` | {o.default} | {o.text} |" for o in options_of(cls)]
    more = "\nAnd those of [`train`](#train), for the recipe.\n" if verb == "plan" else ""
    head = [f"## {verb}\n", f"{what[0].upper()}{what[1:]}.\n{more}", "| option | default | |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _docstrings(cls: type) -> dict[str, str]:
    """The string under each field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), "a dataclass"
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant), "a string"
            found[field.target.id] = " ".join(str(text.value.value).split()).replace("|", "\\|")
    return found


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "*needed*"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or None
    return "" if value is None or value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _with_choices(text: str, hint: Any) -> str:
    """With the words that may stand there, where there is a list of them."""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return f"{text} ({', '.join(f'`{word}`' for word in get_args(kind))})"
    return text
