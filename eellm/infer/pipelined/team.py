"""The processes that share a stage: their sums, and the calls that the first of them hands to the others.

    Lead.call → Outbox → Inbox of each other process → the same call there, with the same sums inside

Data goes one way: the first process says what is computed, the others do as it does. All over gloo, which notices at
once that a process is gone.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from eellm.errors import WorkerError
from eellm.infer.pipelined.wire import FOREVER, START_TIMEOUT, Group, Outbox, PeerLostError, gloo

STOP = 1
FORGET = 2
"""Kinds of calls; those of a network come after them. FORGET: the memory with that number."""


class StageTeam:
    """A `Team`: this process among those of its stage, whose ranks are neighbours."""

    def __init__(self, group: Group, sums: dist.ProcessGroup, *, rank: int, size: int) -> None:
        """group: all processes of the engine. sums: those of the stage. rank: of all. size: processes of a stage."""
        self.group, self.size = group, size
        self.place = rank % size
        self.first = rank - self.place
        """The first one's rank."""
        self.timeout = FOREVER
        """After which a sum is given up."""
        self.is_waiting = False
        """Whether this process can't go on before another one of the stage has."""
        self._sums = sums

    @property
    def others(self) -> range:
        """Ranks of all but the first."""
        return range(self.first + 1, self.first + self.size)

    def sum(self, x_NO: Tensor) -> Tensor:
        options = dist.AllreduceOptions()
        options.timeout = self.timeout
        self._wait(lambda: self._sums.allreduce([x_NO], options))
        return x_NO

    def gather(self, x_NO: Tensor) -> Tensor:
        options = dist.GatherOptions()
        options.rootRank, options.timeout = 0, self.timeout
        parts = [torch.empty_like(x_NO) for _ in range(self.size)] if self.place == 0 else []
        self._wait(lambda: self._sums.gather([parts] if parts else [], [x_NO], options))
        return torch.cat(parts, dim=-1) if parts else x_NO

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        self.is_waiting = True
        try:
            start().wait()
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error
        self.is_waiting = False


def meet(store: dist.Store, rank: int, size: int, tp: int) -> tuple[Group, StageTeam | None]:
    """All processes of an engine, and those of this one's stage. None: the stage has no others."""
    group = gloo(store, rank, size)
    if tp == 1:
        return group, None
    stage = dist.PrefixStore(f"stage{rank // tp}", store)
    sums = cast(dist.ProcessGroup, dist.ProcessGroupGloo(stage, rank % tp, tp, START_TIMEOUT))
    return group, StageTeam(group, sums, rank=rank, size=tp)


class Lead:
    """The first process's end. One call at a time, from whatever thread."""

    def __init__(self, team: StageTeam, explain: Callable[[PeerLostError], Exception] = lambda error: error) -> None:
        """explain: what to raise for a process that is lost."""
        self.team = team
        self.num_memories = 0
        self.dropped: deque[int] = deque()
        """Numbers of memories that nobody here has any more."""
        self._explain = explain
        self._outboxes = [Outbox(team.group, rank) for rank in team.others]
        self._lock = threading.RLock()
        self._broken: str | None = None
        """Why the processes aren't in step any more."""

    @contextmanager
    def call(self, kind: int, values: Sequence[int], data: Tensor | None = None) -> Iterator[None]:
        """The others do the same as what stands in the `with` block. Raises WorkerError once a call was broken off."""
        with self._lock:
            if self._broken is not None:
                raise WorkerError(self._broken)
            self._broken = (
                "a pass was broken off, and the processes that share a stage are out of step: make a new engine"
            )
            try:
                while self.dropped:
                    self._tell(FORGET, (self.dropped.popleft(),))
                self._tell(kind, values, data)
                yield
                if data is not None:  # they have it: there was a sum
                    self.flush()
            except PeerLostError as error:
                reason = self._explain(error)
                self._broken = str(reason)
                raise reason from error
            self._broken = None

    def stop(self) -> None:
        """The others end. Raises PeerLostError where they can't hear it."""
        with self._lock:
            if self._broken is not None:
                raise PeerLostError(self._broken)
            self._tell(STOP, ())

    def flush(self) -> None:
        """Waits until the others have all that was sent."""
        for outbox in self._outboxes:
            outbox.flush()

    def _tell(self, kind: int, values: Sequence[int], data: Tensor | None = None) -> None:
        for outbox in self._outboxes:
            outbox.send(kind, values, data)
