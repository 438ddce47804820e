"""Text files → documents: token ids, and which of them a model is to learn.

A `.jsonl` file holds one document a line: `{"text": "…"}`, learnt whole, or `{"messages": [{"role": "…",
"content": "…"}, …]}`, of which only the assistant's answers are learnt. Any other file is one document. A document that
is learnt whole ends with the tokenizer's end-of-text token; a chat ends as the model's template ends it. What is wrong
with a file is a DataError that names it, and the line.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eellm.errors import DataError, RequestError
from eellm.text.tokenizer import Tokenizer

EXPECTED = 'expected {"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}'


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """A text that stands for itself. Both arrays are as long as it has tokens."""

    tokens: np.ndarray
    """Token ids, int32."""
    is_target: np.ndarray
    """Whether the model is to learn to say this token, bool."""


def read_documents(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of all files, in order, read one by one. Raises DataError, for a missing file before any work."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    for path in paths:
        try:
            yield from _read_lines(path, tokenizer) if path.suffix == ".jsonl" else _read_whole(path, tokenizer)
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror}") from None


def _read_whole(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    try:
        text = _utf8(path.read_bytes())
        if not text.strip():
            raise DataError("the file is empty; leave it out")
        yield _from_text(text, tokenizer)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_lines(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            is_empty = False
            try:
                yield _from_line(_utf8(line), tokenizer)
            except (DataError, RequestError) as error:
                raise DataError(f"{path}:{number}: {error}") from None
    if is_empty:
        raise DataError(f"{path}: the file is empty; leave it out")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None


def _from_line(line: str, tokenizer: Tokenizer) -> Document:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error}); {EXPECTED}") from None
    match data:
        case {"text": str(), "messages": _}:
            raise DataError(f"both a text and messages; {EXPECTED}")
        case {"text": str(text)}:
            return _from_text(text, tokenizer)
        case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
            return _document(*tokenizer.encode_chat(messages))
        case dict():
            raise DataError(f"keys {', '.join(map(repr, data)) or 'none'}, or their values' types; {EXPECTED}")
        case _:
            raise DataError(f"{type(data).__name__}; {EXPECTED}")


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _from_text(text: str, tokenizer: Tokenizer) -> Document:
    tokens = tokenizer.encode(text)
    if tokenizer.eos_id is not None and tokens[-1:] != [tokenizer.eos_id]:  # a pipeline may add it itself
        tokens.append(tokenizer.eos_id)
    return _document(tokens, [True] * len(tokens))


def _document(tokens: list[int], is_target: list[bool]) -> Document:
    return Document(tokens=np.array(tokens, dtype=np.int32), is_target=np.array(is_target, dtype=bool))
