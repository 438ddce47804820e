"""A file → units: what a certificate counts. A unit is one document, or one prompt to be answered.

A `.jsonl` file holds one unit a line: `{"text": "…"}`, `{"messages": […]}`, or a prompt with the answer that is wanted,
`{"prompt": "…", "reference": "…"}`. In any other file units are separated by blank lines. What is wrong with a file is
a DataError that names it, and the line.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eellm.data.documents import (
    EMPTY,
    EXPECTED,
    Document,
    chat,
    content_of,
    encode_text,
    naming,
    utf8,
    whole,
)
from eellm.errors import DataError
from eellm.text.chat import Messages
from eellm.text.tokenizer import Tokenizer

EXPECTED_PROMPT = f'{EXPECTED} or {{"prompt": "...", "reference": "..."}}'


@dataclass(frozen=True)
class Unit:
    where: str
    """The file and line, for errors."""
    content: str | Messages
    """The document, or the prompt."""
    reference: str | None = None
    """The answer that is wanted."""


@dataclass(frozen=True)
class Units:
    """All of a file."""

    units: tuple[Unit, ...]
    sha256: str
    """Of the file."""


def read_units(path: Path) -> Units:
    """Raises DataError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    with naming(str(path)):
        text = utf8(data)
    units = tuple(_from_lines(path, text) if path.suffix == ".jsonl" else _from_text(path, text))
    if not units:
        raise DataError(f"{path}: {EMPTY}")
    return Units(units, hashlib.sha256(data).hexdigest())


def documents_of(units: Units, tokenizer: Tokenizer) -> list[Document]:
    """Each unit's tokens; those without a token to be predicted are left out. Raises DataError."""
    documents = []
    for unit in units.units:
        with naming(unit.where):
            if unit.reference is not None:
                raise DataError("a prompt with a reference is for the metric rouge_l; for others give it as one text")
            document = (
                whole(encode_text(unit.content, tokenizer))
                if isinstance(unit.content, str)
                else chat(unit.content, tokenizer)
            )
        if document.is_target[1:].any():
            documents.append(document)
    return documents


def _from_lines(path: Path, text: str) -> Iterator[Unit]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with naming(where):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"not JSON ({error}); {EXPECTED_PROMPT}") from None
            yield _from_record(where, record)


def _from_record(where: str, record: Any) -> Unit:
    match record:
        case {"prompt": str(prompt), "reference": str(reference), **rest} if not rest.keys() & {"text", "messages"}:
            return Unit(where, prompt, reference)
        case {"prompt": _} | {"reference": _}:
            raise DataError(f"a prompt and its reference are two strings, alone; {EXPECTED_PROMPT}")
    return Unit(where, content_of(record))


def _from_text(path: Path, text: str) -> Iterator[Unit]:
    start = 1
    for number, piece in enumerate(re.split(r"(\n[^\S\n]*(?:\n[^\S\n]*)+)", text.replace("\r\n", "\n"))):
        if number % 2 == 0 and piece.strip():
            yield Unit(f"{path}:{start}", piece.strip())
        start += piece.count("\n")
