"""Metadata as llama.cpp's converter would store it for a known tokenizer is turned into that tokenizer again."""

import itertools
import json
import logging
import math
import pydoc_data.topics

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from eellm.checkpoint.gguf_tokenizer import convert_tokenizer, token_ids
from eellm.errors import CheckpointError

TEXTS = [
    "Hello world",
    "  two  spaces,\ttabs\n\n  and lines \n",
    "It's 12345 things; DON'T they'LL x=3.14 1²",
    "naïve e\u0301te\u0301 東京 😀 ½",
    "a<|im_start|>user\nHi<|im_end|> <custom>b <|endoftext|>",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def corpus():
    return list(pydoc_data.topics.topics.values())[:25]


def byte_level(pre, *, bos=False):
    """A tokenizer that cuts words in the way that llama.cpp calls `pre`. Its merges know no words: each cut tells."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated"), whole]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"), whole]),
    }[pre]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = whole
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [line for text in (*corpus(), *TEXTS * 50) for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"][:-20]]  # the last 20 tokens can only be taken whole
    tokenizer.model = BPE(model["vocab"], merges, ignore_merges=pre == "llama-bpe")
    tokenizer.pre_tokenizer = cut
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<custom>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|>:1 $B:1", special_tokens=[("<|im_start|>", 1)]
        )
    return tokenizer


def tokenizer_metadata(tokenizer, pre, **fields):
    """What llama.cpp's converter would store of a byte-level tokenizer. `fields`: further bools and ids."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [3 if token in SPECIAL else 4 if token == "<custom>" else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    return as_metadata(values | {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0} | fields)


def as_metadata(fields):
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def converted(metadata):
    """The tokenizer and its config."""
    files = convert_tokenizer(metadata, 128)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    return Tokenizer.from_str(files["tokenizer.json"].decode()), json.loads(files["tokenizer_config.json"])


def assert_same_tokens(ours, reference, texts):
    for text in texts:
        ids = ours.encode(text).ids
        assert ids == reference.encode(text).ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
    pair, expected = ours.encode(*texts[:2]), reference.encode(*texts[:2])
    assert (pair.ids, pair.type_ids) == (expected.ids, expected.type_ids)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2"])
def test_byte_level_tokenizers_give_the_same_ids(pre):
    reference = byte_level(pre)
    ours, config = converted(tokenizer_metadata(reference, pre))
    assert_same_tokens(ours, reference, [*TEXTS, *corpus()[:3]])
    assert ours.get_vocab() == reference.get_vocab()
    assert config["add_bos_token"] is False


@pytest.mark.parametrize("said", [None, True])
def test_llama_3_tokenizers_begin_with_bos_unless_the_file_says_otherwise(said):
    reference = byte_level("llama-bpe", bos=True)
    ours, config = converted(tokenizer_metadata(reference, "llama-bpe", add_bos_token=said))
    assert_same_tokens(ours, reference, [*TEXTS, *corpus()[:3]])
    assert config["add_bos_token"] is True

    ours, _ = converted(tokenizer_metadata(reference, "llama-bpe", add_bos_token=False))
    assert_same_tokens(ours, byte_level("llama-bpe"), TEXTS)


def test_an_end_token_is_added_where_the_file_says_so():
    reference = byte_level("smollm")
    ours, _ = converted(tokenizer_metadata(reference, "smollm", add_eos_token=True, add_bos_token=True))
    assert ours.encode("Hello").ids == [1, *reference.encode("Hello").ids, 2]


def test_special_tokens_and_the_chat_template_reach_the_tokenizer_config():
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    metadata = tokenizer_metadata(byte_level("smollm"), "smollm")
    _, config = converted(metadata | {"tokenizer.chat_template": template})
    assert config["chat_template"] == template
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == "<|im_end|>"
    assert config["pad_token"] == "<|endoftext|>"
    assert "unk_token" not in config
    assert config["model_max_length"] == 128


def test_a_default_word_cut_is_taken_for_gpt2_with_a_warning(caplog):
    reference = byte_level("gpt-2")
    ours, _ = converted(tokenizer_metadata(reference, "default"))
    assert_same_tokens(ours, reference, TEXTS)
    assert "GPT-2's way is assumed" in caplog.text


def sentencepiece_like():
    """(reference tokenizer, its pieces in order of id, their types): merges as trained, one per piece."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=500))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    control = ["<unk>", "<s>", "</s>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    joined = [left + right for left, right in merges]
    letters = sorted(set(model["vocab"]) - set(joined))
    pieces = [*control, *in_bytes, *joined, *letters, "<custom>", "zx"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(letters)), 4, 5]  # the last is unused
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    reference = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    reference.decoder = decoders.Sequence(steps)
    reference.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    reference.add_tokens([AddedToken("<custom>", normalized=False)])
    reference.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return reference, pieces, types


def spm_metadata(pieces, types, **fields):
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)]
    values = {"model": "llama", "pre": "default", "tokens": pieces, "scores": scores, "token_type": types}
    return as_metadata(values | {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | fields)


SPM_TEXTS = ["Hello world", "  two  spaces\tand\nlines ", "東京 😀 naïve", "<s>a </s><custom><unk> b", "▁bar_ zx", ""]


def test_sentencepiece_tokenizers_give_the_same_ids():
    reference, pieces, types = sentencepiece_like()
    ours, config = converted(spm_metadata(pieces, types))
    assert_same_tokens(ours, reference, [*SPM_TEXTS, *corpus()[:3]])
    assert ours.get_vocab() == reference.get_vocab()
    assert (config["bos_token"], config["unk_token"]) == ("<s>", "<unk>")


def test_sentencepiece_merges_join_the_best_scoring_neighbours_first():
    _, pieces, types = sentencepiece_like()
    ours, _ = converted(spm_metadata(pieces, types, add_bos_token=False))
    ranks = {piece: rank for rank, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == 1}
    text = corpus()[0][:600]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:  # the definition of SentencePiece's BPE
        pairs = [(ranks.get(a + b, math.inf), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs)
        if rank == math.inf:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert [token for token in ours.encode(text).tokens if not token.startswith("<0x")] == [
        part for part in parts if part in ranks
    ]


def test_a_sentencepiece_tokenizer_may_go_without_the_space_in_front():
    reference, pieces, types = sentencepiece_like()
    ours, _ = converted(spm_metadata(pieces, types, add_space_prefix=False, add_bos_token=False))
    reference.normalizer = normalizers.Replace(" ", "▁")
    assert ours.encode("Hello world").ids == reference.encode("Hello world", add_special_tokens=False).ids
    assert ours.decode(ours.encode(" Hello").ids) == " Hello"


@pytest.mark.parametrize(("changes", "word"), [({"pre": "tekken"}, "'tekken'"), ({"model": "t5"}, "'t5'")])
def test_an_unknown_tokenizer_is_left_out_with_a_warning(caplog, changes, word):
    metadata = tokenizer_metadata(byte_level("gpt-2"), "gpt-2") | as_metadata(changes)
    with caplog.at_level(logging.WARNING, logger="eellm"):
        assert convert_tokenizer(metadata, 128) == {}
    assert word in caplog.text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"merges": None}, "merges is missing"),
        ({"merges": ["no such"]}, "don't fit"),
        ({"merges": ["unpaired"]}, "don't fit"),
        ({"eos_token_id": 9999}, "eos_token_id = 9999"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes, word):
    metadata = tokenizer_metadata(byte_level("gpt-2"), "gpt-2", **changes)
    with pytest.raises(CheckpointError, match=word):
        convert_tokenizer(metadata, 128)


def test_a_file_without_a_tokenizer_gives_none(caplog):
    assert convert_tokenizer({"general.architecture": "llama"}, 128) == {}
    assert "tokenizer.ggml.model = None" in caplog.text


def test_every_token_that_ends_a_text_is_an_eos_token():
    ids = {"bos_token_id": 1, "eos_token_id": 7, "eot_token_id": 9, "eom_token_id": 7}
    assert token_ids(as_metadata(ids)) == {"bos_token_id": 1, "eos_token_id": [7, 9]}
    assert token_ids(as_metadata({"eos_token_id": 7, "eot_token_id": 7})) == {"eos_token_id": 7}
