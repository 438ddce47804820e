"""Text files → documents: token ids, and which of them a model is to learn.

A `.jsonl` file holds one document a line: `{"text": "…"}`, learnt whole, or `{"messages": [{"role": "…",
"content": "…"}, …]}`, of which only the assistant's answers are learnt. Any other file is one document. A document that
is learnt whole ends with the tokenizer's end-of-text token; a chat ends as the model's template ends it. What is wrong
with a file is a DataError that names it, and the line.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eellm.errors import DataError, RequestError
from eellm.text.chat import Messages
from eellm.text.tokenizer import Tokenizer

EMPTY = "the file is empty; leave it out"
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
    with naming(str(path)):
        text = utf8(path.read_bytes())
        if not text.strip():
            raise DataError(EMPTY)
        yield _encode(text, tokenizer)


def _read_lines(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    for where, _, content in json_lines(path):
        with naming(where):
            yield _encode(content, tokenizer)


def json_lines(path: Path) -> Iterator[tuple[str, int, str | Messages]]:
    """Of each document in a .jsonl file: `path:line`, for messages; the bytes of its line; the text or the chat."""
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            is_empty = False
            where = f"{path}:{number}"
            with naming(where):
                content = _from_line(utf8(line))
            yield where, len(line), content
    if is_empty:
        raise DataError(f"{path}: {EMPTY}")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place in a file in front of what is wrong with it."""
    try:
        yield
    except (DataError, RequestError) as error:
        raise DataError(f"{where}: {error}") from None


def nothing_to_learn(num_documents: int, num_tokens: int) -> str:
    """What to say of data without a single label."""
    return (
        f"{num_documents} documents with {num_tokens} tokens hold nothing to learn: no text of two tokens or more, and "
        "no assistant's answer; give other data"
    )


def utf8(data: bytes) -> str:
    """Its text, without a byte order mark. Raises DataError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(error.reason, error.start)) from None


def not_utf8(reason: str, place: int) -> str:
    """What to say of a file that isn't; `place` counts bytes."""
    return f"not UTF-8 ({reason} at byte {place}); convert the file"


def _from_line(line: str) -> str | Messages:
    try:
        return content_of(json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); {EXPECTED}") from None


def content_of(record: Any) -> str | Messages:
    """The text or the chat that a line or row holds. Raises DataError."""
    match record:
        case {"text": str(), "messages": _}:
            raise DataError(f"both a text and messages; {EXPECTED}")
        case {"text": str(text)}:
            return text
        case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
            return messages
        case dict():
            raise DataError(f"keys {', '.join(map(repr, record)) or 'none'}, or their values' types; {EXPECTED}")
        case _:
            raise DataError(f"{type(record).__name__}; {EXPECTED}")


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _encode(content: str | Messages, tokenizer: Tokenizer) -> Document:
    return whole(encode_text(content, tokenizer)) if isinstance(content, str) else chat(content, tokenizer)


def encode_text(text: str, tokenizer: Tokenizer, *, is_first: bool = True, is_last: bool = True) -> list[int]:
    """The tokens of a text, or of a part of it: what stands before a text comes with its first part, the end-of-text
    token with its last."""
    tokens = tokenizer.encode(text, add_special_tokens=is_first)
    if is_last and tokenizer.eos_id is not None and tokens[-1:] != [tokenizer.eos_id]:  # a pipeline may add it itself
        tokens.append(tokenizer.eos_id)
    return tokens


def whole(tokens: list[int]) -> Document:
    """A document that is learnt whole."""
    return Document(tokens=np.array(tokens, dtype=np.int32), is_target=np.ones(len(tokens), dtype=bool))


def chat(messages: Messages, tokenizer: Tokenizer) -> Document:
    """A chat, of which the answers are learnt."""
    tokens, is_target = tokenizer.encode_chat(messages)
    return Document(tokens=np.array(tokens, dtype=np.int32), is_target=np.array(is_target, dtype=bool))
