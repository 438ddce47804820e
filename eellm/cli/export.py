"""`eellm export CKPT OUT`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from eellm.cli.options import parse
from eellm.errors import CheckpointError
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Writes the model of a training run's checkpoint as a Hugging Face directory, with its exits beside it."""

    checkpoint: tyro.conf.Positional[Path]
    """A directory such as run/checkpoints/step-00000100, or a run's out_dir, of which the newest one is taken."""
    out: tyro.conf.Positional[Path]
    """The directory to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights written."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="export")
    from eellm.checkpoint.export import find_checkpoint, load_checkpoint  # here: help and mistakes cost no torch import
    from eellm.checkpoint.hf import save

    checkpoint = find_checkpoint(options.checkpoint)
    if options.out.resolve() in (checkpoint.resolve(), options.checkpoint.resolve()):
        raise CheckpointError(f"{options.out}: holds the checkpoint itself; name another directory to write")
    model = load_checkpoint(checkpoint, dtype=options.dtype)
    save(model, options.out)
    exits = ", ".join(map(str, model.config.exit_layers)) or "none"
    num = sum(p.numel() for p in model.parameters())
    log.info(f"{options.out}: {num / 1e6:.2f} M parameters, {options.dtype}, exits: {exits}; from {checkpoint}")
