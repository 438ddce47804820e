"""What the `[data]` table of a recipe names as a source → its tokens.

A source is a directory of `eellm prepare`, mapped into memory, or text that is encoded here and now: a .txt or .jsonl
file, or `pydoc_data.topics`, the help texts that come with Python. However it comes, it is tokens of documents laid end
to end; a recipe's sources share one tokenizer.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from eellm.data.documents import Document, encode_text, nothing_to_learn, read_documents, whole
from eellm.data.shards import Shards
from eellm.errors import DataError
from eellm.text.bytes import named_tokenizer
from eellm.text.tokenizer import Tokenizer

TOPICS = "pydoc_data.topics"
_EXPECTED = f"a directory of 'eellm prepare', a .txt or .jsonl file, or {TOPICS}"


class Values(Protocol):
    """An array, in memory or not."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Tokens of documents, end to end."""

    name: str
    """As the recipe has it."""
    tokens: Values
    """Token ids."""
    is_target: Values | None
    """Whether each token is to be learnt; None: all are."""
    document_ends: np.ndarray
    """Tokens up to the end of each document, int64."""
    tokenizer: Tokenizer
    """What made the tokens."""
    fingerprint: str
    """SHA-256; equal ones hold equal data."""


def open_sources(names: Sequence[str], *, tokenizer: str, vocab_size: int) -> list[Source]:
    """The sources of a recipe. tokenizer: `bytes` or a directory, for those that are text.

    Raises DataError for a source that isn't there or is damaged, for sources of different tokenizers, and for a
    tokenizer with more tokens than the model's `vocab_size`; CheckpointError for a directory without a tokenizer.
    """
    sources: list[Source] = []
    maker: Tokenizer | None = None
    for name in names:
        if name != TOPICS and Path(name).is_dir():
            sources.append(_from_shards(name))
        else:
            maker = maker or named_tokenizer(tokenizer)
            sources.append(_from_documents(name, maker))
    for source in sources:
        if source.tokenizer.fingerprint != sources[0].tokenizer.fingerprint:
            raise DataError(
                f"{source.name} and {sources[0].name} have different tokenizers; prepare them with one, and give text "
                "the same: data.tokenizer may name a prepared directory"
            )
    if (found := sources[0].tokenizer.vocab_size) > vocab_size:
        raise DataError(
            f"{sources[0].name}: its tokenizer has {found} tokens, the model's vocab_size is {vocab_size}; "
            f"set model.vocab_size to {found} or more, or use another tokenizer"
        )
    return sources


def _from_shards(name: str) -> Source:
    shards = Shards(Path(name))
    return Source(
        name=name,
        tokens=shards.tokens,
        is_target=shards.is_target,
        document_ends=shards.document_ends,
        tokenizer=shards.tokenizer,
        fingerprint=shards.fingerprint,
    )


def _from_documents(name: str, tokenizer: Tokenizer) -> Source:
    documents = list(_documents(name, tokenizer))
    tokens = np.concatenate([document.tokens for document in documents])
    is_target = np.concatenate([document.is_target for document in documents])
    ends = np.cumsum([len(document.tokens) for document in documents], dtype=np.int64)
    if not any(document.is_target[1:].any() for document in documents):
        raise DataError(f"{name}: {nothing_to_learn(len(documents), len(tokens))}")
    digest = hashlib.sha256()
    for values in (tokens, is_target, ends):
        digest.update(values.tobytes())
    return Source(
        name=name,
        tokens=tokens,
        is_target=is_target,
        document_ends=ends,
        tokenizer=tokenizer,
        fingerprint=digest.hexdigest(),
    )


def _documents(name: str, tokenizer: Tokenizer) -> Iterable[Document]:
    if name == TOPICS:
        from pydoc_data.topics import topics  # half a megabyte: only where it is wanted

        return (whole(encode_text(text, tokenizer)) for _, text in sorted(topics.items()))
    if not Path(name).exists():
        raise DataError(f"{name}: no such file or directory; a source is {_EXPECTED}")
    if Path(name).suffix not in (".txt", ".jsonl"):
        raise DataError(f"{name}: a source is {_EXPECTED}; 'eellm prepare' reads other files")
    return read_documents([Path(name)], tokenizer)
