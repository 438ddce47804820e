"""`prepare`: any form of text becomes the tokens that `read_documents` gives, whatever the number of processes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from eellm.data.documents import read_documents
from eellm.data.encode import encode_all, encode_chunk, make_chunks
from eellm.data.inputs import Raw
from eellm.data.prepare import prepare
from eellm.errors import DataError
from eellm.text.bytes import byte_tokenizer, train_bpe
from tests.directories import content
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer, tokenizer_of

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
TOPICS = [topics[name] for name in sorted(topics)]
WORDS = ["the ", "cat's ", "fed", "\n\n", "\n", "  ", ". ", ".\n", "東京 ", "1234567", "\r\n", "_x ", "é"]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def assert_same_as_documents(shards, documents):
    """Same tokens, ends and targets."""
    tokens = np.concatenate([document.tokens for document in documents])
    is_target = np.concatenate([document.is_target for document in documents])
    assert shards.tokens[:].tolist() == tokens.tolist()
    assert shards.document_ends.tolist() == np.cumsum([len(document.tokens) for document in documents]).tolist()
    found = np.ones(len(tokens), bool) if shards.is_target is None else shards.is_target[:].astype(bool)
    assert found.tolist() == is_target.tolist()


@pytest.fixture
def corpus(tmp_path):
    """A text of three megabytes, three times a chunk, and a file of short ones."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(TOPICS * 7))
    jsonl(folder / "more" / "b.jsonl", [{"text": text} for text in TOPICS])
    (folder / "skipped.csv").write_text("a,b")
    return folder


# --- the same whatever the number of processes ---


def test_one_two_and_three_processes_write_the_same_bytes_and_they_are_those_of_the_documents(corpus, tmp_path):
    tokenizer = tiny_tokenizer()
    for num_workers in (1, 2, 3):
        shards = prepare([str(corpus)], tmp_path / str(num_workers), tokenizer=tokenizer, num_workers=num_workers)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    documents = list(read_documents([corpus / "a.txt", corpus / "more" / "b.jsonl"], tokenizer))
    assert_same_as_documents(shards, documents)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7])
def test_chunks_come_back_in_order_also_where_there_are_fewer_than_processes(num_chunks):
    documents = [Raw(where=str(i), text=[f"text {i} " * 20]) for i in range(num_chunks)]
    chunks = list(make_chunks(documents, byte_tokenizer(), size=100))
    assert len(chunks) == num_chunks
    expected = [encode_chunk(chunk, byte_tokenizer()) for chunk in chunks]
    found = list(encode_all(chunks, byte_tokenizer(), num_workers=3))
    assert [e.tokens.tolist() for e in found] == [e.tokens.tolist() for e in expected]
    assert found[0].tokens.dtype == np.uint16


def test_few_chunks_are_in_memory_at_a_time():
    taken = 0

    def chunks():
        nonlocal taken
        for chunk in make_chunks((Raw(where="", text=["a" * 100]) for _ in range(40)), byte_tokenizer(), size=100):
            taken += 1
            yield chunk

    for given_back, _ in enumerate(encode_all(chunks(), byte_tokenizer(), num_workers=2), start=1):
        assert taken - given_back <= 2


def test_what_is_wrong_in_another_process_is_named_and_every_process_ends(tmp_path):
    lines = [{"text": text} for text in TOPICS * 6] + [{"text": "half \ud800"}]
    path = jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=rf"a\.jsonl:{len(lines)}: the text holds half of a surrogate pair"):
        prepare([str(path)], tmp_path / "out", tokenizer=byte_tokenizer(), num_workers=2)
    assert multiprocessing.active_children() == []
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_process_that_dies_is_reported_and_not_waited_for():
    chunks = make_chunks([Raw(where="", text=["a" * 100])] * 40, byte_tokenizer(), size=100)
    encoded = encode_all(chunks, byte_tokenizer(), num_workers=2)
    next(encoded)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that made tokens died"):
        list(encoded)
    assert multiprocessing.active_children() == []


KILLED = """
import multiprocessing, sys
from eellm.data.encode import encode_all
from eellm.data.prepare import *

def stop(chunks, tokenizer, num_workers):
    for encoded in encode_all(chunks, tokenizer, num_workers=num_workers):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        sys.stdin.read()
        yield encoded

if __name__ == "__main__":
    import eellm.data.prepare as module
    from eellm.text.bytes import byte_tokenizer
    module.encode_all = stop
    prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer=byte_tokenizer(), num_workers=2)
"""


def test_a_kill_in_the_middle_leaves_nothing_that_opens_and_no_process(corpus, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2
        watched = [os.pidfd_open(pid) for pid in children]
        process.kill()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("index.json"))
    for descriptor in watched:  # it is readable when the process has ended
        assert multiprocessing.connection.wait([descriptor], timeout=30)
        os.close(descriptor)


# --- long texts in parts ---


def llama_3_like_tokenizer():
    """Its words take line ends along with punctuation, and digits come by threes."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TOPICS[:30] + WORDS * 9, trainer)
    return tokenizer_of(backend, eos_token="<|end|>")


MAKERS = {
    "bytes": byte_tokenizer(),
    "gpt-2": tiny_tokenizer(),
    "llama-3": llama_3_like_tokenizer(),
    "llama-2": sentencepiece_tokenizer(),
}


@pytest.mark.parametrize("maker", MAKERS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 30), st.integers(50, 900), st.integers(1, 700))
def test_a_text_in_parts_has_the_tokens_of_the_whole(maker, seed, size, num_words):
    tokenizer = MAKERS[maker]
    text = "".join(random.Random(seed).choices(WORDS, k=num_words)) + "."
    blocks = [text[i : i + 300] for i in range(0, len(text), 300)]
    chunks = list(make_chunks([Raw(where="", text=blocks), Raw(where="", text=[text])], tokenizer, size=size))
    found = [encode_chunk(chunk, tokenizer) for chunk in chunks]
    ids = tokenizer.encode(text)
    ids = ids if ids[-1] == tokenizer.eos_id else [*ids, tokenizer.eos_id]
    assert np.concatenate([e.tokens for e in found]).tolist() == ids * 2
    assert sum(len(e.ends) for e in found) == 2


@pytest.mark.parametrize(("maker", "is_cut"), [("bytes", True), ("gpt-2", True), ("llama-3", True), ("llama-2", False)])
def test_a_long_text_is_cut_where_the_tokenizer_allows_it(maker, is_cut):
    text = "The cat fed on bread. " * 3000
    chunks = list(make_chunks([Raw(where="", text=[text])], MAKERS[maker], size=1000))
    assert (len(chunks) > 60) == is_cut
    assert max(len(part.content) for chunk in chunks for part in chunk) < (1300 if is_cut else len(text) + 1)


# --- what is read ---


def test_chats_keep_their_masks_beside_texts(tmp_path):
    tokenizer = tiny_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"messages": CHAT}, {"text": "two"}, {"messages": CHAT}])
    shards = prepare([str(path)], tmp_path / "out", tokenizer=tokenizer)
    assert_same_as_documents(shards, list(read_documents([path], tokenizer)))
    (start, end) = shards.document_ends[:2]
    chat = shards.tokens[start:end][shards.is_target[start:end] == 1]
    assert tokenizer.decode(chat.tolist(), skip_special_tokens=False) == "Hi.<|end|>"


def test_parquet_gives_the_documents_of_the_same_jsonl(tmp_path):
    records = [{"text": text} for text in TOPICS[:20]] + [{"messages": CHAT}] * 3
    one = jsonl(tmp_path / "a.jsonl", records)
    texts = [record.get("text") for record in records]
    chats = [record.get("messages") for record in records]
    other = parquet(tmp_path / "a.parquet", id=list(range(23)), text=texts, messages=chats)
    found = [prepare([str(path)], tmp_path / path.suffix[1:], tokenizer=tiny_tokenizer()) for path in (one, other)]
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"a\.parquet: columns body; expected 'text' or 'messages'"),
        ({"text": [1]}, r"a\.parquet: row 1: keys 'text', or their values' types"),
        ({"text": ["a", None]}, r"a\.parquet: row 2: keys none"),
        ({"text": ["a"], "messages": [CHAT]}, r"a\.parquet: row 1: both a text and messages"),
        ({"text": []}, r"a\.parquet: the file is empty"),
    ],
)
def test_a_wrong_parquet_file_is_named(tmp_path, columns, message):
    path = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message):
        prepare([str(path)], tmp_path / "out", tokenizer=tiny_tokenizer())


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or damaged"):
        prepare([str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("pyarrow", "a.parquet", r"reading Parquet needs the library pyarrow: pip install 'eellm\[parquet\]'"),
        ("datasets", "datasets:x", "datasets:x needs the library datasets: pip install datasets"),
    ],
)
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=message):
        prepare([name], tmp_path / "out", tokenizer=byte_tokenizer())


def test_a_dataset_is_read_row_by_row(tmp_path, monkeypatch):
    class Library:
        """Stands for the library; it isn't among what the tests need."""

        asked = ()

        @classmethod
        def load_dataset(cls, name, *, split):
            cls.asked += ((name, split),)
            return [{"text": "one", "messages": None}, {"text": None, "messages": CHAT}]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    shards = prepare(["datasets:some/where", "datasets:a:test"], tmp_path / "out", tokenizer=tiny_tokenizer())
    assert Library.asked == (("some/where", "train"), ("a", "test"))
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"messages": CHAT}] * 2)
    assert_same_as_documents(shards, list(read_documents([path], tiny_tokenizer())))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \n", "the file is empty"),
        (b"latin \xe9 one", "not UTF-8 .* at byte 6"),
        (b"a" * (1 << 20) + b"\xe2\x82x", f"not UTF-8 .* at byte {1 << 20}"),
        (b"a" * ((1 << 20) - 1) + b"\xe2\x82x", f"not UTF-8 .* at byte {(1 << 20) - 1}"),
        (b"torn \xe2\x82", "not UTF-8 .* at byte 5"),
    ],
)
def test_an_empty_or_foreign_text_is_named(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt: {message}") as caught:
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=byte_tokenizer())
    assert str(caught.value).count("a.txt") == 1
    assert not (tmp_path / "out").exists()


def test_letters_across_blocks_and_a_byte_order_mark_are_read_right(tmp_path):
    text = "é" + "a" * ((1 << 20) - 3 - 3) + "€uro"  # the mark and é are 5 bytes: € crosses the block's end
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    shards = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=byte_tokenizer())
    assert byte_tokenizer().decode(shards.tokens[:].tolist()) == text


def test_what_is_not_there_is_named_before_any_work(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no such file or directory"), ("empty", r"no \.txt, \.jsonl, \.parquet file")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            prepare([str(tmp_path / name)], tmp_path / "out", tokenizer=byte_tokenizer())


# --- the tokenizer ---


def test_a_tokenizer_is_trained_on_the_input_and_lies_beside_the_tokens(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TOPICS[:10]])
    shards = prepare([str(path)], tmp_path / "out", tokenizer=400)
    assert shards.tokenizer.files() == train_bpe(TOPICS[:10], 400).files()
    assert_same_as_documents(shards, list(read_documents([path], shards.tokenizer)))
    ids = shards.tokens[0 : shards.document_ends[0]].tolist()
    assert (shards.tokenizer.decode(ids), ids[-1]) == (TOPICS[0], 0)


def test_chats_need_a_model_s_tokenizer(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"messages": CHAT}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: a chat needs a model's tokenizer"):
        prepare([str(path)], tmp_path / "out", tokenizer=400)


# --- again ---


def times(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), 300])
def test_what_is_there_already_is_kept_and_what_is_damaged_or_of_other_text_is_made_anew(tmp_path, tokenizer, caplog):
    path, out = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TOPICS[:5]]), tmp_path / "out"
    prepare([str(path)], out, tokenizer=tokenizer)
    before, whole = times(out), content(out)
    prepare([str(path)], out, tokenizer=tokenizer)
    assert times(out) == before

    data = bytearray((out / "tokens-00000.bin").read_bytes())
    data[20] ^= 1
    (out / "tokens-00000.bin").write_bytes(data)
    prepare([str(path)], out, tokenizer=tokenizer)
    assert "tokens-00000.bin: damaged" in caplog.text
    assert content(out) == whole

    jsonl(path, [{"text": text} for text in TOPICS[:6]])
    assert len(prepare([str(path)], out, tokenizer=tokenizer).document_ends) == 6
    assert prepare([str(path)], out, tokenizer=train_bpe(TOPICS, 270)).tokenizer.vocab_size == 270
