"""What `eellm prepare` reads: files, directories of them, and whatever the library `datasets` opens → texts and chats.

    .jsonl      a document a line, {"text": …} or {"messages": …}
    .parquet    a document a row, in a column `text` or `messages`
    any other   one document
    datasets:NAME_OR_PATH[:SPLIT]       a document a row, as in Parquet

A text comes in blocks, so that a file of any size passes through little memory. What is wrong with a file is a
DataError that names it, and the line or row.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from eellm.data.documents import EMPTY, content_of, json_lines, naming, not_utf8
from eellm.errors import DataError
from eellm.text.chat import Messages

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of the files that are taken from a directory."""
DATASETS = "datasets:"
_BLOCK_BYTES = 1 << 20
_COLUMNS = ("text", "messages")


@dataclass(frozen=True, kw_only=True, eq=False)
class Raw:
    """A document before it is encoded."""

    where: str
    """For messages: the file, and the line or row."""
    text: Iterable[str] = ()
    """Blocks of a text, to be read before the next document."""
    messages: Messages | None = None
    """Or a chat."""


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """The inputs with directories replaced by the files below them, sorted. Raises DataError for what isn't there."""
    found: list[str] = []
    for name in inputs:
        path = Path(name)
        if name.startswith(DATASETS) or path.is_file():
            found.append(name)
        elif path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not files:
                raise DataError(f"{name}: no {', '.join(SUFFIXES)} file in this directory")
            found += files
        else:
            raise DataError(f"{name}: no such file or directory")
    return found


def read_inputs(inputs: Iterable[str], advance: Callable[[int], object]) -> Iterator[Raw]:
    """The documents of all inputs, in order. `advance` is told of bytes as they are read."""
    for name in inputs:
        if name.startswith(DATASETS):
            yield from _dataset(name)
            continue
        readers = {".jsonl": _jsonl, ".parquet": _parquet}
        try:
            yield from readers.get(Path(name).suffix, _text)(Path(name), advance)
        except OSError as error:
            raise DataError(f"{name}: can't be read: {error.strerror or error}") from None


def size_of(inputs: Iterable[str]) -> int | None:
    """Bytes to be read; None where that isn't known beforehand."""
    inputs = list(inputs)
    if any(name.startswith(DATASETS) for name in inputs):
        return None
    return sum(Path(name).stat().st_size for name in inputs)


def fingerprint(inputs: Iterable[str]) -> str | None:
    """SHA-256 over the contents and kinds of all inputs; None where that isn't known beforehand."""
    sums = []
    for name in inputs:
        if name.startswith(DATASETS):
            return None
        with Path(name).open("rb") as file:
            sums.append(f"{Path(name).suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _text(path: Path, advance: Callable[[int], object]) -> Iterator[Raw]:
    yield Raw(where=str(path), text=_blocks(path, advance))


def _blocks(path: Path, advance: Callable[[int], object]) -> Iterator[str]:
    decoder, place, is_empty = codecs.getincrementaldecoder("utf-8")(), 0, True
    with path.open("rb") as file, naming(str(path)):
        while True:
            data = file.read(_BLOCK_BYTES)
            pending = len(decoder.getstate()[0])  # the beginning of a letter that the last block ended with
            try:
                block = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(not_utf8(error.reason, place - pending + error.start)) from None
            block = block.removeprefix("\ufeff") if place == 0 else block
            is_empty &= not block.strip()
            if not data:
                break
            yield block
            place += len(data)
            advance(len(data))
        if is_empty:
            raise DataError(EMPTY)


def _jsonl(path: Path, advance: Callable[[int], object]) -> Iterator[Raw]:
    for where, num_bytes, content in json_lines(path):
        yield _raw(where, content)
        advance(num_bytes)


def _parquet(path: Path, advance: Callable[[int], object]) -> Iterator[Raw]:
    pyarrow = _library("pyarrow", f"{path}: reading Parquet", "pip install 'eellm[parquet]'")
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if not columns:
                raise DataError(f"{path}: columns {', '.join(file.schema_arrow.names)}; expected 'text' or 'messages'")
            num_rows, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _from_row(f"{path}: row {number}", row)
                advance(path.stat().st_size * batch.num_rows // num_rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {error}") from None
    if num_rows == 0:
        raise DataError(f"{path}: {EMPTY}")


def _dataset(name: str) -> Iterator[Raw]:
    datasets = _library("datasets", name, "pip install datasets")
    place, _, split = name.removeprefix(DATASETS).partition(":")
    try:
        rows = datasets.load_dataset(place, split=split or "train")
    except Exception as error:  # whatever its builders raise
        raise DataError(f"{name}: {error}") from None
    number = 0
    for number, row in enumerate(rows, start=1):
        yield _from_row(f"{name}: row {number}", row)
    if number == 0:
        raise DataError(f"{name}: it has no rows; leave it out")


def _from_row(where: str, row: Mapping[str, Any]) -> Raw:
    """A column that is there for other rows is null in this one."""
    with naming(where):
        return _raw(where, content_of({key: value for key, value in row.items() if value is not None}))


def _raw(where: str, content: str | Messages) -> Raw:
    return Raw(where=where, text=[content]) if isinstance(content, str) else Raw(where=where, messages=content)


def _library(module: str, what: str, how: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise DataError(f"{what} needs the library {module}: {how}") from None
