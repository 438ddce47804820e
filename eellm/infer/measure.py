"""What the parts of decoding take here: each range of layers, each head and gate, for 1 to 64 rows.

    Network → timed passes → StepCosts (plain tables, for what decides without torch)

Whole passes run on made-up rows behind a context of moderate length, a few times; of each part the quickest run counts,
for whatever else the machine does only adds to the others. What a tick takes besides is read off a short run at full
depth.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from eellm.config.infer import POLICY, GenerateConfig
from eellm.errors import ConfigError
from eellm.infer.attention import PassRows, Span
from eellm.infer.costs import MEASURED_ROWS, Curve, StepCosts
from eellm.infer.decode.early import Early
from eellm.infer.loop import Loop
from eellm.infer.memory import Memory
from eellm.infer.network import Leg, Network
from eellm.infer.readout import read
from eellm.infer.request import Request
from eellm.infer.sampling import Sampler
from eellm.infer.scheduler import Scheduler
from eellm.infer.sequence import Sequence
from eellm.log import log

T = TypeVar("T")
NUM_RUNS = 7
MIN_OVERHEAD_S = 1e-6
CONTEXT = 64
FORMAT = 4
"""Goes up where times that were kept say something else than new ones."""


@torch.inference_mode()
def measure(network: Network) -> StepCosts:
    """Takes about a hundred times what a token does."""
    config = network.config
    context = min(CONTEXT, config.max_seq_len - 1)
    counts = tuple(n for n in MEASURED_ROWS if context + n <= config.max_seq_len) or (1,)
    memory = network.new_memory()
    memory.reserve(1, context + counts[-1])
    quickest = {n: _quickest(network, memory, context, n) for n in counts}
    if network.device.type == "cpu":
        quickest = {n: parts | _quickest_walk(network, memory, context, n) for n, parts in quickest.items()}

    def curve(part: str, layer: int) -> Curve:
        return Curve(counts, tuple(quickest[n][part, layer] for n in counts))

    stops = (*config.exit_layers, config.num_layers)
    segment_s = tuple(curve("segment", stop) for stop in stops)
    head_s = {stop: curve("head", stop) for stop in stops}
    parts_s = sum(segment.at(1) for segment in segment_s) + head_s[stops[-1]].at(1)
    return StepCosts(
        stops=stops,
        segment_s=segment_s,
        head_s=head_s,
        gate_s={layer: curve("gate", layer) for layer in network.gates},
        overhead_s=max(_full_tick_s(network, context) - parts_s, MIN_OVERHEAD_S),
    )


def _quickest(network: Network, memory: Memory, context: int, num_rows: int) -> dict[tuple[str, int], float]:
    """Each part's best time. Whole passes run, so that every part finds its weights where a pass does: in the memory,
    or in the cache that the rest of the model has left."""
    config, times = network.config, _Times(network.device)
    tokens = [i % config.vocab_size for i in range(num_rows)]
    for _ in range(NUM_RUNS + 1):
        rows = network.rows([Span(0, context, num_rows)])
        h_ND, done = network.embed(tokens), 0
        for stop in (*config.exit_layers, config.num_layers):
            h_ND = times.take(("segment", stop), partial(network.run, h_ND, done + 1, stop, rows, memory))
            done = stop
            times.take(("head", stop), partial(_answers, network, stop, h_ND, rows, memory))
            if stop in network.gates:
                times.take(("gate", stop), partial(_gates, network, stop, h_ND, rows, memory))
    return times.best()


def _quickest_walk(network: Network, memory: Memory, context: int, num_rows: int) -> dict[tuple[str, int], float]:
    """Each part's best time where one sequence's rows go from stop to stop in one call."""
    stops, times = (*network.config.exit_layers, network.config.num_layers), _Times(network.device)
    asked = {stop: 0 if stop in network.own_layer else num_rows for stop in stops}
    legs = [Leg(last=stop, start=0, num_asked=num, threshold=math.inf) for stop, num in asked.items()]
    tokens, span = [i % network.config.vocab_size for i in range(num_rows)], Span(0, context, num_rows)
    for _ in range(NUM_RUNS + 1):
        _, gone = network.walk(network.embed(tokens), 0, legs, span, memory, "max_prob")
        for stop, leg in zip(stops, gone, strict=True):
            times.add(("segment", stop), leg.layers_s)
            if leg.heard is not None:
                times.add(("head", stop), leg.head_s)
    return times.best()


def _answers(network: Network, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> object:
    return read(network, layer, network.attended(layer, h_ND, rows, memory), ["max_prob"] * len(h_ND))


def _gates(network: Network, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> object:
    return network.gate(layer, network.normed(layer, network.attended(layer, h_ND, rows, memory))).tolist()


class _Times:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[tuple[str, int], list[float]] = {}

    def take(self, part: tuple[str, int], run: Callable[[], T]) -> T:
        if self.device.type == "cuda":
            return self._take_on_gpu(part, run)
        start = time.perf_counter()
        result = run()
        self.add(part, time.perf_counter() - start)
        return result

    def _take_on_gpu(self, part: tuple[str, int], run: Callable[[], T]) -> T:
        """Between two events in its stream: a part whose result the host reads has ended when that was read, others
        when the GPU has done them, though nobody waits for it. Never ran on a GPU."""
        stream = torch.cuda.current_stream(self.device)
        stream.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        result = run()
        end.record(stream)
        end.synchronize()
        self.add(part, start.elapsed_time(end) / 1000)
        return result

    def add(self, part: tuple[str, int], seconds: float) -> None:
        self.seconds.setdefault(part, []).append(seconds)

    def best(self) -> dict[tuple[str, int], float]:
        return {part: min(seconds) for part, seconds in self.seconds.items()}


def _full_tick_s(network: Network, context: int) -> float:
    """A tick of full-depth decoding, with all that goes round it."""
    config = network.config
    prompt = [i % config.vocab_size for i in range(context)]
    num_tokens = min(4 * NUM_RUNS, config.max_seq_len - context)
    options = GenerateConfig(method="full", max_new_tokens=num_tokens, ignore_eos=True)
    request = Request(tokens=prompt, thresholds={}, policy=POLICY, options=options)
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
        "format": FORMAT,
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
