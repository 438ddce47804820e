"""`eellm bench MODEL`."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from eellm.cli.options import CACHE_DIR, Layers, parse
from eellm.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Measures how fast a model decodes on this machine: each method against full depth, in turns; 8 and 4 bits too."""

    model: tyro.conf.Positional[str]
    """A model directory, an adapter directory, a .gguf file or a hub id."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    tokens: int = 64
    """New tokens of each run."""
    rounds: int = 3
    """Turns of each setting, one more to warm up."""
    batch: Layers = (1, 8)
    """Batch sizes, separated by commas."""
    threshold: float = 0.8
    """Of early exit."""
    quantized: bool = True
    """Measure 8 and 4 bits as well (CPU only)."""
    out: Path | None = None
    """A JSON file for the numbers."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="bench")
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)}: must be at least 1")
    sizes = options.batch or (1,)
    if min(sizes) < 1:
        raise ConfigError(f"batch = {','.join(map(str, sizes))}: must be at least 1")
    from eellm.checkpoint.hf import load  # here: help and mistakes cost no torch import
    from eellm.evaluate.speed import as_json, measure_speed, settings, speed_cells

    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    before = os.getloadavg()[0]
    rows = settings(model, sizes, options.threshold, quantized=options.quantized and options.device == "cpu")
    speeds = measure_speed(model, rows, num_tokens=options.tokens, rounds=options.rounds, cache_dir=CACHE_DIR)
    load_average = (before, os.getloadavg()[0])
    Console().print(
        speed_cells(speeds).as_rich(f"{options.model}: load {before:.1f} before, {load_average[1]:.1f} after")
    )
    if options.out is not None:
        temporary = options.out.with_name(f".{options.out.name}.tmp-{os.getpid()}")
        temporary.write_text(as_json(speeds, load_average))
        temporary.replace(options.out)
