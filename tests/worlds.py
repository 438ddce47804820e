"""Small worlds for tests, made in memory in well under a second: nothing is downloaded, nothing is left behind."""

import json
from functools import cache
from pydoc_data.topics import topics

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from eellm.text.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE trained on Python's help texts; eos is `<|end|>`, id 0, and there is a ChatML-like template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(topics.values(), trainer)
    return tokenizer_of(backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)


@cache
def sentencepiece_tokenizer() -> Tokenizer:
    """Letters, byte fallback and a space put in front and dropped again, like Llama 2's; bos is added to every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh.", "▁a", "ab", "▁ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer_of(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tokenizer_of(backend: tokenizers.Tokenizer, chat_template: str | None = None, **config: object) -> Tokenizer:
    """A pipeline as a tokenizer of ours; `config` goes into its tokenizer_config.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    return Tokenizer.from_files(files)
