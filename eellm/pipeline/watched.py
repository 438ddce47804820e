"""A stage under torch's schedules that says what it is doing: to whoever names a process that hangs, and to whoever
records a step."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch.distributed import pipelining

from eellm.pipeline.record import Recorder, recording
from eellm.schedule.timeline import Letter


class Watch(Protocol):
    """Says what is being done, for whoever names a process that hangs."""

    def __call__(self, action: str, *, waits: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Within the context this process is in `action`; waits: for others."""
        ...


def unwatched(action: str, *, waits: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A `Watch` that nobody reads."""
    return contextlib.nullcontext()


class WatchedStage(pipelining.PipelineStage):
    """Says which part of which microbatch it computes, and can be evaluated under every schedule."""

    watch: Watch
    _recorder: Recorder | None = None
    """The step's, which its losses bring with each forward."""

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        self._recorder = kwargs["step_losses"].recorder
        with self._doing("forward", "F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        with self._doing("backward", "B" if full_backward else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._doing("backward for weights", "W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @contextlib.contextmanager
    def _doing(self, name: str, letter: Letter, microbatch: int) -> Iterator[None]:
        stage = self.stage_index
        with (
            self.watch(f"{name} of stage {stage}, microbatch {microbatch}"),
            recording(self._recorder, letter, stage, microbatch),
        ):
            yield

    # NOTE torch 2.13 hands gradients between the two stages of a V's tip even in `eval`, where there are none
    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)
