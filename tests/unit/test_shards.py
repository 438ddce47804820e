"""Prepared directories: what is written is what is read; what is damaged, torn or foreign is refused by name."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data.shards import Parts, Shards, is_prepared, writing
from eellm.errors import DataError
from eellm.text.bytes import byte_tokenizer
from tests.directories import content, edit_json
from tests.worlds import tiny_tokenizer

DOCUMENTS = [([5, 6, 7], None), ([8, 9], [False, True]), ([1, 2, 3, 4], None)]


def write(directory, documents=DOCUMENTS, *, shard_tokens=4, tokenizer=None):
    with writing(directory, tokenizer or byte_tokenizer(), recipe="r", shard_tokens=shard_tokens) as writer:
        for tokens, is_target in documents:
            targets = None if is_target is None else np.array(is_target, bool)
            writer.add(np.array(tokens), targets, np.array([len(tokens)]))
    return Shards(directory)


def as_lists(shards):
    is_target = None if shards.is_target is None else shards.is_target[:].tolist()
    return shards.tokens[:].tolist(), is_target, shards.document_ends.tolist()


def test_what_was_written_is_read_back_over_several_shards(tmp_path):
    shards = write(tmp_path / "data")
    assert as_lists(shards) == ([5, 6, 7, 8, 9, 1, 2, 3, 4], [1, 1, 1, 0, 1, 1, 1, 1, 1], [3, 5, 9])
    assert sorted(content(tmp_path / "data")) == [
        "documents.bin",
        "index.json",
        *(f"targets-0000{i}.bin" for i in range(3)),
        "tokenizer.json",
        "tokenizer_config.json",
        *(f"tokens-0000{i}.bin" for i in range(3)),
    ]
    assert shards.tokenizer.files() == byte_tokenizer().files()
    shards.verify()


def test_there_is_no_mask_where_all_is_learnt(tmp_path):
    shards = write(tmp_path / "data", [([1, 2], None), ([3, 4], None)])
    assert shards.is_target is None
    assert not list((tmp_path / "data").glob("targets*"))


def test_ids_are_as_small_as_the_vocabulary_allows(tmp_path):
    write(tmp_path / "data", shard_tokens=100)
    assert (tmp_path / "data" / "tokens-00000.bin").stat().st_size == 16 + 2 * 9
    assert np.memmap(tmp_path / "data" / "tokens-00000.bin", "<u2", "r", 16).tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]


def test_a_vocabulary_beyond_16_bits_has_ids_of_32(tmp_path):
    files = byte_tokenizer().files()
    data = json.loads(files["tokenizer.json"])
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 70000, "content": "<|far|>"})
    data["model"]["vocab"]["<|far|>"] = 70000
    files["tokenizer.json"] = json.dumps(data).encode()
    tokenizer = type(byte_tokenizer()).from_files(files)
    shards = write(tmp_path / "data", [([70000, 3], None)], tokenizer=tokenizer)
    assert shards.tokens[:].tolist() == [70000, 3]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=6), st.data())
def test_parts_are_sliced_as_the_whole(lists, data):
    whole = np.array([value for values in lists for value in values])
    parts = Parts([np.array(values, int) for values in lists if values] or [np.array([], int)])
    assert len(parts) == len(whole)
    start, stop = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    assert parts[start:stop].tolist() == whole[start:stop].tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=8), st.integers(1, 9), st.data())
def test_documents_written_in_any_parts_make_the_same_bytes(tmp_path_factory, documents, shard_tokens, data):
    folder = tmp_path_factory.mktemp("parts")
    lengths = [5, *(length for length, _ in documents)]
    tokens = np.arange(sum(lengths)) % 250
    is_chat = np.repeat([False, *(chat for _, chat in documents)], lengths)
    is_target = ~is_chat | (tokens % 2 == 0)
    ends = np.cumsum(lengths)
    for name in ("a", "b"):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
        with writing(folder / name, byte_tokenizer(), shard_tokens=shard_tokens) as writer:
            seen = 0
            for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
                done = int(np.searchsorted(ends, stop, side="right")) if stop > start or stop == len(tokens) else seen
                mask = is_target[start:stop]
                writer.add(tokens[start:stop], None if mask.all() else mask, ends[seen:done] - start)
                seen = done
    assert content(folder / "a") == content(folder / "b")
    shards = Shards(folder / "a")
    assert shards.tokens[:].tolist() == tokens.tolist()
    assert shards.document_ends.tolist() == ends.tolist()
    assert (is_target.all() and shards.is_target is None) or shards.is_target[:].tolist() == is_target.tolist()


# --- what is refused ---


@pytest.mark.parametrize("name", ["tokens-00001.bin", "targets-00000.bin", "documents.bin"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], r"damaged \(\d+ bytes instead of \d+\)"),
        (lambda data: data + b"\0", r"damaged \(\d+ bytes instead of \d+\)"),
        (lambda data: b"", r"damaged \(0 bytes"),
        (lambda data: b"X" + data[1:], r"damaged \(its header is another\)"),
        (lambda data: data[:8] + b"\2" + data[9:], r"damaged \(its header is another\)"),
    ],
)
def test_a_damaged_file_is_refused_by_name_at_opening(tmp_path, name, spoil, message):
    write(tmp_path / "data")
    path = tmp_path / "data" / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: {message}.*; run 'eellm prepare' again"):
        Shards(tmp_path / "data")


@pytest.mark.parametrize("name", ["tokens-00002.bin", "targets-00001.bin", "documents.bin"])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path, name):
    shards = write(tmp_path / "data")
    path = tmp_path / "data" / name
    data = bytearray(path.read_bytes())
    data[16] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: damaged \(its checksum is another\)"):
        shards.verify()


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin", "tokenizer.json"])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    write(tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing; run 'eellm prepare' again"):
        Shards(tmp_path / "data")


def test_another_tokenizer_beside_the_tokens_is_refused(tmp_path):
    write(tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").write_bytes(tiny_tokenizer().files()["tokenizer.json"])
    with pytest.raises(DataError, match=r"tokenizer\.json isn't the tokenizer that made the tokens"):
        Shards(tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this release reads version 1"),
        ({"format": "other"}, "not of 'eellm prepare'"),
        ({"tokens": ...}, r"index\.json: damaged"),
        ({"tokens": 7}, r"index\.json: damaged"),
        ({"documents": {"name": "documents.bin"}}, r"index\.json: damaged"),
        ({"num_tokens": 8}, "doesn't fit the files beside it"),
        ({"num_documents": 8}, "doesn't fit the files beside it"),
        ({"targets": []}, None),
    ],
)
def test_an_index_that_says_otherwise_is_refused(tmp_path, changes, message):
    write(tmp_path / "data")
    edit_json(tmp_path / "data" / "index.json", **changes)
    if message is None:
        assert Shards(tmp_path / "data").is_target is None
        return
    with pytest.raises(DataError, match=message):
        Shards(tmp_path / "data")


@pytest.mark.parametrize("index", [b"", b"{", b"\xff", b"[]", b"null"])
def test_a_torn_index_is_refused(tmp_path, index):
    write(tmp_path / "data")
    (tmp_path / "data" / "index.json").write_bytes(index)
    with pytest.raises(DataError, match=r"index\.json: not"):
        Shards(tmp_path / "data")
    assert not is_prepared(tmp_path / "data")


def test_a_directory_without_an_index_is_none(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"is no directory of 'eellm prepare': index\.json is missing"):
            Shards(place)


def test_nothing_to_learn_is_refused_and_leaves_nothing(tmp_path):
    for documents in ([], [([1], None), ([2], None)], [([1, 2, 3], [True, False, False])]):
        with pytest.raises(DataError, match=f"{len(documents)} documents with .* nothing to learn"):
            write(tmp_path / "data", documents)
    assert list(tmp_path.iterdir()) == []


# --- replacing ---


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write(tmp_path / "data")
    before = content(tmp_path / "data")
    with pytest.raises(AttributeError), writing(tmp_path / "data", byte_tokenizer()) as writer:
        [writer.add(tokens, None, np.array([2])) for tokens in (np.array([1, 2]), "no array")]
    assert content(tmp_path / "data") == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_earlier_one_is_replaced_as_a_whole_and_other_files_in_it_stay(tmp_path):
    write(tmp_path / "data")
    (tmp_path / "data" / "notes.md").write_text("mine")
    assert as_lists(write(tmp_path / "data", [([1, 2], None)])) == ([1, 2], None, [2])
    assert sorted(content(tmp_path / "data")) == [
        "documents.bin",
        "index.json",
        "notes.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokens-00000.bin",
    ]


def test_an_open_one_can_still_be_read_when_it_is_replaced(tmp_path):
    shards = write(tmp_path / "data")
    before = as_lists(shards)
    write(tmp_path / "data", [([1, 2], None)])
    assert as_lists(shards) == before


def test_a_place_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "index.json").write_text('{"name": "a web site"}')
    with pytest.raises(DataError, match=r"has other files in it and no index\.json of 'eellm prepare'"):
        write(tmp_path)
    with pytest.raises(DataError, match="is a file; name a directory"):
        write(tmp_path / "index.json")
    assert sorted(content(tmp_path)) == ["index.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from eellm.data import shards
from eellm.text.bytes import byte_tokenizer

moves = int(sys.argv[2])
replace = Path.replace
def counted(self, target):
    global moves
    if moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    return replace(self, target)
Path.replace = counted
with shards.writing(Path(sys.argv[1]), byte_tokenizer(), shard_tokens=2) as writer:
    writer.add(np.array([9, 8, 7, 6, 5]), None, np.array([5]))
    if moves < 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moves", [-1, 0, 3, 6])
def test_a_kill_at_any_moment_leaves_what_was_there_or_what_is_refused(tmp_path, moves):
    """moves: files of the new one that are in place by then; -1: while it is still being written."""
    write(tmp_path / "data")
    before = content(tmp_path / "data")
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "data"), str(moves)], check=False).returncode
    assert code == -signal.SIGKILL
    if moves == -1:
        assert content(tmp_path / "data") == before
        (left,) = [path for path in tmp_path.iterdir() if path.name != "data"]
        with pytest.raises(DataError, match="is no directory of 'eellm prepare'"):
            Shards(left)
    else:
        with pytest.raises(DataError, match="is no directory of 'eellm prepare'"):
            Shards(tmp_path / "data")
