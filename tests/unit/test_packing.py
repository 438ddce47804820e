import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eellm.data.documents import Document
from eellm.data.packing import IGNORE, Rows, pack
from eellm.errors import DataError


def document(tokens: list[int], is_target: list[bool] | None = None) -> Document:
    targets = [True] * len(tokens) if is_target is None else is_target
    return Document(tokens=np.array(tokens, dtype=np.int32), is_target=np.array(targets, dtype=bool))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Document], int]:
    """Documents of distinct tokens, one of them with something to learn, and a length of rows."""
    lengths = [*draw(st.lists(st.integers(0, 12), max_size=8)), draw(st.integers(2, 12))]
    first = np.cumsum([1, *lengths])
    targets = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    targets[-1][-1] = True
    documents = [document(list(range(first[i], first[i + 1])), targets[i]) for i in range(len(lengths))]
    return documents, draw(st.integers(1, 10))


def pieces_of(documents: list[Document], seq_len: int) -> list[list[list[tuple[int, int]]]]:
    """The rows as plain lists of pieces of (token, label): the definition, token by token."""
    rows, room = [], 0
    for doc in documents:
        is_new = True
        for i, token in enumerate(doc.tokens.tolist()):
            if room == 0:
                rows.append([])
                room, is_new = seq_len, True
            if is_new:
                rows[-1].append([])
            has_label = i + 1 < len(doc.tokens) and doc.is_target[i + 1]
            rows[-1][-1].append((token, int(doc.tokens[i + 1]) if has_label else IGNORE))
            room, is_new = room - 1, False
    if room:
        rows[-1].append([(0, IGNORE)] * room)
    return rows


def rows_of(rows: Rows) -> list[list[list[tuple[int, int]]]]:
    """The same, from the arrays: tokens of one number, which must count up from 0 as their positions do."""
    found = []
    for row in range(len(rows)):
        found.append([])
        columns = (rows.tokens_NT, rows.labels_NT, rows.positions_NT, rows.documents_NT)
        for token, label, position, number in zip(*(values[row].tolist() for values in columns), strict=True):
            if number == len(found[-1]):
                found[-1].append([])
            assert number == len(found[-1]) - 1
            assert position == len(found[-1][-1])
            found[-1][-1].append((token, label))
    return found


@given(worlds())
def test_rows_hold_every_piece_with_its_labels_positions_and_number(world):
    documents, seq_len = world
    assert rows_of(pack(iter(documents), seq_len)) == pieces_of(documents, seq_len)


def test_the_layout_of_two_documents_in_two_rows():
    rows = pack([document([1, 2, 3]), document([4, 5, 6, 7], [False, False, True, True])], seq_len=5)
    assert rows.tokens_NT.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert rows.labels_NT.tolist() == [[2, 3, IGNORE, IGNORE, 6], [7, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert rows.positions_NT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert rows.documents_NT.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    kinds = [values.dtype for values in (rows.tokens_NT, rows.labels_NT, rows.positions_NT, rows.documents_NT)]
    assert kinds == [np.int32, np.int64, np.int32, np.int32]
    assert len(rows) == 2


@pytest.mark.parametrize(
    "documents", [[], [document([])], [document([1]), document([2])], [document([1, 2, 3], [True, False, False])]]
)
def test_data_with_nothing_to_learn_is_refused(documents):
    with pytest.raises(DataError, match="nothing to learn"):
        pack(documents, seq_len=4)


def test_millions_of_tokens_are_packed_in_a_moment():
    documents = [document([1] * 500)] * 4000
    start = time.perf_counter()
    assert len(pack(documents, seq_len=1024)) == 1954
    assert time.perf_counter() - start < 10
