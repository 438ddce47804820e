"""`eellm add-exits BASE OUT --exits 10,20`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from eellm.cli.options import Layers, parse
from eellm.config.model import ExitConfig, ExitKind, HeadKind, NormKind
from eellm.errors import CheckpointError, ConfigError
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Gives a model early exits and writes them as an adapter directory; the model itself is not touched."""

    base: tyro.conf.Positional[Path]
    """A model directory; one with exits of its own keeps them, and the adapter has the new ones."""
    out: tyro.conf.Positional[Path]
    """The adapter directory to write."""
    exits: Layers
    """Layers after which to put an exit, from 1."""
    kind: ExitKind = "mlp"
    """What stands before the output matrix."""
    head: HeadKind = "tied"
    """The final head's output matrix, or one of its own."""
    norm: NormKind = "own"
    """A norm of its own, or the final head's (LayerSkip: --kind norm --norm final)."""
    gate_size: int = 64
    """Hidden units of each exit's gate; 0: no gate."""
    init: Literal["copy", "random"] = "copy"
    """Start from copies of the model's own parts, or at random."""
    seed: int = 0
    """Of the random weights."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="add-exits")
    from eellm.checkpoint.exits import save_adapter  # here: help and mistakes cost no torch import
    from eellm.checkpoint.hf import load, stored_dtype
    from eellm.exits.lm import add_exits

    if not (options.base / "config.json").exists():
        raise CheckpointError(f"{options.base}: exits are added to a model directory; 'eellm import' makes one")
    if options.exits is None:
        raise ConfigError("--exits: name the layers, such as 10,20")
    kind = {"kind": options.kind, "head": options.head, "norm": options.norm, "gate_size": options.gate_size}
    exits = tuple(ExitConfig(layer=layer, **kind) for layer in options.exits)
    model = load(options.base, dtype=stored_dtype(options.base))
    add_exits(model, exits, init=options.init, seed=options.seed)
    save_adapter(model, options.out, base=options.base, layers=options.exits)
    num = sum(p.numel() for layer in options.exits for p in model.exit(layer).parameters())
    log.info(f"{options.out}: exits at {', '.join(map(str, options.exits))}, {num / 1e6:.2f} M parameters of their own")
