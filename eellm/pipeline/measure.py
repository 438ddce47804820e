"""How long one microbatch takes on each stage of a pipeline, forward and backward."""

import time
from statistics import median

import torch
from torch import Tensor

from eellm.config.parallel import ParallelConfig
from eellm.exits.loss import nothing
from eellm.parallel.data import mark_last
from eellm.parallel.mesh import World
from eellm.pipeline.run import loss_context
from eellm.pipeline.stage import StageModule, StepLosses

NUM_RUNS = 3
"""Timed, after one that isn't."""


def measure_stages(
    stage: StageModule,
    config: ParallelConfig,
    world: World,
    *,
    microbatch: tuple[int, int],
    hidden: tuple[int, torch.dtype],
) -> list[tuple[float, float]]:
    """Seconds of a forward and of a backward, by stage; of the slowest process where several share a stage.

    stage: the only one of this process. microbatch, hidden: as `Pipeline` takes them. All processes call this at a
    time. Leaves no gradient behind.
    """
    runs = [_run(stage, config, world.device, microbatch, hidden) for _ in range(1 + NUM_RUNS)]
    for parameter in stage.parameters():
        parameter.grad = None
    times = torch.zeros(stage.stage.num_stages, 2, dtype=torch.float64, device=world.device)
    times[stage.stage.index] = torch.tensor([median(seconds) for seconds in zip(*runs[1:], strict=True)])
    return [(forward_s, backward_s) for forward_s, backward_s in world.max(times).tolist()]


def _run(
    stage: StageModule,
    config: ParallelConfig,
    device: torch.device,
    microbatch: tuple[int, int],
    hidden: tuple[int, torch.dtype],
) -> tuple[float, float]:
    (num_rows, seq_len), (width, dtype) = microbatch, hidden
    tokens_BT = torch.zeros(num_rows, seq_len, dtype=torch.int64, device=device)
    x: Tensor = tokens_BT
    if not stage.stage.is_first:
        x = torch.randn(num_rows, seq_len // config.tp, width, dtype=dtype, device=device, requires_grad=True)
    positions_BT = torch.arange(seq_len, device=device).expand(num_rows, -1)
    losses = StepLosses(dict.fromkeys(stage.exits, 1.0))
    mark_last(stage, is_last=True)
    with loss_context(is_tensor_parallel=config.tp > 1):
        start = _now(device)
        h_BTD = stage(x, step_losses=losses, labels_BT=tokens_BT, positions_BT=positions_BT)
        middle = _now(device)
        nothing(h_BTD).backward()
        return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
