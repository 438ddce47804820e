"""What the parts of decoding take here: each range of layers, each head and gate, for 1 to 64 rows.

    Network → timed passes → StepCosts (plain tables, for what decides without torch)

Every part runs on made-up rows behind a context of moderate length, and the median of a few runs counts, each after one
that warms up. What a tick takes besides is read off a short full-depth run.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch

from eellm.errors import ConfigError
from eellm.infer.angles import Angles
from eellm.infer.attention import PassRows, Span
from eellm.infer.costs import MEASURED_ROWS, Curve, StepCosts
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.readout import read
from eellm.log import log

NUM_RUNS = 5
CONTEXT = 64


@torch.inference_mode()
def measure(network: Network) -> StepCosts:
    """Takes about a hundred times what a token does."""
    config = network.config
    context = min(CONTEXT, config.max_seq_len - 1)
    counts = tuple(n for n in MEASURED_ROWS if context + n <= config.max_seq_len) or (1,)
    memory = Memory(config, network.own_layer, dtype=network.dtype, device=network.device)
    memory.reserve(1, context + counts[-1])
    angles = Angles(config, dtype=network.dtype, device=network.device)
    rows = {n: PassRows([Span(0, context, n)], angles, config.kv_heads) for n in counts}
    h = {n: network.embed([i % config.vocab_size for i in range(n)]) for n in counts}
    stops = (*config.exit_layers, config.num_layers)

    def curve(run: Callable[[int], object]) -> Curve:
        return Curve(counts, tuple(_seconds(partial(run, n), network.device) for n in counts))

    def answer(layer: int, n: int) -> object:
        z_ND = network.normed(layer, network.attended(layer, h[n], rows[n], memory))
        return read(network, layer, z_ND, ["max_prob"] * n)

    def gate(layer: int, n: int) -> object:
        z_ND = network.normed(layer, network.attended(layer, h[n], rows[n], memory))
        return network.gate(layer, z_ND).tolist()

    segments = zip((0, *stops), stops, strict=False)
    return StepCosts(
        stops=stops,
        segment_s=tuple(
            curve(lambda n, first=before + 1, last=stop: network.run(h[n], first, last, rows[n], memory))
            for before, stop in segments
        ),
        head_s={layer: curve(lambda n, layer=layer: answer(layer, n)) for layer in stops},
        gate_s={
            layer: curve(lambda n, layer=layer: gate(layer, n))
            for layer in config.exit_layers
            if network.heads[layer].gate is not None
        },
        overhead_s=_seconds(lambda: _tick(network, angles, context), network.device),
    )


def _tick(network: Network, angles: Angles, context: int) -> None:
    """What every pass needs besides its layers."""
    network.embed([0])
    PassRows([Span(0, context, 1)], angles, network.config.kv_heads)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(NUM_RUNS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def measured(network: Network, directory: Path | None) -> StepCosts:
    """The network's costs: measured once, and kept in `directory` for the next time on this machine.

    A file there that can't be read is measured anew.
    """
    if directory is None:
        return measure(network)
    path = directory / f"costs-{_key(network)}.json"
    if path.is_file():
        try:
            return StepCosts.from_json(path.read_text())
        except (ConfigError, OSError, UnicodeDecodeError):
            path.unlink(missing_ok=True)
    costs = measure(network)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(costs.to_json())
        temporary.replace(path)
    except OSError as error:
        log.warning(f"the measured costs can't be kept in {directory}: {error}; the next engine measures anew")
    return costs


def _key(network: Network) -> str:
    """All that times depend on, and that can be known."""
    facts = {
        "config": asdict(network.config),
        "bytes": network.num_bytes,
        "dtype": str(network.dtype),
        "device": torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else platform.processor(),
        "machine": platform.node(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
