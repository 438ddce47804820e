"""Tokenizers that are made here: from nothing, and by learning merges."""

import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.errors import CheckpointError, ConfigError
from eellm.text.bytes import byte_tokenizer, named_tokenizer, train_bpe

TEXTS = [topics[name] for name in sorted(topics)[:20]]


def write(tokenizer, directory):
    directory.mkdir()
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)
    return directory


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_a_token_each_and_come_back_as_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert all(0 < i < 257 for i in ids) or "<|end|>" in text
    assert tokenizer.decode(ids) == text


def test_there_are_256_bytes_and_the_end_of_text_is_0():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 0, None)
    assert tokenizer.encode("a<|end|>")[1:] == [0]


def test_the_least_vocabulary_is_that_of_bytes():
    assert train_bpe(TEXTS, 257).files() == byte_tokenizer().files()
    with pytest.raises(ConfigError, match=r"a vocabulary of 256: must be at least 257"):
        train_bpe(TEXTS, 256)


def test_merges_are_learnt_up_to_the_size_asked_for_and_shorten_the_text():
    tokenizer = train_bpe(TEXTS, 600)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (600, 0)
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert tokenizer.encode(" a")[0] != tokenizer.encode("a")[0], "no space is put in front"
    assert train_bpe(["ab"], 600).vocab_size == 258, "nothing more to merge"


def test_the_same_texts_give_the_same_bytes_whatever_the_number_of_threads():
    code = (
        "import hashlib\nfrom pydoc_data.topics import topics\nfrom eellm.text.bytes import train_bpe\n"
        "files = train_bpe([topics[name] for name in sorted(topics)], 1500).files()\n"
        "print(hashlib.sha256(files['tokenizer.json']).hexdigest())"
    )
    found = set()
    for num_threads in ("1", "2", "4"):
        env = {**os.environ, "RAYON_NUM_THREADS": num_threads, "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        found.add(done.stdout)
    assert len(found) == 1


def test_transformers_reads_the_files_and_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = train_bpe(TEXTS, 400)
    theirs = transformers.AutoTokenizer.from_pretrained(write(ours, tmp_path / "tokenizer"))
    for text in (*TEXTS[:3], " naïve 東京", "a<|end|>b"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|end|>", 0)


def test_a_name_is_bytes_or_a_directory_with_a_tokenizer(tmp_path):
    assert named_tokenizer("bytes").files() == byte_tokenizer().files()
    tokenizer = train_bpe(TEXTS, 300)
    assert named_tokenizer(str(write(tokenizer, tmp_path / "a"))).files() == tokenizer.files()
    with pytest.raises(CheckpointError, match=r"nowhere: no tokenizer.json there; .* or 'bytes'"):
        named_tokenizer(str(tmp_path / "nowhere"))


def test_the_fingerprint_is_of_what_makes_ids_and_not_of_how_the_file_spells_it(tmp_path):
    one, other = byte_tokenizer(), train_bpe(TEXTS, 300)
    assert one.fingerprint != other.fingerprint
    respelt = write(one, tmp_path / "a")
    data = json.loads((respelt / "tokenizer.json").read_bytes())
    (respelt / "tokenizer.json").write_text(json.dumps(data))
    assert named_tokenizer(str(respelt)).files() != one.files()
    assert named_tokenizer(str(respelt)).fingerprint == one.fingerprint
