"""From a model to a pipeline of processes: who holds which layers, and how the processes meet.

On one machine the engine's process starts the others; under torchrun they exist, and rank 0 is the engine's.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from eellm.config.model import ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError, WorkerError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.network import Network
from eellm.infer.pipelined.crew import Crew, Process, end_processes, how_it_ended
from eellm.infer.pipelined.setup import Plan
from eellm.infer.pipelined.wire import START_TIMEOUT, Group, gloo
from eellm.infer.pipelined.worker import serve
from eellm.infer.prepare import make_network
from eellm.infer.quantize import Quantize
from eellm.parallel import mesh
from eellm.schedule.partition import Stage, partition


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The engine's part of it."""

    network: Network
    """Of the first stage."""
    crew: Crew


def join(num_stages: int) -> Group | None:
    """Under torchrun, meets the other processes. On rank 0 returns their group; on the others serves a stage until the
    engine closes, and then ends the process. None where torchrun started nothing."""
    if not mesh.is_launched():
        return None
    world = mesh.join(ParallelConfig(pp=num_stages))
    store = dist.PrefixStore("engine", world.store)
    group = gloo(store, world.rank, num_stages)
    if world.rank == 0:
        return group
    serve(group, world.rank)
    raise SystemExit(0)


def make_pipeline(
    model: EarlyExitLM,
    num_stages: int,
    group: Group | None,
    *,
    quantize: Quantize | None,
    compile: bool | None,
    cache_dir: Path | None,
    max_batch: int,
    timeout_s: float,
) -> Pipeline:
    """group: of processes that exist; None: they are started. Raises ConfigError, WorkerError."""
    stages = stages_of(model.config, num_stages)
    processes: Mapping[int, Process] = {}
    num_threads = 0
    if group is None:
        num_threads = max(1, torch.get_num_threads() // num_stages)
        group, processes = _start(num_stages)
    plan = Plan(
        first=0,
        last=0,
        quantize=quantize,
        compile=compile,
        cache_dir=None if cache_dir is None else str(cache_dir.absolute()),
        device=model.decoder.embed.weight.device.type,
        num_threads=num_threads,
        max_in_flight=64 + 4 * max_batch * num_stages,
    )
    crew = Crew(group, processes, model, stages, plan, timeout_s=timeout_s)
    first = range(stages[0].first, stages[0].last + 1)
    network = make_network(model, quantize=quantize, layers=first, cache_dir=cache_dir, compile=compile)
    return Pipeline(network=network, crew=crew)


def stages_of(config: ModelConfig, num_stages: int) -> tuple[Stage, ...]:
    """Stages that take about the same time for a few rows: by the weights that each reads."""
    if num_stages > config.num_layers:
        raise ConfigError(
            f"workers = {num_stages}: the model has {config.num_layers} layers, and each worker needs one"
        )
    D, E = config.hidden_size, config.head_size
    mlp = 3 * D * config.intermediate_size
    layer = 2 * D * E * (config.num_heads + config.kv_heads) + mlp
    head = D * config.vocab_size
    bodies = {"embed": 0, "norm": 0, "mlp": mlp, "layer": layer}
    return partition(
        config.num_layers,
        num_stages,
        config.exit_layers,
        head_cost=head / layer,
        exit_costs={exit.layer: (head + bodies[exit.kind]) / layer for exit in config.exits},
    )


def _start(num_stages: int) -> tuple[Group, dict[int, Process]]:
    """The other processes, on this machine. Raises WorkerError for one that doesn't come."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "store")
        command = [sys.executable, "-m", "eellm.infer.pipelined.worker", path]
        processes = {
            rank: subprocess.Popen([*command, str(rank), str(num_stages)], stdin=subprocess.DEVNULL)
            for rank in range(1, num_stages)
        }
        try:
            store = dist.FileStore(path, num_stages)
            _await(store, "here", processes)
            group = gloo(store, 0, num_stages)
            _await(store, "met", processes)  # NOTE they read the file until then
            return group, processes
        except BaseException:
            end_processes(processes.values())
            raise


def _await(store: dist.Store, word: str, processes: Mapping[int, Process]) -> None:
    """Until all have said so."""
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while not store.check([f"{word}/{rank}" for rank in processes]):
        for rank, process in processes.items():
            if process.poll() is not None:
                raise WorkerError(f"worker {rank} {how_it_ended(process)} while it started")
        if time.monotonic() > deadline:
            raise WorkerError(f"the workers didn't start within {START_TIMEOUT.total_seconds():.0f} s")
        time.sleep(0.01)
