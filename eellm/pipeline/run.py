"""Forward and backward of a step's rows: a loop over microbatches, or one of torch's pipeline schedules.

Both take a batch of a data-parallel rank's rows and cut it into microbatches; both leave gradients in `.grad` (summed
over data-parallel ranks) and the losses' sums in `StepLosses`.
"""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, pipelining
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import loss_parallel

from eellm.config.parallel import ParallelConfig
from eellm.exits.loss import nothing
from eellm.exits.metrics import PackedBatch
from eellm.parallel.data import mark_last
from eellm.pipeline.record import recording
from eellm.pipeline.stage import StageModule, StepLosses
from eellm.pipeline.watched import Watch, WatchedStage
from eellm.schedule.partition import SINGLE

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "looped_bfs": pipelining.ScheduleLoopedBFS,
    "interleaved_zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}


class Driver(Protocol):
    """Runs the stages of this process."""

    num_extra: int
    """Microbatches that a step takes beyond those of the global batch: they fill bubbles."""

    def step(self, batch: PackedBatch, losses: StepLosses, keep_BL: Tensor | None = None) -> None:
        """Forward and backward of all microbatches."""
        ...

    def evaluate(self, batch: PackedBatch, losses: StepLosses) -> None:
        """Forward only; `batch` has as many rows as a step's."""
        ...


class Loop:
    """The whole model in one stage; microbatches are gradient accumulation."""

    num_extra = 0

    def __init__(self, stage: StageModule, config: ParallelConfig, watch: Watch) -> None:
        self.stage, self.watch, self.is_tensor_parallel = stage, watch, config.tp > 1
        self.num_microbatches = config.num_microbatches or 1

    def step(self, batch: PackedBatch, losses: StepLosses, keep_BL: Tensor | None = None) -> None:
        parts = _microbatches(batch, keep_BL, self.num_microbatches)
        with loss_context(self.is_tensor_parallel):
            for i, (tokens_BT, others) in enumerate(parts):
                mark_last(self.stage, is_last=i == len(parts) - 1)
                with self.watch(f"forward of microbatch {i}"), recording(losses.recorder, "F", 0, i):
                    h_BTD = self.stage(tokens_BT, step_losses=losses, **others)
                with self.watch(f"backward of microbatch {i}"), recording(losses.recorder, "B", 0, i):
                    nothing(h_BTD).backward()

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, losses: StepLosses) -> None:
        with loss_context(self.is_tensor_parallel):
            for i, (tokens_BT, others) in enumerate(_microbatches(batch, None, self.num_microbatches)):
                with self.watch(f"evaluation of microbatch {i}"):
                    self.stage(tokens_BT, step_losses=losses, **others)
        _reshard(self.stage)


class Pipeline:
    """This process's stages under a schedule of torch's."""

    num_extra = 0

    def __init__(
        self,
        stages: list[StageModule],
        config: ParallelConfig,
        watch: Watch,
        *,
        group: ProcessGroup,
        microbatch: tuple[int, int],
        hidden: tuple[int, torch.dtype],
        device: torch.device,
    ) -> None:
        """group: the processes of the pipeline. microbatch: its (rows, tokens per row). hidden: width and dtype of the
        hidden state between stages."""
        self.stages, self.watch, self.is_tensor_parallel = stages, watch, config.tp > 1
        (num_rows, seq_len), (width, dtype) = microbatch, hidden
        # NOTE torch would infer these shapes by running the model's forward and backward on garbage
        tokens = torch.empty(num_rows, seq_len, dtype=torch.int64, device="meta")
        h = torch.empty(num_rows, seq_len // config.tp, width, dtype=dtype, device="meta", requires_grad=True)
        parts = [
            self._make_part(
                module,
                device=device,
                input_args=(tokens if module.stage.is_first else h,),
                output_args=(h,),
                group=group,
            )
            for module in stages
        ]
        for part in parts:
            part.watch = watch
        self.schedule: Any = self._make_schedule(parts, config)

    def _make_part(self, module: StageModule, **meta: Any) -> WatchedStage:
        return WatchedStage(module, module.stage.index, module.stage.num_stages, **meta)

    def _make_schedule(self, parts: list[WatchedStage], config: ParallelConfig) -> Any:
        schedule: Any = SCHEDULES[config.schedule]
        return schedule(
            parts[0] if config.schedule in SINGLE else parts,
            config.num_microbatches,
            loss_fn=lambda h_BTD, _: nothing(h_BTD),
            scale_grads=False,  # losses are divided by the number of targets
        )

    def step(self, batch: PackedBatch, losses: StepLosses, keep_BL: Tensor | None = None) -> None:
        args, others = self._inputs(batch, keep_BL)
        with loss_context(self.is_tensor_parallel), self.watch("waiting in the pipeline", waits=True):
            self.schedule.step(*args, target=batch.labels_BT, return_outputs=False, step_losses=losses, **others)

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, losses: StepLosses) -> None:
        args, others = self._inputs(batch, None)
        with loss_context(self.is_tensor_parallel), self.watch("waiting in the pipeline", waits=True):
            self.schedule.eval(*args, target=batch.labels_BT, return_outputs=False, step_losses=losses, **others)
        for stage in self.stages:
            _reshard(stage)

    def _inputs(self, batch: PackedBatch, keep_BL: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        has_first = any(module.stage.is_first for module in self.stages)
        return (batch.tokens_BT,) if has_first else (), _others(batch, keep_BL)


def _others(batch: PackedBatch, keep_BL: Tensor | None) -> dict[str, Tensor]:
    """What a stage's forward takes beside its input."""
    others = {"labels_BT": batch.labels_BT, "positions_BT": batch.positions_BT}
    if batch.is_packed:
        others["documents_BT"] = batch.documents_BT
    return others if keep_BL is None else others | {"keep_BL": keep_BL}


def _microbatches(
    batch: PackedBatch, keep_BL: Tensor | None, num_microbatches: int
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    others = {name: value.chunk(num_microbatches) for name, value in _others(batch, keep_BL).items()}
    tokens = batch.tokens_BT.chunk(num_microbatches)
    return [(tokens_BT, {name: value[i] for name, value in others.items()}) for i, tokens_BT in enumerate(tokens)]


def loss_context(is_tensor_parallel: bool) -> contextlib.AbstractContextManager[Any]:
    """Cross entropy over a vocabulary in parts, in the forward and in the backward."""
    return loss_parallel() if is_tensor_parallel else contextlib.nullcontext()


def _reshard(root: torch.nn.Module) -> None:
    """After a forward without a backward, which would have done it."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
