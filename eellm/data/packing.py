"""Documents → rows of equal length, with nothing lost but the padding behind the last one.

Documents are laid end to end and cut every `seq_len` tokens. What a row holds of a document is a *piece*: its positions
start at 0 and its tokens see only each other. A label is the next token of the same document where that is a target,
the first token of the next row included. N: rows, T: tokens in a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from eellm.data.documents import Document, nothing_to_learn
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
    size = max(1, -(-num_tokens // seq_len)) * seq_len + 1  # the last row looks one token ahead, too

    tokens, is_target, owner = np.zeros(size, np.int32), np.zeros(size, bool), np.full(size, len(documents), np.int32)
    owner[:num_tokens] = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    if documents:
        np.concatenate([document.tokens for document in documents], out=tokens[:num_tokens])
        np.concatenate([document.is_target for document in documents], out=is_target[:num_tokens])
    rows = label_rows(*(sliding_window_view(values, seq_len + 1)[::seq_len] for values in (tokens, is_target, owner)))
    if (rows.labels_NT == IGNORE).all():
        raise DataError(nothing_to_learn(len(documents), num_tokens))
    return rows


def label_rows(tokens_NS: np.ndarray, is_target_NS: np.ndarray, owner_NS: np.ndarray) -> Rows:
    """Rows from their tokens, whether each is to be learnt, and the document it belongs to. S is T + 1: the last column
    is the token behind the row, which is only looked at."""
    is_learnt_NT = is_target_NS[:, 1:] & (owner_NS[:, 1:] == owner_NS[:, :-1])
    positions_NT, documents_NT = _number_pieces(owner_NS[:, :-1])
    return Rows(
        tokens_NT=tokens_NS[:, :-1].astype(np.int32),
        labels_NT=np.where(is_learnt_NT, tokens_NS[:, 1:], IGNORE).astype(np.int64),
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
