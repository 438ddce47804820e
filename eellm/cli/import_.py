"""`eellm import SRC OUT`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from eellm.cli.options import parse
from eellm.errors import CheckpointError
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Reads a model in any form that eellm knows and writes it as a Hugging Face directory."""

    source: tyro.conf.Positional[str]
    """A Hugging Face directory, a .gguf file, or a model's id on the hub."""
    out: tyro.conf.Positional[Path]
    """The directory to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written. Default: as they are stored; float32 for .gguf files, which are dequantised."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="import")
    from eellm.checkpoint.hf import load, save, stored_dtype  # here: help and mistakes cost no torch import

    if options.out.exists() and options.out.resolve() == Path(options.source).resolve():
        raise CheckpointError(f"{options.out}: is the source itself; name another directory to write")
    model = load(options.source, dtype=options.dtype or stored_dtype(options.source))
    save(model, options.out)
    num = sum(p.numel() for p in model.decoder.parameters())
    log.info(f"{options.out}: {num / 1e6:.1f} M parameters, {model.config.num_layers} layers")
