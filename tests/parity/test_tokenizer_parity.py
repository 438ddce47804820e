"""transformers reads what `files()` gives and does the same with it."""

import json
from pydoc_data.topics import topics

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.text.tokenizer import Tokenizer
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "What's a <|end|> in {{ Jinja }}? "},
    {"role": "assistant", "content": "\n A <tag> & 'é' 🙂"},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "blocks and spaces": (
        "{{- bos_token -}}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n"
        "  {% else %}\n  {{ m | tojson }}{{ eos_token }}\n{% endif %}\n {% endfor %}\n"
    ),
    "generation tag": (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}\n {{ m.content }} \n"
        "{% endgeneration %}{%- else -%} {{ m.content }} {%- endif -%}\n"
        "{%- if loop.last %}{% break %}{% endif %}\n{%- endfor -%}"
    ),
    "namespaces and tools": (
        "{% set n = namespace(found=false) %}{% for m in messages %}{% if m.tool_calls is defined %}"
        "{% set n.found = true %}{% endif %}{% endfor %}{{ n.found }}{{ tools is none }}{{ date_string is defined }}"
        "{{ dict(a=messages[0].content) | tojson(indent=2) }}{{ add_generation_prompt }}"
    ),
}


def with_file(tokenizer: Tokenizer, name: str, content: str) -> Tokenizer:
    return Tokenizer.from_files(tokenizer.files() | {name: content.encode()})


def with_post_processor() -> Tokenizer:
    """Byte-level like Llama 3's: bos is added by the pipeline, which also trims offsets."""
    pipeline = json.loads(tiny_tokenizer().files()["tokenizer.json"])
    bos = {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}
    template = [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pipeline["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"<|start|>": bos}},
        ],
    }
    return with_file(tiny_tokenizer(), "tokenizer.json", json.dumps(pipeline))


def with_tokens_in_the_config() -> Tokenizer:
    config = json.loads(tiny_tokenizer().files()["tokenizer_config.json"])
    token = {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {str(tiny_tokenizer().vocab_size): token | {"special": False}}
    config |= {"bos_token": {**token, "content": "<bos>", "__type": "AddedToken"}, "extra_special_tokens": ["<more>"]}
    return with_file(tiny_tokenizer(), "tokenizer_config.json", json.dumps(config))


def with_special_tokens_map() -> Tokenizer:
    content = {"bos_token": {"content": "<|start|>", "lstrip": False, "rstrip": False}, "pad_token": "<pad>"}
    return with_file(tiny_tokenizer(), "special_tokens_map.json", json.dumps(content))


TOKENIZERS = {
    "byte-level": tiny_tokenizer(),
    "byte-level with bos": with_post_processor(),
    "sentencepiece": sentencepiece_tokenizer(),
    "tokens in the config": with_tokens_in_the_config(),
    "special tokens map": with_special_tokens_map(),
}


@pytest.fixture(scope="session")
def oracles(tmp_path_factory) -> dict:
    return {name: oracle_of(tokenizer, tmp_path_factory.mktemp("oracle")) for name, tokenizer in TOKENIZERS.items()}


def oracle_of(tokenizer: Tokenizer, folder) -> transformers.PreTrainedTokenizerFast:
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("topic", ["lambda", "specialnames", "formatstrings"])
def test_real_text_gets_the_same_ids(oracles, name, topic):
    assert TOKENIZERS[name].encode(topics[topic]) == oracles[name].encode(topics[topic])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(text=st.lists(st.sampled_from(["<|end|>", "<|start|>", "<tool>", "<bos>", "<s>", "ab", " ", "é", "\n", "🙂"])))
def test_any_text_gets_the_same_ids_and_back(oracles, name, text):
    tokenizer, oracle, text = TOKENIZERS[name], oracles[name], "".join(text)
    for add in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=add)
        assert ids == oracle.encode(text, add_special_tokens=add)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_ids_decode_to_the_same_text(oracles, name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert tokenizer.decode(ids) == oracles[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_named_tokens_and_the_size_are_the_same(oracles, name):
    tokenizer, oracle = TOKENIZERS[name], oracles[name]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.chat_template == oracle.chat_template


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", ["as it is", *TEMPLATES])
def test_chats_are_rendered_the_same(tmp_path, name, prompt):
    source = TEMPLATES.get(name, tiny_tokenizer().chat_template)
    tokenizer = with_file(with_special_tokens_map(), "chat_template.jinja", source)
    wanted = oracle_of(tokenizer, tmp_path).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat(CHAT, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize("name", ["byte-level", "byte-level with bos", "sentencepiece"])
def test_answers_are_those_that_a_generation_tag_marks(tmp_path, name):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_file(TOKENIZERS[name], "chat_template.jinja", template)
    chat = [
        *CHAT,
        {"role": "assistant", "content": "ab  é"},  # transformers loses answers that begin with a trimmed space
        CHAT[0],
        {"role": "assistant", "content": "ab\n"},
        CHAT[2],
    ]
    wanted = oracle_of(tokenizer, tmp_path).apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, is_answer = tokenizer.encode_chat(chat)
    assert ids == wanted["input_ids"]
    assert list(map(int, is_answer)) == wanted["assistant_masks"]
