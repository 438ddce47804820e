"""What the parts of decoding take here: each range of layers, each head and gate, for 1 to 64 rows.

    Network → timed passes → StepCosts (plain tables, for what decides without torch)

Every part runs on made-up rows behind a context of moderate length, a few times; the quickest run counts, for whatever
else the machine does only adds to the others. What a tick takes besides is read off a short full-depth run.
"""

import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from eellm.config.infer import GenerateConfig
from eellm.errors import ConfigError
from eellm.infer.attention import Span
from eellm.infer.costs import MEASURED_ROWS, Curve, StepCosts
from eellm.infer.decode.early import Early
from eellm.infer.loop import Loop
from eellm.infer.network import Network
from eellm.infer.readout import read
from eellm.infer.request import Request
from eellm.infer.sampling import Sampler
from eellm.infer.scheduler import Scheduler
from eellm.infer.sequence import Sequence
from eellm.log import log

NUM_RUNS = 7
MIN_OVERHEAD_S = 1e-6
CONTEXT = 64


@torch.inference_mode()
def measure(network: Network) -> StepCosts:
    """Takes about a hundred times what a token does."""
    config = network.config
    context = min(CONTEXT, config.max_seq_len - 1)
    counts = tuple(n for n in MEASURED_ROWS if context + n <= config.max_seq_len) or (1,)
    memory = network.new_memory()
    memory.reserve(1, context + counts[-1])
    rows = {n: network.rows([Span(0, context, n)]) for n in counts}
    h = {n: network.embed([i % config.vocab_size for i in range(n)]) for n in counts}
    stops = (*config.exit_layers, config.num_layers)

    def curve(run: Callable[[int], object]) -> Curve:
        return Curve(counts, tuple(_seconds(partial(run, n), network.device) for n in counts))

    def answer(layer: int, n: int) -> object:
        return read(network, layer, network.attended(layer, h[n], rows[n], memory), ["max_prob"] * n)

    def gate(layer: int, n: int) -> object:
        z_ND = network.normed(layer, network.attended(layer, h[n], rows[n], memory))
        return network.gate(layer, z_ND).tolist()

    segments = zip((0, *stops), stops, strict=False)
    segment_s = tuple(
        curve(lambda n, first=before + 1, last=stop: network.run(h[n], first, last, rows[n], memory))
        for before, stop in segments
    )
    head_s = {layer: curve(lambda n, layer=layer: answer(layer, n)) for layer in stops}
    parts_s = sum(segment.at(1) for segment in segment_s) + head_s[stops[-1]].at(1)
    return StepCosts(
        stops=stops,
        segment_s=segment_s,
        head_s=head_s,
        gate_s={layer: curve(lambda n, layer=layer: gate(layer, n)) for layer in network.gates},
        overhead_s=max(_full_tick_s(network, context) - parts_s, MIN_OVERHEAD_S),
    )


def _full_tick_s(network: Network, context: int) -> float:
    """A tick of full-depth decoding, with all that goes round it."""
    config = network.config
    prompt = [i % config.vocab_size for i in range(context)]
    num_tokens = min(4 * NUM_RUNS, config.max_seq_len - context)
    options = GenerateConfig(method="full", max_new_tokens=num_tokens, ignore_eos=True)
    request = Request(tokens=prompt, thresholds={}, options=options)
    memory = network.new_memory()
    memory.reserve(1, context + num_tokens)
    loop = Loop(network, memory, Scheduler(lambda: measure(network)))
    seq = Sequence(
        request,
        Early({}, max_deferred=1),
        Sampler(options.sampling, prompt, network.device),
        stops=loop.stops,
        max_seq_len=config.max_seq_len,
        eos_token_ids=(),
        tokenizer=None,
    )
    seq.place(0, 0)
    while loop.step([seq], 0) is not None:
        pass
    times = seq.times[1:]
    return min((after - before for before, after in itertools.pairwise(times)), default=0.0)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(NUM_RUNS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


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
        "network": type(network).__name__,
        "bytes": network.num_bytes,
        "dtype": str(network.dtype),
        "device": torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else platform.processor(),
        "machine": platform.node(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
