"""What the benchmarks of pipelines share: recipes, a function on several processes, the time until all are through."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.launcher import LaunchConfig, elastic_launch

from eellm.config.model import ModelConfig
from eellm.config.parallel import ParallelConfig, Schedule
from eellm.config.train import TextConfig, TrainConfig, TrainLoopConfig
from eellm.train.check import resolve
from eellm.train.trainer import Trainer

T = TypeVar("T")
Load = tuple[float, float, float]
"""Load averages over 1, 5 and 15 minutes."""


def recipe(
    model: ModelConfig,
    *,
    layers_per_stage: Sequence[int],
    num_microbatches: int,
    rows: int,
    schedule: Schedule = "1f1b",
) -> TrainConfig:
    """A pipeline with a process for each stage. rows: sequences in a microbatch, each of `model.max_seq_len` tokens."""
    return resolve(
        TrainConfig(
            model=model,
            data=TextConfig(train=("pydoc_data.topics",), seq_len=model.max_seq_len),
            train=TrainLoopConfig(out_dir=Path("runs/unused"), global_batch_size=rows * num_microbatches),
            parallel=ParallelConfig(
                pp=len(layers_per_stage),
                schedule=schedule,
                num_microbatches=num_microbatches,
                layers_per_stage=tuple(layers_per_stage),
            ),
        )
    )


def on_processes(num_processes: int, function: Callable[..., T], *args: Any) -> list[T]:
    """What `function(*args)` returned on each of so many new processes, in the order of their ranks. They find each
    other as under torchrun; the function is a module's own."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=function.__name__,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    results = elastic_launch(config, function)(*args)
    return [results[rank] for rank in range(num_processes)]


def together(run: Callable[[], T]) -> tuple[float, T]:
    """Seconds from when all processes are here until all are through, and what `run` returned on this one."""
    dist.barrier()
    start = time.perf_counter()
    result = run()
    dist.barrier()
    return time.perf_counter() - start, result


def iteration(trainer: Trainer, step: int) -> tuple[float, float]:
    """Seconds of a whole step, until all processes are through, and of its forward and backward on this one."""
    seconds, (row, _) = together(lambda: trainer.step(step))
    return seconds, row["time/forward_backward_s"]


def load_text(before: Load) -> str:
    """How busy the machine was, for a table's caption. before: `os.getloadavg()` at the start."""
    return f"load average {before[0]:.2f} before, {os.getloadavg()[0]:.2f} after"
