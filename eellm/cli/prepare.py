"""`eellm prepare --input a.txt b.jsonl --tokenizer DIR | --train-tokenizer 8192 --out data/`."""

import os
from dataclasses import dataclass
from pathlib import Path

from eellm.cli.options import parse
from eellm.config.check import check_at_least
from eellm.errors import ConfigError
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Turns text into token shards, which training maps into memory."""

    input: tuple[str, ...]
    """Files (.txt: one document each; .jsonl, .parquet: one a line or row, `text`, or `messages` of a chat),
    directories of them, or datasets:NAME_OR_PATH[:SPLIT]."""
    out: Path
    """The directory to write."""
    tokenizer: str | None = None
    """A directory with a tokenizer, such as a model's, or `bytes`."""
    train_tokenizer: int | None = None
    """Train a byte-level BPE tokenizer with a vocabulary of this size on the input instead."""
    workers: int | None = None
    """Processes that make tokens. Default: as many as there are processors. The result is the same."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="prepare")
    check_at_least(options, 1, "workers")
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise ConfigError("give one of --tokenizer DIR (a model's) and --train-tokenizer SIZE (a vocabulary's)")
    from eellm.data.prepare import prepare  # here: help and mistakes cost no more imports
    from eellm.text.bytes import named_tokenizer

    tokenizer = options.train_tokenizer if options.tokenizer is None else named_tokenizer(options.tokenizer)
    assert tokenizer is not None
    num_workers = options.workers or os.cpu_count() or 1
    shards = prepare(options.input, options.out, tokenizer=tokenizer, num_workers=num_workers)
    counts = f"{len(shards.document_ends)} documents, {len(shards.tokens)} tokens"
    log.info(f"{options.out}: {counts} of a vocabulary of {shards.tokenizer.vocab_size}")
