"""Byte-level tokenizers that are made here: 256 bytes, `<|end|>` as end of text with id 0, and merges learnt on demand.

Any text can be encoded and comes back unchanged; no space is put in front. The files are those of any model, so that
transformers reads them too. The same texts give the same bytes of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from eellm.errors import CheckpointError, ConfigError
from eellm.text.tokenizer import CONFIG, PIPELINE, Tokenizer

END = "<|end|>"
MIN_VOCAB_SIZE = 257
"""`<|end|>` and every byte."""


def byte_tokenizer() -> Tokenizer:
    """A token a byte: BPE without merges."""
    vocab = {END: 0} | {letter: i for i, letter in enumerate(_alphabet(), start=1)}
    backend = _pipeline(models.BPE(vocab, []))
    backend.add_special_tokens([END])
    return _tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns merges from `texts` until there are `vocab_size` tokens, or nothing is left to merge.

    Raises ConfigError for fewer tokens than there are bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"a vocabulary of {vocab_size}: must be at least {MIN_VOCAB_SIZE}, the bytes and {END}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=_alphabet(), show_progress=False
    )
    backend = _pipeline(models.BPE())
    backend.train_from_iterator(texts, trainer)
    return _tokenizer(backend)


def named_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer of a directory. Raises CheckpointError where that has none."""
    if name == "bytes":
        return byte_tokenizer()
    tokenizer = Tokenizer.from_dir(Path(name))
    if tokenizer is None:
        raise CheckpointError(f"{name}: no {PIPELINE} there; name a directory with a tokenizer, or 'bytes'")
    return tokenizer


def _alphabet() -> list[str]:
    """The letters that stand for the 256 bytes, in the order that the trainer gives them."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _pipeline(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": END}
    files = {PIPELINE: backend.to_str(pretty=True), CONFIG: json.dumps(config, indent=2) + "\n"}
    return Tokenizer.from_files({name: content.encode() for name, content in files.items()})
