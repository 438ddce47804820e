import json
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

from eellm.errors import CheckpointError, DataError, RequestError
from eellm.text.tokenizer import Tokenizer
from tests.worlds import CHAT_TEMPLATE, sentencepiece_tokenizer, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A mutable sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "Immutable."},
]


def with_file(name: str, content: bytes | str | None) -> Tokenizer:
    """The tiny tokenizer with one of its files changed, or left out."""
    files = tiny_tokenizer().files()
    del files[name]
    if content is not None:
        files[name] = content.encode() if isinstance(content, str) else content
    return Tokenizer.from_files(files)


def answers_of(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The text of each run of answer tokens."""
    ids, is_answer = tokenizer.encode_chat(messages)
    runs, run = [], []
    for token, wanted in [*zip(ids, is_answer, strict=True), (0, False)]:
        if wanted:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return runs


@pytest.mark.parametrize("text", [topics["lambda"], "naïve 東京 🙂", " two  spaces \n", ""])
def test_decoding_undoes_encoding(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_directory_written_with_files_is_read_back_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    again = Tokenizer.from_dir(tmp_path)
    assert again.files() == tokenizer.files()
    assert again.encode(topics["if"]) == tokenizer.encode(topics["if"])
    assert (again.bos_id, again.eos_id) == (None, 0)
    assert again.chat_template == CHAT_TEMPLATE


def test_a_directory_without_a_tokenizer_gives_none(tmp_path):
    assert Tokenizer.from_dir(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"eos_token": 7}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"chat_template": [{}]}'),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
        ("special_tokens_map.json", b"nonsense"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, name, content):
    for other, right in tiny_tokenizer().files().items():
        if not (b"chat_template" in content and other == "chat_template.jinja"):
            (tmp_path / other).write_bytes(right)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        Tokenizer.from_dir(tmp_path)


def test_the_pipeline_says_whether_bos_is_added():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.encode("ab")[0] == tokenizer.bos_id == 1
    assert tokenizer.encode("ab", add_special_tokens=False) == tokenizer.encode("ab")[1:]
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"


def test_truncation_and_padding_stored_with_the_pipeline_do_not_apply():
    pipeline = json.loads(tiny_tokenizer().files()["tokenizer.json"])
    pipeline["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = with_file("tokenizer.json", json.dumps(pipeline))
    assert tokenizer.encode(topics["if"]) == tiny_tokenizer().encode(topics["if"])


def test_special_tokens_only_in_the_config_get_the_next_ids():
    size = tiny_tokenizer().vocab_size
    added = {str(size): {"content": "<tool>", "special": False, "__type": "AddedToken"}}
    config = {"bos_token": {"content": "<bos>"}, "added_tokens_decoder": added, "extra_special_tokens": ["<more>"]}
    tokenizer = with_file("tokenizer_config.json", json.dumps(config))
    assert tokenizer.encode("<tool><bos><more>") == [size, size + 1, size + 2]
    assert tokenizer.bos_id == size + 1
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.decode([size, size + 1, size + 2]) == "<tool>"


def test_an_older_special_tokens_map_names_tokens():
    files = tiny_tokenizer().files() | {"special_tokens_map.json": b'{"bos_token": {"content": "<|start|>"}}'}
    tokenizer = Tokenizer.from_files(files)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert "special_tokens_map.json" in tokenizer.files()


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert tiny_tokenizer().decode([0, 10**6, *tiny_tokenizer().encode("a")]) == "a"


def test_one_token_is_shown_with_its_space_and_without_control_characters():
    tokenizer = tiny_tokenizer()
    assert [tokenizer.token_text(i) for i in tokenizer.encode(" the\n")] == [" the", "\\n"]
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.token_text(tokenizer.encode("é")[0]) == "\ufffd"
    assert tokenizer.token_text(10**6) == "<1000000>"
    llama = sentencepiece_tokenizer()
    assert [llama.token_text(i) for i in llama.encode("ab ab")] == ["<s>", " ab", " ab"]


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="surrogate"):
        tiny_tokenizer().encode("half \ud800")


def test_answers_are_told_from_the_rest_of_a_chat():
    tokenizer = tiny_tokenizer()
    ids, _ = tokenizer.encode_chat(CHAT)
    text = tokenizer.apply_chat(CHAT, add_generation_prompt=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert answers_of(tokenizer, CHAT) == ["A mutable sequence.<|end|>", "Immutable.<|end|>"]


def test_a_chat_without_answers_has_none():
    assert answers_of(tiny_tokenizer(), CHAT[:2]) == []


def test_an_answer_may_be_empty_or_hold_special_tokens():
    chat = [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "a<|start|>b<|end|>c"}]
    assert answers_of(tiny_tokenizer(), chat) == ["<|end|>", "a<|start|>b<|end|>c<|end|>"]


def test_an_answer_ends_with_its_content_where_no_token_ends_its_turn():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_file("chat_template.jinja", template)
    assert answers_of(tokenizer, CHAT) == [" A mutable sequence.", " Immutable."]  # the token " A" is on both sides


def test_an_answer_that_the_template_shortens_ends_with_its_turn():
    template = CHAT_TEMPLATE.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
    tokenizer = with_file("chat_template.jinja", template)
    chat = [CHAT[1], {"role": "assistant", "content": "Hm.</think>A sequence."}, CHAT[3]]
    assert answers_of(tokenizer, chat) == ["A sequence.<|end|>"]


def test_a_template_whose_prompt_is_no_prefix_of_the_chat_is_refused():
    tokenizer = with_file("chat_template.jinja", CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(DataError, match="message 3: the model's chat template"):
        tokenizer.encode_chat(CHAT)


def test_a_chat_needs_a_template_and_a_message():
    tokenizer = with_file("chat_template.jinja", None)
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="no chat template; send a plain prompt"):
        tokenizer.apply_chat(CHAT)
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.encode_chat(CHAT)
    with pytest.raises(RequestError, match="at least one message"):
        tiny_tokenizer().apply_chat([])


def test_a_template_in_the_config_is_used_where_no_file_has_one():
    files = tiny_tokenizer().files()
    del files["chat_template.jinja"]
    for template, wanted in [("one", "one"), ([{"name": "default", "template": "of many"}], "of many"), ([], None)]:
        files["tokenizer_config.json"] = json.dumps({"chat_template": template}).encode()
        assert Tokenizer.from_files(files).chat_template == wanted


def test_the_text_layer_loads_no_torch():
    program = "import sys, eellm.text.stream, eellm.text.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
