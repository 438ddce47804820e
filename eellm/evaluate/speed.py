"""How fast a model decodes on this machine: methods, batch sizes, weights of fewer bits, each against full depth.

Every setting takes turns with plain full-depth decoding of the same prompts (full, setting, full, setting, …) in one
process; reported are medians of the rates and of the ratios of neighbours. The limit is the time in which the matrices
of one token are read, at the best rate at which this machine adds up memory of that size.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch

from eellm.evaluate.tables import Cells
from eellm.exits.lm import EarlyExitLM
from eellm.infer.engine import Engine
from eellm.infer.quantize import Quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: how to decode."""

    name: str
    options: Mapping[str, Any]
    """Of `Engine.submit`."""
    batch_size: int = 1
    quantize: Quantize | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one setting reached."""

    name: str
    batch_size: int
    tokens_per_s: float
    """Of the whole batch, prompts included; median."""
    limit: float
    """`tokens_per_s` where reading the matrices once a step is all that takes time (at full depth)."""
    ratio: float
    """To full depth in float32 with the same batch; median."""
    ratio_range: tuple[float, float]
    same_tokens: float
    """Share of the tokens that full depth chose too, up to the first that it didn't."""


def settings(model: EarlyExitLM, batch_sizes: Sequence[int], threshold: float, *, quantized: bool) -> list[Setting]:
    """What `eellm bench` measures."""
    methods: dict[str, dict[str, Any]] = {"full": {"method": "full"}}
    if model.config.exits:
        methods[f"early {threshold:g}"] = {"method": "early", "threshold": threshold}
    methods |= {"speculative": {"method": "speculative"}, "auto": {"method": "auto"}}
    rows = [
        Setting(name=name, options=options, batch_size=size)
        for size in batch_sizes
        for name, options in methods.items()
    ]
    bits: tuple[Quantize, ...] = ("int8", "int4") if quantized else ()
    rows += [
        Setting(name=f"full {kind}", options={"method": "full"}, batch_size=size, quantize=kind)
        for size in batch_sizes
        for kind in bits
    ]
    return rows


def measure_speed(
    model: EarlyExitLM, rows: Sequence[Setting], *, num_tokens: int, rounds: int, cache_dir: Path | None = None
) -> list[Speed]:
    """Each setting's speed. A setting and full depth beside it have an engine each, made for them, so that neither
    reuses rows or what was found out of the other or of the setting before; every round has prompts of its own."""
    speeds = []
    for row in rows:
        plain = Setting(name="full", options={"method": "full"}, batch_size=row.batch_size)
        with _engine(model, plain, cache_dir) as full, _engine(model, row, cache_dir) as engine:
            speeds.append(_in_turns(model, (full, plain), (engine, row), num_tokens, rounds))
    return speeds


def _engine(model: EarlyExitLM, row: Setting, cache_dir: Path | None) -> Engine:
    return Engine(model, max_batch=row.batch_size, quantize=row.quantize, cache_dir=cache_dir)


def _in_turns(
    model: EarlyExitLM, full: tuple[Engine, Setting], early: tuple[Engine, Setting], num_tokens: int, rounds: int
) -> Speed:
    engine, row = early
    rates, ratios, same = [], [], []
    for number in range(rounds + 1):
        prompts = prompts_for(model, row.batch_size, number)
        expected, plain_rate = _run(*full, prompts, num_tokens)
        tokens, rate = _run(engine, row, prompts, num_tokens)
        if number == 0:
            continue  # warms up
        rates.append(rate)
        ratios.append(rate / plain_rate)
        same += [_same_prefix(a, b) for a, b in zip(expected, tokens, strict=True)]
    num_bytes = engine.stats().weight_bytes
    return Speed(
        name=row.name,
        batch_size=row.batch_size,
        tokens_per_s=median(rates),
        limit=row.batch_size * bandwidth(num_bytes) / num_bytes,
        ratio=median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        same_tokens=sum(same) / len(same),
    )


def _run(engine: Engine, row: Setting, prompts: Sequence[Any], num_tokens: int) -> tuple[list[list[int]], float]:
    start = time.perf_counter()
    outs = engine.generate(prompts, max_new_tokens=num_tokens, ignore_eos=True, **row.options)
    seconds = time.perf_counter() - start
    return [out.tokens for out in outs], sum(len(out.tokens) for out in outs) / seconds


def prompts_for(model: EarlyExitLM, number: int, seed: int, num_tokens: int = 32) -> list[list[int]]:
    """Beginnings of texts from Python's own documentation; made-up ids for a model without tokenizer."""
    if model.tokenizer is None:
        size = model.config.vocab_size
        return [[(seed * 31 + i * 17 + j * j) % size for j in range(num_tokens)] for i in range(number)]
    texts = sorted(text for text in topics.values() if len(text) > 2000)
    chosen = [texts[(seed * number + i) % len(texts)] for i in range(number)]
    return [model.tokenizer.encode(text[200:1200])[:num_tokens] for text in chosen]


def bandwidth(num_bytes: int) -> float:
    """Bytes a second at which memory of that size is read: the best of a few sums and largest values."""
    memory = torch.ones(max(num_bytes // 4, 1))
    times = []
    for read in (memory.sum, memory.amax) * 4:
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return memory.nbytes / min(times)


def speed_cells(speeds: Sequence[Speed]) -> Cells:
    """One row per setting."""
    headers = ("method", "batch", "tok/s", "limit", "ratio", "range", "same")
    return Cells(
        headers,
        tuple(
            (
                speed.name,
                str(speed.batch_size),
                f"{speed.tokens_per_s:.1f}",
                f"{speed.limit:.0f}",
                f"{speed.ratio:.2f}",
                f"{speed.ratio_range[0]:.2f} to {speed.ratio_range[1]:.2f}",
                f"{speed.same_tokens:.0%}",
            )
            for speed in speeds
        ),
    )


def as_json(speeds: Sequence[Speed], load: tuple[float, float]) -> str:
    """load: the machine's average over a minute, before and after."""
    data = {
        "load": load,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "speeds": [dataclasses.asdict(speed) for speed in speeds],
    }
    return json.dumps(data, indent=2) + "\n"


def _same_prefix(expected: Sequence[int], tokens: Sequence[int]) -> float:
    pairs = zip(expected, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected)) / max(len(expected), 1)
