"""Texts and chats → tokens, by several processes, with the same result whatever their number.

    documents → chunks of about a million letters → a process each, in turn → their tokens, in order

A long text is cut into parts that are encoded apart, only where that gives the very tokens of the whole. Chunk i goes
to process i mod n, which gets its next one when it has given its last one back: so little is in memory at any time.
"""

import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from eellm.data.documents import chat, encode_text, naming
from eellm.data.inputs import Raw
from eellm.data.shards import token_dtype
from eellm.errors import DataError, EellmError, RequestError
from eellm.text.chat import Messages
from eellm.text.tokenizer import Tokenizer

CHUNK = 1 << 20
"""Letters in a chunk, about."""
_WINDOW = 256
_MAX_TRIES = 16
_CUT = re.compile(r"(?<=\w)\s")
_DIED = "a process that made tokens died (out of memory?); run again, with fewer workers"


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Of a document, what is encoded at once."""

    where: str
    """For messages."""
    content: str | Messages
    """Text, or a whole chat."""
    is_first: bool = True
    """Whether it begins a document."""
    is_last: bool = True
    """Whether it ends it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A chunk's tokens."""

    tokens: np.ndarray
    """Token ids, in the dtype of shards."""
    is_target: np.ndarray | None
    """Whether each is to be learnt; None: all are."""
    ends: np.ndarray
    """The numbers of these tokens that end a document, int64."""


def make_chunks(documents: Iterable[Raw], tokenizer: Tokenizer, *, size: int = CHUNK) -> Iterator[list[Part]]:
    """Parts of documents, in order, some `size` letters at a time. Raises DataError as the inputs do."""
    chunk: list[Part] = []
    num_letters = 0
    for part in _parts(documents, tokenizer, size):
        chunk.append(part)
        num_letters += _length(part.content)
        if num_letters >= size:
            yield chunk
            chunk, num_letters = [], 0
    if chunk:
        yield chunk


def cut_text(blocks: Iterable[str], size: int, fits: Callable[[str, str], bool]) -> Iterator[str]:
    """A text in parts of about `size` letters, cut between a word and a space where `fits(left, right)` for the letters
    around; never empty but for an empty text."""
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while (cut := _find_cut(text, start + size, fits)) is not None:
            yield text[start:cut]
            start = cut
    yield text[start:]


def encode_chunk(chunk: Sequence[Part], tokenizer: Tokenizer) -> Encoded:
    """The tokens of a chunk. Raises DataError that names the document which can't be encoded."""
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    ends: list[int] = []
    num_tokens = 0
    for part in chunk:
        with naming(part.where):
            if isinstance(part.content, str):
                ids = encode_text(part.content, tokenizer, is_first=part.is_first, is_last=part.is_last)
                tokens.append(np.array(ids, np.int32))
                targets.append(np.ones(len(ids), bool))
            else:
                document = chat(part.content, tokenizer)
                tokens.append(document.tokens)
                targets.append(document.is_target)
        num_tokens += len(tokens[-1])
        if part.is_last:
            ends.append(num_tokens)
    is_target = np.concatenate(targets)
    return Encoded(
        tokens=np.concatenate(tokens).astype(token_dtype(tokenizer.vocab_size)),
        is_target=None if is_target.all() else is_target,
        ends=np.array(ends, np.int64),
    )


def encode_all(chunks: Iterable[list[Part]], tokenizer: Tokenizer, *, num_workers: int) -> Iterator[Encoded]:
    """Every chunk's tokens, in order; by this process where `num_workers` is 1. Raises DataError."""
    if num_workers == 1:
        yield from (encode_chunk(chunk, tokenizer) for chunk in chunks)
        return
    with _workers(tokenizer, num_workers) as connections:
        num_sent = num_received = 0
        for chunk in chunks:
            connection = connections[num_sent % num_workers]
            if num_sent >= num_workers:
                yield _receive(connection)
                num_received += 1
            _send(connection, chunk)
            num_sent += 1
        for i in range(num_received, num_sent):
            yield _receive(connections[i % num_workers])


def _parts(documents: Iterable[Raw], tokenizer: Tokenizer, size: int) -> Iterator[Part]:
    def fits(left: str, right: str) -> bool:
        try:
            apart = tokenizer.encode(left) + tokenizer.encode(right, add_special_tokens=False)
            return apart == tokenizer.encode(left + right)
        except RequestError:  # what can't be encoded is named when it is to be
            return False

    for document in documents:
        if document.messages is not None:
            yield Part(where=document.where, content=document.messages)
            continue
        texts = cut_text(document.text, size, fits)
        text, is_first = next(texts), True
        for later in texts:
            yield Part(where=document.where, content=text, is_first=is_first, is_last=False)
            text, is_first = later, False
        yield Part(where=document.where, content=text, is_first=is_first)


def _find_cut(text: str, start: int, fits: Callable[[str, str], bool]) -> int | None:
    """The first place from `start` on that fits, if there is one with enough letters behind it to tell."""
    for place in islice((match.start() for match in _CUT.finditer(text, start)), _MAX_TRIES):
        if place + _WINDOW > len(text):
            return None
        if fits(text[max(0, place - _WINDOW) : place], text[place : place + _WINDOW]):
            return place
    return None


def _length(content: str | Messages) -> int:
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


@contextmanager
def _workers(tokenizer: Tokenizer, num_workers: int) -> Iterator[list[Connection]]:
    """Pipes to as many processes, which end when theirs is closed, as it is, too, when this process is killed."""
    context = get_context("spawn")  # it hands on no other process's pipe
    connections: list[Connection] = []
    with ExitStack() as stack:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, tokenizer.files()), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(ours.close)  # first
            connections.append(ours)
        yield connections


def _work(connection: Connection, files: dict[str, bytes]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    tokenizer = Tokenizer.from_files(files)
    with suppress(EOFError, ConnectionError):  # it has left
        while True:
            chunk = connection.recv()
            try:
                connection.send(encode_chunk(chunk, tokenizer))
            except EellmError as error:
                connection.send(error)


def _send(connection: Connection, chunk: list[Part]) -> None:
    try:
        connection.send(chunk)
    except ConnectionError:
        raise DataError(_DIED) from None


def _receive(connection: Connection) -> Encoded:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError):
        raise DataError(_DIED) from None
    if isinstance(answer, EellmError):
        raise answer
    return answer
