"""Documents → rows of equal length, with nothing lost but the padding behind the last one.

Documents are laid end to end and cut every `seq_len` tokens. What a row holds of a document is a *piece*: its positions
start at 0 and its tokens see only each other. A label is the next token of the same document where that is a target,
the first token of the next row included. N: rows, T: tokens in a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eellm.data.documents import Document
from eellm.errors import DataError
from eellm.exits.loss import IGNORE


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Training data, all of it, in memory."""

    tokens_NT: np.ndarray
    """Token ids, int32. Padding is 0."""
    labels_NT: np.ndarray
    """The token to be said next, or IGNORE; int64."""
    positions_NT: np.ndarray
    """Position within the piece, from 0; int32."""
    documents_NT: np.ndarray
    """Number of the piece within its row, from 0; int32. Attention stays within equal numbers; padding has its own."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens_NT)


def pack(documents: Iterable[Document], seq_len: int) -> Rows:
    """Lays documents into rows of `seq_len` tokens. Raises DataError where nothing is left to learn."""
    documents = list(documents)
    lengths = [len(document.tokens) for document in documents]
    num_tokens = sum(lengths)
    num_rows = -(-num_tokens // seq_len)
    size = num_rows * seq_len

    tokens, is_target, owner = np.zeros(size, np.int32), np.zeros(size, bool), np.full(size, len(documents), np.int32)
    owner[:num_tokens] = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    if documents:
        np.concatenate([document.tokens for document in documents], out=tokens[:num_tokens])
        np.concatenate([document.is_target for document in documents], out=is_target[:num_tokens])

    labels = np.full(size, IGNORE, np.int64)
    is_learnt = is_target[1:] & (owner[1:] == owner[:-1])
    labels[:-1][is_learnt] = tokens[1:][is_learnt]
    if not is_learnt.any():
        raise DataError(
            f"{len(documents)} documents with {num_tokens} tokens hold nothing to learn: no text of two tokens or "
            "more, and no assistant's answer; give other data"
        )
    positions_NT, documents_NT = _number_pieces(owner.reshape(num_rows, seq_len))
    return Rows(
        tokens_NT=tokens.reshape(num_rows, seq_len),
        labels_NT=labels.reshape(num_rows, seq_len),
        positions_NT=positions_NT,
        documents_NT=documents_NT,
    )


def _number_pieces(owner_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position within the piece and number of the piece within the row, from each token's document."""
    is_new_NT = np.zeros(owner_NT.shape, bool)
    is_new_NT[:, 1:] = owner_NT[:, 1:] != owner_NT[:, :-1]
    column_T = np.arange(owner_NT.shape[1], dtype=np.int32)
    start_NT = np.maximum.accumulate(np.where(is_new_NT, column_T, np.int32(0)), axis=1)
    return column_T - start_NT, np.cumsum(is_new_NT, axis=1, dtype=np.int32)
