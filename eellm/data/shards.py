"""Prepared text on disk: the tokens of all documents end to end, in files that are mapped into memory, not read whole.

    data/index.json            what there is: written last, so that a directory without it is refused
    data/tokens-00000.bin …    token ids, uint16 where the vocabulary fits, else uint32; cut every so many tokens
    data/targets-00000.bin …   whether each token is to be learnt, uint8; absent where all are
    data/documents.bin         where each document ends, counted in tokens from the beginning of all, int64
    data/tokenizer.json …      the tokenizer, as any model's directory has it

A .bin file is a header of 16 bytes (magic, version, dtype) and little-endian numbers. Opening checks every header and
size, which costs nothing; `verify` also checks the SHA-256 of every file, which reads them all.
"""

import hashlib
import json
import os
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eellm.data.documents import nothing_to_learn
from eellm.errors import CheckpointError, DataError
from eellm.text.tokenizer import FILES, PIPELINE, Tokenizer

INDEX = "index.json"
FORMAT = "eellm tokens"
VERSION = 1
SHARD_TOKENS = 1 << 28
_HEADER = struct.Struct("<8sI4s")
_MAGIC = b"eellmtok"
_OWNED = ("tokens-*.bin", "targets-*.bin", "documents.bin", *FILES)
_AGAIN = "run 'eellm prepare' again"


class Shards:
    """A prepared directory, open for reading."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError for a directory that isn't a prepared one, is of another version, or is damaged."""
        self.directory = directory
        index = _read_index(directory)
        try:
            files = index["tokens"], index["targets"], [index["documents"]]
            self._entries: list[dict[str, Any]] = [entry for group in files for entry in group]
            tokens, targets, (document_ends,) = ([_map(directory, entry) for entry in group] for group in files)
            self.recipe: str | None = index["recipe"]
            """Fingerprint of what it was made from, if that has one."""
            sizes = index["num_tokens"], index["num_documents"]
            fingerprint: str = index["tokenizer"]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{directory / INDEX}: damaged; {_AGAIN}") from None
        self.tokens = Parts(tokens)
        """Token ids; slices of them are arrays."""
        self.is_target = Parts(targets) if targets else None
        """Whether each token is to be learnt; None: all are."""
        self.document_ends: np.ndarray = document_ends
        """Tokens up to the end of each document, int64."""
        self.tokenizer = _read_tokenizer(directory, fingerprint)
        """What made the tokens."""
        if (len(self.tokens), len(document_ends)) != sizes or document_ends[-1] != sizes[0]:
            raise DataError(f"{directory / INDEX}: doesn't fit the files beside it; {_AGAIN}")
        if self.is_target is not None and len(self.is_target) != len(self.tokens):
            raise DataError(f"{directory / INDEX}: not as many targets as tokens; {_AGAIN}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sums of all files: equal ones hold equal tokens."""
        return hashlib.sha256(" ".join(entry["sha256"] for entry in self._entries).encode()).hexdigest()

    def verify(self) -> None:
        """Reads every file and checks its sum. Raises DataError that names the first damaged one."""
        for entry in self._entries:
            path = self.directory / entry["name"]
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise DataError(f"{path}: damaged (its checksum is another); {_AGAIN}")


class Parts:
    """Arrays that are one, end to end."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        """A copy of [start:stop]."""
        start, stop, _ = span.indices(len(self))
        found = [np.empty(0, self._parts[0].dtype)]
        while start < stop:
            i = bisect_right(self._starts, start) - 1
            found.append(self._parts[i][start - self._starts[i] : stop - self._starts[i]])
            start += len(found[-1])
        return np.concatenate(found)


class ShardWriter:
    """What `writing` gives: takes documents, in parts of any size."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._tokens = _SplitFile(directory, "tokens", token_dtype(tokenizer.vocab_size), shard_tokens)
        self._targets = _SplitFile(directory, "targets", np.dtype(np.uint8), shard_tokens)
        self._documents = _File(directory / "documents.bin", np.dtype(np.int64))
        self._is_inside = False  # of a document
        self._has_labels = False

    def add(self, tokens: np.ndarray, is_target: np.ndarray | None, ends: np.ndarray) -> None:
        """More tokens; whether each is to be learnt (None: all are); which numbers of these tokens end a document."""
        first = np.append([] if self._is_inside else [0], ends).astype(np.int64)
        is_label = np.ones(len(tokens), bool) if is_target is None else is_target.astype(bool)
        is_label[first[first < len(tokens)]] = False  # nothing stands before a document's first token
        self._has_labels |= bool(is_label.any())
        if is_target is not None and self._targets.length < self._tokens.length:
            self._targets.fill(1, self._tokens.length)  # the first chat: until here, all was learnt
        if is_target is not None or self._targets.length:
            self._targets.append(np.ones(len(tokens), np.uint8) if is_target is None else is_target)
        self._documents.append(ends + self._tokens.length)
        self._tokens.append(tokens)
        self._is_inside = len(tokens) > (ends[-1] if len(ends) else 0) or (self._is_inside and len(ends) == 0)

    def close(self) -> dict[str, Any]:
        """Closes the files; the index's account of them. Raises DataError where nothing is to be learnt."""
        parts = {"tokens": self._tokens.close(), "targets": self._targets.close(), "documents": self._documents.close()}
        counts = {"num_documents": self._documents.length, "num_tokens": self._tokens.length}
        if not self._has_labels:
            raise DataError(nothing_to_learn(**counts))
        return counts | parts


@contextmanager
def writing(
    directory: Path, tokenizer: Tokenizer, *, recipe: str | None = None, shard_tokens: int = SHARD_TOKENS
) -> Iterator[ShardWriter]:
    """What is added to the writer becomes the prepared `directory` when the block ends well, else nothing changes.

    recipe: a fingerprint of what it is made from. Raises DataError as `check_free`, and where nothing is to be learnt.
    """
    check_free(directory)
    place = directory.resolve()  # "." has no name
    temporary = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had our number
    try:
        temporary.mkdir(parents=True)
        writer = ShardWriter(temporary, tokenizer, shard_tokens)
        yield writer
        files = writer.close()
        for name, content in tokenizer.files().items():
            (temporary / name).write_bytes(content)
        head = {"format": FORMAT, "format_version": VERSION, "recipe": recipe, "tokenizer": tokenizer.fingerprint}
        index = {**head, "vocab_size": tokenizer.vocab_size, **files}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _move(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(directory: Path) -> None:
    """Raises DataError where something else than an earlier prepared directory stands there."""
    if directory.is_dir():
        if is_prepared(directory) or not any(directory.iterdir()):
            return
        raise DataError(f"{directory} has other files in it and no {INDEX} of 'eellm prepare'; name another directory")
    if directory.exists():
        raise DataError(f"{directory} is a file; name a directory")


def is_prepared(directory: Path) -> bool:
    """Whether a directory is one of `eellm prepare`, damaged perhaps."""
    try:
        index = json.loads((directory / INDEX).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("format") == FORMAT


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{directory} is no directory of 'eellm prepare': {INDEX} is missing") from None
    except ValueError:
        raise DataError(f"{path}: not JSON; {_AGAIN}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: not of 'eellm prepare'; name a directory that is")
    if index.get("format_version") != VERSION:
        raise DataError(
            f"{path}: format version {index.get('format_version')!r}; this release reads version {VERSION}: {_AGAIN}"
        )
    return index


def _map(directory: Path, entry: dict[str, Any]) -> np.ndarray:
    path, dtype, length = directory / entry["name"], np.dtype(entry["dtype"]), entry["length"]
    try:
        with path.open("rb") as file:
            header, num_bytes = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {_AGAIN}") from None
    if num_bytes != (wanted := _HEADER.size + length * dtype.itemsize):
        raise DataError(f"{path}: damaged ({num_bytes} bytes instead of {wanted}); {_AGAIN}")
    if header != _header(dtype):
        raise DataError(f"{path}: damaged (its header is another); {_AGAIN}")
    return np.memmap(path, dtype, "r", _HEADER.size).view(np.ndarray)


def _read_tokenizer(directory: Path, fingerprint: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_dir(directory)
    except CheckpointError as error:
        raise DataError(f"{error}; or {_AGAIN}") from None
    if tokenizer is None or tokenizer.fingerprint != fingerprint:
        problem = "is missing" if tokenizer is None else "isn't the tokenizer that made the tokens"
        raise DataError(f"{directory / PIPELINE} {problem}; {_AGAIN}")
    return tokenizer


def _header(dtype: np.dtype) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, dtype.str.encode())


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _move(source: Path, directory: Path) -> None:
    """Files of the user's own in an earlier `directory` stay; the index goes first and comes back last."""
    if not directory.is_dir():
        source.rename(directory)
        return
    (directory / INDEX).unlink(missing_ok=True)
    for pattern in _OWNED:
        for stale in directory.glob(pattern):
            stale.unlink()
    for path in sorted(source.iterdir(), key=lambda path: path.name == INDEX):
        path.replace(directory / path.name)


class _File:
    """A .bin file that is being written, and its sum."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype = path, dtype.newbyteorder("<")
        self._file = path.open("wb")
        self._sum = hashlib.sha256()
        self._write(_header(self._dtype))
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        self._write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> dict[str, Any]:
        self._file.close()
        names = {"name": self._path.name, "dtype": self._dtype.str}
        return {**names, "length": self.length, "sha256": self._sum.hexdigest()}

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sum.update(data)


class _SplitFile:
    """Numbered files, each but the last of `limit` numbers; none where nothing is appended."""

    def __init__(self, directory: Path, stem: str, dtype: np.dtype, limit: int) -> None:
        self._directory, self._stem, self._dtype, self._limit = directory, stem, dtype, limit
        self._done: list[dict[str, Any]] = []
        self._file: _File | None = None
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        while len(values):
            if self._file is None:
                self._file = _File(self._directory / f"{self._stem}-{len(self._done):05d}.bin", self._dtype)
            part = values[: self._limit - self._file.length]
            self._file.append(part)
            self.length += len(part)
            values = values[len(part) :]
            if self._file.length == self._limit:
                self.close()

    def fill(self, value: int, length: int) -> None:
        while (missing := length - self.length) > 0:
            self.append(np.full(min(missing, 1 << 20), value))

    def close(self) -> list[dict[str, Any]]:
        if self._file is not None:
            self._done.append(self._file.close())
            self._file = None
        return self._done
