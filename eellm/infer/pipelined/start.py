"""From a model to a pipeline of processes: who holds which layers, and how the processes meet.

On one machine the engine's process starts the others; under torchrun they exist, and rank 0 is the engine's. The
processes of a stage are neighbours.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from eellm.config.model import ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError, WorkerError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.costs import StepCosts
from eellm.infer.loop import Loop
from eellm.infer.memory import Memory
from eellm.infer.network import Network, check_bodies
from eellm.infer.pipelined.crew import Crew, Process, end_processes, how_it_ended
from eellm.infer.pipelined.loop import PipelinedLoop, PipelinedMemory, PipelinedScheduler
from eellm.infer.pipelined.setup import Plan, stage_weights
from eellm.infer.pipelined.team import StageTeam, meet
from eellm.infer.pipelined.tensor import TensorParallelNetwork, check_parts, part_config, part_weights
from eellm.infer.pipelined.wire import START_TIMEOUT, Group
from eellm.infer.pipelined.worker import serve, stage_model
from eellm.infer.prepare import make_network
from eellm.infer.quantize import Quantize
from eellm.infer.scheduler import Scheduler
from eellm.parallel import mesh
from eellm.schedule.partition import Stage, partition

Met = tuple[Group, StageTeam | None]
"""All processes, and those of this one's stage where it has others."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The engine's part of it."""

    network: Network
    """Of the first stage."""
    crew: Crew
    memory: Memory | PipelinedMemory
    """Of all stages."""
    loop: Loop


def join(workers: int, tp: int) -> Met | None:
    """Under torchrun, meets the other processes. On rank 0 returns their groups; on the others serves a stage, or a
    part of one, until the engine closes, and then ends the process. None where torchrun started nothing."""
    if not mesh.is_launched():
        return None
    world = mesh.join(ParallelConfig(pp=workers // tp, tp=tp))
    group, team = meet(dist.PrefixStore("engine", world.store), world.rank, workers, tp)
    if world.rank == 0:
        return group, team
    serve(group, team, world.rank)


def check_workers(workers: int, tp: int, compile: bool | None) -> None:
    """Raises ConfigError."""
    for name, value in (("workers", workers), ("tp", tp)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    if workers % tp:
        near = sorted({max(workers // tp, 1) * tp, (workers // tp + 1) * tp})
        raise ConfigError(
            f"tp = {tp}: that many processes share each stage, so workers must be a multiple of it, and it is "
            f"{workers}; make it {' or '.join(map(str, near))}"
        )
    if compile and tp > 1:
        raise ConfigError(f"compile = True: the kernels run a stage in one process, and tp = {tp}; leave it out")


def make_pipeline(
    model: EarlyExitLM,
    workers: int,
    tp: int,
    met: Met | None,
    *,
    quantize: Quantize | None,
    compile: bool | None,
    cache_dir: Path | None,
    max_batch: int,
    timeout_s: float,
    costs: Callable[[], StepCosts],
) -> Pipeline:
    """met: processes that exist; None: they are started. Raises ConfigError, WorkerError."""
    check_parts(model.config, tp)
    check_bodies(model)
    num_stages = workers // tp
    stages = stages_of(model.config, num_stages, tp)
    processes: Mapping[int, Process] = {}
    num_threads = 0
    if met is None:
        num_threads = max(1, torch.get_num_threads() // workers)
        met, processes = _start(workers, tp)
    group, team = met
    plan = Plan(
        first=stages[0].first,
        last=stages[0].last,
        tp=tp,
        quantize=quantize,
        compile=compile,
        cache_dir=None if cache_dir is None else str(cache_dir.absolute()),
        device=model.decoder.embed.weight.device.type,
        num_threads=num_threads,
        max_in_flight=64 + 4 * max_batch * num_stages,
    )
    crew = Crew(group, team, processes, model, stages, plan, timeout_s=timeout_s)
    network = _first_network(model, plan, crew)
    memory = network.new_memory()
    if num_stages == 1:
        loop = Loop(network, memory, Scheduler(costs))
        return Pipeline(network=network, crew=crew, memory=memory, loop=loop)
    loop = PipelinedLoop(network, memory, PipelinedScheduler(costs), crew)
    return Pipeline(network=network, crew=crew, memory=PipelinedMemory(memory, model.config, crew), loop=loop)


def _first_network(model: EarlyExitLM, plan: Plan, crew: Crew) -> Network:
    layers, quantize, cache_dir = plan.layers, plan.quantize, plan.directory
    if crew.lead is None:
        return make_network(model, quantize=quantize, layers=layers, cache_dir=cache_dir, compile=plan.compile)
    config, embedding_VD = model.config, model.decoder.embed.weight.detach()
    chosen = stage_weights(model.state_dict(), plan.first, plan.last, config.num_layers)
    part = stage_model(part_config(config, plan.tp), part_weights(chosen, 0, plan.tp), embedding_VD.device)
    return TensorParallelNetwork(
        part, layers, config, crew.lead, embedding_VD=embedding_VD, quantize=quantize, cache_dir=cache_dir
    )


def stages_of(config: ModelConfig, num_stages: int, tp: int = 1) -> tuple[Stage, ...]:
    """Stages that take about the same time for a few rows: by the weights that each reads."""
    if num_stages > config.num_layers:
        raise ConfigError(
            f"workers = {num_stages * tp}: the model has {config.num_layers} layers, and "
            f"{'each worker needs' if tp == 1 else f'each {tp} workers need'} one"
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


def _start(workers: int, tp: int) -> tuple[Met, dict[int, Process]]:
    """The other processes, on this machine. Raises WorkerError for one that doesn't come."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "store")
        command = [sys.executable, "-m", "eellm.infer.pipelined.worker", path]
        processes = {
            rank: subprocess.Popen([*command, str(rank), str(workers), str(tp)], stdin=subprocess.DEVNULL)
            for rank in range(1, workers)
        }
        try:
            store = dist.FileStore(path, workers)
            _await(store, "here", processes)
            met = meet(store, 0, workers, tp)
            _await(store, "met", processes)  # NOTE they read the file until then
            return met, processes
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
