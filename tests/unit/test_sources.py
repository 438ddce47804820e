"""Sources of a recipe: prepared directories and text become the same tokens; what doesn't fit together is refused."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest

from eellm.data.documents import read_documents
from eellm.data.prepare import prepare
from eellm.data.sources import open_sources
from eellm.errors import CheckpointError, DataError
from eellm.text.bytes import byte_tokenizer
from tests.worlds import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"text": topics["if"]}, {"messages": CHAT}, {"text": topics["lambda"]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def model_dir(folder):
    """A directory with the tiny tokenizer's files, as a model's."""
    folder.mkdir()
    for name, content in tiny_tokenizer().files().items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_text_and_its_prepared_directory_hold_the_same(text, tmp_path):
    prepare([str(text)], tmp_path / "data", tokenizer=tiny_tokenizer())
    names = [str(text), str(tmp_path / "data")]
    one, other = open_sources(names, tokenizer=model_dir(tmp_path / "model"), vocab_size=512)
    assert one.tokens[:].tolist() == other.tokens[:].tolist()
    assert one.is_target[:].tolist() == other.is_target[:].tolist()
    assert one.document_ends.tolist() == other.document_ends.tolist()
    documents = list(read_documents([text], tiny_tokenizer()))
    assert one.tokens[:].tolist() == np.concatenate([document.tokens for document in documents]).tolist()
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert (one.name, other.name) == tuple(names)


def test_the_help_texts_of_python_are_a_source_in_the_order_of_their_names():
    (source,) = open_sources(["pydoc_data.topics"], tokenizer="bytes", vocab_size=257)
    ends = source.document_ends.tolist()
    assert len(ends) == len(topics)
    assert source.tokens[ends[0] - 1] == byte_tokenizer().eos_id
    for i, name in enumerate(sorted(topics)):
        start = ends[i - 1] if i else 0
        assert byte_tokenizer().decode(source.tokens[start : ends[i]].tolist()) == topics[name]


def test_their_order_is_not_that_of_the_dict(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "two", "a": "one"})
    (source,) = open_sources(["pydoc_data.topics"], tokenizer="bytes", vocab_size=257)
    assert byte_tokenizer().decode(source.tokens[:].tolist()) == "onetwo"


def test_the_fingerprint_is_of_the_contents(text, tmp_path):
    def fingerprints(names):
        return [source.fingerprint for source in open_sources(names, tokenizer="bytes", vocab_size=257)]

    (tmp_path / "b.txt").write_text(topics["if"])
    (tmp_path / "c.txt").write_text(topics["if"])
    (tmp_path / "d.txt").write_text(topics["if"] + ".")
    b, c, d = fingerprints([str(tmp_path / f"{name}.txt") for name in "bcd"])
    assert b == c != d
    for name in "bcd":
        prepare([str(tmp_path / f"{name}.txt")], tmp_path / name, tokenizer=byte_tokenizer())
    b, c, d = fingerprints([str(tmp_path / name) for name in "bcd"])
    assert b == c != d


def test_sources_of_two_tokenizers_are_refused(text, tmp_path):
    prepare([str(text)], tmp_path / "data", tokenizer=tiny_tokenizer())
    (tmp_path / "b.txt").write_text("one two")
    names = [str(tmp_path / "data"), str(tmp_path / "b.txt")]
    with pytest.raises(DataError, match=r"b\.txt and .*data have different tokenizers; .* data\.tokenizer may name"):
        open_sources(names, tokenizer="bytes", vocab_size=512)
    assert len(open_sources(names, tokenizer=names[0], vocab_size=512)) == 2


def test_a_tokenizer_beyond_the_model_s_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"its tokenizer has 257 tokens, the model's vocab_size is 256; set model"):
        open_sources(["pydoc_data.topics"], tokenizer="bytes", vocab_size=256)


def test_the_named_tokenizer_is_not_asked_for_where_all_is_prepared(text, tmp_path):
    prepare([str(text)], tmp_path / "data", tokenizer=tiny_tokenizer())
    open_sources([str(tmp_path / "data")], tokenizer="nowhere", vocab_size=512)
    with pytest.raises(CheckpointError, match=r"nowhere: no tokenizer\.json there"):
        open_sources([str(text)], tokenizer="nowhere", vocab_size=512)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such file or directory; a source is a directory of 'eellm prepare', a .txt or"),
        ("empty", "empty is no directory of 'eellm prepare': index.json is missing"),
        ("a.parquet", "a.parquet: a source is .* 'eellm prepare' reads other files"),
        ("one.txt", "one.txt: 1 documents with 1 tokens hold nothing to learn"),
        ("bad.jsonl", "bad.jsonl:1: not JSON"),
    ],
)
def test_what_is_no_source_is_named_with_what_is(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "one.txt").write_text("<|end|>")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=message):
        open_sources([name], tokenizer="bytes", vocab_size=257)
