"""Runs a schedule of ours on torch's pipeline runtime: 1F1B with microbatches that fill bubbles. The one file that
touches private names of torch.distributed.pipelining.

    rows: those of the regular microbatches, then those of the extras  →  gradients as if of the regular ones alone

An extra of Part 1 turns around below the last stage: there its backward starts from a gradient of zeros, and the losses
of the exits it has passed do the rest. An extra of Part 2 is carried through the first stages without a graph, and
leaves no gradient there. `eellm.schedule.fill` says by what losses and gradients are scaled, and why.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from eellm.config.parallel import ParallelConfig
from eellm.exits.loss import nothing
from eellm.exits.metrics import PackedBatch
from eellm.parallel.gradients import scale_gradients
from eellm.pipeline.run import Pipeline
from eellm.pipeline.stage import StageModule, StepLosses
from eellm.pipeline.watched import WatchedStage
from eellm.schedule.action import Action, Order, Schedule
from eellm.schedule.check import with_transfers
from eellm.schedule.fill import FillScale, fill_scales, is_part_1


class FilledPipeline(Pipeline):
    """This process's stage under a schedule of `eellm.plan.simulate.fill_bubbles`."""

    def __init__(self, stages: list[StageModule], config: ParallelConfig, filled: Schedule, **layout: Any) -> None:
        """layout: as `Pipeline` takes it."""
        self.filled, self.num_extra = filled, len(filled.extras)
        self.scale = fill_scales(filled)[stages[0].stage.index]
        super().__init__(stages, config, **layout)

    def step(self, batch: PackedBatch, losses: StepLosses, keep_BL: Tensor | None = None) -> None:
        """batch: the rows of the regular microbatches and then those of the extras, alike in number. Only regular
        ones report their losses."""
        super().step(batch, losses, keep_BL)
        for stage in self.stages:
            scale_gradients(stage.parameters(), self.scale.gradient)

    def _make_part(self, module: StageModule, **meta: Any) -> WatchedStage:
        part = _FilledStage(module, module.stage.index, module.stage.num_stages, **meta)
        part.filled, part.scale = self.filled, self.scale
        return part

    def _make_schedule(self, parts: list[WatchedStage], config: ParallelConfig) -> "_Runtime":
        return _Runtime(parts, self.filled)


class _FilledStage(WatchedStage):
    """Knows what each microbatch is for."""

    filled: Schedule
    scale: FillScale

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        work, losses = self.filled.works[fwd_chunk_id], kwargs["step_losses"]
        is_regular, learns = fwd_chunk_id < self.filled.num_microbatches, work.backward_start <= self.stage_index
        if torch.is_grad_enabled():
            scaled = self.scale.loss if is_part_1(work) else 1.0
            losses = losses.scaled(scaled if learns else 0.0, is_reported=is_regular)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            kwargs = kwargs | {"step_losses": losses}
            return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and self.filled.works[bwd_chunk_id].backward_end == self.stage_index + 1:
            for info in self.grad_recv_info[bwd_chunk_id]:
                assert info.buffer is not None, "a hidden state has a gradient"
                info.buffer.zero_()
            return []
        return super().get_bwd_recv_ops(bwd_chunk_id)


class _Runtime(_PipelineScheduleRuntime):
    """torch's runtime with our order. torch would refuse a schedule whose microbatches are not all alike."""

    def __init__(self, stages: list[WatchedStage], filled: Schedule) -> None:
        super().__init__(list(stages), len(filled.works), lambda h_BTD, _: nothing(h_BTD), scale_grads=False)
        orders, stage = with_transfers(filled), stages[0].stage_index
        assert filled.ranks[stage] == self.rank, "one stage on each rank, in order"
        order = orders[self.rank]
        self._training = len(filled.works), _actions(order, filled, stage)
        forwards = tuple(
            a for a in order if a.kind in ("F", "SEND_F", "RECV_F") and a.microbatch < filled.num_microbatches
        )
        self._evaluation = filled.num_microbatches, _actions(forwards, filled, stage, has_backward=False)
        self._use(self._training)

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """Of the regular microbatches alone."""
        self._use(self._evaluation)
        try:
            return super().eval(*args, **kwargs)
        finally:
            self._use(self._training)

    def _use(self, program: tuple[int, list[_Action]]) -> None:
        self._n_microbatches, actions = program
        self.pipeline_order_with_comms = {self.rank: actions}


def _actions(order: Order, filled: Schedule, stage: int, *, has_backward: bool = True) -> list[_Action]:
    """In torch's terms, with what FSDP needs around it."""
    actions = [_Action(stage, _ComputationType.UNSHARD)]
    for action in order:
        if action.kind == "B" and stage + 1 == filled.works[action.microbatch].backward_end < filled.num_stages:
            # NOTE torch insists on a receive before a backward below the last stage; ours receives nothing
            actions.append(_action(action._replace(kind="RECV_B")))
        actions.append(_action(action))
    reduce = [_Action(stage, _ComputationType.REDUCE_GRAD)] if has_backward else []
    return [*actions, *reduce, _Action(stage, _ComputationType.RESHARD)]


def _action(action: Action) -> _Action:
    return _Action(action.stage, _ComputationType.from_str(action.kind), action.microbatch)
