import json
from pathlib import Path

import numpy as np
import pytest

from eellm.data.documents import read_documents
from eellm.errors import DataError
from eellm.text.tokenizer import Tokenizer
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


def file_of(folder: Path, name: str, *lines: object) -> Path:
    """A file with one line per object: bytes and text as they are, anything else as JSON."""
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path = folder / name
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return path


def without_template() -> Tokenizer:
    files = tiny_tokenizer().files()
    del files["chat_template.jinja"]
    return Tokenizer.from_files(files)


def test_a_text_file_is_one_document_that_ends_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    path = file_of(tmp_path, "a.md", "one\r", "", "two é")
    (document,) = read_documents([path], tokenizer)
    assert document.tokens.tolist() == [*tokenizer.encode("one\r\n\ntwo é"), tokenizer.eos_id]
    assert document.is_target.all()
    assert (document.tokens.dtype, document.is_target.dtype) == (np.int32, bool)


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    tokenizer = tiny_tokenizer()
    path = file_of(tmp_path, "a.jsonl", {"text": "one"}, "", {"id": 7, "text": "two"}, {"text": ""}, "")
    texts = [tokenizer.decode(document.tokens) for document in read_documents([path, path], tokenizer)]
    assert texts == ["one", "two", ""] * 2


def test_of_a_chat_only_answers_are_targets_and_the_template_ends_it(tmp_path):
    tokenizer = tiny_tokenizer()
    path = file_of(tmp_path, "a.jsonl", {"messages": CHAT})
    (document,) = read_documents([path], tokenizer)
    text = tokenizer.decode(document.tokens, skip_special_tokens=False)
    assert text == tokenizer.apply_chat(CHAT, add_generation_prompt=False)
    assert tokenizer.decode(document.tokens[document.is_target], skip_special_tokens=False) == "Hi.<|end|>"


def test_a_document_begins_with_bos_only_where_the_pipeline_adds_it(tmp_path):
    path = file_of(tmp_path, "a.txt", "ab")
    (document,) = read_documents([path], sentencepiece_tokenizer())
    assert (document.tokens[0], document.tokens[-1]) == (1, 2)
    (document,) = read_documents([path], tiny_tokenizer())
    assert document.tokens[0] != document.tokens[-1] == 0


def test_a_byte_order_mark_is_no_text(tmp_path):
    tokenizer = tiny_tokenizer()
    for path in (
        file_of(tmp_path, "a.txt", b"\xef\xbb\xbfa"),
        file_of(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text":"a"}'),
    ):
        (document,) = read_documents([path], tokenizer)
        assert tokenizer.decode(document.tokens) == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("7", r'int; expected {"text": "..."} or {"messages": '),
        ([CHAT], "list; expected"),
        ({}, "keys none"),
        ({"txt": "a"}, "keys 'txt'"),
        ({"text": 7}, "keys 'text', or their values' types"),
        ({"text": "a", "messages": CHAT}, "both a text and messages"),
        ({"messages": []}, "keys 'messages'"),
        ({"messages": ["hello"]}, "keys 'messages'"),
        ({"messages": [{"role": "user", "content": None}]}, "keys 'messages'"),
        ({"text": "half \ud800"}, "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8 .invalid start byte at byte 10."),
    ],
)
def test_a_wrong_line_is_named_and_what_is_expected(tmp_path, line, message):
    path = file_of(tmp_path, "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([path], tiny_tokenizer()))
    assert str(caught.value).startswith(f"{path}:3: ")


def test_messages_need_a_chat_template(tmp_path):
    path = file_of(tmp_path, "a.jsonl", {"messages": CHAT})
    with pytest.raises(DataError, match=r"a.jsonl:1: the model has no chat template"):
        list(read_documents([path], without_template()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
        ("a.txt", b"latin \xe9 one", "a.txt: not UTF-8 .* at byte 6"),
    ],
)
def test_an_empty_or_foreign_file_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        list(read_documents([file_of(tmp_path, name, content)], tiny_tokenizer()))


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
def test_a_missing_file_is_named_before_any_work(tmp_path, name):
    documents = read_documents([file_of(tmp_path, "a.txt", "a"), tmp_path / name], tiny_tokenizer())
    with pytest.raises(DataError, match="no such file"):
        next(documents)
