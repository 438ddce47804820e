"""The measured timeline of one step: what each rank computes, and when, heads apart.

    a driver: with recording(recorder, "F", stage, microbatch) …  → this rank's spans → all ranks' on rank 0

A head runs inside a forward or a backward and cuts its span in two: spans of a rank never overlap. Where it runs in the
backward, hooks on the hidden state in front of it and behind it say when: they see the same gradients and change none.
Waiting for other ranks is in no span. Each process reads its own clock; all meet at a few barriers at the step's start
and note when, and the median difference of these times puts the ranks on one clock. One barrier would not do: a process
may wait for its turn on a busy machine before it can look. On a GPU, both ends of each span wait for the device, so a
recorded step is slower than others.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from eellm.parallel.mesh import World
from eellm.schedule.timeline import Letter, Span, Timeline

NUM_MEETINGS = 9
"""Barriers at the start of a recorded step."""


class Recorder:
    """Takes down one step of this process."""

    def __init__(self, world: World, *, num_microbatches: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """num_microbatches: regular ones; those numbered on from them fill bubbles."""
        self._world, self._num_microbatches, self._clock = world, num_microbatches, clock
        self._rank = world.index("pp")
        self._since_s = 0.0
        self._met_s: list[float] = []
        """When this process left each barrier."""
        self._open: list[tuple[Letter, int, int]] = []
        """Letter, stage and microbatch of what runs, and of what that is part of."""
        self._spans: list[Span] = []

    def start(self) -> None:
        """Meets all processes; called right before the step."""
        for _ in range(NUM_MEETINGS):
            self._world.sum(torch.zeros((), device=self._world.device)).item()  # NOTE `item` waits for a GPU
            self._met_s.append(self._clock())

    @contextlib.contextmanager
    def work(self, letter: Letter, stage: int, microbatch: int) -> Iterator[None]:
        """Within the context this process computes that."""
        self._cut()
        self._open.append((letter, stage, microbatch))
        try:
            yield
        finally:
            self._cut()
            self._open.clear()

    def head(self, run: Callable[[Tensor], Tensor], x: Tensor, *, is_final: bool, is_deferred: bool) -> Tensor:
        """`run(x)`: the hidden state behind a head. Takes down its forward, unless it is deferred, and later its
        backward, which lies between the gradients of the two hidden states."""
        if is_deferred:
            y = run(x)
        else:
            self._enter("H" if is_final else "E")
            y = run(x)
            self._leave()
        deferred, eager = ("H", "h") if is_final else ("D", "e")
        y.register_hook(lambda _: self._enter(deferred if is_deferred else eager))
        if x.requires_grad:
            x.register_hook(lambda _: self._leave())
        return y

    def timeline(self) -> Timeline | None:
        """The pipeline of the first data- and tensor-parallel ranks, on rank 0; nothing elsewhere. All processes call
        this, after the step. The first span starts at 0."""
        is_drawn = self._world.dp_index == 0 and self._world.index("tp") == 0
        gathered = self._world.gather((self._met_s, self._spans if is_drawn else []))
        if not self._world.is_main:
            return None
        spans: list[Span] = []
        for met_s, theirs in gathered:
            ahead_s = median(there - here for there, here in zip(met_s, self._met_s, strict=True))
            spans += [_earlier(span, ahead_s) for span in theirs]
        spans.sort(key=lambda span: (span.rank, span.start_s))
        first_s = min((span.start_s for span in spans), default=0.0)
        return Timeline(num_ranks=self._world.axis_size("pp"), spans=tuple(_earlier(span, first_s) for span in spans))

    def _enter(self, letter: Letter) -> None:
        assert self._open, "heads run as part of the work"
        self._cut()
        _, stage, microbatch = self._open[0]
        self._open.append((letter, stage, microbatch))

    def _leave(self) -> None:
        """NOTE a backward that is taken apart may pass a hidden state twice, the second time without its head."""
        if len(self._open) > 1:
            self._cut()
            self._open.pop()

    def _cut(self) -> None:
        """Ends the span that runs, if there is one; the next begins."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        now_s = self._clock()
        if self._open:
            letter, stage, microbatch = self._open[-1]
            is_extra = microbatch >= self._num_microbatches
            self._spans.append(Span(self._rank, stage, microbatch, letter, self._since_s, now_s, is_extra))
        self._since_s = now_s


def _earlier(span: Span, seconds: float) -> Span:
    return span._replace(start_s=span.start_s - seconds, end_s=span.end_s - seconds)


def recording(
    recorder: Recorder | None, letter: Letter, stage: int, microbatch: int
) -> contextlib.AbstractContextManager[None]:
    """`recorder.work`, where there is a recorder."""
    return contextlib.nullcontext() if recorder is None else recorder.work(letter, stage, microbatch)
